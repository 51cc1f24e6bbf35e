"""What the evaluations of all seeds say together. Intervals are over recordings, of means over seeds.

Shape legend: S seeds, R recordings, W windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.evaluation.statistics import Interval, bootstrap, mean_of_recordings
from moshi_ttt.system.output_folder import METRICS
from study.jobs import StudyError

BASE, ON = "base", "updates on"


@dataclass(frozen=True)
class Measured:
    """One figure of an arm under a condition: ``values [S, R, W]``, NaN where a recording has no such window."""

    values: Tensor

    @property
    def interval(self) -> Interval:
        """The mean over seeds, recordings and windows."""
        return bootstrap(self.values.nanmean(0), mean_of_recordings)

    @property
    def by_seed(self) -> list[float]:
        return [float(mean_of_recordings(values[None])[0]) for values in self.values]

    def minus(self, other: Measured) -> Measured:
        """The difference, recording by recording and seed by seed."""
        return Measured(self.values - other.values)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One evaluation of every seed, on one group of recordings.

    Attributes:
        figures: by (what, arm, condition); what is ``second`` or ``third``, for gains; ``loss, first`` and so on,
            for the presentations themselves; or a stream's name.
        parameters: of each arm.
        windows: the same keys for streams, with all windows ``[S, R, W]``, those within attention's context too.
        recordings: their names.
    """

    figures: dict[tuple[str, str, str], Measured]
    windows: dict[tuple[str, str, str], Tensor]
    parameters: dict[str, int]
    recordings: list[str]

    def of(self, what: str, arm: str, condition: str = ON) -> Measured:
        """Raises KeyError."""
        return self.figures[what, arm, condition]

    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for _, arm, _ in self.figures))


def read_group(folders: Sequence[Path]) -> Group:
    """The evaluations of one kind on one group of recordings, a folder for each seed. Raises StudyError."""
    found = [_read(folder) for folder in folders]
    recordings = found[0]["recordings"]
    for folder, values in zip(folders, found, strict=True):
        if values["recordings"] != recordings:
            raise StudyError(f"{folder} is about other recordings than {folders[0]}: delete both, and go on.")
    figures: dict[tuple[str, str, str], list[Tensor]] = {}
    windows: dict[tuple[str, str, str], list[Tensor]] = {}
    for values in found:
        for gain in values.get("gains", []):
            key = (gain["hearing"], gain["subject"], gain["condition"])
            figures.setdefault(key, []).append(gained := _tensor(gain["by_recording"])[:, None])
            loss = _tensor(gain["loss_by_recording"])[:, None]
            figures.setdefault((f"loss, {gain['hearing']}", *key[1:]), []).append(loss)
            if gain["hearing"] == "second":
                figures.setdefault(("loss, first", *key[1:]), []).append(loss + gained)
        for curve in values.get("curves", []):
            key = (curve["stream"], curve["subject"], curve["condition"])
            by_window = _tensor(curve["by_recording"])
            windows.setdefault(key, []).append(by_window)
            first = values["figures_from_frame"] // values["window_frames"]
            figures.setdefault(key, []).append(by_window[:, first:])
    return Group(
        figures={key: Measured(torch.stack(parts)) for key, parts in figures.items()},
        windows={key: torch.stack(parts) for key, parts in windows.items()},
        parameters={name: int(about["parameters"]) for name, about in found[0]["subjects"].items()},
        recordings=recordings,
    )  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{folder} holds no evaluation ({error}). Delete it, and go on.") from None
    return values


def _tensor(rows: list[Any]) -> Tensor:
    if rows and isinstance(rows[0], list):
        return torch.stack([_tensor(row) for row in rows])
    return torch.tensor([math.nan if value is None else value for value in rows], dtype=torch.float64)
