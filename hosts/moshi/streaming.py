"""Streaming state: the blocks' own, and all of a Moshi's, saved and restored.

Moshi keeps streaming state in its modules, as dataclasses of tensors and counters. ``stream_state`` copies all of it
into one flat mapping; ``restore_stream_state`` writes such a mapping into another stream of the same shape. Tensors are
written into the buffers that are there, so a captured CUDA graph continues with the restored values.

Not part of it: the weights, and the random generator that sampling draws from (torch's global one).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from moshi_ttt.core import state as states
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.tensor_files import read_tensors
from moshi_ttt.hosts.moshi.upstream import (
    AttentionState,
    LMGen,
    LMModel,
    RingKVCache,
    State,
    StreamingModule,
    StreamingMultiheadAttention,
)

FORMAT = {"format": "moshi_ttt.stream_state", "version": "1"}

# Made anew by every stream, and the same in each: configuration, callbacks, captured graphs.
_NOT_CARRIED = {
    "batch_size", "device", "block", "graphed_main", "graphed_depth", "exit_stack", "reset_callback",
    "set_exec_mask_callback", "_set_exec_mask_graphed", "skipped_before", "updates", "volume", "casts",
}  # fmt: skip
# Filled by the first step, None before: the keys and values of what cross-attention looks at.
_FILLED_LATER = ("k_cross", "v_cross")


@dataclass
class BlockStreamState(State):
    """Streaming state of one block: buffers of B rows that ``block.step`` updates in place.

    Attributes:
        updates: ``[B]`` bool, the rows whose test-time updates are enabled; a tensor, so that a captured graph follows.
        casts: the block's parameters as this stream's steps multiply them.
        volume: ``[B]``, of what the block adds, in the dtype of the role ``output``; a tensor for the same reason.
    """

    block: SequenceBlock
    buffers: BlockState

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.skipped_before = torch.zeros_like(self.block.skipped_updates(self.buffers))
        self.updates = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        self.casts = ParameterCasts(self.block)
        self.volume = torch.ones(self.batch_size, dtype=self.block.roles.output, device=self.device)

    @torch.no_grad()
    def set_switch(self, name: str, value: float | Tensor) -> None:
        """Set ``updates`` or ``volume``, for all rows or ``[B]``, from the next step on."""
        rows: Tensor = getattr(self, name)
        if isinstance(value, Tensor):
            rows.copy_(value)
        else:
            rows.fill_(value)

    @torch.no_grad()
    def forget(self) -> None:
        """Put every row's memory back to the learned initial one; caches that are not memory stay."""
        with self._counting_skipped():
            states.copy_(self.buffers, self.block.forget(self.buffers))

    @torch.no_grad()
    def exchange(self) -> None:
        """Move every row's memory to the next row."""
        with self._counting_skipped():
            for name in self.block.memory_names():
                self.buffers[name].copy_(self.buffers[name].roll(1, 0))

    @contextmanager
    def _counting_skipped(self) -> Iterator[None]:
        """Keep each row's total of skipped updates where the memory inside is replaced: the count may be part of it."""
        before = self.block.skipped_updates(self.buffers).clone()
        yield
        self.skipped_before.add_(before - self.block.skipped_updates(self.buffers))

    def reset(self, reset_mask: Tensor) -> None:
        """Put the rows where ``reset_mask [B]`` is true back to the learned initial state."""
        super().reset(reset_mask)
        skipped = self.block.skipped_updates(self.buffers)
        self.skipped_before.add_(torch.where(reset_mask.to(skipped.device), skipped, 0))
        self.block.reset_state(self.buffers, reset_mask)

    def __exit__(self, *exception: object) -> None:
        """At the end of streaming, warn about the updates that were skipped in each row.

        Raises PrecisionError where parameters were declared frozen and were changed.
        """
        try:
            self._warn_of_skipped()
            if not any(exception):
                self.casts.check_frozen()
        finally:
            self.casts.clear()

    def _warn_of_skipped(self) -> None:
        skipped = (self.skipped_before + self.block.skipped_updates(self.buffers)).tolist()
        if any(skipped):
            warnings.warn(
                f"{self.block.info.site}: updates were skipped because they were not finite, per stream: {skipped}. "
                f"{self.block.skipped_advice}",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Slot:
    """One value that a stream carries, and where it is kept."""

    name: str
    owner: Any
    key: str
    module: nn.Module

    @property
    def value(self) -> Any:
        return self.owner[self.key] if isinstance(self.owner, dict) else getattr(self.owner, self.key)

    def snapshot(self) -> Tensor:
        value = self.value
        if isinstance(value, Tensor):
            return value.detach().clone(memory_format=torch.contiguous_format)
        return torch.tensor(value, dtype=torch.int64)

    def problem(self, given: Tensor) -> str | None:
        """Why ``given`` cannot be written here, or None."""
        value = self.value
        if value is None:
            attention = cast(StreamingMultiheadAttention, self.module)
            rows, heads = self.owner.batch_size, attention.num_heads
            dtype = cast(Tensor, attention.in_projs[0].weight).dtype
            shape: tuple[Any, ...] = (rows, heads, "any length", attention.embed_dim // heads)
            fits = given.dim() == 4 and (*given.shape[:2], "any length", given.shape[3]) == shape
        else:
            shape, dtype = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else ((), torch.int64)
            fits = tuple(given.shape) == shape
        if fits and given.dtype == dtype:
            return None
        return f"{self.name}: expected {shape} {dtype}, got {tuple(given.shape)} {given.dtype}"

    def write(self, given: Tensor) -> None:
        value = self.value
        if isinstance(value, Tensor):
            value.copy_(given)
        elif value is None:
            setattr(self.owner, self.key, given.detach().to(self.owner.device, copy=True))
        else:
            setattr(self.owner, self.key, int(given))


def stream_state(module: LMGen | LMModel) -> dict[str, Tensor]:
    """A copy of everything that a streaming ``module`` carries from step to step, under flat names.

    Moshi's own ``get_streaming_state`` of an LMGen leaves out the language model, which is detached from it; this has
    both: key-value caches, offsets, execution masks, pending tokens, cross-attention, and the blocks' fast weights.

    Raises:
        HostError: ``module`` is not streaming, or keeps something this version does not know how to save.
    """
    return {slot.name: slot.snapshot() for slot in _slots(module) if slot.value is not None}


@torch.no_grad()
def restore_stream_state(module: LMGen | LMModel, state: Mapping[str, Tensor]) -> None:
    """Continue a stream: write what ``stream_state`` returned into ``module``, which must be streaming.

    In place where a buffer exists. Another process, a position inside a chunk and another device are all fine; the
    batch size, the configuration and the dtypes must be the same.

    Raises:
        HostError: names, shapes or dtypes differ; every difference is listed and nothing has been written.
    """
    slots = {slot.name: slot for slot in _slots(module)}
    state = _upgraded(module, state)
    needed = {name for name, slot in slots.items() if slot.value is not None}
    problems = [f"missing {name}" for name in sorted(needed - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - slots.keys())]
    problems += [p for name in slots if name in state and (p := slots[name].problem(state[name])) is not None]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise HostError(
            f"The stream state does not fit this stream: {shown}. Nothing was restored. Stream the same model, with "
            "the same blocks, batch size and options as the stream that was saved."
        )
    for name, slot in slots.items():
        if name in state:
            slot.write(state[name])


def _upgraded(root: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with each block's buffers as this version of the block has them."""
    found = dict(state)
    for path, module in root.named_modules():
        stream = getattr(module, "_streaming_state", None)
        if isinstance(stream, BlockStreamState):
            prefix = f"{path}/buffers."
            saved = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            upgraded = stream.block.upgrade_state(saved)
            found = {name: tensor for name, tensor in found.items() if not name.startswith(prefix)}
            found |= {prefix + name: tensor for name, tensor in upgraded.items()}
    return found


def save_stream_state(path: str | Path, module: LMGen | LMModel) -> Path:
    """Write ``stream_state(module)`` to a safetensors file; a reader sees the old file or the whole new one."""
    path = Path(path)
    tensors = {name: tensor.cpu() for name, tensor in stream_state(module).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=FORMAT)
    return path


def load_stream_state(path: str | Path, module: LMGen | LMModel) -> None:
    """Restore a file that ``save_stream_state`` wrote. Raises HostError for a bad file, or if it does not fit."""
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise HostError(f"Cannot read the stream state {path}: {error}.") from None
    if {key: metadata.get(key) for key in FORMAT} != FORMAT:
        raise HostError(f"{path} is not a stream state of this version: its metadata is {metadata}, not {FORMAT}.")
    restore_stream_state(module, tensors)


def _slots(root: LMGen | LMModel) -> list[_Slot]:
    if not isinstance(root, LMGen | LMModel):
        raise HostError(f"Only an LMGen or an LMModel has a stream state here, got {type(root).__name__}.")
    if root._streaming_state is None:
        raise HostError(
            f"This {type(root).__name__} is not streaming. Enter `with module.streaming(batch_size):` first."
        )
    slots: list[_Slot] = []
    for path, module in root.named_modules():
        # The depth transformer streams inside a step only: between steps it has no state, and there is nothing to keep.
        if isinstance(module, StreamingModule) and module._streaming_state is not None:
            slots.extend(_slots_of(f"{path}/" if path else "", module._streaming_state, module))
    return slots


def _slots_of(prefix: str, state: State, module: nn.Module) -> Iterator[_Slot]:
    for key, value in vars(state).items():
        if key in _NOT_CARRIED:
            continue
        if isinstance(value, Tensor | int):
            yield _Slot(prefix + key, state, key, module)
        elif isinstance(value, RingKVCache):
            yield _Slot(f"{prefix}{key}.cache", value, "cache", module)
            yield _Slot(f"{prefix}{key}.end_offset", value, "end_offset", module)
        elif isinstance(value, dict):
            for name in value:
                yield _Slot(f"{prefix}{key}.{name}", value, name, module)
        elif value is None:
            # None for good in a self-attention; in a cross-attention, only until the first step.
            if key in _FILLED_LATER and isinstance(state, AttentionState) and module.cross_attention:
                yield _Slot(prefix + key, state, key, module)
        else:
            raise HostError(
                f"{prefix}{key} holds a {type(value).__name__}, which this version cannot save. "
                "Use the version of Moshi that pyproject.toml asks for."
            )
