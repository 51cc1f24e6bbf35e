"""Compares training calls of whole blocks by Triton kernels with the definition in float64, and prints errors as JSON.

A program of its own, with TRITON_INTERPRET=1 before Triton is imported: its own functions are interpreted too then.
Memory that a kernel is given to write to is full of NaN.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.testing import BlockCase, Shape
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.hybrid.triton.train import TritonTrain

CHUNK, ROWS = 16, 2
OPTIONS: dict[str, dict[str, Any]] = {"ttt_linear": {}, "ttt_mlp": {"expansion": 2}}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "linear": ("ttt_linear", 41, {}, {}),
    "linear, not causal": ("ttt_linear", 32, {"causal": False}, {}),
    "linear, volumes by row": ("ttt_linear", 17, {"gate": {"alpha": "layer"}}, {"volume": [0.0, 2.5]}),
    "mlp": ("ttt_mlp", 41, {"checkpoint_chunks": 2}, {}),
    "mlp, less than a chunk": ("ttt_mlp", 7, {}, {"volume": 0.5}),
    "mlp, a row without updates": ("ttt_mlp", 33, {}, {"updates": [True, False]}),
    "mlp, both directions": ("ttt_mlp", 19, {"bidirectional": True}, {}),
    "mlp, tokens that may not enter": ("ttt_mlp", 50, {}, {"spoiled": True}),
    "linear, continued": ("ttt_linear", 37, {}, {"earlier": 21}),
    "mlp, continued": ("ttt_mlp", 37, {"checkpoint_chunks": 2}, {"earlier": 21}),
    "mlp, continued, one row anew": ("ttt_mlp", 27, {}, {"earlier": 21, "reset": [True, False]}),
    "mlp, continued, tokens that may not enter": ("ttt_mlp", 50, {}, {"earlier": 5, "spoiled": True}),
    "mlp, the state wanted": ("ttt_mlp", 35, {}, {"earlier": 0}),
    "linear, gradients of the state": ("ttt_linear", 41, {}, {"earlier": 0, "of_state": True}),
    "mlp, gradients of the state": ("ttt_mlp", 25, {}, {"earlier": 0, "of_state": True}),
}
"""Variant, tokens, options, and what the call is given."""


def block_of(variant: str, options: dict[str, Any], dtype: torch.dtype, backend: str) -> tuple[BlockCase, Any]:
    options = {"chunk": CHUNK, **OPTIONS[variant], **options, "backend": {"train": backend}}
    shape = Shape(dim=32, heads=2, batch=ROWS)  # heads of 16, the least that the kernels take
    (case,) = (each for each in default_cases(variant, [options], shapes=(shape,)) if each.dtype == dtype)
    return case, case.block()


def drawn(case: BlockCase, length: int, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[B, T, N]`` float64, and ``[B, T]`` bool, its tokens that may enter."""
    x = BlockCase(variant=case.variant, config=case.config, dtype=torch.float64, shape=case.shape).inputs(length)
    entering = torch.ones(ROWS, length, dtype=torch.bool)
    if "spoiled" in given:  # float64 would take a number that is too large for float32
        x[0, 5, 3], x[1, 40, 2] = torch.inf, torch.nan
        entering[0, 5] = entering[1, 40] = False
    return x, entering


def state_before(block: Any, case: BlockCase, length: int) -> dict[str, torch.Tensor]:
    """The state after ``length`` tokens of one row and, of the other, none; the initial one after 0."""
    state = block.allocate_state(ROWS)
    if length:
        x = case.inputs(length, seed=7)
        if length < CHUNK:
            x[0, 2, 1] = torch.inf  # spoils the chunk in which it ends
        with torch.no_grad():
            state = block(x, state, BlockContext(exec_mask=torch.tensor([True, False])))[1]
    return state


def called(name: str, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    """Output, gradients and state of a call; where tokens may not enter, their own outputs are left out."""
    variant, length, options, given = CASES[name]
    case, block = block_of(variant, options, dtype, backend)
    x, entering = drawn(case, length, given)
    weights, carries = x.nan_to_num(0, 0, 0).flip(1), "earlier" in given
    x = x.to(dtype).requires_grad_()
    volume, updates, reset = given.get("volume", 1.0), given.get("updates", True), given.get("reset")
    context = BlockContext(
        want_state=carries, detach_state=carries and "of_state" not in given,
        reset=None if reset is None else torch.tensor(reset),
        volume=torch.tensor(volume, dtype=dtype) if isinstance(volume, list) else volume,
        updates=torch.tensor(updates) if isinstance(updates, list) else updates,
    )  # fmt: skip
    state = state_before(block, case, given["earlier"]) if given.get("earlier") else None
    y, after = block(x, state, context)
    if backend == "triton":
        run = block._train_run(x.device)
        assert isinstance(run, TritonTrain)
        assert run.takes_layer(block, state, context, length)
    loss = torch.where(entering[..., None], y * weights.to(y), 0).sum()  # [B, T, 1] over [B, T, N]
    if "of_state" in given:
        loss = loss + sum(tensor.square().sum() for tensor in after.values() if tensor.is_floating_point())
    loss.backward()
    found = {"y": torch.where(entering[..., None], y, 0), "x": torch.where(entering[..., None], x.grad, 0)}
    found |= {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in block.named_parameters()}
    whole = length // CHUNK * CHUNK
    if carries:
        found |= after
    elif case.causal and whole:  # the state after the last whole chunk
        if backend != "triton":
            _, after = block(x[:, :whole].detach(), None, BlockContext(updates=context.updates))
        found |= {n: after[n] for n in after if n.startswith(("weight", "bias", "skipped", "position"))}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def errors(name: str) -> dict[str, float]:
    expected, found = called(name, torch.float64, "naive"), called(name, torch.float32, "triton")
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    return {n: float((found[n] - t).norm() / t.norm().clamp(min=1e-4)) for n, t in expected.items()}


def launches(variant: str) -> list[int]:
    """Kernels of torch's and of ours in a call's two passes, in values and counted on tensors without."""
    counts = []
    for device in ("cpu", "meta"):
        case, _ = block_of(variant, {}, torch.float32, "triton")
        block, x = case.block(device=device), torch.zeros(ROWS, 33, 32, device=device, requires_grad=True)
        with DeviceLog(device) as log:
            block(x, None, BlockContext(want_state=False))[0].sum().backward()
        counts.append(sum(n for name, n in log.launches.items() if name.startswith("launches_")))
    return counts


def health(variant: str) -> dict[str, list[float]]:
    """The figures of health of a block by tensor operations and by kernels, and how many launches they are each."""
    found: dict[str, list[float]] = {}
    for backend in ("torch", "triton"):
        case, block = block_of(variant, {}, torch.float32, backend)
        x, _ = drawn(case, 50, {"spoiled": True})
        x, counted = x.float(), case.block(device="meta")
        with torch.no_grad():
            block.token_scale_offset.fill_(0.25)  # updates that change the weights
            block(x)
            counted(x.to("meta"))
            for name, figure in block.statistics(x, BlockContext()).items():
                found.setdefault(name, []).append(float(figure))
            with DeviceLog() as log:
                counted.statistics(x.to("meta"), BlockContext())
        found.setdefault("launches", []).append(log.num_launches)
    return found


def main() -> None:
    torch.use_deterministic_algorithms(True)  # torch then fills memory that a kernel is to write with NaN
    assert torch.ones(1).new_empty(2, 3).isnan().all()
    found: dict[str, Any] = {name: errors(name) for name in CASES}
    print(json.dumps({"errors": found, "launches": {variant: launches(variant) for variant in OPTIONS},
                      "health": {variant: health(variant) for variant in OPTIONS}}))  # fmt: skip


if __name__ == "__main__":
    main()
