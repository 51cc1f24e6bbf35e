"""Test-time-training layers for pretrained speech language models.

The names below are the programmatic door; they are imported when first used, so ``import moshi_ttt`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moshi_ttt.core.adapter import load_adapter, save_adapter
    from moshi_ttt.core.config_parsing import load_config, parse_config
    from moshi_ttt.core.injection import Injection, Plan, inject, make_plan
    from moshi_ttt.core.registry import Registry, default_registry

_HOME = {
    "Injection": "moshi_ttt.core.injection",
    "Plan": "moshi_ttt.core.injection",
    "Registry": "moshi_ttt.core.registry",
    "default_registry": "moshi_ttt.core.registry",
    "inject": "moshi_ttt.core.injection",
    "load_adapter": "moshi_ttt.core.adapter",
    "load_config": "moshi_ttt.core.config_parsing",
    "make_plan": "moshi_ttt.core.injection",
    "parse_config": "moshi_ttt.core.config_parsing",
    "save_adapter": "moshi_ttt.core.adapter",
}

__all__ = [
    "Injection",
    "Plan",
    "Registry",
    "default_registry",
    "inject",
    "load_adapter",
    "load_config",
    "make_plan",
    "parse_config",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moshi_ttt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
