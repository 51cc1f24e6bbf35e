"""The longer measurements of the chosen arms: after other clips, with clips held at once, over one stream."""

from __future__ import annotations

from typing import Any

import torch

from study.results import BASE, Measured, StudyResults, tensor
from study.stages import HOUR


def lasting_after(results: StudyResults, group: str, arm: str, volume: float) -> list[dict[str, Any]]:
    """A row for each number of clips between: ``count``, ``minutes``, and the figures of the evaluation.

    ``gain`` is beyond the base model's. ``saved`` is what the last presentation costs less than the base model's, and
    ``once`` what the clips between, which are played once, cost less.
    """
    rows = results.longer(group, arm, "lasting", volume)
    found = []
    for count in sorted({row["clips_between"] for row in rows}):
        own = [row for row in rows if row["clips_between"] == count]  # one of each seed
        names = {"gain": "gain", "saved": "saved", "once": "interludes_saved"}
        figures = {
            name: Measured(torch.stack([tensor(row[f"{each}_by_recording"]) for row in own]))
            for name, each in names.items()
        }
        found.append({"count": count, "minutes": own[0]["seconds_between"] / 60, **figures})
    return found


def held_after(results: StudyResults, group: str, arm: str, volume: float) -> list[dict[str, Any]]:
    """A row for each number of clips held at once: ``held``, and the ``gain`` beyond the base model's."""
    own, base = results.longer(group, arm, "held", volume), results.longer(group, BASE, "held", 1.0)
    if not own:
        return []
    gains = Measured(torch.stack([tensor(row["first"]) - tensor(row["again"]) for row in own]))  # [S, R, N]
    bases = torch.stack([tensor(row["first"]) - tensor(row["again"]) for row in base])
    beyond = gains.values - bases
    return [
        {"held": count, "gain": Measured(beyond[:, :, place])} for place, count in enumerate(own[0]["counts"])
    ]  # fmt: skip


def stream_parts(results: StudyResults) -> list[dict[str, Any]]:
    """What each arm saves in each part of one stream: means over seeds and orders of the recordings.

    ``worst`` is the part with the largest cost.
    """
    found = []
    for arm in results.arms(HOUR) if results.groups([HOUR]) else ():
        if arm == BASE:
            continue
        other = results.reference(arm)
        others = torch.stack([tensor(row["parts"]) for row in results.longer(HOUR, other, "hour", 1.0)])
        for volume in results.volumes(HOUR, arm, "hour"):
            own = torch.stack([tensor(row["parts"]) for row in results.longer(HOUR, arm, "hour", volume)])
            saved = (others - own).mean((0, 1))  # [S, B, P] to [P]
            found.append(
                {"arm": arm, "against": other, "volume": volume, "saved": saved.tolist(), "worst": float(saved.min())}
            )
    return found
