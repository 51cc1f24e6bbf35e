"""Evaluations of the base model and of adapters on the same recordings, with intervals.

``models`` loads the base model and adapters and evaluates them under a condition, ``documents`` reads the recordings,
``clips`` puts clips of them into batches, ``teacher_forcing`` measures losses frame by frame, ``statistics`` makes
intervals, ``reporting`` writes the folder; each evaluation is a module of its own, and ``compare`` puts several in one
table.

Each of these modules is imported when it is first used: ``moshi_ttt.evaluation.recall.evaluate(...)``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moshi_ttt.evaluation import between, compare, inner_loop, long_context, recall, zero_shot

__all__ = ["between", "compare", "inner_loop", "long_context", "recall", "zero_shot"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Evaluations: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted(__all__)
