"""The streams of a batched language model and its codec, row by row: cleared, copied out, written, switched.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import BlockSite, Switch
from moshi_ttt.hosts.moshi.row_state import RowKind
from moshi_ttt.hosts.moshi.slot_stats import RECENT
from moshi_ttt.hosts.moshi.stream_values import StreamValue, stream_values
from moshi_ttt.hosts.moshi.streaming import BlockStreamState
from moshi_ttt.hosts.moshi.upstream import LMGen, LMModel, MimiModel


class RowStreams:
    """``count`` rows of ``generator`` and ``mimi``, which stream until ``close``.

    Attributes:
        values: everything that a row carries, by name; memory: what of it is memory.

    Raises HostError where one of the modules is streaming already.
    """

    def __init__(self, generator: LMGen, mimi: MimiModel, count: int) -> None:
        model: LMModel = generator.lm_model
        for module in (mimi, generator, model):
            if module._streaming_state is not None:
                raise HostError(f"This {type(module).__name__} is streaming already: end that stream first.")
        self.generator = generator
        self.mimi = mimi
        self.count = count
        self._open = ExitStack()
        with ExitStack() as stack, MOSHI_HOST.frozen(model), MOSHI_HOST.updates(model, True):
            stack.enter_context(mimi.streaming(count))
            stack.enter_context(generator.streaming(count))
            self._open = stack.pop_all()
        sites = [module for module in model.modules() if isinstance(module, BlockSite)]
        self.blocks: list[BlockStreamState] = [state for site in sites if (state := site._streaming_state) is not None]
        for block in self.blocks:
            block.keep_recent(RECENT)
        lm = {f"lm/{value.name}": value for value in stream_values(generator)}
        codec = {f"mimi/{value.name}": value for value in stream_values(mimi)}
        self.values = {name: value for name, value in (lm | codec).items() if value.is_of_a_row}
        self.memory = {name: value for name, value in self.values.items() if self._is_memory(value)}

    def close(self) -> None:
        """End the streams, with a warning about updates that were skipped."""
        self._open.close()

    def of_kind(self, kind: RowKind) -> Mapping[str, StreamValue]:
        """What a state of ``kind`` holds."""
        return self.memory if kind == "memory" else self.values

    @torch.no_grad()
    def clear(self, row: int) -> None:
        """Put ``row`` at the start of a stream, with nothing left of the one before."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        mask[row] = True
        self.mimi.reset_streaming(mask)
        self.generator.reset_streaming(mask)
        for value in self.values.values():
            value.row_clear(row)

    def save(self, row: int, kind: RowKind) -> dict[str, Tensor]:
        """A copy of ``row`` on the CPU."""
        return {name: value.row_snapshot(row) for name, value in self.of_kind(kind).items()}

    @torch.no_grad()
    def restore(self, row: int, kind: RowKind, tensors: Mapping[str, Tensor]) -> None:
        """Write what ``save`` returned, and ``require_continuable`` accepted, into ``row``, in place."""
        with self._counting_skipped():
            for name, value in self.of_kind(kind).items():
                value.row_write(row, tensors[name])

    @torch.no_grad()
    def learned_start(self) -> dict[str, Tensor]:
        """The memory of a row at the start of a stream."""
        tensors: dict[str, Tensor] = {}
        for block in self.blocks:
            fresh = block.block.init_state(1)
            own = {name: value for name, value in self.memory.items() if value.owner is block.buffers}
            tensors |= {name: fresh[value.key][0].to("cpu", copy=True).contiguous() for name, value in own.items()}
        return tensors

    def forget(self, row: int) -> None:
        """Put the memory of ``row`` back to its learned start."""
        for block in self.blocks:
            block.forget(row)

    def switch(self, row: int, name: Switch, value: float) -> None:
        """Set ``updates`` or ``volume`` of ``row`` from the next step on."""
        for block in self.blocks:
            block.set_row(name, row, value)

    @contextmanager
    def _counting_skipped(self) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.counting_skipped())
            yield

    def _is_memory(self, value: StreamValue) -> bool:
        return any(value.owner is each.buffers and value.key in each.block.memory_names() for each in self.blocks)
