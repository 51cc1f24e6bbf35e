"""The table that answers the question: the arms that were chosen, on test recordings, in one row each."""

from __future__ import annotations

from study.curves import stream_parts
from study.results import Measured, StudyResults

ANOTHER = "memory of another"


def answer_table(results: StudyResults, groups: list[str], titles: list[str]) -> list[tuple[str, ...]]:
    """A header and a row for each chosen arm at its volume.

    Recall, what is left of it with another's memory, and the bucket of speech played once that is worst, for each of
    ``groups``, which the header calls ``titles``; then the worst part of one long stream, against the base model.
    """
    streams = {(row["arm"], row["volume"]): row for row in stream_parts(results)}
    header = ["", "compared with", "volume"]
    for title in titles:
        header += [f"recall, {title}", f"another's memory, {title}", f"worst bucket, {title}"]
    rows = [(*header, "worst part of one stream")]
    for label, arm in results.choices["arms"].items():
        other, volume = results.reference(arm), float(results.choices["volumes"][arm])
        row = [f"{arm} ({label})", other, f"{volume:g}"]
        for group in groups:
            row.append(_show(results.gain(group, arm, other, volume=volume)))
            there = (ANOTHER, volume) in results.settings(group, arm)
            row.append(_show(results.gain(group, arm, other, "second", ANOTHER, volume)) if there else "")
            row.append(_show(worst_bucket(results, group, arm, volume), 4))
        stream = streams.get((arm, volume))
        rows.append((*row, "" if stream is None else f"{stream['worst']:+.4f}"))
    return rows


def worst_bucket(results: StudyResults, group: str, arm: str, volume: float) -> Measured:
    """The effect on speech played once in the bucket where it is least."""
    other = results.reference(arm)
    effects = [
        results.effect(group, arm, other, column, volume=volume)
        for column in range(1, 1 + len(results.scale["buckets"]))
    ]
    return min(effects, key=lambda each: each.interval.value)


def _show(measured: Measured, digits: int = 3) -> str:
    return measured.interval.show(digits, sign=True)
