"""Several evaluations in one table and one figure: what each subject reached in each, with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.system.output_folder import METRICS

COMPARED = ("long-context", "recall", "zero-shot")
BLUE, GREY = "#0072B2", "#666666"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure: ``value`` with its interval, of a subject under a condition, in an evaluation.

    Attributes:
        what: the evaluation and what it measured, with its unit.
        lower_is_better: whether it is a loss.
    """

    what: str
    subject: str
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
            other = found.setdefault((result.what, result.subject), result)
            if not math.isclose(other.value, result.value, rel_tol=1e-6) and math.isfinite(result.value):
                raise ConfigError(
                    f"{result.what} of {result.subject} is {result.value:.6f} in {folder}, and {other.value:.6f} in a "
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
            f"{folder} is no result of `moshi-ttt evaluate`: {METRICS} cannot be read ({error})."
        ) from None
    made_by = values.get("made_by") if isinstance(values, dict) else None
    if made_by not in {f"moshi-ttt evaluate {name}" for name in COMPARED}:
        raise ConfigError(f"{folder} was made by {made_by!r}; compared can be results of: {', '.join(COMPARED)}.")
    return dict(values)


def _long_context(values: dict[str, Any]) -> Iterator[Result]:
    segments = values.get("segment_frames")
    heard = f", segments of {segments} frames" if segments else ""
    for curve in values["curves"]:
        what = f"{curve['stream']} loss beyond attention{heard} (nats a token)"
        yield _result(what, _label(curve), curve["loss_beyond_context"], lower_is_better=True)


def _recall(values: dict[str, Any]) -> Iterator[Result]:
    if "between" in values:  # A, other clips, A
        for after in values["between"]:
            what = f"recall after {after['clips_between']} other clips, beyond the base (nats a token)"
            label = f"{after['subject']}, volume {after['volume']:g}"
            yield _result(what, label, after["gain_beyond_base"], lower_is_better=False)
        return
    for gain in values["gains"]:
        what = f"recall, {gain['hearing']} hearing (nats saved a token)"
        yield _result(what, _label(gain), gain["gain"], lower_is_better=False)
    for point in values.get("by_volume", ()):
        label = f"{point['subject']}, volume {point['volume']:g}"
        what = "recall, second hearing beyond the base (nats a token)"
        yield _result(what, label, point["recall"], lower_is_better=False)
        yield _result("cost of speech heard once (nats a token)", label, point["cost"], lower_is_better=True)


def _zero_shot(values: dict[str, Any]) -> Iterator[Result]:
    for name, variant in values["variants"].items():
        what = f"{values['dataset']} (share of pairs right)"
        yield _result(what, name, variant["overall"]["accuracy"], lower_is_better=False)


def _label(entry: dict[str, Any]) -> str:
    return str(entry["subject"]) if entry["subject"] == "base" else f"{entry['subject']}, {entry['condition']}"


def _result(what: str, subject: str, interval: dict[str, float | None], *, lower_is_better: bool) -> Result:
    value, low, high = (math.nan if (x := interval[key]) is None else float(x) for key in ("value", "low", "high"))
    return Result(what=what, subject=subject, value=value, low=low, high=high, lower_is_better=lower_is_better)


def write_comparison(folder: Path, results: Sequence[Result], facts: Sequence[dict[str, Any]], *, made_by: str) -> None:
    """metrics.json, report.md and comparison.png."""
    rows = [{key: _number(value) for key, value in vars(result).items()} for result in results]
    values = {"made_by": made_by, "results": rows, "of": list(facts)}
    (folder / METRICS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    measured = list(dict.fromkeys(result.what for result in results))
    subjects = list(dict.fromkeys(result.subject for result in results))
    by_place = {(result.subject, result.what): result for result in results}
    lines = ["# Comparison", "", f"| | {' | '.join(measured)} |", "| --- |" + " ---: |" * len(measured)]
    for subject in subjects:
        cells = [_cell(by_place.get((subject, what))) for what in measured]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    lines += ["", "Losses: lower is better; everything else: higher. In brackets 95 % intervals.", ""]
    lines += ["![comparison](comparison.png)", "", *(f"- {fact}" for fact in facts), ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(folder / "comparison.png", measured, subjects, by_place)


def _cell(result: Result | None) -> str:
    if result is None or not math.isfinite(result.value):
        return ""
    interval = f" ({result.low:.4f} to {result.high:.4f})" if math.isfinite(result.low) else ""
    return f"{result.value:.4f}{interval}"


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plot(
    path: Path, measured: Sequence[str], subjects: Sequence[str], by_place: dict[tuple[str, str], Result]
) -> None:
    figure = Figure(figsize=(8, 1.2 + len(measured) * (0.6 + 0.24 * len(subjects))), layout="constrained")
    panels = figure.subplots(len(measured), 1, squeeze=False)[:, 0]
    for axes, what in zip(panels, measured, strict=True):
        shown = [
            (place, by_place[subject, what]) for place, subject in enumerate(subjects) if (subject, what) in by_place
        ]
        for place, result in shown:
            colour = GREY if result.subject == "base" else BLUE
            axes.plot(result.value, place, "o", color=colour, markersize=5)
            if math.isfinite(result.low):
                axes.plot([result.low, result.high], [place, place], "-", color=colour, linewidth=2)
        axes.set_yticks(range(len(subjects)), subjects, fontsize=8)
        axes.invert_yaxis()
        better = "lower" if shown and shown[0][1].lower_is_better else "higher"
        axes.set_title(f"{what}; {better} is better", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#DDDDDD")
    figure.savefig(path, dpi=120)
