"""What ``evaluate recall --between`` leaves: metrics.json with every number, report.md with one table, one figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moshi_ttt.evaluation.between import FIGURES, After, Between
from moshi_ttt.evaluation.reporting import MARKERS, NOTE, PALETTE, facts_lines, versions
from moshi_ttt.evaluation.statistics import as_json
from moshi_ttt.system.output_folder import METRICS

PICTURE = "recall_by_interval.png"
DASHES = ("-", "--", ":", "-.")


def write_between(folder: Path, result: Between, *, made_by: str, frame_seconds: float) -> None:
    """metrics.json, report.md and the figure."""
    options, seconds = result.options, result.options.frames * frame_seconds
    values = {
        "made_by": made_by, "versions": versions(), **result.facts, "frames": options.frames, "skipped": result.skip,
        "seed": options.seed, "recordings": result.recordings, "left_out": result.left_out,
        "pieces_asked_for": options.pieces, "pieces_by_recording": result.pieces, "interludes": result.interludes,
        "attention_restarts": True, "between": [_row(each, seconds, options.seed) for each in result.after],
    }  # fmt: skip
    (folder / METRICS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Recall after other clips", "", *facts_lines(result.facts, result.recordings, result.left_out),
        f"{sum(result.pieces)} clips of {options.frames} frames ({seconds:.1f} s), up to {options.pieces} of each "
        f"recording. Each is followed by other clips, from {result.interludes} of the interludes, and then presented "
        f"again. Every clip is one forward pass: memory is carried, attention restarts. The first {result.skip} frames "
        "of a presentation are not counted.", "",
        "| | volume | clips between | time between | gain beyond the base model's | this presentation, saved against "
        "the base model | clips between, saved against the base model |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for each in result.after:
        cells = " | ".join(str(each.interval(name, options.seed)) for name in FIGURES)
        lines.append(
            f"| {each.subject} | {each.volume:g} | {each.count} | {_duration(each.count * seconds)} | {cells} |"
        )
    lines += ["", f"![gain by the time between]({PICTURE})", "", NOTE, ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(folder / PICTURE, result, seconds)


def _row(each: After, seconds: float, seed: int) -> dict[str, Any]:
    return {
        "subject": each.subject, "volume": each.volume, "clips_between": each.count,
        "seconds_between": each.count * seconds,
        "gain_beyond_base": as_json(each.interval("gain", seed)),
        "saved_against_base": as_json(each.interval("saved", seed)),
        "interludes_saved_against_base": as_json(each.interval("once", seed)),
        "gain_by_recording": each.gain.tolist(), "saved_by_recording": each.saved.tolist(),
        "interludes_saved_by_recording": each.once.tolist(),
    }  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _plot(path: Path, result: Between, seconds: float) -> None:
    """The gain against the time between, on a logarithmic axis; colors are subjects, dashes volumes."""
    subjects = list(dict.fromkeys(each.subject for each in result.after))
    volumes = list(dict.fromkeys(each.volume for each in result.after))
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=PALETTE[0], linewidth=1, zorder=0)
    for subject, volume in dict.fromkeys((each.subject, each.volume) for each in result.after):
        again, place = divmod(subjects.index(subject) + 1, len(PALETTE))  # the first color is the base model's
        own = [each for each in result.after if (each.subject, each.volume) == (subject, volume)]
        gains = [each.interval("gain", result.options.seed) for each in own]
        axes.errorbar(
            [each.count * seconds for each in own], [gain.value for gain in gains],
            yerr=[[gain.value - gain.low for gain in gains], [gain.high - gain.value for gain in gains]],
            color=PALETTE[place], linestyle=DASHES[volumes.index(volume) % len(DASHES)], linewidth=1.6, capsize=3,
            elinewidth=1, marker=MARKERS[again % len(MARKERS)] or ".",
            label=f"{subject}, volume {volume:g}" if len(volumes) > 1 else subject,
        )  # fmt: skip
    ticks = sorted({each.count for each in result.after})
    axes.set_xscale("log")
    axes.set_xticks([count * seconds for count in ticks], [_duration(count * seconds) for count in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time between the two presentations (logarithmic)", fontsize=9)
    axes.set_ylabel("gain beyond the base model's (nats per audio token)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
