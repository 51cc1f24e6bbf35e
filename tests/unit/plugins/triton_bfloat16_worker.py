"""Compares calls and steps under the policy ``uniform``, in bfloat16, with float64, and prints the errors as JSON.

Of tensor operations and of Triton kernels, with the same parameters, inputs and state. A program of its own, with
TRITON_INTERPRET=1 before Triton is imported. Memory that a kernel is given to write to is full of NaN.

    python -m tests.unit.plugins.triton_bfloat16_worker CASE...
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.precision import UNIFORM
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.testing import Shape
from moshi_ttt.core.testing.case import BlockCase, default_cases
from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.plugins.hybrid.triton.step import TritonStep
from moshi_ttt.plugins.hybrid.triton.train import TritonTrain

CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "linear": ("ttt_linear", {}, 41, {}),
    "linear, continued": ("ttt_linear", {}, 37, {"earlier": 21}),
    "mlp": ("ttt_mlp", {"expansion": 2, "checkpoint_chunks": 2}, 41, {}),
    "mlp, continued": ("ttt_mlp", {"expansion": 2}, 37, {"earlier": 21}),
    "mlp, continued by less than a chunk": ("ttt_mlp", {"expansion": 2}, 14, {"earlier": 21}),
    "linear, a convolution": ("ttt_linear", {"conv_kernel": 3}, 33, {"earlier": 5}),
}
"""Of calls: variant, options, tokens, and tokens before the call; with those, the state after it is compared too."""
STEPS: dict[str, tuple[str, dict[str, Any], int]] = {
    "steps of linear": ("ttt_linear", {"chunk": 3}, 13),
    "steps of mlp": ("ttt_mlp", {"chunk": 3, "expansion": 2}, 13),
    "steps of three layers": ("ttt_multilayer", {"chunk": 3}, 10),
    "steps of linear, a convolution": ("ttt_linear", {"chunk": 3, "conv_kernel": 3}, 7),
}
"""Variant, options, steps."""
ROWS = 2


def as_a_gpu(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """To bfloat16 and from it as a GPU converts, to the nearest number; Triton's interpreter cuts bits off."""
    if source == tl.float32:
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy()
    return torch.from_numpy(np.array(data).view(np.int16)).view(torch.bfloat16).float().numpy()


def three_blocks(
    variant: str, options: dict[str, Any], operation: Literal["train", "step"]
) -> tuple[BlockCase, dict[str, HybridBlock]]:
    """The same block in float64, and in bfloat16 by tensor operations and by kernels."""
    shape = Shape(dim=32, heads=2, batch=ROWS)  # heads of 16, the least that the kernels take
    cases = {c.dtype: c.at(policy=UNIFORM) for c in default_cases(variant, [{"chunk": 16, **options}], shapes=(shape,))}
    case, found = cases[torch.bfloat16], {}
    parameters = case.block().state_dict()
    parameters["token_scale_offset"].fill_(0.25)  # updates that change the weights
    for name, dtype in (("float64", torch.float64), ("torch", torch.bfloat16), ("triton", torch.bfloat16)):
        block = cases[dtype].block()
        assert isinstance(block, HybridBlock)
        block.load_state_dict(parameters)
        block.use_backend(operation, "triton" if name == "triton" else "torch")
        found[name] = block
    return case, found


def in_dtype(state: BlockState, dtype: torch.dtype) -> BlockState:
    return {n: t.to(dtype, copy=True) if t.is_floating_point() else t.clone() for n, t in state.items()}


def called(block: HybridBlock, x: Tensor, state: BlockState | None, weights: Tensor) -> dict[str, Tensor]:
    x = x.to(block.roles.model, copy=True).requires_grad_()
    state = None if state is None else in_dtype(state, block.roles.state)
    y, after = block(x, state, BlockContext(want_state=state is not None))
    loss = (y * weights.to(y)).sum()
    if state is not None:
        assert {t.dtype for t in after.values() if t.is_floating_point()} == {block.roles.state}
        loss = loss + sum(t.square().sum() for t in after.values() if t.requires_grad)
    loss.backward()
    found = {"y": y, "x": x.grad} | {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    return found | (after if state is not None else {})


def of_call(name: str) -> dict[str, dict[str, float]]:
    variant, options, length, given = CASES[name]
    case, blocks = three_blocks(variant, options, "train")
    x, state = case.inputs(length), None
    if "earlier" in given:
        with torch.no_grad():
            earlier = case.inputs(given["earlier"], seed=7).double()
            state = blocks["float64"](earlier, blocks["float64"].allocate_state(ROWS))[1]
            state = in_dtype(state, torch.bfloat16)
    weights = case.inputs(length, seed=3)
    found = {name: called(block, x, state, weights) for name, block in blocks.items()}
    assert isinstance(blocks["triton"]._train_run(x.device), TritonTrain)
    return compared(found)


def of_steps(name: str) -> dict[str, dict[str, float]]:
    variant, options, steps = STEPS[name]
    case, blocks = three_blocks(variant, options, "step")
    x, found = case.inputs(steps), {}
    for each, block in blocks.items():
        state = block.allocate_state(ROWS)
        y = torch.cat([block.step(x[:, t : t + 1].to(block.roles.model), state) for t in range(steps)], 1)
        assert {t.dtype for t in state.values() if t.is_floating_point()} == {block.roles.state}
        found[each] = {"y": y, **state}
    assert isinstance(blocks["triton"]._step_run(x.device), TritonStep)
    return compared(found)


def compared(found: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """||a - b|| / ||b|| of each result, b in float64."""
    expected = {name: tensor.detach().double() for name, tensor in found.pop("float64").items()}
    assert all(each.keys() == expected.keys() for each in found.values())
    return {
        who: {n: float((t.detach().double() - expected[n]).norm() / expected[n].norm().clamp(min=1e-4))
              for n, t in each.items()} for who, each in found.items()
    }  # fmt: skip


def main() -> None:
    torch.use_deterministic_algorithms(True)  # torch then fills memory that a kernel is to write with NaN
    assert torch.ones(1).new_empty(2, 3).isnan().all()
    interpreter._convert_float = as_a_gpu
    print(json.dumps({name: of_call(name) if name in CASES else of_steps(name) for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
