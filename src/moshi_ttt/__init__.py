"""Test-time-training layers for pretrained speech language models.

    model = moshi_ttt.load_model("builtin:tiny")
    ttt = moshi_ttt.inject(model, moshi_ttt.TTTMLPConfig(layers="last:3", chunk=32))

The public names are those of ``dir(moshi_ttt)``. Each is imported when it is first used, so ``import moshi_ttt`` is
quick and imports no plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moshi_ttt import evaluation, testing, training
    from moshi_ttt.core.adapter import load_adapter, save_adapter
    from moshi_ttt.core.config import TTTConfig
    from moshi_ttt.core.config_parsing import load_config, parse_config
    from moshi_ttt.core.errors import MoshiTTTError
    from moshi_ttt.core.injection import Injection, Plan, inject, make_plan
    from moshi_ttt.core.registry import Registry, default_registry
    from moshi_ttt.hosts.moshi.host import MoshiHostConfig
    from moshi_ttt.models import load_model
    from moshi_ttt.plugins.common.gate import GateConfig
    from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
    from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
    from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig
    from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig
    from moshi_ttt.plugins.ttt_ridge.config import TTTRidgeConfig

    __version__: str

_HOME = {
    "GateConfig": "moshi_ttt.plugins.common.gate",
    "GatingMLPConfig": "moshi_ttt.plugins.gating_mlp.config",
    "Injection": "moshi_ttt.core.injection",
    "MoshiHostConfig": "moshi_ttt.hosts.moshi.host",
    "MoshiTTTError": "moshi_ttt.core.errors",
    "Plan": "moshi_ttt.core.injection",
    "Registry": "moshi_ttt.core.registry",
    "TTTConfig": "moshi_ttt.core.config",
    "TTTLinearConfig": "moshi_ttt.plugins.ttt_linear.config",
    "TTTMLPConfig": "moshi_ttt.plugins.ttt_mlp.config",
    "TTTMultilayerConfig": "moshi_ttt.plugins.ttt_multilayer.config",
    "TTTRidgeConfig": "moshi_ttt.plugins.ttt_ridge.config",
    "default_registry": "moshi_ttt.core.registry",
    "inject": "moshi_ttt.core.injection",
    "load_adapter": "moshi_ttt.core.adapter",
    "load_config": "moshi_ttt.core.config_parsing",
    "load_model": "moshi_ttt.models",
    "make_plan": "moshi_ttt.core.injection",
    "parse_config": "moshi_ttt.core.config_parsing",
    "save_adapter": "moshi_ttt.core.adapter",
}
"""Public name -> the module that defines it."""
_MODULES = ("evaluation", "testing", "training")
"""Public modules."""

__all__ = [
    "GateConfig",
    "GatingMLPConfig",
    "Injection",
    "MoshiHostConfig",
    "MoshiTTTError",
    "Plan",
    "Registry",
    "TTTConfig",
    "TTTLinearConfig",
    "TTTMLPConfig",
    "TTTMultilayerConfig",
    "TTTRidgeConfig",
    "__version__",
    "default_registry",
    "evaluation",
    "inject",
    "load_adapter",
    "load_config",
    "load_model",
    "make_plan",
    "parse_config",
    "save_adapter",
    "testing",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("moshi-ttt")
    raise AttributeError(f"module 'moshi_ttt' has no attribute {name!r}.{_meant(name)}")


def _meant(name: str) -> str:
    """A question with the public names that are near to a wrong one; empty where none is."""
    from difflib import get_close_matches

    by_letters = {public.lower(): public for public in __all__}
    near = [by_letters[match] for match in get_close_matches(name.lower(), by_letters, n=2, cutoff=0.7)]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def __dir__() -> list[str]:
    return sorted(__all__)
