"""Held-out recordings in batches, each from its beginning to its end. They do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moshi_ttt.data.corpus import Corpus, SegmentError
from moshi_ttt.data.dataset import CodesBatch


def held_out_batches(corpus: Corpus, *, batch_size: int, rank: int, world_size: int) -> Iterator[Iterator[CodesBatch]]:
    """For ``batch_size`` recordings at a time on each rank, their consecutive segments.

    Every rank gets equally many batches; where a recording has ended, or there is none, a row is the zero token.
    Longest recordings first, so that those of a batch end together. What cannot be read is the zero token too, and the
    batch says so.
    """
    listed = [
        (recording.segments, source, number)
        for source, each in enumerate(corpus.sources)
        for number, recording in enumerate(each.recordings)
    ]
    listed.sort(key=lambda item: (-item[0], *item[1:]))
    group = batch_size * world_size
    for first in range(0, len(listed), group):
        together = listed[first : first + group]
        mine = together[rank * batch_size :][:batch_size]
        yield _segments(corpus, mine, batch_size, longest=together[0][0], first=first + rank * batch_size)


def _segments(
    corpus: Corpus, recordings: Sequence[tuple[int, int, int]], rows: int, *, longest: int, first: int
) -> Iterator[CodesBatch]:
    nothing = torch.full((corpus.rows, corpus.frames), corpus.zero_token, dtype=torch.int64)
    ids = torch.arange(first, first + rows)
    for segment in range(longest):
        codes, problems = [nothing] * rows, []
        for row, (segments, source, number) in enumerate(recordings):
            if segment < segments:
                try:
                    codes[row] = corpus.codes(source, number, segment)
                except SegmentError as error:
                    problems.append(str(error))
        yield CodesBatch(torch.stack(codes), ids, tuple(problems))
