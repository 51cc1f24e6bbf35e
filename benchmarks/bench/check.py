"""Comparing the ratios of a run with a stored baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Spread

TOLERANCE = 0.20
"""A ratio may be this much larger than the baseline's, as a share of it."""
UPDATE = "make bench-baseline"


class BaselineError(Exception):
    """A baseline that cannot be read, or that this run cannot be compared with."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What has to be equal for two runs to be comparable, and what a reader wants to know beside it.

    Attributes:
        size: of the problems: ``small`` or ``smoke``.
        threads: that torch had.
        machine: the processor; only named, because ratios of another one may be compared.
        torch: its version; only named.
    """

    size: str
    threads: int
    machine: str
    torch: str


def write_baseline(path: Path, setting: Setting, ratios: Mapping[str, Spread]) -> None:
    """Store the ratios of a run."""
    values = {
        "made_by": UPDATE, **vars(setting),
        "ratios": {name: {key: round(value, 4) for key, value in vars(each).items()} for name, each in ratios.items()},
    }  # fmt: skip
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_baseline(path: Path) -> tuple[Setting, dict[str, Spread]]:
    """Raises BaselineError where there is none, or where it is not one."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        setting = Setting(**{name: values[name] for name in ("size", "threads", "machine", "torch")})
        return setting, {name: Spread(**each) for name, each in values["ratios"].items()}
    except FileNotFoundError:
        raise BaselineError(f"There is no baseline at {path}. Measure one on a quiet machine: {UPDATE}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaselineError(
            f"{path} is no baseline ({type(error).__name__}: {error}). Make it again: {UPDATE}"
        ) from None


def refuse_other_setting(now: Setting, then: Setting) -> None:
    """Raise BaselineError where the run and the baseline are of different sizes or threads."""
    for name in ("size", "threads"):
        mine, stored = getattr(now, name), getattr(then, name)
        if mine != stored:
            raise BaselineError(
                f"This run has --{name} {mine}, the baseline {stored}. Run with --{name} {stored}, or make another "
                f"baseline: {UPDATE}"
            )


def problems(
    measured: Mapping[str, Spread],
    baseline: Mapping[str, Spread],
    *,
    complete: bool = True,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """A sentence for every ratio that is too much larger than the baseline's, or that only one of the two has.

    Args:
        measured: the ratios of this run.
        baseline: the stored ones.
        complete: False where only some comparisons were run; the others are not missed.
        tolerance: how much larger a ratio may be, as a share of the baseline's.
    """
    found = []
    for name, spread in measured.items():
        stored = baseline.get(name)
        if stored is None:
            found.append(f"{name} has no baseline. Measure one on a quiet machine: {UPDATE}")
        elif not spread.median <= (1 + tolerance) * stored.median:  # true for NaN, too
            found.append(
                f"{name}: {spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f}), and the baseline is "
                f"{stored.median:.3f}: {_change(spread, stored)}, and {tolerance:+.0%} is allowed. Look for the change "
                f"that made it slower, or its reference faster; if it is intended, make a new baseline: {UPDATE}"
            )
    if complete:
        found += [
            f"{name} is in the baseline and was not measured. If the comparison is gone, make a new baseline: {UPDATE}"
            for name in baseline.keys() - measured.keys()
        ]
    return found


def faster(measured: Mapping[str, Spread], baseline: Mapping[str, Spread], tolerance: float = TOLERANCE) -> list[str]:
    """A sentence for every ratio that is so much smaller that the baseline no longer guards it."""
    return [
        f"{name}: {spread.median:.3f}, and the baseline is {baseline[name].median:.3f}: "
        f"{_change(spread, baseline[name])}. Make a new baseline, so that it stays so: {UPDATE}"
        for name, spread in measured.items()
        if name in baseline and spread.median < (1 - tolerance) * baseline[name].median
    ]


def _change(spread: Spread, stored: Spread) -> str:
    return f"{spread.median / stored.median - 1:+.0%}"
