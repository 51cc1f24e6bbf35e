"""How often the right recording of a pair has the lower score, with an interval over items.

Shape legend: N items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.evaluation.pairs import Pair
from moshi_ttt.evaluation.statistics import Interval, bootstrap, mean_of_rows


class ScoringError(MoshiTTTError, ValueError):
    """Recordings or models that cannot be compared."""


@dataclass(frozen=True)
class PairOutcome:
    """Scores of a pair's two recordings."""

    pair: Pair
    right: float
    wrong: float

    @property
    def value(self) -> float:
        """1 where the right recording has the lower score, 0 where the wrong one has, 0.5 for a tie."""
        return (self.right < self.wrong) + 0.5 * (self.right == self.wrong)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The share of items answered rightly, from 0 to 1, with its interval over items.

    Attributes:
        items, pairs: how many; an item's value is the mean over its pairs.
    """

    share: Interval
    items: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a scorer makes of pairs; ``groups`` in the order in which they first occur, none where no pair has one."""

    outcomes: tuple[PairOutcome, ...]
    overall: Accuracy
    groups: dict[str, Accuracy]


def accuracy(outcomes: Sequence[PairOutcome], *, seed: int = 0) -> Accuracy:
    """The share of items where the right recording has the lower score; ties count half. Raises ScoringError for none.

    The interval is a percentile bootstrap over items, seeded: pairs of one item are not independent.
    """
    values = _by_item(outcomes)
    return Accuracy(share=bootstrap(values, mean_of_rows, seed=seed), items=len(values), pairs=len(outcomes))


def evaluate_pairs(pairs: Iterable[Pair], scorer: Callable[[Path], float], *, seed: int = 0) -> Evaluation:
    """What ``scorer`` makes of ``pairs``: asked once for each recording, it gives a score, the lower the likelier.

    Raises ScoringError: no pairs, or a score that is not a finite number.
    """
    scores: dict[Path, float] = {}
    outcomes = []
    groups: dict[str, list[PairOutcome]] = {}
    for pair in pairs:
        for path in (pair.right, pair.wrong):
            if path not in scores:
                scores[path] = finite_score(scorer(path), path)
        outcome = PairOutcome(pair, scores[pair.right], scores[pair.wrong])
        outcomes.append(outcome)
        if pair.group:
            groups.setdefault(pair.group, []).append(outcome)
    return Evaluation(
        outcomes=tuple(outcomes), overall=accuracy(outcomes, seed=seed),
        groups={name: accuracy(found, seed=seed) for name, found in groups.items()},
    )  # fmt: skip


def difference(evaluation: Evaluation, base: Evaluation, *, seed: int = 0) -> Interval:
    """The accuracy of ``evaluation`` minus that of ``base``, both of the same pairs, resampled alike."""
    assert [outcome.pair for outcome in evaluation.outcomes] == [outcome.pair for outcome in base.outcomes]
    return bootstrap(_by_item(evaluation.outcomes) - _by_item(base.outcomes), mean_of_rows, seed=seed)


def finite_score(value: float, path: Path) -> float:
    """``value``, the score of ``path``. Raises ScoringError where it is not finite."""
    if not math.isfinite(value):
        raise ScoringError(f"{path} has the score {value}, which is not finite. Check the model with moshi-ttt doctor.")
    return value


def _by_item(outcomes: Sequence[PairOutcome]) -> Tensor:
    """``[N]`` float64: each item's mean over its pairs, in the order in which items first occur."""
    if not outcomes:
        raise ScoringError("No pairs to score. Give a data set with at least one.")
    items: dict[str, list[float]] = {}
    for outcome in outcomes:
        items.setdefault(outcome.pair.question, []).append(outcome.value)
    return torch.tensor([sum(values) / len(values) for values in items.values()], dtype=torch.float64)
