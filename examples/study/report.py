"""report.md, its figures, and metrics.json with every figure of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moshi_ttt.evaluation.models import CONDITIONS
from moshi_ttt.evaluation.statistics import as_json
from moshi_ttt.system.report.tables import image, table, version_text
from moshi_ttt.system.report.writer import numbers, versions, write_report
from study.answer import answer_table
from study.choice import choose_volume
from study.cost import Cost
from study.curves import held_after, lasting_after, stream_parts
from study.pictures import plot_answer, plot_curves, plot_volumes
from study.plan import FRAME_RATE, LORA
from study.results import BASE, ON, WHOLE, Measured, StudyResults, candidates
from study.stages import HOUR, TEST, VALIDATION

TITLES = {
    "valid": "validation recordings, known voices", "valid_unseen": "validation recordings, unseen voices",
    "test": "known voices", "test_unseen": "unseen voices",
}  # fmt: skip
LASTING = ("gain", "saved", "once")
CONTROLS = tuple(condition for condition in CONDITIONS if condition != ON)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is written.

    Attributes:
        speech: names of the folders of recordings, by what they are for.
    """

    results: StudyResults
    speech: Mapping[str, Sequence[str]]
    costs: Mapping[str, Cost]
    made_by: str

    def write(self, folder: Path) -> None:
        """report.md, metrics.json and the figures."""
        write_report(folder, self._metrics(), self._lines())
        groups = {group: TITLES[group] for group in self.results.groups(TEST)}
        plot_answer(folder / "answer.png", self.results, groups)
        plot_volumes(folder / "volumes.png", self.results, groups)
        if has_longer(self.results):
            plot_curves(folder / "curves.png", self.results, groups)

    def _lines(self) -> list[str]:
        results, scale = self.results, self.results.scale
        lines = [
            "# Does memory help, and what does it cost?", "",
            f"Attention sees {scale['context']} frames ({scale['context'] / FRAME_RATE:.1f} s). Seeds: "
            f"{', '.join(map(str, results.seeds))}; {scale['base_steps']} steps of the base model, {scale['steps']} of "
            f"each arm, {scale['batch']} segments of {2 * scale['clip'] / FRAME_RATE:.1f} s a step. {version_text()}.",
            *(f"{name.capitalize()}: {', '.join(folders)}." for name, folders in self.speech.items()),
            "Nats per audio token. Means over seeds and recordings; in brackets 95 % percentile bootstrap intervals "
            "over recordings. Arms with a LoRA beside their blocks are compared with the LoRA alone, all others with "
            "the base model.", "",
            "## The answer", "", *answer(results), "",
            "## Chosen on the validation recordings", "", *choice_table(results), "",
            "## Open questions, on the validation recordings", "", *open_table(results), "",
        ]  # fmt: skip
        for group in results.groups(TEST):
            lines += [f"# {TITLES[group].capitalize()} ({len(results.recordings(group))} recordings)", ""]
            lines += ["## Recall", "", *recall_table(results, group), ""]
            lines += ["## Speech played once", "", *once_table(results, group), ""]
            lines += ["## Against the base model", "", *beside_lora_table(results, group), ""]
            lines += ["## Controls", "", *controls_table(results, group), ""]
            lines += ["## By volume", "", *volume_table(results, group), ""]
            if has_longer(results):
                lines += ["## After other clips, first seed", "", *lasting_table(results, group), ""]
                lines += ["## Clips held at once", "", *held_table(results, group), ""]
        if has_longer(results):
            lines += ["# One stream", "", *hour_table(results), ""]
        lines += [*image("recall and cost", "answer.png"), *image("recall and cost by volume", "volumes.png")]
        if has_longer(results):
            lines += image("how long, and how many", "curves.png")
        return [*lines, *(["# Cost", "", *self._cost_table(), ""] if self.costs else [])]

    def _cost_table(self) -> list[str]:
        header = ("", "trained parameters", "streamed frame / base model's", "memory of a stream (KiB)")
        rows = [
            (name, f"{self.results.parameters(name):,}", f"{cost.step_ratio:.2f}", f"{cost.state_bytes / 1024:,.0f}")
            for name, cost in self.costs.items()
        ]
        return table(header, rows)

    def _metrics(self) -> dict[str, Any]:
        results = self.results
        return {
            "made_by": self.made_by, "versions": versions(), "seeds": results.seeds, "scale": results.scale,
            "speech": self.speech, "choices": results.choices,
            "costs": {name: vars(cost) for name, cost in self.costs.items()},
            "figures": [row for group in results.groups((*VALIDATION, *TEST)) for row in figure_rows(results, group)],
            "longer": [row for group in results.groups(TEST) for row in longer_rows(results, group)],
            "one_stream": stream_parts(results),
        }  # fmt: skip


# ---- every figure, for metrics.json


def figure_rows(results: StudyResults, group: str) -> list[dict[str, Any]]:
    """Of every arm under every setting that was measured: the gain and the effects, with intervals."""
    rows = []
    for arm in results.with_memory(group):
        other = results.reference(arm)
        for condition, volume in results.settings(group, arm):
            figures = {
                f"gain, {each}": results.gain(group, arm, other, each, condition, volume)
                for each in ("second", "third")
            }
            figures["saved, second"] = _saved(results, group, arm, other, condition, volume)
            for column, name in enumerate(buckets(results)):
                figures[f"played once, {name}"] = results.effect(group, arm, other, column, condition, volume)
            rows += [
                {
                    "group": group, "arm": arm, "against": other, "condition": condition, "volume": volume,
                    "what": what, "by_seed": numbers(measured.by_seed), **as_json(measured.interval),
                    "by_recording": numbers(measured.values.nanmean(0)),
                }
                for what, measured in figures.items() if measured.values.isfinite().any()
            ]  # fmt: skip
    return rows


def longer_rows(results: StudyResults, group: str) -> list[dict[str, Any]]:
    """Of the chosen arms: after other clips, and with so many clips held at once."""
    found = []
    for arm, volume in chosen_settings(results):
        for row in (*lasting_after(results, group, arm, volume), *held_after(results, group, arm, volume)):
            intervals = {name: as_json(each.interval) for name, each in row.items() if isinstance(each, Measured)}
            plain = {name: each for name, each in row.items() if not isinstance(each, Measured)}
            found.append({"group": group, "arm": arm, "volume": volume, **plain, **intervals})
    return found


# ---- tables


def has_longer(results: StudyResults) -> bool:
    """Whether the chosen arms were measured for longer, see ``plan.Scale.longer``."""
    return bool(results.groups([HOUR]))


def buckets(results: StudyResults) -> list[str]:
    """The names of the columns of ``measures.once``."""
    firsts = results.scale["buckets"]
    ends = [f"{first} to {end - 1}" for first, end in pairwise(firsts)]
    return [f"{firsts[0]} to {firsts[-1] - 1}", *ends, f"{firsts[-1]} and more"]


def settings_of(results: StudyResults, arm: str) -> list[float]:
    """The volume that was chosen, and 1."""
    return list(dict.fromkeys((float(results.choices["volumes"][arm]), 1.0)))


def chosen_settings(results: StudyResults) -> list[tuple[str, float]]:
    """The arms that were chosen, each at its volumes."""
    arms = dict.fromkeys(results.choices["arms"].values())
    return [(arm, volume) for arm in arms for volume in settings_of(results, arm)]


def answer(results: StudyResults) -> list[str]:
    """The chosen arms on test recordings."""
    groups = results.groups(TEST)
    header, *rows = answer_table(results, groups, [TITLES[group] for group in groups])
    return table(header, rows, "ll" + "r" * (len(header) - 2))


def choice_table(results: StudyResults) -> list[str]:
    """What decided: the recall and the worst bucket of every arm at the volume that it was given."""
    header = ("", "compared with", "volume", "harmless", "recall, known", "recall, unseen", "worst bucket", "chosen as")
    rows = []
    for arm, volume in results.choices["volumes"].items():
        (tried,) = [each for each in results.choices["candidates"][arm] if each["volume"] == volume]
        recalls = [f"{value:+.3f}" for value in tried["recalls"]]
        worst = min(min(group) for group in tried["effects"])
        named = [label for label, name in results.choices["arms"].items() if name == arm]
        rows.append((
            arm, results.reference(arm), f"{volume:g}", "yes" if results.choices["harmless"][arm] else "no",
            *[*recalls, ""][:2], f"{worst:+.4f}", ", ".join(named),
        ))  # fmt: skip
    return table(header, rows, "llrlrrrl")


def open_table(results: StudyResults) -> list[str]:
    """The arms that are not judged, at the volume that the rule would give them and at 1."""
    header = ("", "volume", "harmless", "recall, known", "recall, unseen", "worst bucket")
    tried_by = candidates(results) if results.groups(VALIDATION) else {}
    rows = []
    for arm, tried in tried_by.items():
        if arm in results.choices["volumes"]:
            continue
        shown = [choose_volume(tried), *(each for each in tried if each.volume == 1.0)]
        for each in dict.fromkeys(shown):
            recalls = [f"{value:+.3f}" for value in each.recalls]
            harmless = "yes" if each.harmless else "no"
            rows.append((arm, f"{each.volume:g}", harmless, *[*recalls, ""][:2], f"{each.worst:+.4f}"))
    return table(header, rows, "lrlrrr")


def recall_table(results: StudyResults, group: str) -> list[str]:
    """The gains of the later presentations, and the second presentation itself."""
    header = ("", "trained parameters", "volume", "second", "seeds", "third", "the second itself")
    rows = []
    for arm in results.with_memory(group):
        other = results.reference(arm)
        for volume in settings_of(results, arm):
            second, third = (results.gain(group, arm, other, each, volume=volume) for each in ("second", "third"))
            saved = _saved(results, group, arm, other, ON, volume)
            rows.append((
                arm, f"{results.parameters(arm):,}", f"{volume:g}", str(second.interval), _seeds(second),
                _short(third), _short(saved),
            ))  # fmt: skip
    return table(header, rows, "lrrrlrr")


def once_table(results: StudyResults, group: str) -> list[str]:
    """What is saved on speech played once, by bucket."""
    rows = [
        (arm, f"{volume:g}", *(
            _short(results.effect(group, arm, results.reference(arm), column, volume=volume), 4)
            for column in range(len(buckets(results)))
        ))
        for arm in results.with_memory(group) for volume in settings_of(results, arm)
    ]  # fmt: skip
    return table(("", "volume", *buckets(results)), rows)


def beside_lora_table(results: StudyResults, group: str) -> list[str]:
    """The LoRA, and the arms with a LoRA, compared with the base model."""
    if LORA not in results.arms(group):
        return []
    arms = [(LORA, 1.0)]
    arms += [
        (arm, volume) for arm in results.with_memory(group) if results.reference(arm) == LORA
        for volume in settings_of(results, arm)
    ]  # fmt: skip
    columns = range(len(buckets(results)))
    rows = [
        (
            arm, f"{volume:g}", _short(results.gain(group, arm, BASE, volume=volume)),
            *(_short(results.effect(group, arm, BASE, column, volume=volume)) for column in columns),
        )
        for arm, volume in arms
    ]  # fmt: skip
    return table(("", "volume", "second", *(f"once, {each}" for each in buckets(results))), rows)


def controls_table(results: StudyResults, group: str) -> list[str]:
    """What is left of the gain, and of the effect on speech played once, under each control at the chosen volume."""
    rows = []
    for arm in results.with_memory(group):
        other, volume = results.reference(arm), float(results.choices["volumes"][arm])
        there = set(results.settings(group, arm))
        gains = [
            _short(results.gain(group, arm, other, "second", each, volume)) if (each, volume) in there else ""
            for each in CONTROLS
        ]
        effects = [
            _short(results.effect(group, arm, other, WHOLE, each, volume)) if (each, volume) in there else ""
            for each in CONTROLS
        ]
        gain = _short(results.gain(group, arm, other, volume=volume))
        rows.append((arm, f"{volume:g}", gain, *gains, *effects))
    names = ["second", *(f"second, {each}" for each in CONTROLS), *(f"once, {each}" for each in CONTROLS)]
    return table(("", "volume", *names), rows)


def volume_table(results: StudyResults, group: str) -> list[str]:
    """The chosen arms at every volume."""
    rows = []
    for arm in dict.fromkeys(results.choices["arms"].values()):
        other = results.reference(arm)
        for volume in results.volumes(group, arm):
            columns = range(len(buckets(results)))
            effects = [_short(results.effect(group, arm, other, column, volume=volume)) for column in columns]
            rows.append((arm, f"{volume:g}", _short(results.gain(group, arm, other, volume=volume)), *effects))
    return table(("", "volume", "second", *(f"once, {each}" for each in buckets(results))), rows)


def lasting_table(results: StudyResults, group: str) -> list[str]:
    """The chosen arms after other clips."""
    rows = [
        (arm, f"{volume:g}", str(row["count"]), f"{row['minutes']:.1f}", *(_short(row[each]) for each in LASTING))
        for arm, volume in chosen_settings(results) for row in lasting_after(results, group, arm, volume)
    ]  # fmt: skip
    return table(("", "volume", "clips between", "minutes", "gain", "the clip itself", "clips between, once"), rows)


def held_table(results: StudyResults, group: str) -> list[str]:
    """The chosen arms with so many clips held at once."""
    rows = [
        (arm, f"{volume:g}", str(row["held"]), _short(row["gain"]))
        for arm, volume in chosen_settings(results) for row in held_after(results, group, arm, volume)
    ]  # fmt: skip
    return table(("", "volume", "clips", "gain"), rows)


def hour_table(results: StudyResults) -> list[str]:
    """What the chosen arms save in each part of one long stream."""
    rows = [
        (row["arm"], f"{row['volume']:g}", *(f"{value:+.4f}" for value in row["saved"]))
        for row in stream_parts(results)
    ]
    minutes = results.scale["hour"][1] / FRAME_RATE / 60
    most = max((len(row) for row in rows), default=2) - 2
    header = ("", "volume", *(f"{part * minutes:.0f} to {(part + 1) * minutes:.0f} min" for part in range(most)))
    return table(header, [(*row, *[""] * (most + 2 - len(row))) for row in rows])


def _saved(results: StudyResults, group: str, arm: str, other: str, condition: str, volume: float) -> Measured:
    """How much lower the loss of the second presentation is."""
    own = results.presentation(group, arm, "second", condition, volume)
    return results.presentation(group, other, "second").minus(own)


def _short(measured: Measured, digits: int = 3) -> str:
    return measured.interval.show(digits, sign=True)


def _seeds(measured: Measured) -> str:
    return ", ".join(f"{value:+.3f}" for value in measured.by_seed)
