"""The report of ``evaluate zero-shot``: the accuracy of each model in a table, and every score in metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moshi_ttt.evaluation.pair_accuracy import Accuracy, PairOutcome
from moshi_ttt.evaluation.statistics import LEVEL, Interval, as_json
from moshi_ttt.evaluation.zero_shot import ZeroShotResults
from moshi_ttt.system.report.tables import table
from moshi_ttt.system.report.writer import versions, write_report

CHANCE = 0.5


def write_zero_shot(folder: Path, results: ZeroShotResults, facts: Mapping[str, Any], *, made_by: str) -> None:
    """metrics.json with the scores of every pair, and report.md."""
    values = {"made_by": made_by, "versions": versions(), **facts, **zero_shot_metrics(results, scores=True)}
    write_report(folder, values, zero_shot_lines(results))


def zero_shot_metrics(results: ZeroShotResults, *, scores: bool = False) -> dict[str, Any]:
    """Values that ``json.dumps(..., allow_nan=False)`` takes; with ``scores`` those of every pair too."""
    return {
        "dataset": results.pairs.dataset,
        "source": str(results.pairs.source),
        "pairs": len(results.pairs.pairs),
        "left_out": list(results.pairs.problems),
        "normalisation": results.normalization,
        "codebooks": results.codebooks,
        "seed": results.seed,
        "chance": CHANCE,
        "variants": {
            name: {
                "overall": _accuracy(found.overall),
                "groups": {group: _accuracy(each) for group, each in found.groups.items()},
                **({"scores": [_outcome(outcome) for outcome in found.outcomes]} if scores else {}),
            }
            for name, found in results.evaluations.items()
        },
        "differences": {name: as_json(each) for name, each in results.differences.items()},
    }


def zero_shot_lines(results: ZeroShotResults) -> list[str]:
    """A section: what was scored and how, the table of models, and one of groups where there are any."""
    names = list(results.evaluations)
    overall = results.evaluations[names[0]].overall
    left_out = f"; {len(results.pairs.problems)} more could not be used" if results.pairs.problems else ""
    scored = "all codebooks" if results.codebooks == "all" else "the first, semantic codebook"
    normalized = "mean per predicted token" if results.normalization == "token" else "sum, not normalized by length"
    lines = [
        f"## Zero-shot: {results.pairs.dataset}", "",
        f"{overall.pairs} pairs of {overall.items} items{left_out}. The model is right where the right recording has "
        f"the lower negative log-likelihood over {scored} ({normalized}); ties count half, chance is {CHANCE:.0%}. "
        f"Intervals: {LEVEL:.0%}, percentile bootstrap over items, seed {results.seed}.", "",
    ]  # fmt: skip
    rows = []
    for name, found in results.evaluations.items():
        change = results.differences.get(name)
        rows.append((name, _percent(found.overall.share), "" if change is None else _percent(change, sign=True)))
    lines += table(("model", "accuracy, %", f"minus {names[0]}, points"), rows)
    if groups := results.evaluations[names[0]].groups:
        rows_of_groups = [
            (group, str(first.items), *(_percent(results.evaluations[name].groups[group].share) for name in names))
            for group, first in groups.items()
        ]
        lines += ["", *table(("group", "items", *names), rows_of_groups)]
    return lines


def _percent(interval: Interval, *, sign: bool = False) -> str:
    return interval.show(1, sign=sign, scale=100)


def _accuracy(found: Accuracy) -> dict[str, Any]:
    return {"accuracy": as_json(found.share), "items": found.items, "pairs": found.pairs}


def _outcome(outcome: PairOutcome) -> dict[str, Any]:
    pair = outcome.pair
    return {"name": pair.name, "group": pair.group, "right": outcome.right, "wrong": outcome.wrong}
