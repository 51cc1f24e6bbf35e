"""report.md, its figures, and metrics.json with every number of the study."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moshi_ttt.evaluation.reporting import PALETTE, versions
from moshi_ttt.evaluation.statistics import Interval
from moshi_ttt.system.output_folder import METRICS
from study.cost import Cost
from study.plan import FRAME_RATE, Scale
from study.results import BASE, ON, Group

LORA = "LoRA"
TITLES = {"test": "voices heard in training", "unseen": "voices never heard in training"}
CONTROLS = ("updates off", "memory of another")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is written.

    Attributes:
        speech: names of the folders of recordings, by group.
        recall, context: by group of recordings.
        ablations: recall on the validation recordings, or None.
        choices: which candidate each subject was given, and the validation losses of all.
    """

    scale: Scale
    speech: Mapping[str, Sequence[str]]
    recall: Mapping[str, Group]
    context: Mapping[str, Group]
    ablations: Group | None
    costs: Mapping[str, Cost]
    choices: Mapping[str, Any]
    made_by: str

    def write(self, folder: Path) -> None:
        """report.md, metrics.json, recall.png and context.png."""
        (folder / METRICS).write_text(json.dumps(self._numbers(), indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text("\n".join(self._lines()), encoding="utf-8")
        _plot_recall(folder / "recall.png", self.recall)
        _plot_context(folder / "context.png", self.context, self.scale.window)

    def _lines(self) -> list[str]:
        scale = self.scale
        lines = [
            "# Does memory help?", "",
            f"Attention sees {scale.context} frames ({scale.context / FRAME_RATE:.1f} s). Seeds: "
            f"{', '.join(map(str, scale.seeds))}; {scale.base_steps} steps of the base model, {scale.steps} of each "
            f"subject, {scale.batch} segments of {scale.segment_seconds:.1f} s a step. "
            + ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
            *(f"{TITLES[name].capitalize()}: {', '.join(folders)}." for name, folders in self.speech.items()),
            "Means over seeds and recordings; in brackets 95 % percentile bootstrap intervals over recordings.", "",
        ]  # fmt: skip
        for name, group in self.recall.items():
            lines += [f"## Recall, {TITLES[name]} ({len(group.recordings)} recordings)", "", *recall_table(group), ""]
            lines += [*hearings_table(group), ""]
        lines += ["![recall](recall.png)", ""]
        for name, group in self.context.items():
            title = f"## Audio loss beyond attention, {TITLES[name]} ({len(group.recordings)} recordings)"
            lines += [title, "", *context_table(group), ""]
        lines += ["![loss by position](context.png)", "", "## Cost", "", *self._cost_table(), ""]
        if self.ablations is not None:
            lines += ["## Ablations (recall, validation recordings, first seed)", "", *recall_table(self.ablations), ""]
        lines += ["## Chosen on the validation recordings", "", *self._choices(), ""]
        return lines

    def _cost_table(self) -> list[str]:
        lines = [
            "| | trained parameters | streamed frame / base model's | memory of a stream (KiB) |",
            "| --- | ---: | ---: | ---: |",
        ]
        parameters = next(iter(self.recall.values())).parameters
        return lines + [
            f"| {name} | {parameters[name]:,} | {cost.step_ratio:.2f} | {cost.state_bytes / 1024:,.0f} |"
            for name, cost in self.costs.items()
        ]

    def _choices(self) -> list[str]:
        lines = ["| | audio loss of each candidate | chosen |", "| --- | --- | ---: |"]
        for name, losses in self.choices["validation_loss"].items():
            lines.append(f"| {name} | {', '.join(f'{loss:.4f}' for loss in losses)} | {self.choices['chosen'][name]} |")
        return lines

    def _numbers(self) -> dict[str, Any]:
        groups = {f"recall, {name}": group for name, group in self.recall.items()}
        groups |= {f"context, {name}": group for name, group in self.context.items()}
        groups |= {"ablations": self.ablations} if self.ablations is not None else {}
        return {
            "made_by": self.made_by, "versions": versions(), "scale": vars(self.scale), "speech": self.speech,
            "choices": self.choices,
            "costs": {name: vars(cost) for name, cost in self.costs.items()},
            "groups": {name: _group_numbers(group) for name, group in groups.items()},
        }  # fmt: skip


def recall_table(group: Group) -> list[str]:
    """What hearing again saves, beyond what it saves the base model; and what is left of it under the controls."""
    lines = [
        "Nats saved per audio token in the second hearing, beyond the base model's; the third is after another piece.",
        "", "| | trained parameters | second | seeds | beyond LoRA's | updates off | another's memory | third |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    base = {hearing: group.of(hearing, BASE) for hearing in ("second", "third")}
    for subject in group.subjects():
        second = group.of("second", subject).minus(base["second"])
        third = group.of("third", subject).minus(base["third"])
        lora = ""
        if subject not in (BASE, LORA) and LORA in group.subjects():
            lora = str(second.minus(group.of("second", LORA).minus(base["second"])).interval)
        controls = []
        for condition in CONTROLS:
            there = ("second", subject, condition) in group.figures
            controls.append(
                _short(group.of("second", subject, condition).minus(base["second"]).interval) if there else ""
            )
        own = group.of("second", subject) if subject == BASE else second
        lines.append(
            f"| {subject} | {group.parameters[subject]:,} | {own.interval} | {_seeds(own.by_seed)} | {lora} | "
            f"{controls[0]} | {controls[1]} | "
            f"{_short((group.of('third', BASE) if subject == BASE else third).interval)} |"
        )
    return lines


def hearings_table(group: Group) -> list[str]:
    """The losses of the hearings themselves: a gain could also come of a first hearing that is worse."""
    hearings = ("first", "second", "third")
    lines = [
        "Nats saved per audio token in each hearing itself, against the base model in the same hearing.", "",
        f"| | {' | '.join(hearings)} |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for subject in group.subjects():
        if subject != BASE:
            saved = (group.of(f"loss, {each}", BASE).minus(group.of(f"loss, {each}", subject)) for each in hearings)
            lines.append(f"| {subject} | {' | '.join(str(each.interval) for each in saved)} |")
    return lines


def context_table(group: Group, stream: str = "audio") -> list[str]:
    """Losses beyond attention's context, what is saved against the base model and against LoRA, and the controls."""
    lines = [
        "| | loss (nats a token) | saved against base | seeds | saved against LoRA | with updates off | "
        "with another's memory |", "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    base = group.of(stream, BASE)
    for subject in group.subjects():
        own = group.of(stream, subject)
        saved = base.minus(own)
        lora = ""
        if subject not in (BASE, LORA) and LORA in group.subjects():
            lora = str(group.of(stream, LORA).minus(own).interval)
        controls = []
        for condition in CONTROLS:
            there = (stream, subject, condition) in group.figures
            controls.append(_short(base.minus(group.of(stream, subject, condition)).interval) if there else "")
        cells = ["", ""] if subject == BASE else [str(saved.interval), _seeds(saved.by_seed)]
        lines.append(
            f"| {subject} | {own.interval.value:.4f} | {cells[0]} | {cells[1]} | {lora} | {' | '.join(controls)} |"
        )
    return lines


def _short(interval: Interval) -> str:
    return f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def _seeds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)


def _group_numbers(group: Group) -> dict[str, Any]:
    return {
        "recordings": group.recordings, "parameters": group.parameters,
        "figures": [
            {
                "what": what, "subject": subject, "condition": condition, "by_seed": measured.by_seed,
                **vars(measured.interval),
                "by_recording": [[_number(v) for v in row] for row in measured.values.nanmean(2).tolist()],
            }
            for (what, subject, condition), measured in group.figures.items()
            if measured.values.isfinite().any()
        ],
    }  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plot_recall(path: Path, groups: Mapping[str, Group]) -> None:
    """A panel for each group: the gain of each subject, its interval, its seeds as dots, its controls as crosses."""
    subjects = [name for name in next(iter(groups.values())).subjects() if name != BASE]
    figure = Figure(figsize=(8, 1.2 + len(groups) * (0.7 + 0.34 * len(subjects))), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        base = group.of("second", BASE)
        for place, subject in enumerate(subjects):
            colour = PALETTE[place % len(PALETTE)]
            gain = group.of("second", subject).minus(base)
            axes.plot([gain.interval.low, gain.interval.high], [place, place], "-", color=colour, linewidth=3)
            axes.plot(gain.interval.value, place, "o", color=colour, markersize=7)
            axes.plot(gain.by_seed, [place - 0.22] * len(gain.by_seed), ".", color=colour, markersize=4)
            for condition, mark in zip(CONTROLS, ("|", "x"), strict=True):
                if ("second", subject, condition) in group.figures:
                    control = group.of("second", subject, condition).minus(base)
                    label = condition if place == 1 else None
                    axes.plot(control.interval.value, place + 0.22, mark, color="#666666", markersize=6, label=label)
        axes.axvline(0, color="#BBBBBB", linewidth=1)
        axes.set_yticks(range(len(subjects)), subjects, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(TITLES[name], fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7, frameon=False, loc="lower right")
    panels[-1].set_xlabel("nats per audio token saved in the second hearing, beyond the base model's; higher is better")
    figure.savefig(path, dpi=120)


def _plot_context(path: Path, groups: Mapping[str, Group], window: int) -> None:
    """A panel for each group: what each subject saves against the base model, window by window."""
    figure = Figure(figsize=(8, 0.8 + 2.6 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        base = group.windows["audio", BASE, ON]
        subjects = [subject for subject in group.subjects() if subject != BASE]
        for place, subject in enumerate(subjects):
            for condition, style in ((ON, "-"), ("updates off", "--")):
                if ("audio", subject, condition) in group.windows:
                    saved = (base - group.windows["audio", subject, condition]).nanmean((0, 1))
                    seconds = [(index + 0.5) * window / FRAME_RATE for index in range(len(saved))]
                    label = subject if condition == ON else None
                    axes.plot(seconds, saved, style, color=PALETTE[place % len(PALETTE)], label=label, linewidth=1.6)
        axes.axhline(0, color="#BBBBBB", linewidth=1)
        axes.set_title(f"{TITLES[name]}; dashed: updates off", fontsize=9, loc="left")
        axes.set_ylabel("nats saved")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7, frameon=False, ncols=3)
    panels[-1].set_xlabel("position in the recording (s)")
    figure.savefig(path, dpi=120)
