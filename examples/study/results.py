"""What was measured, of all seeds together. Intervals are over recordings, of means over seeds.

A seed's results are one file, ``seed_N.json``, with the losses of every arm, recording by recording.

Shape legend: S seeds, R recordings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.evaluation.statistics import Interval, bootstrap, mean_of_recordings
from moshi_ttt.system.output_folder import METRICS
from moshi_ttt.system.report.writer import to_json
from study.choice import Candidate
from study.jobs import StudyError
from study.plan import LORA
from study.stages import HOUR, TEST, VALIDATION, Study

BASE, ON = "base", "updates on"
PRESENTATIONS = {"first": 0, "second": 1, "third": 3}
"""The place of each presentation of A in A, A, B, A."""
WHOLE = 0
"""The column of ``once`` with all buckets but the last; the buckets follow."""


@dataclass(frozen=True)
class Measured:
    """One figure: ``values [S, R]``, NaN where a recording has none."""

    values: Tensor

    @property
    def interval(self) -> Interval:
        """The mean over seeds and recordings; recordings without the figure are left out."""
        means = self.values.nanmean(0)  # [R]
        return bootstrap(means[~means.isnan()][:, None], mean_of_recordings)

    @property
    def by_seed(self) -> list[float]:
        return [float(values.nanmean()) for values in self.values]

    def minus(self, other: Measured) -> Measured:
        """The difference, recording by recording and seed by seed."""
        return Measured(self.values - other.values)


def gather(study: Study, seed: int, choices: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The results of one seed: everything that its measurements wrote. Raises StudyError where one is missing.

    Without ``choices``, those on validation recordings alone. Arms that are not judged are left out where they were
    not measured.
    """
    arms = {BASE: None, **{arm.name: arm for arm in study.arms}}
    measured_longer = choices is not None and study.scale.longer
    longer = {name: arms[name] for name in choices["arms"].values()} if choices and measured_longer else {}
    groups: dict[str, Any] = {}
    judged = {name: arm for name, arm in arms.items() if arm is None or arm.judged}
    for group in study.groups(VALIDATION) if choices is None or seed == choices["seed"] else ():
        files = {name: study.measured(seed, arm, group) for name, arm in arms.items()}
        groups[group] = {name: read_json(file) for name, file in files.items() if name in judged or file.exists()}
    for group in study.groups(TEST) if choices is not None else ():
        groups[group] = {name: read_json(study.measured(seed, arm, group)) for name, arm in judged.items()}
        for name, arm in longer.items():
            assert arm is not None  # the base model is not chosen
            assert choices is not None
            if arm.beside_lora or seed != choices["seed"]:
                continue
            groups[group][name]["lasting"] = _lasting(study.lasting(seed, arm, group, (1.0,)).result)
    if measured_longer:
        named = {BASE: None, **longer, **{arm.name: arm for arm in study.arms if arm.kind is None}}
        groups[HOUR] = {name: read_json(study.measured(seed, arm, HOUR)) for name, arm in named.items()}
    return {
        "seed": seed,
        "scale": {name: value for name, value in asdict(study.scale).items() if name != "seeds"},
        "arms": {arm.name: {"kind": arm.kind, "beside_lora": arm.beside_lora} for arm in study.arms},
        "choices": choices,
        "groups": groups,
    }


def _lasting(folder: Path) -> list[dict[str, Any]]:
    """What ``moshi-ttt evaluate recall --between`` wrote, without what the report does not need."""
    names = ("volume", "clips_between", "seconds_between", "gain_by_recording", "saved_by_recording")
    return [
        {name: row[name] for name in (*names, "interludes_saved_by_recording")}
        for row in read_json(folder / METRICS)["between"]
    ]


def write_seed(folder: Path, values: Mapping[str, Any]) -> Path:
    """``folder/seed_N.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed_{values['seed']}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(to_json(values) + "\n", encoding="utf-8")
    return path


class StudyResults:
    """The results of some seeds.

    Attributes:
        seeds: their numbers.
        scale: its size, as in ``plan.Scale``.
        choices: what was chosen, the same for all of them; empty before.
    """

    def __init__(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Raises StudyError where seeds differ in what they measured, or in what was chosen."""
        self._found = list(found)
        self.seeds = [int(values["seed"]) for values in found]
        self.scale: Mapping[str, Any] = found[0]["scale"]
        self.choices: Mapping[str, Any] = found[0]["choices"] or {}
        for values in found[1:]:
            for name in ("choices", "scale", "arms"):
                if values[name] != found[0][name]:
                    raise StudyError(
                        f"The results of seeds {self.seeds[0]} and {values['seed']} differ in their {name}: they are "
                        "of two studies. Read results of one."
                    )

    @classmethod
    def read(cls, paths: Iterable[Path]) -> StudyResults:
        """Of files that ``write_seed`` wrote. Raises StudyError."""
        return cls([read_json(path) for path in paths])

    def groups(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that were measured."""
        return [name for name in names if name in self._found[0]["groups"]]

    def arms(self, group: str) -> list[str]:
        """In the order of the study, the base model first."""
        return list(self._found[0]["groups"][group])

    def recordings(self, group: str) -> list[str]:
        return list(self._found[0]["groups"][group][BASE]["presented"])

    def parameters(self, arm: str) -> int:
        return next(int(each[arm]["parameters"]) for each in self._found[0]["groups"].values() if arm in each)

    def volumes(self, group: str, arm: str, kind: str = "once") -> list[float]:
        """At which an arm was measured with updates enabled, ascending."""
        rows = self._found[0]["groups"][group].get(arm, {}).get(kind, [])
        return sorted({float(row["volume"]) for row in rows if row.get("condition", ON) == ON})

    def settings(self, group: str, arm: str) -> list[tuple[str, float]]:
        """The conditions and volumes under which an arm was measured."""
        return [(row["condition"], float(row["volume"])) for row in self._found[0]["groups"][group][arm]["once"]]

    def reference(self, arm: str) -> str:
        """What an arm is compared with: the LoRA alone where it has one beside its blocks, else the base model."""
        return LORA if self._found[0]["arms"][arm]["beside_lora"] else BASE

    def with_memory(self, group: str) -> list[str]:
        """The arms that have blocks, and were measured on a group of recordings."""
        there = self._found[0]["groups"][group]
        return [name for name, about in self._found[0]["arms"].items() if about["kind"] is not None and name in there]

    def once(self, group: str, arm: str, column: int, condition: str = ON, volume: float = 1.0) -> Measured:
        """The audio loss of recordings played once, in a column of ``measures.once``; the last of joined ones."""
        if column == len(self.scale["buckets"]):
            return self._column(group, arm, "once", "last", None, condition, volume)
        return self._column(group, arm, "once", "buckets", column, condition, volume)

    def effect(
        self, group: str, arm: str, other: str, column: int, condition: str = ON, volume: float = 1.0
    ) -> Measured:
        """What is saved against ``other`` on speech played once; below zero it is a cost."""
        return self.once(group, other, column).minus(self.once(group, arm, column, condition, volume))

    def presentation(self, group: str, arm: str, name: str, condition: str = ON, volume: float = 1.0) -> Measured:
        """The audio loss of the ``first``, ``second`` or ``third`` presentation."""
        return self._column(group, arm, "recall", "losses", PRESENTATIONS[name], condition, volume)

    def gain(
        self, group: str, arm: str, other: str, name: str = "second", condition: str = ON, volume: float = 1.0
    ) -> Measured:
        """What a later presentation saves against the first, beyond what it saves ``other``."""

        def own(each: str, *setting: Any) -> Measured:
            first, later = (self.presentation(group, each, which, *setting) for which in ("first", name))
            return first.minus(later)

        return own(arm, condition, volume).minus(own(other))

    def longer(self, group: str, arm: str, kind: str, volume: float) -> list[dict[str, Any]]:
        """The rows of ``held``, ``hour`` or ``lasting`` at a volume, those of the first seed first."""
        return [
            row for values in self._with(group) for row in values["groups"][group][arm].get(kind, ())
            if row["volume"] == volume
        ]  # fmt: skip

    def _with(self, group: str) -> list[Mapping[str, Any]]:
        """What the seeds found that measured a group: validation recordings are for the first one alone."""
        return [values for values in self._found if group in values["groups"]]

    def _column(
        self, group: str, arm: str, kind: str, name: str, column: int | None, condition: str, volume: float
    ) -> Measured:
        """Raises KeyError where a seed that measured the group has no such figure."""
        seeds = []
        for values in self._with(group):
            for row in values["groups"][group][arm][kind]:
                if row["condition"] == condition and row["volume"] == volume:
                    numbers = tensor(row[name])
                    seeds.append(numbers if column is None else numbers[:, column])
                    break
            else:
                raise KeyError((group, arm, kind, condition, volume))
        return Measured(torch.stack(seeds))


def candidates(results: StudyResults) -> dict[str, list[Candidate]]:
    """Every arm that has blocks, at every volume, on the validation recordings."""
    groups = results.groups(VALIDATION)
    buckets = range(1, 1 + len(results.scale["buckets"]))
    found: dict[str, list[Candidate]] = {}
    for arm in results.with_memory(groups[0]):
        other = results.reference(arm)
        found[arm] = [
            Candidate(
                volume=volume,
                recalls=tuple(
                    results.gain(group, arm, other, volume=volume).interval.value for group in groups
                ),
                effects=tuple(
                    tuple(results.effect(group, arm, other, each, volume=volume).interval.value for each in buckets)
                    for group in groups
                ),
            )
            for volume in results.volumes(groups[0], arm)
        ]  # fmt: skip
    return found


def tensor(rows: Sequence[Any]) -> Tensor:
    """Numbers in lists as float64; NaN for None."""
    if rows and isinstance(rows[0], list):
        return torch.stack([tensor(row) for row in rows])
    return torch.tensor([math.nan if value is None else value for value in rows], dtype=torch.float64)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} holds no results ({error}). Delete it, and run the same command again.") from None
    return values
