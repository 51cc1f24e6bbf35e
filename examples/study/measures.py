"""What is measured of one model at one volume: losses, which are compared with those of other models later.

Every forward pass is a plain one. The state of the blocks is carried to the next pass, and attention starts afresh in
each, so it sees nothing of an earlier presentation.

Shape legend: R recordings, K buckets, B rows, Q rows of the language model, T frames, N counts, P parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moshi_ttt.core.host import CarriedState
from moshi_ttt.evaluation.clips import Clip, lay_out
from moshi_ttt.evaluation.documents import Document, batches
from moshi_ttt.evaluation.models import Condition, ModelUnderTest, evaluate_codes
from moshi_ttt.evaluation.recall import choose
from moshi_ttt.evaluation.statistics import window_means
from moshi_ttt.evaluation.teacher_forcing import forward_losses
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from study.jobs import StudyError


def once(
    tested: ModelUnderTest, documents: Sequence[Document], *, condition: Condition, volume: float, segment: int,
    buckets: Sequence[int], least: int, batch_size: int,
) -> Tensor:  # fmt: skip
    """``[R, 1 + K]``: the audio loss of recordings played once, from the first bucket on, and in each bucket.

    See ``bucket_means``.
    """
    found: dict[int, Tensor] = {}
    for chosen, codes in batches(documents, batch_size, tested.padding):
        losses = evaluate_codes(tested, codes, condition, every=segment, segments=segment, volume=volume).audio
        means = torch.cat([bucket_means(losses, each, least) for each in (buckets[:1], buckets)], dim=1)
        found |= {id(document): row for document, row in zip(chosen, means, strict=True)}
    return torch.stack([found[id(document)] for document in documents])


def joined(documents: Sequence[Document], frames: int) -> list[Document]:
    """Recordings one after the other, as many as it takes for each to have ``frames`` frames; what is left is dropped.

    Recordings of a minute do not reach the last bucket, and these do.
    """
    found: list[Document] = []
    open_ones: list[Document] = []
    for document in documents:
        open_ones.append(document)
        if sum(each.frames for each in open_ones) >= frames:
            codes = torch.cat([each.codes for each in open_ones], dim=1)  # [Q, T]
            found.append(Document(" + ".join(each.name for each in open_ones), codes))
            open_ones = []
    return found


def bucket_means(losses: Tensor, buckets: Sequence[int], least: int) -> Tensor:
    """``[R, K]``: means over the frames of each bucket, of ``losses [R, T]``; NaN where it has fewer than ``least``.

    A bucket begins at its frame in ``buckets`` and ends where the next begins; the last has no end. NaN in ``losses``
    does not count.
    """
    columns = []
    for first, end in pairwise((*buckets, None)):
        part = losses[:, first:end]  # [R, T']
        columns.append(torch.where((~part.isnan()).sum(1) >= least, part.nanmean(1), math.nan))
    return torch.stack(columns, dim=1)


def recall(
    tested: ModelUnderTest, documents: Sequence[Document], *, condition: Condition, volume: float, frames: int,
    clips: int, batch_size: int,
) -> Tensor:  # fmt: skip
    """``[R, 4]``: the audio loss of each presentation of A, A, B, A beyond the attention context at its beginning.

    A is each of the first ``clips`` clips of a recording, B a clip of another recording.
    """
    kept, _ = choose(documents, frames, clips, tested.context)
    rows_of = lay_out([min(clips, document.frames // frames) for document in kept], batch_size, next_between=False)
    losses, owners = [], []
    for rows in rows_of:
        codes = torch.stack([
            torch.cat([_codes(kept, clip, frames) for clip in (row.own, row.own, row.between, row.own)], dim=1)
            for row in rows
        ])  # [B, Q, 4 T]  # fmt: skip
        found = evaluate_codes(tested, codes, condition, every=frames, segments=frames, volume=volume).audio
        losses.append(found.unflatten(1, (4, frames))[:, :, tested.context :].nanmean(2))  # [B, 4 T] to [B, 4]
        owners += [row.own.recording for row in rows]
    return _of_recordings(torch.cat(losses), torch.tensor(owners), len(kept))


def held(
    tested: ModelUnderTest, documents: Sequence[Document], *, volume: float, frames: int, clips: int,
    counts: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``[R, N]`` twice: the audio loss of so many clips presented one after the other, and of each presented again.

    A row begins with the first clip of its recording, and goes on through the first clips of the recordings that
    follow, then the second ones. Each clip is presented again from the state after all of them, and leaves nothing
    behind.

    Raises StudyError where there are fewer clips than the largest of ``counts``.
    """
    kept, _ = choose(documents, frames, clips, tested.context)
    pool = [
        _codes(kept, Clip(recording, number), frames)
        for number in range(clips) for recording, document in enumerate(kept)
        if document.frames >= (number + 1) * frames
    ]  # fmt: skip
    if len(pool) < max(counts):
        raise StudyError(f"{max(counts)} clips held at once: the recordings have {len(pool)}. Give smaller counts.")
    firsts: list[Tensor] = []
    means: list[tuple[Tensor, Tensor]] = []
    state: CarriedState | None = None
    with tested.present(), MOSHI_HOST.updates(tested.model, True), MOSHI_HOST.volume(tested.model, volume):
        for place in range(max(counts)):
            loss, state = _forward(tested, _column(pool, place, len(kept)), state)
            firsts.append(loss)
            if place + 1 in counts:
                again = [_forward(tested, _column(pool, each, len(kept)), state)[0] for each in range(place + 1)]
                means.append((torch.stack(firsts).mean(0), torch.stack(again).mean(0)))
    return torch.stack([first for first, _ in means], dim=1), torch.stack([again for _, again in means], dim=1)


def hour(
    tested: ModelUnderTest, documents: Sequence[Document], *, volume: float, rows: int, frames: int, part: int,
    segment: int,
) -> Tensor:  # fmt: skip
    """``[B, P]``: the audio loss of streams of ``frames`` frames, by parts of ``part`` frames.

    Each row is a stream of whole recordings one after the other, in an order of its own, none of them twice. It is
    shorter where there are not as many frames.
    """
    codes = torch.stack([_joined(documents, row, frames) for row in range(rows)])  # [B, Q, T]
    losses = evaluate_codes(tested, codes, "updates on", every=segment, segments=segment, volume=volume).audio
    return window_means(losses, part)


def _joined(documents: Sequence[Document], seed: int, frames: int) -> Tensor:
    """``[Q, T]``: the recordings in an order that ``seed`` decides, cut after ``frames`` frames."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.cat([documents[index].codes for index in order], dim=1)[:, :frames]


def _codes(documents: Sequence[Document], clip: Clip, frames: int) -> Tensor:
    """``[Q, T]``."""
    return documents[clip.recording].codes[:, clip.number * frames : (clip.number + 1) * frames]


def _column(pool: Sequence[Tensor], place: int, rows: int) -> Tensor:
    """``[B, Q, T]``: the clip at ``place`` of every row; a row starts at a clip of its own and goes around."""
    return torch.stack([pool[(row + place) % len(pool)] for row in range(rows)])


def _forward(tested: ModelUnderTest, codes: Tensor, state: CarriedState | None) -> tuple[Tensor, CarriedState]:
    """``[B]``: the mean audio loss of ``codes [B, Q, T]`` beyond the attention context, and the state after it."""
    losses, after = forward_losses(tested.model, codes, MOSHI_HOST, state)
    return losses.audio[:, tested.context :].nanmean(1), after


def _of_recordings(values: Tensor, owners: Tensor, recordings: int) -> Tensor:
    """``[R, ...]``: the mean over each recording's rows, of ``values [B, ...]``."""
    return torch.stack([values[owners == recording].nanmean(0) for recording in range(recordings)])


def plain(values: Tensor) -> list[object]:
    """As lists for JSON: six digits after the point, None for NaN."""
    if values.dim() > 1:
        return [plain(row) for row in values]
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]
