"""What a quickstart found: on the console, in ``report.md`` and, every number, in ``metrics.json``."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moshi_ttt.apps.explain import human_bytes
from moshi_ttt.apps.output_folder import METRICS
from moshi_ttt.apps.quickstart.evaluate import WINDOW, Curve, Difference
from moshi_ttt.apps.quickstart.setup import Setup
from moshi_ttt.apps.quickstart.stream import Agreement, Streamed
from moshi_ttt.apps.quickstart.train import TrainingLog

REPORT = "report.md"
SOURCE = "Asterisk core sounds (English, one speaker), CC-BY-SA-3.0"


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that was measured. ``curves``: base, updates off, updates on; ``differences``: on against each of them."""

    training: TrainingLog
    curves: tuple[Curve, ...]
    differences: tuple[Difference, ...]
    agreement: Agreement
    streamed: Streamed


def introduction(setup: Setup) -> RenderableType:
    """What is about to run."""
    plan, speech = setup.plan, setup.speech
    sites = ", ".join(f"{block.variant.name} at {block.site}" for block in plan.blocks)
    return Text(
        f"Blocks: {sites}; {plan.parameters:,} parameters, {human_bytes(plan.state_bytes)} of state per stream.\n"
        f"Speech: {speech.training_seconds:.0f} s to train on; held out: {speech.held_out.name} "
        f"({speech.held_out.seconds:.0f} s). Streamed: {setup.streamed.name}."
    )


def conclusion(out: Path, setup: Setup, results: Results, seconds: Mapping[str, float]) -> RenderableType:
    """The main numbers, the files, and what to try next."""
    streamed = results.streamed
    table = Table(title=f"Audio loss on held-out speech ({setup.speech.held_out.name})", title_justify="left")
    table.add_column("")
    table.add_column("nats per token", justify="right")
    for curve in results.curves:
        table.add_row(curve.name, f"{curve.mean:.4f}")
    lines = [verdict(difference) for difference in results.differences]
    lines.append(
        f"Streaming: {streamed.median_ms:.0f} ms per frame of {streamed.frame_ms:.0f} ms (real-time factor "
        f"{streamed.real_time_factor:.2f}); it differs from training by at most {results.agreement.audio:.0e} in the "
        "logits."
    )
    lines += [
        f"The fast weights of layer {site.layer} moved by {change[-1]:.1%} of their norm while listening."
        for site, change in streamed.change.items()
    ]
    listing = f"Wrote {out}{'/' if not str(out).endswith('/') else ''}: " + ", ".join(_files(setup, results))
    following = (
        f"Took {seconds['total']:.0f} s. Next:\n"
        f"  open {out / REPORT}, listen to {out / 'generated.wav'}\n"
        "  moshi-ttt quickstart --audio YOUR.wav --out another-run   your own voice\n"
        "  moshi-ttt quickstart --config tiny-ttt-linear --out linear-run   another kind of block\n"
        "  moshi-ttt explain moshi-7b-ttt-mlp   what the same would cost in Moshi 7B"
    )
    return Group(table, Text("\n".join(lines)), "", Text(listing), Text(following))


def verdict(difference: Difference) -> str:
    """One honest sentence on which of two is better, by how much, and how sure that is."""
    if abs(difference.mean) <= 2 * difference.error or math.isnan(difference.error):
        return (
            f"No clear difference between {difference.better} and {difference.worse}: {difference.mean:+.4f} nats per "
            f"token, standard error {difference.error:.4f}."
        )
    word = "lower" if difference.mean > 0 else "HIGHER"
    return (
        f"With {difference.better} the loss is {abs(difference.mean):.4f} nats per token {word} than with "
        f"{difference.worse} (standard error {difference.error:.4f}; second half of the recording: "
        f"{difference.second_half:+.4f})."
    )


def write(folder: Path, setup: Setup, results: Results, seconds: Mapping[str, float], *, made_by: str) -> None:
    """``report.md`` and ``metrics.json``."""
    figures = metrics(setup, results, seconds, made_by=made_by)
    (folder / METRICS).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(markdown(setup, results, figures), encoding="utf-8")


def metrics(setup: Setup, results: Results, seconds: Mapping[str, float], *, made_by: str) -> dict[str, Any]:
    """Every number, JSON-able; a number that could not be measured is null."""
    settings, plan, streamed, speech = setup.settings, setup.plan, results.streamed, setup.speech
    return {
        "made_by": made_by,
        "versions": {name: version(name) for name in ("moshi-ttt", "moshi", "torch")}
        | {"python": platform.python_version()},
        "machine": {"device": "cpu", "threads": torch.get_num_threads(), "platform": platform.machine()},
        "config": {
            "host": settings.host.model_dump(mode="json"),
            "precision": plan.policy.name,
            "seed": settings.ttt.seed,
            "ttt": [entry.model_dump(mode="json") for entry in settings.ttt.ttt],
            "train": settings.train.model_dump(mode="json"),
            "stream": settings.stream.model_dump(mode="json"),
        },
        "data": {
            "source": SOURCE,
            "training": sorted({recording.name for recording in speech.training}),
            "training_seconds": speech.training_seconds,
            "held_out": speech.held_out.name,
            "held_out_seconds": speech.held_out.seconds,
            "streamed": setup.streamed.name,
        },
        "parameters": {
            "base": sum(p.numel() for p in plan.host.base_state_dict(setup.model).values()),
            "blocks": plan.parameters,
        },
        "state_bytes_per_stream": plan.state_bytes,
        "training": {
            "losses": results.training.losses,
            "gradient_norms": results.training.gradient_norms,
            "seconds_per_step": results.training.seconds / len(results.training.losses),
        },
        "held_out_loss": {
            curve.name: {"mean": _number(curve.mean), "windows": [(s, _number(v)) for s, v in curve.windows()]}
            for curve in results.curves
        },
        "window_frames": WINDOW,
        "differences": [
            {key: _number(value) if isinstance(value, float) else value for key, value in asdict(difference).items()}
            | {"clear": difference.clear}
            for difference in results.differences
        ],
        "streaming": {
            "frames": len(streamed.step_ms),
            "median_ms_per_frame": streamed.median_ms,
            "p95_ms_per_frame": _percentile(streamed.step_ms, 0.95),
            "real_time_factor": streamed.real_time_factor,
            "fast_weight_change": {str(site): change for site, change in streamed.change.items()},
            "against_training": asdict(results.agreement),
        },
        "seconds": dict(seconds),
    }


def markdown(setup: Setup, results: Results, figures: Mapping[str, Any]) -> str:
    """The report: what was done, what came out, how sure that is, and what it does not show."""
    plan, train, stream = setup.plan, setup.settings.train, setup.settings.stream
    base, off, on = results.curves
    streamed, agreement, data = results.streamed, results.agreement, figures["data"]
    sites = ", ".join(f"`{block.variant.name}` at `{block.site}`" for block in plan.blocks)
    windows = "\n".join(
        f"| {start} to {start + WINDOW - 1} | {b:.3f} | {o:.3f} | {n:.3f} | {o - n:+.3f} |"
        for (start, b), (_, o), (_, n) in zip(base.windows(), off.windows(), on.windows(), strict=True)
    )
    moved = "\n".join(
        f"- `{site}`: {change[0]:.2%} of their initial norm after one frame, {change[-1]:.1%} after {len(change)}."
        for site, change in streamed.change.items()
    )
    return f"""# Quickstart: a Moshi that learns while it listens

{sites}: {plan.parameters:,} trained parameters beside {figures["parameters"]["base"]:,} frozen ones of
`{setup.settings.host.hf_repo}`; {human_bytes(plan.state_bytes)} of state per stream; precision policy
`{plan.policy.name}`.

## Result

| audio loss on held-out speech | nats per token |
| --- | ---: |
| base model, no blocks | {base.mean:.4f} |
| trained blocks, updates off | {off.mean:.4f} |
| trained blocks, updates on | {on.mean:.4f} |

{chr(10).join(f"- {verdict(difference)}" for difference in results.differences)}

The standard error is over windows of {WINDOW} frames ({WINDOW * streamed.frame_ms / 1000:.1f} s) of one recording.
How to read it: *updates on* against *updates off* shows what the fast weights learn during the recording, in a model
whose blocks were trained with updates on (nothing was trained to do without them). *Updates on* against the *base
model* also has what the blocks learned from the training recordings before. One speaker, one recording and a tiny
model: this shows that the machinery works and how large its effect is here, and nothing about Moshi 7B.

![loss by position](loss_by_position.png)

| frames | base | updates off | updates on | off minus on |
| --- | ---: | ---: | ---: | ---: |
{windows}

## Data

{data["source"]}. Trained on {data["training_seconds"]:.0f} s: {", ".join(data["training"])}, each at
several speeds. Evaluated on {data["held_out"]} ({data["held_out_seconds"]:.0f} s), which neither the base model nor the
blocks were trained on. The base model was not trained on any of these recordings either.

## Training

{train.steps} steps of AdamW, {train.batch_size} segments of {train.frames} frames a step, learning rate
{train.learning_rate:g} (gates {train.gate_learning_rate:g}), seeds: blocks {setup.settings.ttt.seed}, segments
{train.seed}.
{figures["training"]["seconds_per_step"] * 1000:.0f} ms a step.

![training](training.png)

## Streaming

{len(streamed.step_ms)} frames of {data["streamed"]} went in as the user's voice, one at a time, while Moshi answered
(`generated.wav`; temperature {stream.temperature:g}, seed {stream.seed}; a model of this size babbles).

- {streamed.median_ms:.1f} ms a frame (median; one frame is {streamed.frame_ms:.0f} ms of audio), real-time factor
  {streamed.real_time_factor:.2f} on {figures["machine"]["threads"]} threads.
- Over {agreement.frames} frames, token by token against one forward pass as in training: logits differ by at most
  {agreement.audio:.1e} (audio, of {agreement.audio_scale:.0f}) and {agreement.text:.1e} (text, of
  {agreement.text_scale:.0f}).

Change of the fast weights while listening:

{moved}

![state](state.png)

## Reproduce

Versions: {", ".join(f"{name} {number}" for name, number in figures["versions"].items())}.
Times in seconds: {", ".join(f"{name} {value:.0f}" for name, value in figures["seconds"].items())}.
Every number is in `metrics.json`, the whole configuration among them. `adapter/` holds the trained blocks:

```python
from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.core.registry import default_registry

host = default_registry().host("moshi")
model = host.load(host.config_class.model_validate({json.dumps(figures["config"]["host"]).replace("null", "None")}))
injection = load_adapter(model, "adapter")
```
"""


def _files(setup: Setup, results: Results) -> list[str]:
    audio = ["generated.wav"] if results.streamed.tokens.shape[1] else []
    return ["adapter/", REPORT, "loss_by_position.png", "training.png", "state.png", *audio, METRICS]


def _percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100)[round(100 * share) - 1] if len(values) > 1 else values[0]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
