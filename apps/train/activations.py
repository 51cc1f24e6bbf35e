"""What one training step holds beside its parameters, counted without a device: ``train --plan``.

The step runs on the meta device, whose tensors have shapes and no values, so it costs no memory and serves any block.

Shape legend: B rows of a micro-batch, Q rows of codes, T frames.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moshi_ttt.apps.train.losses import LossWeights, loss_sums
from moshi_ttt.apps.train.model import TrainedModel
from moshi_ttt.core.device_log import INDEXING, DeviceLog
from moshi_ttt.core.host import CarriedState
from moshi_ttt.hosts.moshi.host import MOSHI_HOST

aten = torch.ops.aten


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one micro-batch, forward and backward.

    Attributes:
        kept: alive between the passes: what the backward pass needs.
        peak: the most that is alive at any time.
    """

    kept: int
    peak: int


class _StepLog(DeviceLog):
    """Counts a step. Where a mask picks tokens, all of them are counted: how many it picks depends on the data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            given, (mask,) = args[0], args[1]
            picks = func is aten.index.Tensor
            # [.., any] -> [number of tokens, any], or the gradient's way back, in the shape that was given
            func, args, kwargs = aten.empty.memory_format, (), {"dtype": given.dtype, "device": "meta"}
            args = ([mask.numel(), *given.shape[mask.dim() :]],) if picks else (list(given.shape),)
        return super().__torch_dispatch__(func, types, args, kwargs)


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
        blocks = {site: block.allocate_state(rows) for site, block in trained.injection.blocks.items()}
        continued = MOSHI_HOST.carry(model, CarriedState(blocks, ids), document_ids=ids)
    if not gradients:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    try:
        with _StepLog() as log, continued:
            loss = loss_sums(model, codes, LossWeights(first_codebook=1.0, text_padding=1.0))[:2].sum()
            kept = log.bytes
            loss.backward()
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return StepBytes(kept=kept, peak=log.peak)
