"""Present a clip twice to the base model, and to the adapter that ships with the tiny Moshi."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moshi_ttt.apps.quickstart import evaluate as evaluating
from moshi_ttt.apps.quickstart.evaluate import Curve
from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import BUILTIN_TINY
from moshi_ttt.hosts.moshi.tiny import memory_adapter

FRAMES = 96
"""Of the clip: 7.7 s, half as long again as the tiny Moshi's attention sees."""


@dataclass(frozen=True, kw_only=True)
class Twice:
    """The losses of a clip of ``frames`` frames followed by itself.

    Attributes:
        skip: frames at the beginning of the second presentation whose attention context reaches into the first.
    """

    base: Curve
    memory: Curve
    frames: int
    skip: int

    @property
    def saved(self) -> float:
        """Nats per audio token saved in the second presentation, where attention sees nothing of the first."""
        second = slice(self.frames + self.skip, None)
        return float((self.base.values - self.memory.values)[second].nanmean())


def shipped_memory(host: MoshiHostConfig) -> Path | None:
    """The adapter that ships with the tiny Moshi, where ``host`` is that model with its own weights."""
    own = host.hf_repo == BUILTIN_TINY and host.moshi_weights is None and host.config_path is None
    return memory_adapter() if own else None


def present_twice(model: Any, document: Tensor, adapter: Path) -> Twice:
    """Present the first ``FRAMES`` frames of ``document [Q, T]`` twice. The model has no blocks before and after."""
    context = int(model.context or 0)
    codes = document[:, :FRAMES].repeat(1, 2)
    base = evaluating.evaluate(model, MOSHI_HOST, codes, name="base model")
    injection = load_adapter(model, adapter)
    try:
        memory = evaluating.evaluate(model, MOSHI_HOST, codes, name="with the shipped memory")
    finally:
        injection.remove()
    return Twice(base=base, memory=memory, frames=FRAMES, skip=context)
