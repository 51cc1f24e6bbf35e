"""The batches of one rank, starting at any step.

Shape legend: B segments of a batch, G segments of a step over all ranks and microbatches, Q rows, T frames.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from moshi_ttt.data.corpus import Corpus, SegmentError
from moshi_ttt.data.order import SegmentOrder, StreamOrder
from moshi_ttt.data.problems import DataError
from moshi_ttt.system.interruption import handle, stop_signals

TRIES = 20
"""Segments tried in place of one that cannot be read."""


class CodesBatch(NamedTuple):
    """The input of one forward pass on one rank (``core.batches.Batch``).

    Attributes:
        codes: ``[B, Q, T]`` int64.
        document_ids: ``[B]`` int64: which document a row is part of. Without carrying every row is a document of its
            own; with carrying a row's id changes where its stream begins another recording.
        problems: segments that could not be read, and were replaced or left empty.
    """

    codes: Tensor
    document_ids: Tensor
    problems: tuple[str, ...]

    @property
    def positions(self) -> int:
        """T, and the start token."""
        return self.codes.shape[-1] + 1

    def inputs(self, device: torch.device) -> Tensor:
        """``codes`` on ``device``."""
        return self.codes.to(device)


class TrainingData(Dataset[CodesBatch]):
    """The batches of a rank: item ``step * microbatches + microbatch``, for any step from 0 on.

    A step's G = batch_size x microbatches x world_size segments depend on the corpus, the seed and G alone. Row b of
    microbatch m on rank r is segment ``(m * world_size + r) * batch_size + b`` of them.

    A segment that cannot be read is replaced by the one after it in its source; with ``carry`` its row is the zero
    token, so that it has no loss. Either way the batch says so.

    Args:
        batch_size: B.
        microbatches: forward passes of a step.
        rank, world_size: which of how many ranks this is.
        seed, shuffle: see ``SegmentOrder``.
        carry: each row is a stream that reads recordings from end to end, one after another; see ``StreamOrder``.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        microbatches: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        carry: bool,
    ) -> None:
        assert batch_size > 0, batch_size
        assert microbatches > 0, microbatches
        assert 0 <= rank < world_size, (rank, world_size)
        self.corpus = corpus
        self.microbatches = microbatches
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._carry = carry
        steps: type[_CarriedSteps] | type[_PlainSteps] = _CarriedSteps if carry else _PlainSteps
        self._steps = steps(corpus, batch_size * microbatches * world_size, seed, shuffle)

    def __getitem__(self, index: int) -> CodesBatch:
        """Raises DataError when a segment cannot be read, nor any of those tried in its place."""
        step, microbatch = divmod(index, self.microbatches)
        first = (microbatch * self._world_size + self._rank) * self._batch_size
        rows = self._steps.at(step)[first : first + self._batch_size]
        problems: list[str] = []
        codes = [self._codes(row, problems) for row in rows]
        return CodesBatch(torch.stack(codes), torch.tensor([row.document_id for row in rows]), tuple(problems))

    def _codes(self, row: _Row, problems: list[str]) -> Tensor:
        """``[Q, T]`` of a segment, or of what stands in for it; what is wrong is added to ``problems``."""
        corpus = self.corpus
        source = corpus.sources[row.source]
        for offset in range(1 + (0 if self._carry else min(TRIES, source.num_segments - 1))):
            try:
                return corpus.codes(row.source, *source.locate((row.place + offset) % source.num_segments))
            except SegmentError as error:
                if str(error) not in problems:
                    problems.append(str(error))
        if self._carry:
            return torch.full((corpus.rows, corpus.frames), corpus.zero_token, dtype=torch.int64)
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise DataError(
            f"{offset + 1} segments of {source.path} in a row cannot be read. Fix or remove them:\n{listed}"
        )


def loader(data: TrainingData, *, start_step: int, num_workers: int) -> DataLoader[CodesBatch]:
    """The batches of ``data`` from ``start_step`` on, without end: the same whatever the number of workers.

    Raises DataError when workers would have to encode on a GPU, which forked processes cannot use.
    """
    if num_workers > 0 and data.corpus.encodes_on not in (None, "cpu"):
        raise DataError(
            f"data.num_workers = {num_workers}, and Mimi is on {data.corpus.encodes_on}, which workers cannot use. "
            "Set data.num_workers to 0, load Mimi on the CPU, or encode the recordings into shards first."
        )
    return DataLoader(
        data,
        batch_size=None,
        sampler=_From(start_step * data.microbatches),
        num_workers=num_workers,
        # A fork shares the corpus and Mimi as they are; torch gives each worker a single thread.
        multiprocessing_context="fork" if num_workers > 0 else None,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # else the global generator is drawn from, and training sees other numbers
    )


class _Row(NamedTuple):
    """A segment by its source and its place there, and the document that it counts as."""

    source: int
    place: int
    document_id: int


class _PlainSteps:
    """The G rows of a step, each a segment of its own. Steps are best asked for in order."""

    def __init__(self, corpus: Corpus, rows: int, seed: int, shuffle: bool) -> None:
        counts = [source.num_segments for source in corpus.sources]
        weights = [source.weight for source in corpus.sources]
        self._new_order: Callable[[], SegmentOrder] = lambda: SegmentOrder(counts, weights, seed, shuffle)
        self._order = self._new_order()
        self._size = rows
        self._step = -1
        self._rows: list[_Row] = []

    def at(self, step: int) -> list[_Row]:
        if step != self._step:
            first = step * self._size
            if first < self._order.position:
                self._order = self._new_order()
            self._order.skip(first - self._order.position)
            taken = self._order.take(self._size)
            self._rows = [_Row(source, place, first + row) for row, (source, place) in enumerate(taken)]
            self._step = step
        return self._rows


class _CarriedSteps:
    """The G rows of a step, each the next segment of a stream. Steps are best asked for in order."""

    def __init__(self, corpus: Corpus, rows: int, seed: int, shuffle: bool) -> None:
        documents = [[recording.segments for recording in source.recordings] for source in corpus.sources]
        weights = [source.weight for source in corpus.sources]
        self._new_order: Callable[[], StreamOrder] = lambda: StreamOrder(documents, weights, seed, shuffle, rows)
        self._order = self._new_order()
        self._sources = corpus.sources
        self._step = -1
        self._rows: list[_Row] = []

    def at(self, step: int) -> list[_Row]:
        if step != self._step:
            if step < self._order.position:
                self._order = self._new_order()
            self._order.skip(step - self._order.position)
            self._rows = [
                _Row(source, self._sources[source].index(recording, segment), document_id)
                for source, recording, segment, document_id in self._order.next_step()
            ]
            self._step = step
        return self._rows


class _From(Sampler[int]):
    """``first``, ``first + 1``, ... without end."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        index = self._first
        while True:
            yield index
            index += 1


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a termination reach the whole process group: a worker that ended would take the run with it."""
    handle(stop_signals(), signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
