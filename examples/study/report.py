"""report.md, its figures, and metrics.json with every number of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi_ttt.evaluation.statistics import as_json
from moshi_ttt.system.report.figures import (
    GREY,
    colors,
    heading,
    interval_bar,
    legend_outside,
    name_rows,
    panels,
    rule,
    save,
)
from moshi_ttt.system.report.tables import image, table, version_text
from moshi_ttt.system.report.writer import numbers, versions, write_report
from study.cost import Cost
from study.plan import FRAME_RATE, Scale
from study.results import BASE, ON, Group, Measured

LORA = "LoRA"
TITLES = {"test": "voices of the training recordings", "unseen": "voices that are in no training recording"}
CONTROLS = ("updates off", "memory of another")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is written.

    Attributes:
        speech: names of the folders of recordings, by group.
        recall, context: by group of recordings.
        ablations: recall on the validation recordings, or None.
        choices: which candidate each arm was given, and the validation losses of all.
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
        write_report(folder, self._metrics(), self._lines())
        _plot_recall(folder / "recall.png", self.recall)
        _plot_context(folder / "context.png", self.context, self.scale.window)

    def _lines(self) -> list[str]:
        scale = self.scale
        lines = [
            "# Does memory help?", "",
            f"Attention sees {scale.context} frames ({scale.context / FRAME_RATE:.1f} s). Seeds: "
            f"{', '.join(map(str, scale.seeds))}; {scale.base_steps} steps of the base model, {scale.steps} of each "
            f"arm, {scale.batch} segments of {scale.segment_seconds:.1f} s a step. {version_text()}.",
            *(f"{TITLES[name].capitalize()}: {', '.join(folders)}." for name, folders in self.speech.items()),
            "Means over seeds and recordings; in brackets 95 % percentile bootstrap intervals over recordings.", "",
        ]  # fmt: skip
        for name, group in self.recall.items():
            lines += [f"## Recall, {TITLES[name]} ({len(group.recordings)} recordings)", "", *recall_table(group), ""]
            lines += [*presentations_table(group), ""]
        lines += image("recall", "recall.png")
        for name, group in self.context.items():
            title = f"## Audio loss beyond the attention context, {TITLES[name]} ({len(group.recordings)} recordings)"
            lines += [title, "", *context_table(group), ""]
        lines += [*image("loss by position", "context.png"), "## Cost", "", *self._cost_table(), ""]
        if self.ablations is not None:
            lines += ["## Ablations (recall, validation recordings, first seed)", "", *recall_table(self.ablations), ""]
        lines += ["## Chosen on the validation recordings", "", *self._choices(), ""]
        return lines

    def _cost_table(self) -> list[str]:
        header = ("", "trained parameters", "streamed frame / base model's", "memory of a stream (KiB)")
        parameters = next(iter(self.recall.values())).parameters
        rows = [
            (name, f"{parameters[name]:,}", f"{cost.step_ratio:.2f}", f"{cost.state_bytes / 1024:,.0f}")
            for name, cost in self.costs.items()
        ]
        return table(header, rows)

    def _choices(self) -> list[str]:
        rows = [
            (name, ", ".join(f"{loss:.4f}" for loss in losses), str(self.choices["chosen"][name]))
            for name, losses in self.choices["validation_loss"].items()
        ]
        return table(("", "audio loss of each candidate", "chosen"), rows, "llr")

    def _metrics(self) -> dict[str, Any]:
        groups = {f"recall, {name}": group for name, group in self.recall.items()}
        groups |= {f"context, {name}": group for name, group in self.context.items()}
        groups |= {"ablations": self.ablations} if self.ablations is not None else {}
        return {
            "made_by": self.made_by, "versions": versions(), "scale": vars(self.scale), "speech": self.speech,
            "choices": self.choices,
            "costs": {name: vars(cost) for name, cost in self.costs.items()},
            "groups": {name: _group_metrics(group) for name, group in groups.items()},
        }  # fmt: skip


def recall_table(group: Group) -> list[str]:
    """The gain of the second presentation beyond the base model's; and what is left of it under the controls."""
    header = ("", "trained parameters", "second", "seeds", "beyond LoRA's", "updates off", "another's memory", "third")
    rows = []
    for arm in group.arms():
        second, third = (
            group.of(each, arm) if arm == BASE else _gained(group, each, arm) for each in ("second", "third")
        )  # of the base model its own gain
        lora = str(second.minus(_gained(group, "second", LORA)).interval) if _beside_lora(group, arm) else ""
        controls = [
            _short(_gained(group, "second", arm, each)) if ("second", arm, each) in group.figures else ""
            for each in CONTROLS
        ]
        row = [f"{group.parameters[arm]:,}", str(second.interval), _seeds(second), lora, *controls, _short(third)]
        rows.append((arm, *row))
    return [
        "Gain (loss of the first presentation minus loss of this one, nats per audio token) beyond the base model's. "
        "The third presentation follows a clip of another recording.", "",
        *table(header, rows, "lrrlrrrr"),
    ]  # fmt: skip


def presentations_table(group: Group) -> list[str]:
    """The losses of the presentations themselves: a gain could also come of a first presentation that is worse."""
    presentations = ("first", "second", "third")
    rows = [
        (arm, *(str(_saved(group, f"loss, {each}", arm).interval) for each in presentations))
        for arm in group.arms() if arm != BASE
    ]  # fmt: skip
    return [
        "Nats per audio token saved in each presentation, against the base model in the same presentation.", "",
        *table(("", *presentations), rows),
    ]  # fmt: skip


def context_table(group: Group, stream: str = "audio") -> list[str]:
    """Losses beyond the attention context, what is saved against the base model and against LoRA, and the controls."""
    header = (
        "", "loss (nats/token)", "saved against base", "seeds", "saved against LoRA", "with updates off",
        "with another's memory",
    )  # fmt: skip
    rows = []
    for arm in group.arms():
        own, saved = group.of(stream, arm), _saved(group, stream, arm)
        against = ("", "") if arm == BASE else (str(saved.interval), _seeds(saved))
        lora = str(group.of(stream, LORA).minus(own).interval) if _beside_lora(group, arm) else ""
        controls = [
            _short(_saved(group, stream, arm, each)) if (stream, arm, each) in group.figures else ""
            for each in CONTROLS
        ]
        rows.append((arm, f"{own.interval.value:.4f}", *against, lora, *controls))
    return table(header, rows, "lrrlrrr")


def _gained(group: Group, presentation: str, arm: str, condition: str = ON) -> Measured:
    """The gain beyond the base model's."""
    return group.of(presentation, arm, condition).minus(group.of(presentation, BASE))


def _saved(group: Group, what: str, arm: str, condition: str = ON) -> Measured:
    """How much lower the loss is than the base model's."""
    return group.of(what, BASE).minus(group.of(what, arm, condition))


def _beside_lora(group: Group, arm: str) -> bool:
    return arm not in (BASE, LORA) and LORA in group.arms()


def _short(measured: Measured) -> str:
    return measured.interval.show(3, sign=True)


def _seeds(measured: Measured) -> str:
    return ", ".join(f"{value:+.3f}" for value in measured.by_seed)


def _group_metrics(group: Group) -> dict[str, Any]:
    return {
        "recordings": group.recordings, "parameters": group.parameters,
        "figures": [
            {
                "what": what, "subject": arm, "condition": condition, "by_seed": numbers(measured.by_seed),
                **as_json(measured.interval),
                "by_recording": [numbers(row) for row in measured.values.nanmean(2)],
            }
            for (what, arm, condition), measured in group.figures.items()
            if measured.values.isfinite().any()
        ],
    }  # fmt: skip


def _plot_recall(path: Path, groups: Mapping[str, Group]) -> None:
    """A panel for each group: the gain of each arm, its interval, its seeds as dots, its controls as crosses."""
    arms = [name for name in next(iter(groups.values())).arms() if name != BASE]
    figure, axes_of = panels(len(groups), width=9.5, height=1.2 + len(groups) * (0.7 + 0.34 * len(arms)), sharex=True)
    for axes, (name, group) in zip(axes_of, groups.items(), strict=True):
        rule(axes, x=0)
        for place, arm in enumerate(arms):
            gain, color = _gained(group, "second", arm), colors(place + 1)["color"]
            interval_bar(axes, gain.interval.low, gain.interval.high, place, color, linewidth=3)
            axes.plot(gain.interval.value, place, "o", color=color, markersize=7)
            axes.plot(gain.by_seed, [place - 0.22] * len(gain.by_seed), ".", color=color, markersize=4)
            for condition, mark in zip(CONTROLS, ("|", "x"), strict=True):
                if ("second", arm, condition) in group.figures:
                    control = _gained(group, "second", arm, condition).interval.value
                    label = condition if place == len(arms) - 1 else None
                    axes.plot(control, place + 0.22, mark, color=GREY, markersize=6, label=label)
        name_rows(axes, arms)
        heading(axes, TITLES[name])
    legend_outside(figure)
    axes_of[-1].set_xlabel("gain of the second presentation beyond the base model's (nats/token; higher is better)")
    save(figure, path, grid="x")


def _plot_context(path: Path, groups: Mapping[str, Group], window: int) -> None:
    """A panel for each group: what each arm saves against the base model, window by window."""
    figure, axes_of = panels(len(groups), width=9.5, height=0.8 + 2.6 * len(groups))
    for axes, (name, group) in zip(axes_of, groups.items(), strict=True):
        base = group.windows["audio", BASE, ON]
        rule(axes, y=0)
        for place, arm in enumerate([arm for arm in group.arms() if arm != BASE], start=1):
            for condition, dashes in ((ON, "-"), ("updates off", "--")):
                if ("audio", arm, condition) in group.windows:
                    saved = (base - group.windows["audio", arm, condition]).nanmean((0, 1))
                    seconds = [(index + 0.5) * window / FRAME_RATE for index in range(len(saved))]
                    label = arm if condition == ON else None
                    axes.plot(seconds, saved, dashes, color=colors(place)["color"], label=label, linewidth=1.6)
        heading(axes, f"{TITLES[name]}; dashed: updates off")
        axes.set_ylabel("saved against base (nats/token)")
    legend_outside(figure)
    axes_of[-1].set_xlabel("position in the recording (s)")
    save(figure, path)
