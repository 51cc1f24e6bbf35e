"""The reports of ``evaluate long-context`` and ``evaluate recall``: what is in their tables, numbers and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moshi_ttt.evaluation.long_context import STREAMS, LongContext, PositionCurve
from moshi_ttt.evaluation.recall import PLACES, Recall
from moshi_ttt.evaluation.statistics import RESAMPLES, as_json, window_means
from moshi_ttt.evaluation.volumes import PICTURE, plot_volumes, volume_lines, volume_rows
from moshi_ttt.system.report.figures import BLACK, BLUE, GREY, ORANGE, SHADE, colors, legend_outside, panels, rule, save
from moshi_ttt.system.report.tables import fact_lines, image, table
from moshi_ttt.system.report.writer import numbers, versions, write_report

PRESENTATION_LOOKS: dict[str, dict[str, Any]] = {
    "first": {"color": GREY, "alpha": 0.45, "linewidth": 3.0},
    "second": {"color": BLUE, "linewidth": 1.5},
    "third": {"color": ORANGE, "linewidth": 1.2, "linestyle": "--"},
}
"""Wide under narrow, so that presentations with equal losses are all seen."""
STYLES = {"updates on": "-", "updates off": "--", "memory reset": "-.", "memory of another": ":"}
ENOUGH = 10
"""Recordings from which a report gives intervals without a warning."""


def note(recordings: int) -> str:
    """The last line of a report: what its intervals are, and a warning where they are of few recordings."""
    said = (
        f"Intervals: 95 %, percentile bootstrap over recordings, {RESAMPLES:,} resamples. Losses are in nats/token; "
        "lower is better."
    )
    if recordings >= ENOUGH:
        return said
    few = "1 recording gives no interval" if recordings == 1 else f"{recordings} recordings make intervals too narrow"
    return f"{said} {few}: evaluate {ENOUGH} or more."


def write_long_context(folder: Path, result: LongContext, *, made_by: str, frame_seconds: float) -> None:
    """metrics.json, report.md and a figure for each stream that has tokens."""
    streams = [stream for stream in STREAMS if any(_any(c) for c in result.curves if c.stream == stream)]
    values = {
        "made_by": made_by, "versions": versions(), **result.facts, "context_frames": result.context,
        "window_frames": result.options.window, "seed": result.options.seed, "every_frames": result.options.every,
        "segment_frames": result.options.segments, "attention_restarts": result.options.segments is not None,
        "figures_from_frame": result.curves[0].first_beyond * result.options.window,
        "recordings": result.recordings, "left_out": result.left_out,
        "curves": [_curve(result, curve) for curve in result.curves if curve.stream in streams],
    }  # fmt: skip
    lines = ["# Loss by position", "", *fact_lines(result.facts, result.recordings, result.left_out)]
    lines += [_how_evaluated(result, frame_seconds), ""]
    beyond = result.curves[0].first_beyond * result.options.window * frame_seconds
    for stream in streams:
        lines += [f"## {stream}", "", f"Positions beyond the attention context (from {beyond:.1f} s on):", ""]
        lines += [*_losses(result, stream), *_by_span(result, stream), ""]
        lines += image(stream, f"{stream}_by_position.png")
        _plot(folder / f"{stream}_by_position.png", result, stream, frame_seconds)
    write_report(folder, values, [*lines, note(len(result.recordings))])


def _losses(result: LongContext, stream: str) -> list[str]:
    """The table of losses beyond the attention context."""
    base = result.curve("base", "updates on", stream)
    rows = [
        (
            curve.label, result.loss(curve).show(), "" if curve is base else str(result.saved(curve, base)),
            str(result.slope(curve)),
        )
        for curve in result.curves if curve.stream == stream
    ]  # fmt: skip
    return table(("", "loss", "saved against base", "rises per 1,000 frames"), rows)


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
        "", "Saved against base, by position in the recording, in frames (number of recordings that reach it):", "",
        *table(
            ("", *(f"{span.label} ({span.recordings})" for span in columns)),
            [(label, *(str(span.saved) for span in row)) for label, row in rows.items()],
        ),
    ]  # fmt: skip


def _how_evaluated(result: LongContext, frame_seconds: float) -> str:
    segments = result.options.segments
    if segments is None:
        return "Streamed token by token, as in a conversation: attention has its whole context at every frame."
    return (
        f"Plain forward passes of {segments} frames ({segments * frame_seconds:.1f} s), as in training. The TTT state "
        "is carried from segment to segment. **Attention is not: it restarts at each segment** and sees nothing "
        "before it, so every model has higher losses in the first frames of a segment. Each segment begins with start "
        "tokens, and the late codebooks of its last frames are not predicted. Compare only with results of the same "
        "segments."
    )


def write_recall(folder: Path, result: Recall, *, made_by: str) -> None:
    """metrics.json, report.md, and a figure of the loss by frame within each presentation."""
    values = {
        "made_by": made_by, "versions": versions(), **result.facts, "frames": result.frames, "skipped": result.skip,
        "seed": result.seed, "recordings": result.recordings, "left_out": result.left_out,
        "pieces_asked_for": result.asked, "pieces_by_recording": result.clips,
        "memory_of_another_had_heard_own": result.processed_own, "gains": _gains(result),
        "loss_by_position": [
            {"subject": each.model, "condition": each.condition}
            | {presentation: numbers(losses) for presentation, losses in zip(PLACES, each.losses, strict=True)}
            for each in result.by_position
        ],
    }  # fmt: skip
    if result.by_volume:
        values["by_volume"] = volume_rows(result.by_volume, result.seed)
    lines = ["# Recall", "", *fact_lines(result.facts, result.recordings, result.left_out), *_presented(result), ""]
    lines += [*_recall_table(result), "", *image("presentations", "recall_by_position.png")]
    if result.by_volume:
        lines += volume_lines(result.by_volume, result.seed)
        models = list(dict.fromkeys(gains.model for gains in result.gains))
        drawn = dict.fromkeys(each.model for each in result.by_volume)
        plot_volumes(
            folder / PICTURE, result.by_volume, result.seed,
            {name: look(models, name, "updates on")["color"] for name in drawn},
        )  # fmt: skip
    write_report(folder, values, [*lines, note(len(result.recordings))])
    _plot_recall(folder / "recall_by_position.png", result)


def _gains(result: Recall) -> list[dict[str, Any]]:
    return [
        {
            "subject": gains.model, "condition": gains.condition, "hearing": gains.presentation,
            "gain": as_json(result.gain(gains)), "beyond_base": as_json(result.beyond_base(gains)),
            "by_recording": numbers(gains.values),
            "saved_against_base": as_json(result.saved(gains)), "loss_by_recording": numbers(gains.losses),
        }
        for gains in result.gains
    ]  # fmt: skip


def _recall_table(result: Recall) -> list[str]:
    header = ("", "presentation", "gain", "beyond the base model's gain", "loss, saved against the base model")
    rows = []
    for gains in result.gains:
        is_base = gains.model == "base"
        against = ("", "") if is_base else (str(result.beyond_base(gains)), str(result.saved(gains)))
        label = gains.model if is_base else f"{gains.model}, {gains.condition}"
        rows.append((label, gains.presentation, str(result.gain(gains)), *against))
    return table(header, rows, "llrrr")


def _presented(result: Recall) -> list[str]:
    """What was presented, in words; and in which clips memory of another was not only another's."""
    total = sum(result.clips)
    lines = [
        f"{total} clips of {result.frames} frames, up to {result.asked} of each recording. Each clip is presented "
        "three times: the second presentation follows the first directly, the third follows a clip of another "
        f"recording. The first {result.skip} frames of each presentation are not counted. The gain is the loss of the "
        "first presentation minus the loss of this one, in nats per audio token: the mean over recordings, each the "
        "mean over its clips.",
    ]  # fmt: skip
    for presentation, rows in (result.processed_own or {}).items():
        if rows:
            lines += [
                "", f"Memory of another, {presentation} presentation: in {rows} of {total} clips the other memory has "
                "already processed the clip's own recording. With --clips 2 and four recordings in a batch this does "
                "not happen.",
            ]  # fmt: skip
    return lines


def _curve(result: LongContext, curve: PositionCurve) -> dict[str, Any]:
    return {
        "subject": curve.model, "condition": curve.condition, "stream": curve.stream,
        "loss_beyond_context": as_json(result.loss(curve)), "slope_per_1000_frames": as_json(result.slope(curve)),
        "saved_by_span": [
            {"from_frame": span.first, "to_frame": span.end, "recordings": span.recordings} | as_json(span.saved)
            for span in result.saved_by_span(curve, result.curve("base", "updates on", curve.stream))
        ],
        "mean_by_window": numbers(curve.windows.nanmean(0)),
        "by_recording": [numbers(row) for row in curve.windows],
    }  # fmt: skip


def _any(curve: PositionCurve) -> bool:
    return not bool(curve.windows.isnan().all())


def _plot(path: Path, result: LongContext, stream: str, frame_seconds: float) -> None:
    """Above the loss by window, below what is saved against the base model; colors are models, dashes conditions."""
    curves = [curve for curve in result.curves if curve.stream == stream]
    base = result.curve("base", "updates on", stream)
    models = list(dict.fromkeys(curve.model for curve in curves))
    rows = 1 if models == ["base"] else 2
    figure, axes = panels(rows, width=9.5, height=1.0 + 2.8 * rows, sharex=True)
    width = result.options.window * frame_seconds
    for curve in curves:
        drawn = look(models, curve.model, curve.condition)
        seconds = [(index + 0.5) * width for index in range(curve.windows.shape[1])]
        axes[0].plot(seconds, curve.windows.nanmean(0), **drawn)
        if curve is not base:
            axes[1].plot(seconds, (base.windows - curve.windows).nanmean(0), **drawn)
    axes[0].set_ylabel(f"{stream} loss\n(nats/token)")
    if rows == 2:
        axes[1].axhline(0, **look(models, "base", "updates on"), zorder=1)
        axes[1].set_ylabel("saved against base\n(nats/token, above 0 is better)")
    _mark(figure, axes, result, frame_seconds)
    _explain(figure, models, list(dict.fromkeys(curve.condition for curve in curves)))
    save(figure, path)


def look(models: Sequence[str], model: str, condition: str) -> dict[str, Any]:
    """How a curve is drawn: color and marker of its model, dashes of its condition."""
    width = 1.8 if condition == "updates on" else 1.2
    return {**colors(models.index(model)), "linestyle": STYLES[condition], "linewidth": width}


def _mark(figure: Figure, axes: Sequence[Axes], result: LongContext, frame_seconds: float) -> None:
    """Title, the line where attention ends, and the axis of positions."""
    segments = result.options.segments
    how = f", segments of {segments * frame_seconds:.1f} s: attention restarts at each" if segments else ""
    recordings = "1 recording" if len(result.recordings) == 1 else f"mean over {len(result.recordings)} recordings"
    figure.suptitle(f"{recordings}{how}", fontsize=10)
    reach = result.reach * frame_seconds
    for each in axes:
        rule(each, x=reach)
    axes[0].annotate(
        f"attention reaches {reach:.1f} s", (reach, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", fontsize=8, color=GREY,
    )  # fmt: skip
    axes[-1].set_xlim(left=0)
    axes[-1].set_xlabel(f"position in the recording (s), windows of {result.options.window * frame_seconds:.1f} s")


def _explain(figure: Figure, models: Sequence[str], conditions: Sequence[str]) -> None:
    """Beside the panels: the color of each model, and the dashes of each condition."""
    handles = [Line2D([], [], **look(models, name, "updates on"), label=name) for name in models]
    if len(conditions) > 1:
        plain: list[dict[str, Any]] = [{"linestyle": STYLES[name], "label": name} for name in conditions]
        handles.append(Line2D([], [], linestyle="", label=""))
        handles += [Line2D([], [], color=BLACK, linewidth=1.4, **each) for each in plain]
    legend_outside(figure, handles, handlelength=3.2)


def _plot_recall(path: Path, result: Recall) -> None:
    """A panel for each model, updates on: the loss of the three presentations by frame within the presentation."""
    shown = [each for each in result.by_position if each.condition == "updates on"]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    width = max(1, result.frames // 64)
    frames = [(index + 0.5) * width for index in range(result.frames)]
    figure, axes_of = panels(
        rows, columns, width=1.6 + 2.8 * columns, height=0.6 + 2.4 * rows, sharex=True, sharey=True
    )  # fmt: skip
    for axes, each in zip(axes_of[: len(shown)], shown, strict=True):
        axes.axvspan(0, result.skip, color=SHADE, linewidth=0, label="not counted")
        for presentation, mean in zip(PLACES, window_means(each.losses, width), strict=True):
            label = f"{presentation} presentation"
            axes.plot(frames[: len(mean)], mean, label=label, **PRESENTATION_LOOKS[presentation])
        axes.set_title(each.model)
        axes.set_xlim(0, result.frames)
        axes.tick_params(labelbottom=True)
    for axes in axes_of[len(shown) :]:
        axes.set_visible(False)
    averaged = f", means over {width}" if width > 1 else ""
    figure.supxlabel(f"frame within the presentation{averaged}", fontsize=9)
    figure.supylabel("audio loss (nats/token)", fontsize=9)
    legend_outside(figure)
    save(figure, path)
