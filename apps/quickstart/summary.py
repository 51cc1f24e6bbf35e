"""What a quickstart prints: first what it will do, at the end the main numbers and next steps."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moshi_ttt.apps.quickstart.results import QuickstartResults, verdict
from moshi_ttt.apps.quickstart.setup import Setup
from moshi_ttt.core.units import human_bytes


def introduction(setup: Setup) -> RenderableType:
    """The text that is printed before the run."""
    plan, speech = setup.plan, setup.speech
    sites = ", ".join(f"{block.variant.name} at {block.site}" for block in plan.blocks)
    return Text(
        f"Blocks: {sites}; {plan.parameters:,} parameters, {human_bytes(plan.state_bytes)} of state per stream.\n"
        f"Speech: {speech.training_seconds:.0f} s to train on; held out: {speech.held_out.name} "
        f"({speech.held_out.seconds:.0f} s). Streamed: {setup.streamed.name}."
    )


def conclusion(out: Path, files: list[str], setup: Setup, results: QuickstartResults, seconds: float) -> RenderableType:
    """The main numbers, the files, and what to try next."""
    streamed, agreement = results.streamed, results.agreement
    table = Table(title=f"Audio loss on held-out speech ({setup.speech.held_out.name})", title_justify="left")
    table.add_column("")
    table.add_column("nats/token", justify="right")
    for curve in results.curves:
        table.add_row(curve.name, f"{curve.mean:.4f}")
    lines = [verdict(difference) for difference in results.differences]
    if results.twice is not None:
        lines.insert(
            0,
            f"A clip presented twice: the shipped adapter saves {results.twice.saved:.2f} nats/token the second time "
            "(heard_twice.png).",
        )
    lines.append(
        f"Streaming: {streamed.median_ms:.0f} ms per frame of {streamed.frame_ms:.0f} ms (real-time factor "
        f"{streamed.real_time_factor:.2f}). Token by token, the logits differ from training's by at most "
        f"{max(agreement.audio, agreement.text):.0e}."
    )
    lines += [
        f"The fast weights of {site} moved by {change[-1]:.1%} of their norm during the stream."
        for site, change in streamed.change.items()
    ]
    following = (
        f"Took {seconds:.0f} s. Next:\n"
        f"  open {out / 'report.md'}, listen to {out / 'generated.wav'}\n"
        "  moshi-ttt quickstart --audio YOUR.wav --out another-run   your own voice\n"
        "  moshi-ttt quickstart --config tiny-ttt-linear --out linear-run   another kind of block\n"
        "  moshi-ttt explain moshi-7b-ttt-mlp   what the same would cost in Moshi 7B"
    )
    listing = f"Wrote {str(out).rstrip('/')}/: {', '.join(files)}"
    return Group(table, Text("\n".join(lines)), "", Text(listing), Text(following))
