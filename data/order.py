"""The order of segments, for the global batch of all ranks, computed with integers alone.

Nothing here depends on ranks, workers, the machine or a library's random generator: every draw is a hash of the seed
and of its own position, so that any position can be gone to, and a run on other ranks sees the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

BLOCK = 4096
"""Documents drawn ahead at a time."""
SKIP_BLOCK = 1 << 18
"""Draws that a skip counts at a time."""
DRAWS, PERMUTATIONS = 1, 2
"""What a hash is for, so that one use of a seed says nothing about another."""


class SegmentOrder:
    """An endless sequence of (source, index in the source).

    Each draw first picks a source by weight. Each source is gone through in epochs, every index once in each: in order,
    or in a new random order each time.

    Args:
        counts: indexes of each source, 1 or more.
        weights: of each source, above 0; only their ratios matter.
        seed: decides both choices.
        shuffle: whether an epoch has a random order.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> None:
        assert counts, "no sources"
        assert min(counts) > 0, counts
        assert len(weights) == len(counts), (counts, weights)
        assert min(weights) > 0, weights
        self.position = 0
        self._counts = tuple(counts)
        self._bounds = np.cumsum(weights) / np.sum(weights)
        self._draws = _hash(_hash(np.array([seed], np.uint64), DRAWS), 0)
        self._epochs = [
            _hash(_hash(np.array([seed], np.uint64), PERMUTATIONS), source) for source in range(len(counts))
        ]
        self._shuffle = shuffle
        self._taken = [0] * len(counts)
        # Of each source: an epoch, and the order of that epoch and of those after it, [epochs, count].
        self._orders: list[tuple[int, Integers]] = [(0, np.empty((0, count), np.int64)) for count in counts]

    def take(self, n: int) -> list[tuple[int, int]]:
        """The next ``n`` draws."""
        sources = self._sources(n)
        places = np.empty(n, np.int64)
        for source in range(len(self._counts)):
            of_source = sources == source
            places[of_source] = self._places(source, int(of_source.sum()))
        self.position += n
        return list(zip(sources.tolist(), places.tolist(), strict=True))

    def skip(self, n: int) -> None:
        """As ``take``, without its result."""
        end = self.position + n
        while self.position < end:
            block = min(end - self.position, SKIP_BLOCK)
            drawn = np.bincount(self._sources(block), minlength=len(self._counts)).tolist()
            self._taken = [before + more for before, more in zip(self._taken, drawn, strict=True)]
            self.position += block

    def _sources(self, n: int) -> Integers:
        """``[n]``: the sources of the next draws."""
        if len(self._counts) == 1:
            return np.zeros(n, np.int64)
        positions = np.arange(self.position, self.position + n, dtype=np.uint64)
        shares = (_hash(self._draws, positions) >> np.uint64(11)).astype(np.float64) / 2.0**53
        found = np.searchsorted(self._bounds, shares, side="right")
        sources: Integers = np.minimum(found, len(self._counts) - 1)  # the last bound may be rounded to less than 1
        return sources

    def _places(self, source: int, n: int) -> Integers:
        """``[n]``: the next indexes of a source."""
        count = self._counts[source]
        epochs, places = np.divmod(np.arange(self._taken[source], self._taken[source] + n), count)
        self._taken[source] += n
        if not n or not self._shuffle:
            return places
        first, orders = self._orders[source]
        if not first <= epochs[0] <= epochs[-1] < first + len(orders):
            first = int(epochs[0])
            orders = _permutations(self._epochs[source], first, int(epochs[-1]) + 1, count)
            self._orders[source] = (first, orders)
        chosen: Integers = orders[epochs - first, places]
        return chosen


class StreamOrder:
    """What each of many streams reads at each step: a document segment by segment, then the next of a common queue.

    The queue is a ``SegmentOrder`` of documents, so a weight counts documents. The streams are served in turn.

    Args:
        documents: of each source, the number of segments of each of its documents, 1 or more.
        weights, seed, shuffle: of the queue.
        streams: how many streams there are.
    """

    def __init__(
        self, documents: Sequence[Sequence[int]], weights: Sequence[float], seed: int, shuffle: bool, streams: int
    ) -> None:
        assert streams > 0, streams
        assert all(min(lengths) > 0 for lengths in documents), documents
        self.position = 0
        self._lengths = [list(lengths) for lengths in documents]
        self._queue = SegmentOrder([len(lengths) for lengths in documents], weights, seed, shuffle)
        self._drawn: deque[tuple[int, int]] = deque()
        self._documents_taken = 0
        self._current = [(0, 0, 0)] * streams
        self._starts = [0] * streams
        self._ends = [0] * streams

    def next_step(self) -> list[tuple[int, int, int, int]]:
        """Of each stream: source, document, segment in it, and an id that no other document of the run has.

        The ids count the documents in the order in which they were taken.
        """
        served = []
        for stream, end in enumerate(self._ends):
            if end == self.position:
                self._take(stream, self.position)
            source, document, document_id = self._current[stream]
            served.append((source, document, self.position - self._starts[stream], document_id))
        self.position += 1
        return served

    def skip(self, steps: int) -> None:
        """As ``steps`` times ``next_step``, without its results."""
        streams = len(self._ends)
        self.position += steps
        # Who ends first, and of those the first stream, takes the next document: one number orders both.
        turns = [end * streams + stream for stream, end in enumerate(self._ends)]
        heapify(turns)
        while turns[0] < self.position * streams:
            end, stream = divmod(turns[0], streams)
            self._take(stream, end)
            heapreplace(turns, self._ends[stream] * streams + stream)

    def _take(self, stream: int, step: int) -> None:
        """Give the next document of the queue to a stream that needs one at ``step``."""
        if not self._drawn:
            self._drawn.extend(self._queue.take(BLOCK))
        source, document = self._drawn.popleft()
        self._current[stream] = (source, document, self._documents_taken)
        self._documents_taken += 1
        self._starts[stream] = step
        self._ends[stream] = step + self._lengths[source][document]


def _permutations(key: Hashes, first: int, stop: int, count: int) -> Integers:
    """``[stop - first, count]``: for each epoch a random order of ``count`` indexes, sorted by their hashes."""
    epochs = _hash(key, np.arange(first, stop, dtype=np.uint64))
    orders: Integers = np.argsort(_hash(epochs[:, None], np.arange(count, dtype=np.uint64)), axis=1, kind="stable")
    return orders


def _hash(key: Hashes, value: Hashes | int) -> Hashes:
    """64 bits that look random, of a key and a value: splitmix64 (Steele, Lea and Flood, 2014) at key + value steps."""
    steps = np.atleast_1d(np.asarray(value, np.uint64)) + np.uint64(1)
    bits: Hashes = key + steps * np.uint64(0x9E3779B97F4A7C15)  # array arithmetic wraps around, as it must
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
