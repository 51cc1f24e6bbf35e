"""What a streamed frame costs: the models take turns in one process, so that a disturbance affects all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from moshi_ttt.evaluation.models import ModelUnderTest

ROUNDS, FRAMES = 20, 16


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one model.

    Attributes:
        step_ratio: the median frame of one stream (main transformer, no depformer) over the base model's.
        state_bytes: what its memory takes for one stream.
    """

    step_ratio: float
    state_bytes: int


@torch.no_grad()
def measure(models: Sequence[ModelUnderTest], *, rounds: int = ROUNDS, frames: int = FRAMES) -> dict[str, Cost]:
    """A new stream of each by turns, ``rounds`` times ``frames`` frames; the first round is not counted.

    The base model comes first in ``models``. They may share one: each is in it while it streams.
    """
    base = models[0].model
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, base.card, (1, 1 + base.n_q, frames), generator=generator)
    seconds: dict[str, list[float]] = {tested.name: [] for tested in models}
    state_bytes: dict[str, int] = {}
    for _ in range(rounds + 1):
        for tested in models:
            with tested.present(), tested.model.streaming(1):
                state_bytes[tested.name] = _state_bytes(tested)
                for frame in range(frames):
                    began = time.perf_counter()
                    tested.model.forward_text(codes[:, :, frame : frame + 1])
                    seconds[tested.name].append(time.perf_counter() - began)
    typical = {name: median(times[frames:]) for name, times in seconds.items()}
    own = typical[models[0].name]
    return {
        tested.name: Cost(step_ratio=typical[tested.name] / own, state_bytes=state_bytes[tested.name])
        for tested in models
    }


def _state_bytes(tested: ModelUnderTest) -> int:
    if tested.injection is None:
        return 0
    return sum(block.state_bytes() for block in tested.injection.blocks.values())
