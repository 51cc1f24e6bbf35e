"""The results of a quickstart, as numbers and as sentences."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moshi_ttt.apps.quickstart.evaluate import WINDOW, Curve, Difference, compare
from moshi_ttt.apps.quickstart.recall import Twice
from moshi_ttt.apps.quickstart.setup import Setup
from moshi_ttt.apps.quickstart.stream import Agreement, Streamed
from moshi_ttt.apps.quickstart.train import TrainingLog
from moshi_ttt.system.report.writer import number, numbers, versions

SOURCE = "Asterisk core sounds (English, one speaker), CC-BY-SA-3.0"


@dataclass(frozen=True, kw_only=True)
class QuickstartResults:
    """All that was measured.

    Attributes:
        base: the model without blocks.
        on, off: the trained blocks, test-time updates on and off.
        cleared: updates on, but the fast weights are reset once per attention context; None where attention sees
            everything.
        control: blocks trained from the same start, on the same speech, for as long, but without updates; None where
            blocks do nothing without them.
        twice: a clip presented twice, without and with the adapter that ships with the tiny Moshi; None for another
            model.
    """

    training: TrainingLog
    base: Curve
    on: Curve
    off: Curve
    cleared: Curve | None
    control: Curve | None
    agreement: Agreement
    streamed: Streamed
    twice: Twice | None = None

    @property
    def curves(self) -> tuple[Curve, ...]:
        """All curves, from the base model to the trained blocks with updates on."""
        found = (self.base, self.control, self.off, self.cleared, self.on)
        return tuple(curve for curve in found if curve is not None)

    @property
    def differences(self) -> tuple[Difference, ...]:
        """The differences between ``on`` and every other curve."""
        return tuple(compare(self.on, curve) for curve in self.curves if curve is not self.on)


def verdict(difference: Difference) -> str:
    """A sentence on which of two models is better, by how much, and whether the difference is significant."""
    if abs(difference.mean) <= 2 * difference.error or math.isnan(difference.error):
        return (
            f"No clear difference between {difference.better} and {difference.worse}: {difference.mean:+.4f} "
            f"nats/token, standard error {difference.error:.4f}."
        )
    word = "lower" if difference.mean > 0 else "HIGHER"
    return (
        f"{difference.better}: {abs(difference.mean):.4f} nats/token {word} than {difference.worse} (standard "
        f"error {difference.error:.4f}; second half of the recording {difference.second_half:+.4f})."
    )


def metrics(setup: Setup, results: QuickstartResults, seconds: Mapping[str, float], *, made_by: str) -> dict[str, Any]:
    """All numbers as values for JSON. A number that could not be measured is null."""
    settings, plan, streamed, speech = setup.settings, setup.plan, results.streamed, setup.speech
    return {
        "made_by": made_by,
        "versions": versions() | {"python": platform.python_version()},
        "machine": {"device": "cpu", "threads": torch.get_num_threads(), "platform": platform.machine()},
        "config": {
            "host": settings.host.model_dump(mode="json"),
            "precision": plan.policy.name,
            "seed": settings.ttt.seed,
            "ttt": [entry.model_dump(mode="json") for entry in settings.ttt.ttt],
            "training": settings.run.model_dump(mode="json", exclude={"wandb", "moshi_paths"}),
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
            curve.name: {"mean": number(curve.mean), "windows": [(a, b, number(v)) for a, b, v in curve.windows()]}
            for curve in results.curves
        },
        "heard_twice": None if results.twice is None else _presented_twice(results.twice),
        "window_frames": WINDOW,
        "differences": [
            {key: number(value) if isinstance(value, float) else value for key, value in asdict(difference).items()}
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


def _presented_twice(twice: Twice) -> dict[str, Any]:
    curves = {curve.name: numbers(curve.values) for curve in (twice.base, twice.memory)}
    return {
        "frames": twice.frames, "attention_sees_the_first_for": twice.skip, "saved": number(twice.saved), **curves,
    }  # fmt: skip


def _percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100)[round(100 * share) - 1] if len(values) > 1 else values[0]
