"""What an evaluation leaves: metrics.json with every number, report.md with the tables, and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from moshi_ttt.evaluation.long_context import STREAMS, Curve, LongContext
from moshi_ttt.evaluation.recall import PLACES, Recall
from moshi_ttt.evaluation.statistics import RESAMPLES, as_json, window_means
from moshi_ttt.evaluation.volumes import PICTURE, plot_volumes, volume_lines, volume_rows
from moshi_ttt.system.output_folder import METRICS

PALETTE = ("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEARING_LOOKS: dict[str, dict[str, Any]] = {
    "first": {"color": "#BBBBBB", "linewidth": 3.0},
    "second": {"color": PALETTE[1], "linewidth": 1.5},
    "third": {"color": PALETTE[2], "linewidth": 1.2, "linestyle": "--"},
}
"""Wide under narrow, so that hearings that lose the same are all seen."""
MARKERS = ("", "o", "s", "^")
STYLES = {"updates on": "-", "updates off": "--", "memory reset": "-.", "memory of another": ":"}
NOTE = (
    f"Intervals: 95 %, percentile bootstrap over recordings, {RESAMPLES:,} resamples. Nats per token; lower losses are "
    "better."
)


def versions() -> dict[str, str]:
    """Of what computed the figures."""
    return {name: version(name) for name in ("moshi-ttt", "moshi", "torch")}


def write_long_context(folder: Path, result: LongContext, *, made_by: str, frame_seconds: float) -> None:
    """metrics.json, report.md and a plot for each stream that has tokens."""
    streams = [stream for stream in STREAMS if any(_any(c) for c in result.curves if c.stream == stream)]
    values = {
        "made_by": made_by, "versions": versions(), **result.facts, "context_frames": result.context,
        "window_frames": result.options.window, "seed": result.options.seed, "every_frames": result.options.every,
        "segment_frames": result.options.segments, "attention_restarts": result.options.segments is not None,
        "figures_from_frame": result.curves[0].first_beyond * result.options.window,
        "recordings": result.recordings, "left_out": result.left_out,
        "curves": [_curve(result, curve) for curve in result.curves if curve.stream in streams],
    }  # fmt: skip
    (folder / METRICS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    lines = ["# Loss by position", "", *facts_lines(result.facts, result.recordings, result.left_out)]
    lines += [_how_heard(result, frame_seconds), ""]
    beyond = result.curves[0].first_beyond * result.options.window * frame_seconds
    for stream in streams:
        lines += [
            f"## {stream}", "", f"Beyond what attention sees (from {beyond:.1f} s on):", "",
            "| | loss | saved against base | rises per 1,000 frames |", "| --- | ---: | ---: | ---: |",
        ]  # fmt: skip
        base = result.curve("base", "updates on", stream)
        for curve in result.curves:
            if curve.stream == stream:
                saved = "" if curve is base else str(result.saved(curve, base))
                loss = result.loss(curve)
                lines.append(
                    f"| {curve.label} | {loss.value:.4f} ({loss.low:.4f} to {loss.high:.4f}) | {saved} | "
                    f"{result.slope(curve)} |"
                )
        lines += _by_span(result, stream)
        lines += ["", f"![{stream}]({stream}_by_position.png)", ""]
        _plot(folder / f"{stream}_by_position.png", result, stream, frame_seconds)
    (folder / "report.md").write_text("\n".join([*lines, NOTE, ""]), encoding="utf-8")


def _by_span(result: LongContext, stream: str) -> list[str]:
    """A table of what is saved by position in the recordings; nothing where no spans are given."""
    base = result.curve("base", "updates on", stream)
    rows = {
        curve.label: result.saved_by_span(curve, base)
        for curve in result.curves if curve.stream == stream and curve is not base
    }  # fmt: skip
    columns = next(iter(rows.values()), [])
    if not columns:
        return []
    return [
        "", "Saved against base, by position in the recording, in frames (recordings that reach it):", "",
        "| | " + " | ".join(f"{span.label} ({span.recordings})" for span in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {label} | " + " | ".join(str(span.saved) for span in row) + " |" for label, row in rows.items()),
    ]  # fmt: skip


def _how_heard(result: LongContext, frame_seconds: float) -> str:
    segments = result.options.segments
    if segments is None:
        return "Heard token by token, as a listener's Moshi hears: attention reaches back its whole context everywhere."
    return (
        f"Heard in plain forward passes of {segments} frames ({segments * frame_seconds:.1f} s), as training hears. "
        "Memory is carried from segment to segment. **Attention is not: it restarts at each segment** and sees nothing "
        "of what was before, so the first frames of each are harder for every subject. Each segment begins with start "
        "tokens, and the late codebooks of its last frames are not predicted. Compare only with results of the same "
        "segments."
    )


def write_recall(folder: Path, result: Recall, *, made_by: str) -> None:
    """metrics.json, report.md and a plot of the hearings by position."""
    rows = [
        {
            "subject": gains.subject, "condition": gains.condition, "hearing": gains.hearing,
            "gain": as_json(result.gain(gains)), "beyond_base": as_json(result.beyond_base(gains)),
            "by_recording": _numbers(gains.values),
            "saved_against_base": as_json(result.saved(gains)), "loss_by_recording": _numbers(gains.losses),
        }
        for gains in result.gains
    ]  # fmt: skip
    by_position = [
        {"subject": each.subject, "condition": each.condition}
        | {hearing: _numbers(losses) for hearing, losses in zip(PLACES, each.losses, strict=True)}
        for each in result.by_position
    ]
    values = {
        "made_by": made_by, "versions": versions(), **result.facts, "frames": result.frames, "skipped": result.skip,
        "seed": result.seed, "recordings": result.recordings, "left_out": result.left_out,
        "pieces_asked_for": result.asked, "pieces_by_recording": result.pieces,
        "memory_of_another_had_heard_own": result.heard_own, "gains": rows, "loss_by_position": by_position,
    }  # fmt: skip
    if result.by_volume:
        values["by_volume"] = volume_rows(result.by_volume, result.seed)
    (folder / METRICS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Recall", "", *facts_lines(result.facts, result.recordings, result.left_out), *_heard(result), "",
        "| | hearing | gain | beyond the base model's | loss of this hearing, saved against the base model's |",
        "| --- | --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for gains in result.gains:
        label = gains.subject if gains.subject == "base" else f"{gains.subject}, {gains.condition}"
        against = (result.beyond_base(gains), result.saved(gains))
        beyond, saved = ("", "") if gains.subject == "base" else map(str, against)
        lines.append(f"| {label} | {gains.hearing} | {result.gain(gains)} | {beyond} | {saved} |")
    lines += ["", "![hearings](recall_by_position.png)", ""]
    if result.by_volume:
        lines += volume_lines(result.by_volume, result.seed)
        subjects = list(dict.fromkeys(gains.subject for gains in result.gains))
        drawn = dict.fromkeys(each.subject for each in result.by_volume)
        colours = {name: look(subjects, name, "updates on")["color"] for name in drawn}
        plot_volumes(folder / PICTURE, result.by_volume, result.seed, colours)
    lines += [NOTE, ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    _plot_recall(folder / "recall_by_position.png", result)


def _heard(result: Recall) -> list[str]:
    """What was heard of the recordings, in words; and where memory of another was not only another's."""
    total = sum(result.pieces)
    lines = [
        f"{total} pieces of {result.frames} frames, up to {result.asked} of each recording; the first {result.skip} "
        "frames of a hearing are not counted. What a hearing saves against the first, in nats per audio token: the "
        "mean over recordings, each the mean of its pieces. The second hearing follows at once, the third after a "
        "piece of another recording.",
    ]  # fmt: skip
    for hearing, rows in (result.heard_own or {}).items():
        if rows:
            lines += [
                "", f"Memory of another, {hearing} hearing: in {rows} of {total} pieces that memory had heard the "
                "piece's own recording too. With --pieces 2 and four recordings in a batch it would not have.",
            ]  # fmt: skip
    return lines


def facts_lines(facts: dict[str, Any], recordings: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """The list at the head of a report: where everything comes from, and what was left out."""
    lines = [f"- {name}: {value}" for name, value in facts.items() if name != "subjects"]
    lines += [f"- {name}: {about}" for name, about in facts.get("subjects", {}).items()]
    lines.append(f"- recordings: {len(recordings)}")
    if left_out:
        lines.append(f"- left out, too short: {', '.join(left_out)}")
    lines.append("- " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    return [*lines, ""]


def _curve(result: LongContext, curve: Curve) -> dict[str, Any]:
    return {
        "subject": curve.subject, "condition": curve.condition, "stream": curve.stream,
        "loss_beyond_context": as_json(result.loss(curve)), "slope_per_1000_frames": as_json(result.slope(curve)),
        "saved_by_span": [
            {"from_frame": span.first, "to_frame": span.end, "recordings": span.recordings} | as_json(span.saved)
            for span in result.saved_by_span(curve, result.curve("base", "updates on", curve.stream))
        ],
        "mean_by_window": _numbers(curve.windows.nanmean(0)),
        "by_recording": [_numbers(row) for row in curve.windows],
    }  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _any(curve: Curve) -> bool:
    return not bool(curve.windows.isnan().all())


def _plot(path: Path, result: LongContext, stream: str, frame_seconds: float) -> None:
    """Above the loss by window, below what is saved against the base model; colours are subjects, dashes conditions."""
    curves = [curve for curve in result.curves if curve.stream == stream]
    base = result.curve("base", "updates on", stream)
    subjects = list(dict.fromkeys(curve.subject for curve in curves))
    panels = 1 if subjects == ["base"] else 2
    figure = Figure(figsize=(9.5, 1.0 + 2.8 * panels), layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    width = result.options.window * frame_seconds
    for curve in curves:
        drawn = look(subjects, curve.subject, curve.condition)
        seconds = [(index + 0.5) * width for index in range(curve.windows.shape[1])]
        axes[0].plot(seconds, curve.windows.nanmean(0), **drawn)
        if curve is not base:
            axes[1].plot(seconds, (base.windows - curve.windows).nanmean(0), **drawn)
    axes[0].set_ylabel(f"{stream} loss\n(nats per token)")
    if panels == 2:
        axes[1].axhline(0, **look(subjects, "base", "updates on"), zorder=1)
        axes[1].set_ylabel("saved against base\n(nats per token, above 0 is better)")
    _finish(figure, axes, result, frame_seconds)
    _explain(figure, subjects, list(dict.fromkeys(curve.condition for curve in curves)))
    figure.savefig(path, dpi=120)


def look(subjects: Sequence[str], subject: str, condition: str) -> dict[str, Any]:
    """How a curve is drawn. Where there are more subjects than colours, markers tell them apart."""
    again, place = divmod(subjects.index(subject), len(PALETTE))
    return {
        "color": PALETTE[place], "marker": MARKERS[again % len(MARKERS)], "markersize": 4, "markevery": 4,
        "linestyle": STYLES[condition], "linewidth": 1.8 if condition == "updates on" else 1.2,
    }  # fmt: skip


def _finish(figure: Figure, axes: Sequence[Any], result: LongContext, frame_seconds: float) -> None:
    """Titles, the line where attention ends, and the axis of positions."""
    segments = result.options.segments
    heard = f", segments of {segments * frame_seconds:.1f} s: attention restarts at each" if segments else ""
    recordings = "1 recording" if len(result.recordings) == 1 else f"mean over {len(result.recordings)} recordings"
    figure.suptitle(f"{recordings}{heard}", fontsize=10)
    reach = result.reach * frame_seconds
    for each in axes:
        each.axvline(reach, color="#999999", linewidth=1, zorder=0)
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#EEEEEE")
        each.set_axisbelow(True)  # or the grid would cross out the zero line
        each.tick_params(labelsize=8)
        each.yaxis.label.set_size(9)
    axes[0].annotate(
        f"attention reaches {reach:.1f} s", (reach, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", fontsize=8, color="#666666",
    )  # fmt: skip
    axes[-1].set_xlim(left=0)
    axes[-1].set_xlabel(
        f"position in the recording (s), windows of {result.options.window * frame_seconds:.1f} s", fontsize=9
    )


def _explain(figure: Figure, subjects: Sequence[str], conditions: Sequence[str]) -> None:
    """Beside the panels: whose colour is whose, and which dashes are which condition's."""
    handles = [Line2D([], [], **look(subjects, name, "updates on"), label=name) for name in subjects]
    if len(conditions) > 1:
        plain: list[dict[str, Any]] = [{"linestyle": STYLES[name], "label": name} for name in conditions]
        handles.append(Line2D([], [], linestyle="", label=""))
        handles += [Line2D([], [], color="#333333", linewidth=1.4, **each) for each in plain]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)


def _plot_recall(path: Path, result: Recall) -> None:
    """A panel for each subject, updates on: the loss of the three hearings by frame within the hearing."""
    shown = [each for each in result.by_position if each.condition == "updates on"]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    width = max(1, result.frames // 64)
    frames = [(index + 0.5) * width for index in range(result.frames)]
    figure = Figure(figsize=(1.6 + 2.8 * columns, 0.6 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, each in zip(panels[: len(shown)], shown, strict=True):
        axes.axvspan(0, result.skip, color="#EEEEEE", linewidth=0, label="not counted")
        for hearing, mean in zip(PLACES, window_means(each.losses, width), strict=True):
            axes.plot(frames[: len(mean)], mean, label=f"{hearing} hearing", **HEARING_LOOKS[hearing])
        axes.set_title(each.subject, fontsize=10)
        axes.set_xlim(0, result.frames)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    averaged = f", means over {width}" if width > 1 else ""
    figure.supxlabel(f"frame within the hearing{averaged}", fontsize=9)
    figure.supylabel("audio loss (nats per token)", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
