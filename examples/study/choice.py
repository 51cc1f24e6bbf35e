"""The rule of the study: which volume each arm gets, and which arms answer the question. See docs/study.md.

Only validation recordings of the first seed are looked at. What is chosen is recorded in ``choices.json``; the stage
that evaluates test recordings refuses to run without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.system.report.writer import to_json
from study.jobs import StudyError
from study.plan import Arm

CHOICES = "choices.json"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An arm at a volume, on validation recordings; nats per audio token against what it is compared with.

    Attributes:
        recalls: the gain of the second presentation, for each group of recordings.
        effects: what is saved on speech played once, for each group and bucket; below zero it is a cost.
    """

    volume: float
    recalls: tuple[float, ...]
    effects: tuple[tuple[float, ...], ...]

    @property
    def recall(self) -> float:
        """The mean over groups."""
        return sum(self.recalls) / len(self.recalls)

    @property
    def worst(self) -> float:
        """The worst bucket of all groups."""
        return min(min(group) for group in self.effects)

    @property
    def harmless(self) -> bool:
        """No bucket of any group has a cost."""
        return self.worst >= 0.0


def choose_volume(candidates: Sequence[Candidate]) -> Candidate:
    """The harmless one with the largest recall; where none is harmless, the one whose worst bucket is best."""
    if harmless := [each for each in candidates if each.harmless]:
        return max(harmless, key=lambda each: each.recall)
    return max(candidates, key=lambda each: each.worst)


def choose_arms(chosen: Mapping[str, Candidate], arms: Sequence[Arm]) -> dict[str, str]:
    """The arm with the largest recall of each kind, alone and beside LoRA, by ``KIND`` and ``KIND + LoRA``.

    Arms without a harmless volume come after all others.
    """
    best: dict[str, str] = {}
    for arm in arms:
        if arm.kind is None:
            continue
        label = f"{arm.kind} + LoRA" if arm.beside_lora else arm.kind
        other = best.get(label)
        if other is None or _rank(chosen[arm.name]) > _rank(chosen[other]):
            best[label] = arm.name
    return best


def _rank(candidate: Candidate) -> tuple[bool, float]:
    return candidate.harmless, candidate.recall


def record(path: Path, candidates: Mapping[str, Sequence[Candidate]], arms: Sequence[Arm], seed: int) -> None:
    """Write ``choices.json``, where there is none yet: a choice that was made stays."""
    if path.exists():
        return
    chosen = {name: choose_volume(tried) for name, tried in candidates.items()}
    values = {
        "seed": seed,
        "arms": choose_arms(chosen, arms),
        "volumes": {name: each.volume for name, each in chosen.items()},
        "harmless": {name: each.harmless for name, each in chosen.items()},
        "candidates": {name: [asdict(each) for each in tried] for name, tried in candidates.items()},
    }
    with atomic_file(path) as temporary:
        temporary.write_text(to_json(values) + "\n", encoding="utf-8")


def read_choices(path: Path) -> dict[str, Any]:
    """What was chosen. Raises StudyError where nothing was."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(
            f"There is no {path}: no volume was chosen yet, and test recordings are evaluated once, after that. Run "
            "the stage 'validate' first."
        ) from None
    return values
