"""Streams blocks by the Triton kernels of a step beside tensor operations, and prints what differs as JSON.

A program of its own, with TRITON_INTERPRET=1 before Triton is imported. Memory that a kernel is given to write to is
full of NaN, and so are slots of an unfinished chunk that hold no token.

    python -m tests.unit.plugins.triton_step_worker CASE...

A CASE is a name of ``CASES``, "launches of NAME" for the launches of its step, or "given tokens, NAME" for its inner
loop alone.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.state import BlockState, clone
from moshi_ttt.core.testing import Shape
from moshi_ttt.core.testing.case import BlockCase, default_cases
from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.plugins.hybrid.triton import step, step_operations

CASES: dict[str, tuple[str, dict[str, object], int, Shape, str]] = {
    "linear": ("ttt_linear", {"chunk": 3}, 9, Shape(dim=32, heads=2, batch=3), "float32"),
    "mlp": ("ttt_mlp", {"chunk": 3}, 7, Shape(dim=32, heads=2, batch=3), "float32"),
    "mlp, odd sizes": ("ttt_mlp", {"chunk": 5, "expansion": 3}, 11, Shape(dim=20, heads=1, batch=1), "float32"),
    "mlp, embeddings, one gate, bfloat16": (
        "ttt_mlp", {"chunk": 3, "value": "embedding", "gate": {"alpha": "layer"}}, 7, Shape(dim=16, heads=1, batch=2),
        "bfloat16",
    ),
    "linear, convolution": (
        "ttt_linear", {"chunk": 3, "conv_kernel": 3}, 7, Shape(dim=16, heads=1, batch=2), "float32",
    ),
    "three layers": ("ttt_multilayer", {"chunk": 3}, 7, Shape(dim=16, heads=1, batch=2), "float32"),
    "linear, chunk 16": ("ttt_linear", {"chunk": 16}, 35, Shape(dim=16, heads=1, batch=1), "float32"),
    "mlp, chunk 16": ("ttt_mlp", {"chunk": 16}, 37, Shape(dim=32, heads=2, batch=3), "float32"),
    "mlp, chunk 40": ("ttt_mlp", {"chunk": 40}, 45, Shape(dim=16, heads=1, batch=1), "float32"),
    "four layers, odd sizes": (
        "ttt_multilayer", {"chunk": 4, "hidden_dims": (6, 140, 35)}, 10, Shape(dim=40, heads=2, batch=3), "float32",
    ),
}  # fmt: skip
"""Variant, options, steps, shape, dtype of the host."""
ALONE = "linear"
"""Of this one, rows are changed."""


def blocks_of(name: str) -> tuple[BlockCase, SequenceBlock, SequenceBlock]:
    """The case, its block by tensor operations, and the same one by the kernels."""
    variant, options, _, shape, dtype = CASES[name]
    found = default_cases(variant, [options])
    case = replace(next(each for each in found if each.dtype == getattr(torch, dtype)), shape=shape)
    return case, case.block(), with_kernels(case)


def with_kernels(case: BlockCase) -> SequenceBlock:
    block = case.block()
    assert isinstance(block, HybridBlock)
    block.use_backend("step", "triton")
    return block


def poisoned(state: BlockState, active: Tensor) -> BlockState:
    """``state`` with NaN where slots hold no token; the next one of rows that are not ``active [B]`` is zero."""
    position = state["position"][:, None]  # [B, 1]
    for part, tensor in state.items():
        if part.startswith(("input.", "gradient.")):
            ahead = torch.arange(tensor.shape[2]) >= position  # [B, C]
            following = (torch.arange(tensor.shape[2]) == position) & ~active[:, None]  # [B, C]
            tensor.masked_fill_(ahead[:, None, :, None], math.nan)  # [B, 1, C, 1] over [B, H, C, any]
            tensor.masked_fill_(following[:, None, :, None], 0)  # the same
    return state


def relative(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||, where both have NaN at the same places, if at all."""
    assert torch.equal(actual.isnan(), expected.isnan())
    a, b = (each.double().nan_to_num() for each in (actual, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-6))


def streamed(name: str) -> dict[str, float]:
    """The largest errors of outputs and of each part of the state, and counts of what must be bit-equal and is not."""
    case, plain, fused = blocks_of(name)
    rows, steps = case.shape.batch, CASES[name][2]
    x, embeddings = case.inputs(steps), case.inputs(steps, seed=5)
    generator = torch.Generator().manual_seed(0)
    x[0, 1] = math.nan
    if rows > 1:
        x[1, 2, 0] = math.inf
    states = [plain.allocate_state(rows), fused.allocate_state(rows)]
    addresses = [tensor.data_ptr() for tensor in states[1].values()]
    found: dict[str, float] = {"output": 0.0, "masked rows that changed": 0.0, "buffers that moved": 0.0}
    for t in range(steps):
        active = torch.rand(rows, generator=generator) < (0.8 if rows > 1 else 1.0)
        updated = torch.rand(rows, generator=generator) < 0.8
        if t in (1, 2):
            active[:], updated[:] = True, True
        volume = torch.tensor([0.5, 1.0, 0.0])[:rows] if t % 3 else 0.5
        now = x[:, t : t + 1]
        context = BlockContext(
            input_embeddings=embeddings[:, t : t + 1], exec_mask=active if rows > 1 else None,
            updates=updated if t % 4 else True, volume=volume,
        )  # fmt: skip
        before = clone(poisoned(states[1], active))
        poisoned(states[0], active)
        expected, actual = plain.step(now, states[0], context), fused.step(now, states[1], context)
        kept = active & now.isfinite().all(-1)[:, 0]
        if kept.any():
            found["output"] = max(found["output"], relative(actual[kept], expected[kept]))
        for part, tensor in states[1].items():
            held = tensor[~active], before[part][~active]
            found["masked rows that changed"] += not torch.equal(*(each.nan_to_num(123.0) for each in held))
            found[part] = max(found.get(part, 0.0), relative(tensor, states[0][part]))
        if t == 5 and rows > 2:
            for block, state in zip((plain, fused), states, strict=True):
                block.reset_state(state, torch.arange(rows) == 2)
    found["buffers that moved"] = float(addresses != [tensor.data_ptr() for tensor in states[1].values()])
    found["updates that were skipped"] = float(states[1]["skipped"].sum())
    return found


def alone(name: str) -> dict[str, float]:
    """Outputs and state of a row beside others that change, against the same beside others, bit for bit."""
    case, _, fused = blocks_of(name)
    x = case.inputs(4)
    other = x.clone()
    other[1:, 1:] = math.nan
    outcomes = []
    for given in (x, other):
        state = fused.allocate_state(case.shape.batch)
        outs = [fused.step(given[:, t : t + 1], state)[:1] for t in range(4)]
        outcomes.append([*outs, *(tensor[:1] for tensor in state.values())])
    return {"what a stranger changed": float(sum(not torch.equal(a, b) for a, b in zip(*outcomes, strict=True)))}


def launches(name: str) -> dict[str, float]:
    """How many kernels one step of a host with masks launches: those of Triton, and operations of torch's."""
    from triton.runtime.interpreter import GridExecutor

    case = blocks_of(name)[0].at(dtype=torch.bfloat16)
    block = with_kernels(case)
    count, of_interpreter, rows = 0, 0, case.shape.batch
    run, log = GridExecutor.__call__, DeviceLog(device="cpu")

    def counted(self: GridExecutor, *given: object, **named: object) -> object:
        nonlocal count, of_interpreter
        count += 1
        before = log.num_launches
        outcome = run(self, *given, **named)
        of_interpreter += log.num_launches - before
        return outcome

    casts = ParameterCasts(block, frozen=True)
    mask, volume = torch.ones(rows, dtype=torch.bool), torch.ones(rows)
    state = block.allocate_state(rows)
    token = case.inputs(1)
    context = BlockContext(input_embeddings=token, exec_mask=mask, updates=mask, volume=volume, casts=casts)
    block.step(token, state, context)
    GridExecutor.__call__ = counted  # type: ignore[method-assign]
    inside = [DirectOperations()]
    step_before, step.operations = step.operations, lambda: inside[0]  # type: ignore[assignment]
    try:
        with torch.no_grad(), log:
            block.step(token, state, context)
    finally:
        GridExecutor.__call__ = run  # type: ignore[method-assign]
        step.operations = step_before
    return {"kernels": float(count), "of torch": float(log.num_launches - of_interpreter)}


class DirectOperations:
    """The operations as plain functions, so that what torch computes inside of them is counted too."""

    def __getattr__(self, name: str) -> object:
        return getattr(step_operations, f"_{name}")


def given_tokens(name: str) -> dict[str, float]:
    """The inner loop alone, which takes tokens that are not finite."""
    from moshi_ttt.plugins.hybrid.inner_loop import Tokens
    from moshi_ttt.plugins.hybrid.layer import objective
    from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop

    case, plain, _ = blocks_of(name)
    rows, heads = case.shape.batch, case.shape.heads
    generator = torch.Generator().manual_seed(2)
    states = [plain.allocate_state(rows) for _ in range(2)]
    layer = plain.requires_grad_(False).layer()
    norm, worst = objective(layer), 0.0
    for t in range(4):
        parts: list[Tensor] = [torch.randn(rows, 1, heads, case.shape.dim // heads, generator=generator) for _ in "qkv"]
        tokens = Tokens(*parts, torch.rand(rows, 1, heads, generator=generator))
        tokens.k[rows - 1, 0, heads - 1, 0] = math.nan if t == 1 else 1.0
        mask = torch.rand(rows, generator=generator) < 0.8
        expected = recurrent_inner_loop(tokens, states[0], norm, layer.token_scale, mask)
        actual = step.TritonStep()(tokens, states[1], norm, layer.token_scale, mask)
        kept = mask.clone()
        kept[rows - 1] &= t != 1
        worst = max([worst, relative(actual[kept], expected[kept]), float(actual[~mask].abs().sum())])
        worst = max([worst, *(relative(states[1][part], states[0][part]) for part in states[0])])
    return {"error": worst}


def _after(words: str, text: str) -> str:
    return text.removeprefix(words) if text.startswith(words) else ""


def main() -> None:
    torch.use_deterministic_algorithms(True)  # torch then fills memory that a kernel is to write with NaN
    assert torch.ones(1).new_empty(2, 3).isnan().all()
    results: dict[str, dict[str, float]] = {}
    for given in sys.argv[1:]:
        if name := _after("launches of ", given):
            torch.use_deterministic_algorithms(False)  # what fills memory with NaN is a launch
            results[given] = launches(name)
            torch.use_deterministic_algorithms(True)
        elif name := _after("given tokens, ", given):
            results[given] = given_tokens(name)
        else:
            results[given] = streamed(given) | (alone(given) if given == ALONE else {})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
