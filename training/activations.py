"""Count the memory and the launches of a training step, without a device, for ``train --plan`` and for the docs.

The step runs on the meta device, whose tensors have shapes and no values, so it costs no memory and serves any block.

Shape legend: B rows of a micro-batch, Q rows of codes, T frames.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moshi_ttt.core.device_log import INDEXING, DeviceLog
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.state import clone
from moshi_ttt.training.trained import TrainedModel

aten = torch.ops.aten


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one micro-batch, forward and backward.

    Attributes:
        kept: alive between the passes: what the backward pass needs.
        peak: the most that is alive at any time.
        problems: what would wait for the device, or copies a tensor from the CPU; picking tokens by a mask apart.
        forward, backward: launches of each pass, those of layers that the backward pass computes again too.
    """

    kept: int
    peak: int
    problems: tuple[str, ...]
    forward: int
    backward: int


class _StepLog(DeviceLog):
    """Counts a step. Where a mask picks tokens, all of them are counted: how many it picks depends on the data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            given, (mask,) = args[0], args[1]
            picks = func is aten.index.Tensor
            # [.., any] -> [number of tokens, any], or the gradient's way back, in the shape that was given
            self.launches[str(func)] += 1
            func, args, kwargs = aten.empty.memory_format, (), {"dtype": given.dtype, "device": "meta"}
            args = ([mask.numel(), *given.shape[mask.dim() :]],) if picks else (list(given.shape),)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _FusedAttention(torch.autograd.Function):
    """What a fused attention holds: its arguments, its output, and a number for each query and head. No scores.

    On the meta device attention would be counted as products and a softmax, with scores ``[B, H, T, T]`` that no device
    makes that this runs on.
    """

    @staticmethod
    def forward(ctx: Any, log: DeviceLog, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.log = log
        log.launches["attention"] += 1
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.log.launches["attention, backward"] += 1
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Fused(TorchFunctionMode):
    def __init__(self, log: DeviceLog) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _FusedAttention.apply(self.log, *args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def step_bytes(trained: TrainedModel, *, rows: int, frames: int, carried: bool, gradients: bool) -> StepBytes:
    """The bytes of one micro-batch of ``rows`` rows of ``frames`` frames of a model on the meta device.

    Args:
        carried: the blocks' states are carried in and out; those that come in are not counted.
        gradients: count the gradients of parameters, whole, as they come; else each until it would be exchanged.
    """
    model = trained.model
    codes = torch.empty(rows, model.num_codebooks, frames, dtype=torch.int64, device="meta")
    continued: Any = nullcontext()
    if carried:
        ids = torch.empty(rows, dtype=torch.int64, device="meta")
        blocks = {site: clone(block.init_state(rows)) for site, block in trained.injection.blocks.items()}
        continued = trained.host.carry(model, CarriedState(blocks, ids), document_ids=ids)
    if not gradients:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    try:
        with _StepLog() as log, _Fused(log), continued:
            loss = trained.losses.sums(model, codes)[0].sum()
            kept, forward = log.bytes, log.num_launches
            torch.autograd.backward(loss)  # not loss.backward(), which takes the mode away that layers run again need
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return StepBytes(
        kept=kept, peak=log.peak, problems=tuple(dict.fromkeys(log.problems)), forward=forward,
        backward=log.num_launches - forward,
    )  # fmt: skip
