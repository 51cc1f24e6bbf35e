"""Data that cannot be used: the error, what is wrong with single recordings, and how many of those a run allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moshi_ttt.core.errors import MoshiTTTError

LISTED = 10
"""Problems that an error message spells out."""


class DataError(MoshiTTTError, ValueError):
    """Training data that cannot be used."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line of a manifest (``line`` counts from 1)."""

    file: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def check_share(problems: Sequence[Problem], total: int, *, max_bad_share: float, text: str) -> None:
    """Raise DataError when more than ``max_bad_share`` of ``total`` recordings have problems, or none is left."""
    if not 0.0 <= max_bad_share < 1.0:
        raise DataError(f"data.max_bad_share = {max_bad_share}: allowed are shares from 0 to below 1, such as 0.01.")
    if total == 0:
        raise DataError(f"data {text!r} lists no recordings. Give a manifest with a line for each recording.")
    bad = len(problems)
    if bad < total and bad / total <= max_bad_share:
        return
    listed = [f"  {problem}" for problem in problems[:LISTED]]
    if bad > LISTED:
        listed.append(f"  and {bad - LISTED} more")
    advice = "No recording is left: fix them." if bad >= total else "Fix or remove them, or raise data.max_bad_share."
    raise DataError(
        f"data {text!r}: {bad} of {total} recordings ({bad / total:.1%}) cannot be used, and data.max_bad_share allows "
        f"{max_bad_share:.1%}:\n" + "\n".join(listed) + f"\n{advice}"
    )
