"""Which clips of which recordings form a batch in ``recall``, and which clip is presented between their presentations.

``memory of another`` hands the memory of each row of a batch to the next row between two presentations. It is another
recording's only when the rows come from different recordings, so that is how they are put together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Clip(NamedTuple):
    """The ``number``-th clip, from 0, of the ``recording``-th recording."""

    recording: int
    number: int


class Row(NamedTuple):
    """One row of a batch: ``own`` is the A of A, A, B, A, and ``between`` the B."""

    own: Clip
    between: Clip


def lay_out(counts: Sequence[int], batch_size: int, *, next_between: bool) -> list[list[Row]]:
    """Every clip once, in batches of ``batch_size`` rows or a few more.

    Args:
        counts: how many clips each recording has, one at least; two recordings or more.
        next_between: B is always of the next recording. Otherwise it is of the first of the following recordings that
            the next row is not of: ``memory of another`` would hand that row a memory that has just processed its own.
    """
    laid_out = []
    for clips in _batches(counts, batch_size):
        rows = []
        for own, receiver in zip(clips, [*clips[1:], clips[0]], strict=True):
            others = [(own.recording + step) % len(counts) for step in range(1, len(counts))]
            clean = others if next_between else [other for other in others if other != receiver.recording]
            other = (clean or others)[0]
            rows.append(Row(own, Clip(other, own.number % counts[other])))
        laid_out.append(rows)
    return laid_out


def processed_own(batches: Sequence[Sequence[Row]]) -> dict[str, int]:
    """In how many rows ``memory of another`` has processed the row's own recording, by presentation.

    Memory is handed on before each presentation. The memory of a row's second presentation was in the row before it;
    that of its third was three rows back in the first presentation, two rows back in the second, and in the row before
    it during B.
    """
    found = {"second": 0, "third": 0}
    for rows in batches:
        for index, row in enumerate(rows):
            one, two, three = (rows[(index - back) % len(rows)] for back in (1, 2, 3))
            found["second"] += row.own.recording == one.own.recording
            found["third"] += row.own.recording in (
                three.own.recording, two.own.recording, one.between.recording,
            )  # fmt: skip
    return found


def _batches(counts: Sequence[int], size: int) -> Iterator[list[Clip]]:
    """Recordings with the most clips left come first: then one is twice in a batch only where it must be."""
    left = list(counts)
    for rows in torch.arange(sum(counts)).tensor_split(max(1, sum(counts) // size)):
        clips: list[Clip] = []
        while len(clips) < len(rows):
            order = sorted((r for r in range(len(left)) if left[r]), key=lambda r: (-left[r], r))
            for recording in order[: len(rows) - len(clips)]:
                clips.append(Clip(recording, counts[recording] - left[recording]))
                left[recording] -= 1
        yield _apart(clips)


def _apart(clips: list[Clip]) -> list[Clip]:
    """The same clips; those of one recording are not neighbours, nor first and last, unless they are most of all."""
    often = Counter(clip.recording for clip in clips)
    if max(often.values()) == 1:
        return clips
    ordered = sorted(clips, key=lambda clip: (-often[clip.recording], clip))
    places = [*range(0, len(clips), 2), *range(1, len(clips), 2)]
    return [clip for _, clip in sorted(zip(places, ordered, strict=True))]
