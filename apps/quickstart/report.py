"""``report.md`` and ``metrics.json``: the run, its results with their uncertainty, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moshi_ttt.apps.quickstart.evaluate import WINDOW
from moshi_ttt.apps.quickstart.results import QuickstartResults, metrics, verdict
from moshi_ttt.apps.quickstart.setup import Setup
from moshi_ttt.core.units import human_bytes
from moshi_ttt.hosts.moshi.loading import BUILTIN_TINY
from moshi_ttt.system.report.tables import table
from moshi_ttt.system.report.writer import write_report
from moshi_ttt.training.optimizer import rates


def write(
    folder: Path, setup: Setup, results: QuickstartResults, seconds: Mapping[str, float], *, made_by: str
) -> None:
    """Write both files into the folder."""
    figures = metrics(setup, results, seconds, made_by=made_by)
    sections = (_heading, _recall, _result, _data, _training, _streaming, _reproduce)
    written = (section(setup, results, figures).strip() for section in sections)
    write_report(folder, figures, ["\n\n".join(section for section in written if section)])


def _heading(setup: Setup, results: QuickstartResults, figures: Mapping[str, Any]) -> str:
    plan = setup.plan
    sites = ", ".join(f"`{block.variant.name}` at `{block.site}`" for block in plan.blocks)
    return f"""# Quickstart: test-time training in a small Moshi

{sites}:
{plan.parameters:,} trained parameters beside {figures["parameters"]["base"]:,} frozen ones of
`{setup.settings.host.hf_repo}`; {human_bytes(plan.state_bytes)} of state per stream; precision policy
`{plan.policy.name}`."""


def _recall(setup: Setup, results: QuickstartResults, figures: Mapping[str, Any]) -> str:
    twice = results.twice
    if twice is None:
        return ""
    seconds = twice.frames * results.streamed.frame_ms / 1000
    return f"""## A clip presented twice

The first {seconds:.1f} s of the held-out recording are presented twice. In the second presentation, the adapter that
ships with the tiny Moshi has a loss **{twice.saved:.2f} nats per audio token** lower than the base model's. Only frames
whose attention context ({twice.skip} frames) holds nothing of the first presentation are counted. The adapter was not
trained on this recording. The right panel and the sections below show the blocks that were trained here.

![a clip presented twice](heard_twice.png)"""


def _result(setup: Setup, results: QuickstartResults, figures: Mapping[str, Any]) -> str:
    losses = table(
        ("audio loss on held-out speech", "nats/token"), [(curve.name, f"{curve.mean:.4f}") for curve in results.curves]
    )
    verdicts = "\n".join(f"- {verdict(difference)}" for difference in results.differences)
    span = WINDOW * results.streamed.frame_ms / 1000
    windows = [
        (f"{part[0][0]} to {part[0][1]}", *(f"{mean:.3f}" for _, _, mean in part))
        for part in zip(*(curve.windows() for curve in results.curves), strict=True)
    ]
    by_window = table(("frames", *(curve.name for curve in results.curves)), windows)
    new_line = "\n"
    return f"""## Result

{new_line.join(losses)}

{verdicts}

How to read it:

{_guide(setup, results)}

The standard error is over windows of {WINDOW} frames ({span:.1f} s) of one recording; another seed moves the numbers
too (`--seed 1`). This is one speaker, one recording and a tiny model: it shows that the method runs and how large its
effect is here. It shows nothing about Moshi 7B.

![loss by position](loss_by_position.png)

{new_line.join(by_window)}"""


def _guide(setup: Setup, results: QuickstartResults) -> str:
    lines = ["- *base model*: no blocks. The difference to it includes what the blocks learned in training."]
    if results.control is not None:
        lines.append(
            "- *trained without updates*: the control. The same blocks from the same start, trained on the same speech "
            "for as many steps, but with test-time updates disabled. The difference to it is the effect of the updates."
        )
    lines.append(
        "- *updates off*: the trained blocks with their updates disabled after training. They were not trained for "
        "that, so the difference to it shows how much they depend on updates, not how much updates help."
    )
    if results.cleared is not None:
        lines.append(
            f"- *memory cleared*: updates on, but the fast weights are reset every {setup.model.context} frames, the "
            "length of the attention context. The difference to it is the effect of memory beyond that context."
        )
    return "\n".join(lines)


def _data(setup: Setup, results: QuickstartResults, figures: Mapping[str, Any]) -> str:
    data = figures["data"]
    base = (
        "None of these recordings was used to train the base model."
        if setup.settings.host.hf_repo == BUILTIN_TINY
        else "Whether the base model was trained on any of these recordings is not known here."
    )
    return f"""## Data

{data["source"]}. The blocks were trained on {data["training_seconds"]:.0f} s, each recording at several speeds:
{", ".join(data["training"])}. They were evaluated on {data["held_out"]} ({data["held_out_seconds"]:.0f} s), which they
were not trained on. {base}"""


def _training(setup: Setup, results: QuickstartResults, figures: Mapping[str, Any]) -> str:
    run, rate = setup.settings.run, rates(setup.settings.run.optim)
    return f"""## Training

{run.max_steps} steps of AdamW, {run.batch_size} segments of {setup.segments.frames} frames a step,
{figures["training"]["seconds_per_step"] * 1000:.0f} ms a step; learning rate {rate["ttt"]:g}, gates
{rate["gates"]:g}; seeds: blocks {setup.settings.ttt.seed}, segments {run.seed}.

![training](training.png)"""


def _streaming(setup: Setup, results: QuickstartResults, figures: Mapping[str, Any]) -> str:
    streamed, agreement, stream = results.streamed, results.agreement, setup.settings.run.stream
    moved = "\n".join(
        f"- `{site}`: {values[0]:.2%} of their initial norm after one frame, {values[-1]:.1%} after {len(values)}."
        for site, values in streamed.change.items()
    )
    return f"""## Streaming

{len(streamed.step_ms)} frames of {setup.streamed.name} went in as the user's voice, one at a time, while Moshi answered
(`generated.wav`; temperature {stream.temperature:g}, seed {stream.seed}; a model of this size babbles).

- {streamed.median_ms:.1f} ms a frame (median; one frame is {streamed.frame_ms:.0f} ms of audio), real-time factor
  {streamed.real_time_factor:.2f} with {figures["machine"]["threads"]} thread(s).
- Over {agreement.frames} frames, token by token against one forward pass as in training, in {agreement.dtype}: logits
  differ by at most {agreement.audio:.1e} (audio, of {agreement.audio_scale:.0f}) and {agreement.text:.1e} (text, of
  {agreement.text_scale:.0f}).

Change of the fast weights during the stream:

{moved}

![state](state.png)"""


def _reproduce(setup: Setup, results: QuickstartResults, figures: Mapping[str, Any]) -> str:
    host = {key: value for key, value in figures["config"]["host"].items() if value is not None}
    return f"""## Reproduce

Versions: {", ".join(f"{name} {number}" for name, number in figures["versions"].items())}.
Times in seconds: {", ".join(f"{name} {value:.0f}" for name, value in figures["seconds"].items())}.
Every number is in `metrics.json`, with the whole configuration. `adapter/` holds the trained blocks:

```python
from moshi_ttt import default_registry, load_adapter

host = default_registry().host("moshi")
model = host.load(host.config_class.model_validate({host!r}))
injection = load_adapter(model, "adapter")
```"""
