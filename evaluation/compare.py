"""Several evaluations in one table and one figure: the result of each model in each, with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi_ttt.core.deprecation import renamed_attributes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.system.output_folder import METRICS
from moshi_ttt.system.report.figures import BLUE, GREY, heading, interval_bar, name_rows, panels, save
from moshi_ttt.system.report.tables import image, show_interval, table
from moshi_ttt.system.report.writer import number, write_report

COMPARED = ("long-context", "recall", "zero-shot")


@renamed_attributes(subject="model")
@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure: ``value`` with its interval, of a model under a condition, in an evaluation.

    Attributes:
        what: the evaluation and what it measured, with its unit.
        lower_is_better: whether it is a loss.
    """

    what: str
    model: str
    value: float
    low: float
    high: float
    lower_is_better: bool


def read_results(folders: Sequence[Path]) -> tuple[list[Result], list[dict[str, Any]]]:
    """The figures of folders that ``moshi-ttt evaluate`` wrote, and of each folder what it says about itself.

    Raises ConfigError: no such result, folders of different base models, or two figures for the same thing.
    """
    found: dict[tuple[str, str], Result] = {}
    facts: list[dict[str, Any]] = []
    for folder in folders:
        values = _read(folder)
        kind = str(values["made_by"]).removeprefix("moshi-ttt evaluate ")
        for result in {"long-context": _long_context, "recall": _recall, "zero-shot": _zero_shot}[kind](values):
            other = found.setdefault((result.what, result.model), result)
            if not math.isclose(other.value, result.value, rel_tol=1e-6) and math.isfinite(result.value):
                raise ConfigError(
                    f"{result.what} of {result.model} is {result.value:.6f} in {folder}, and {other.value:.6f} in a "
                    "folder before it. Compare evaluations of the same recordings, and give each adapter its own name."
                )
        about = ("made_by", "data", "dataset", "base model", "seed", "subjects", "versions")
        facts.append({"folder": str(folder), **{key: values[key] for key in about if key in values}})
    bases = {fact.get("base model") for fact in facts}
    if len(bases) > 1:
        raise ConfigError(f"These results are of different base models: {', '.join(map(str, sorted(bases, key=str)))}.")
    return list(found.values()), facts


def _read(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is not a result of `moshi-ttt evaluate`: {METRICS} cannot be read ({error}). Give a folder that "
            "`moshi-ttt evaluate` wrote."
        ) from None
    made_by = values.get("made_by") if isinstance(values, dict) else None
    if made_by not in {f"moshi-ttt evaluate {name}" for name in COMPARED}:
        raise ConfigError(
            f"{folder} was made by {made_by!r}. Only long-context, recall and zero-shot results can be compared."
        )
    return dict(values)


def _long_context(values: dict[str, Any]) -> Iterator[Result]:
    segments = values.get("segment_frames")
    how = f", segments of {segments} frames" if segments else ""
    for curve in values["curves"]:
        what = f"{curve['stream']} loss beyond the attention context{how} (nats/token)"
        yield _result(what, _label(curve), curve["loss_beyond_context"], lower_is_better=True)


def _recall(values: dict[str, Any]) -> Iterator[Result]:
    if "between" in values:  # A, other clips, A
        for after in values["between"]:
            what = f"recall after {after['clips_between']} other clips, beyond the base model's gain (nats/token)"
            label = f"{after['subject']}, volume {after['volume']:g}"
            yield _result(what, label, after["gain_beyond_base"], lower_is_better=False)
        return
    for gain in values["gains"]:
        what = f"recall, {gain['hearing']} presentation (gain, nats/token)"
        yield _result(what, _label(gain), gain["gain"], lower_is_better=False)
    for point in values.get("by_volume", ()):
        label = f"{point['subject']}, volume {point['volume']:g}"
        what = "recall, second presentation, beyond the base model's gain (nats/token)"
        yield _result(what, label, point["recall"], lower_is_better=False)
        yield _result("cost of the first presentation (nats/token)", label, point["cost"], lower_is_better=True)


def _zero_shot(values: dict[str, Any]) -> Iterator[Result]:
    for name, variant in values["variants"].items():
        what = f"{values['dataset']} (share of pairs right)"
        yield _result(what, name, variant["overall"]["accuracy"], lower_is_better=False)


def _label(entry: dict[str, Any]) -> str:
    return str(entry["subject"]) if entry["subject"] == "base" else f"{entry['subject']}, {entry['condition']}"


def _result(what: str, model: str, interval: dict[str, float | None], *, lower_is_better: bool) -> Result:
    value, low, high = (math.nan if (x := interval[key]) is None else float(x) for key in ("value", "low", "high"))
    return Result(what=what, model=model, value=value, low=low, high=high, lower_is_better=lower_is_better)


def write_comparison(folder: Path, results: Sequence[Result], facts: Sequence[dict[str, Any]], *, made_by: str) -> None:
    """metrics.json, report.md and comparison.png."""
    rows = [
        {
            "what": result.what, "subject": result.model, "value": number(result.value), "low": number(result.low),
            "high": number(result.high), "lower_is_better": result.lower_is_better,
        }
        for result in results
    ]  # fmt: skip
    measured = list(dict.fromkeys(result.what for result in results))
    models = list(dict.fromkeys(result.model for result in results))
    by_place = {(result.model, result.what): result for result in results}
    cells = [(model, *(_cell(by_place.get((model, what))) for what in measured)) for model in models]
    lines = [
        "# Comparison", "", *table(("", *measured), cells), "",
        "Losses and costs: lower is better; everything else: higher is better. In brackets: 95 % intervals.", "",
        *image("comparison", "comparison.png"), *(f"- {fact}" for fact in facts),
    ]  # fmt: skip
    write_report(folder, {"made_by": made_by, "results": rows, "of": list(facts)}, lines)
    _plot(folder / "comparison.png", measured, models, by_place)


def _cell(result: Result | None) -> str:
    return "" if result is None else show_interval(result.value, result.low, result.high)


def _plot(path: Path, measured: Sequence[str], models: Sequence[str], by_place: dict[tuple[str, str], Result]) -> None:
    """A panel for each figure: the value of each model and its interval."""
    panel_rows = [[by_place[model, what] for model in models if (model, what) in by_place] for what in measured]
    counts = [len(rows) for rows in panel_rows]
    height = 0.4 + 0.7 * len(measured) + 0.24 * sum(counts)
    figure, axes_of = panels(len(measured), width=8.5, height=height, height_ratios=[1 + count for count in counts])
    for axes, what, rows in zip(axes_of, measured, panel_rows, strict=True):
        for place, result in enumerate(rows):
            color = GREY if result.model == "base" else BLUE
            axes.plot(result.value, place, "o", color=color, markersize=5)
            interval_bar(axes, result.low, result.high, place, color)
        name_rows(axes, [result.model for result in rows])
        axes.margins(y=0.3 / len(rows))
        heading(axes, f"{what}; {'lower' if rows[0].lower_is_better else 'higher'} is better")
    save(figure, path, grid="x")
