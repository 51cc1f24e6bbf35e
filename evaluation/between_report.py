"""The report of ``evaluate recall --between``: metrics.json with every number, report.md with a table, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moshi_ttt.evaluation.between import FIGURES, After, Between
from moshi_ttt.evaluation.reporting import note
from moshi_ttt.evaluation.statistics import as_json
from moshi_ttt.system.report.figures import MARKERS, PALETTE, legend_outside, panels, rule, save
from moshi_ttt.system.report.tables import fact_lines, image, table
from moshi_ttt.system.report.writer import numbers, versions, write_report

PICTURE = "recall_by_interval.png"
DASHES = ("-", "--", ":", "-.")


def write_between(folder: Path, result: Between, *, made_by: str, frame_seconds: float) -> None:
    """metrics.json, report.md and the figure."""
    options, seconds = result.options, result.options.frames * frame_seconds
    values = {
        "made_by": made_by, "versions": versions(), **result.facts, "frames": options.frames, "skipped": result.skip,
        "seed": options.seed, "recordings": result.recordings, "left_out": result.left_out,
        "pieces_asked_for": options.clips, "pieces_by_recording": result.clips, "interludes": result.interludes,
        "attention_restarts": True, "between": [_row(each, seconds, options.seed) for each in result.after],
    }  # fmt: skip
    header = (
        "", "volume", "clips between", "time between", "gain beyond the base model's",
        "this presentation, saved against the base model", "clips between, saved against the base model",
    )  # fmt: skip
    rows = [
        (
            each.model, f"{each.volume:g}", str(each.count), _duration(each.count * seconds),
            *(str(each.interval(name, options.seed)) for name in FIGURES),
        )
        for each in result.after
    ]  # fmt: skip
    lines = [
        "# Recall after other clips", "", *fact_lines(result.facts, result.recordings, result.left_out),
        f"{sum(result.clips)} clips of {options.frames} frames ({seconds:.1f} s), up to {options.clips} of each "
        f"recording. Each is followed by other clips, from {result.interludes} of the interludes, and then presented "
        f"again. Every clip is one forward pass: memory is carried, attention restarts. The first {result.skip} frames "
        "of a presentation are not counted.", "",
        *table(header, rows), "", *image("gain by the time between", PICTURE),
    ]  # fmt: skip
    write_report(folder, values, [*lines, note(len(result.recordings))])
    _plot(folder / PICTURE, result, seconds)


def _row(each: After, seconds: float, seed: int) -> dict[str, Any]:
    return {
        "subject": each.model, "volume": each.volume, "clips_between": each.count,
        "seconds_between": each.count * seconds,
        "gain_beyond_base": as_json(each.interval("gain", seed)),
        "saved_against_base": as_json(each.interval("saved", seed)),
        "interludes_saved_against_base": as_json(each.interval("once", seed)),
        "gain_by_recording": numbers(each.gain), "saved_by_recording": numbers(each.saved),
        "interludes_saved_by_recording": numbers(each.once),
    }  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _plot(path: Path, result: Between, seconds: float) -> None:
    """The gain against the time between, on a logarithmic axis; colors are models, dashes volumes."""
    models = list(dict.fromkeys(each.model for each in result.after))
    volumes = list(dict.fromkeys(each.volume for each in result.after))
    figure, (axes,) = panels(width=7.5, height=4.5)
    rule(axes, y=0)
    for model, volume in dict.fromkeys((each.model, each.volume) for each in result.after):
        again, place = divmod(models.index(model) + 1, len(PALETTE))  # the first color is the base model's
        own = [each for each in result.after if (each.model, each.volume) == (model, volume)]
        gains = [each.interval("gain", result.options.seed) for each in own]
        axes.errorbar(
            [each.count * seconds for each in own], [gain.value for gain in gains],
            yerr=[[gain.value - gain.low for gain in gains], [gain.high - gain.value for gain in gains]],
            color=PALETTE[place], linestyle=DASHES[volumes.index(volume) % len(DASHES)], linewidth=1.6, capsize=3,
            elinewidth=1, marker=MARKERS[again % len(MARKERS)] or ".",
            label=f"{model}, volume {volume:g}" if len(volumes) > 1 else model,
        )  # fmt: skip
    ticks = sorted({each.count for each in result.after})
    axes.set_xscale("log")
    axes.set_xticks([count * seconds for count in ticks], [_duration(count * seconds) for count in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time between the two presentations (logarithmic)")
    axes.set_ylabel("gain beyond the base model's (nats per audio token)")
    legend_outside(figure)
    save(figure, path)
