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

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from moshi_ttt.core import state as states
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.core.state_ranges import range_problems
from moshi_ttt.core.tensor_files import CHECKSUM, is_damaged, read_tensors, with_checksum
from moshi_ttt.hosts.moshi.stream_values import StreamValue, stream_values
from moshi_ttt.hosts.moshi.upstream import LMGen, LMModel, State

FORMAT = {"format": "moshi_ttt.stream_state", "version": "1"}


class RecentTokens:
    """The inputs of each row's latest steps, in buffers that stay where they are: what figures are computed from.

    Attributes:
        x: ``[B, n, D]``, the latest last; zero where a row has made fewer steps.
        embeddings: ``[B, n, D]``, the input embeddings of the same tokens.
    """

    def __init__(self, rows: int, tokens: int, block: SequenceBlock, device: torch.device) -> None:
        shape = (rows, tokens, block.info.dim)
        self.x = torch.zeros(shape, dtype=block.info.dtype, device=device)
        self.embeddings = torch.zeros(shape, dtype=block.info.dtype, device=device)

    def add(self, x: Tensor, embeddings: Tensor | None, mask: Tensor) -> None:
        """Append a step, ``[B, T, D]`` each, in the rows where ``mask [B]`` is true."""
        for kept, new in ((self.x, x), (self.embeddings, embeddings)):
            if new is not None:
                shifted = torch.cat([kept, new.to(kept)], dim=1)[:, -kept.shape[1] :]
                kept.copy_(torch.where(row_mask(mask, kept), shifted, kept))

    def reset(self, mask: Tensor) -> None:
        """Clear the rows where ``mask [B]`` is true."""
        for kept in (self.x, self.embeddings):
            kept.masked_fill_(row_mask(mask, kept), 0)


@dataclass
class BlockStreamState(State):
    """Streaming state of one block: buffers of B rows that ``block.step`` updates in place.

    Attributes:
        updates: ``[B]`` bool, the rows whose test-time updates are enabled; a tensor, so that a captured graph follows.
        casts: the block's parameters as this stream's steps multiply them.
        volume: ``[B]``, of what the block adds, in the dtype of the role ``output``; a tensor for the same reason.
        recent: the latest inputs, where ``keep_recent`` was called.
    """

    block: SequenceBlock
    buffers: BlockState

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.skipped_before = torch.zeros_like(self.block.skipped_updates(self.buffers))
        self.updates = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        self.casts = ParameterCasts(self.block)
        self.volume = torch.ones(self.batch_size, dtype=self.block.roles.output, device=self.device)
        self.recent: RecentTokens | None = None

    def keep_recent(self, tokens: int) -> None:
        """Keep each row's latest ``tokens`` inputs from now on. To be called before a step is captured in a graph."""
        self.recent = RecentTokens(self.batch_size, tokens, self.block, self.device)

    @torch.no_grad()
    def set_switch(self, name: str, value: float | Tensor) -> None:
        """Set ``updates`` or ``volume``, for all rows or ``[B]``, from the next step on."""
        rows: Tensor = getattr(self, name)
        if isinstance(value, Tensor):
            rows.copy_(value)
        else:
            rows.fill_(value)

    @torch.no_grad()
    def set_row(self, name: str, row: int, value: float) -> None:
        """Set ``updates`` or ``volume`` of one row, from the next step on."""
        getattr(self, name)[row].fill_(value)

    @torch.no_grad()
    def forget(self, row: int | None = None) -> None:
        """Put the memory of one row, or of all, back to the learned initial one; caches that are not memory stay."""
        with self.counting_skipped():
            if row is None:
                states.copy_(self.buffers, self.block.forget(self.buffers))
                return
            fresh = self.block.init_state(1, self.device)
            for name in self.block.memory_names():
                self.buffers[name][row].copy_(fresh[name][0])

    @torch.no_grad()
    def exchange(self) -> None:
        """Move every row's memory to the next row."""
        with self.counting_skipped():
            for name in self.block.memory_names():
                self.buffers[name].copy_(self.buffers[name].roll(1, 0))

    @contextmanager
    def counting_skipped(self) -> Iterator[None]:
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
        if self.recent is not None:
            self.recent.reset(reset_mask.to(skipped.device))

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


def stream_state(module: LMGen | LMModel) -> dict[str, Tensor]:
    """A copy of everything that a streaming ``module`` carries from step to step, under flat names.

    Moshi's own ``get_streaming_state`` of an LMGen leaves out the language model, which is detached from it; this has
    both: key-value caches, offsets, execution masks, pending tokens, cross-attention, and the blocks' fast weights.
    Nothing from beyond the end of a row's stream is in it: not what a former stream left in a row that was reset.

    Raises:
        HostError: ``module`` is not streaming, or keeps something this version does not know how to save.
    """
    return {name: value.snapshot() for name, value in _values(module).items() if value.value is not None}


@torch.no_grad()
def restore_stream_state(module: LMGen | LMModel, state: Mapping[str, Tensor]) -> None:
    """Continue a stream: write what ``stream_state`` returned into ``module``, which must be streaming.

    In place where a buffer exists. Another process, a position inside a chunk and another device are all fine; the
    batch size, the configuration and the dtypes must be the same.

    Raises:
        HostError: names, shapes or dtypes differ, or a number is one that no stream has; every difference is listed and
            nothing has been written.
    """
    values = _values(module)
    state = _upgraded(module, state)
    needed = {name for name, value in values.items() if value.value is not None}
    problems = [f"missing {name}" for name in sorted(needed - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - values.keys())]
    problems += [p for name in values if name in state and (p := values[name].problem(state[name])) is not None]
    if not problems:
        problems += _block_problems(module, state)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise HostError(
            f"The stream state does not fit this stream: {shown}. Nothing was restored. Stream the same model, with "
            "the same blocks, batch size and options as the stream that was saved."
        )
    for name, value in values.items():
        if name in state:
            value.write(state[name])
    for value in values.values():
        value.erase()  # what an earlier version saved may have more than the stream


def _block_states(
    root: nn.Module, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, SequenceBlock, dict[str, Tensor]]]:
    """What begins the names of each block's buffers, the block, and its part of ``state`` by its own names."""
    for path, module in root.named_modules():
        stream = getattr(module, "_streaming_state", None)
        if isinstance(stream, BlockStreamState):
            prefix = f"{path}/buffers."
            own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            yield prefix, stream.block, own


def _block_problems(root: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
    """Numbers that no stream has, as each block declares them."""
    for prefix, block, own in _block_states(root, state):
        yield from (prefix + problem for problem in range_problems(block.state_ranges(), own))


def _upgraded(root: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with each block's buffers as this version of the block has them."""
    found = dict(state)
    for prefix, block, saved in _block_states(root, state):
        upgraded = block.upgrade_state(saved)
        found = {name: tensor for name, tensor in found.items() if not name.startswith(prefix)}
        found |= {prefix + name: tensor for name, tensor in upgraded.items()}
    return found


def save_stream_state(path: str | Path, module: LMGen | LMModel) -> Path:
    """Write ``stream_state(module)`` to a safetensors file; a reader sees the old file or the whole new one."""
    path = Path(path)
    tensors = {name: tensor.cpu() for name, tensor in stream_state(module).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=with_checksum(tensors, FORMAT))
    return path


def load_stream_state(path: str | Path, module: LMGen | LMModel) -> None:
    """Restore a file that ``save_stream_state`` wrote. Raises HostError for a bad file, or if it does not fit."""
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise HostError(f"Cannot read the stream state {path}: {error}.") from None
    if {key: value for key, value in metadata.items() if key != CHECKSUM} != FORMAT:
        raise HostError(f"{path} is not a stream state of this version: its metadata is {metadata}, not {FORMAT}.")
    if is_damaged(tensors, metadata):
        raise HostError(
            f"{path} is damaged: its checksum is not that of what it holds. Give another file, or start a new stream."
        )
    restore_stream_state(module, tensors)


def _values(root: LMGen | LMModel) -> dict[str, StreamValue]:
    if not isinstance(root, LMGen | LMModel):
        raise HostError(f"Only an LMGen or an LMModel has a stream state here, got {type(root).__name__}.")
    return {value.name: value for value in stream_values(root)}
