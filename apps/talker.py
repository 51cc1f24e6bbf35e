"""A Moshi that can be talked to: the base model with or without an adapter, its codec and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moshi_ttt.configs.reading import read_config
from moshi_ttt.core.adapter import find_adapter, load_adapter, read_manifest
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.paths import user_path
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.hosts.moshi.compatibility import require_audio, require_talking, require_unconditioned
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import BUILTIN_TINY
from moshi_ttt.hosts.moshi.tiny import memory_adapter

SHIPPED_MEMORY = "builtin:memory"
"""What the command line calls the adapter that ships with the tiny Moshi."""
NO_ADAPTER = "none"
"""What it calls the base model alone."""


@dataclass(frozen=True, kw_only=True)
class Talker:
    """What ``Slots`` needs, and what makes text of its tokens.

    Attributes:
        model: the language model, in eval mode, with the adapter in it.
        injection: the adapter's blocks; None without an adapter.
        codec: the codec and the tokenizer.
        facts: where it comes from, for reports.
    """

    model: Any
    injection: Injection | None
    codec: SpeechCodec
    facts: dict[str, Any]

    @property
    def mimi(self) -> Any:
        return self.codec.mimi

    @property
    def silent_tokens(self) -> frozenset[int]:
        """Text tokens that say nothing."""
        return frozenset({self.codec.text_padding, self.codec.end_of_padding})


def load_talker(config: str, adapter: str | None, registry: Registry | None = None) -> Talker:
    """The Moshi that ``config`` names, on the GPU where there is one, with an adapter in it.

    Args:
        config: a YAML file or the name of a packaged config; the blocks that it lists are not put in.
        adapter: a folder with an adapter or a checkpoint that holds one, or ``SHIPPED_MEMORY``; None for none.

    Raises ConfigError, HostError and AdapterError. What cannot be used is refused before weights are read.
    """
    registry = registry or default_registry()
    host = read_config(config, registry=registry).host
    if not isinstance(host, MoshiHostConfig):
        raise ConfigError(f"Only a Moshi can be talked to (host 'moshi'), and {config} names {host.name!r}.")
    folder = None if adapter is None else _adapter_folder(adapter)
    manifest = None if folder is None else read_manifest(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = SpeechCodec.load(host, device, require=_require)
    facts: dict[str, Any] = {"base model": host.described, "adapter": NO_ADAPTER if folder is None else str(adapter)}
    if folder is None or manifest is None:
        return Talker(model=MOSHI_HOST.load(host, device=device), injection=None, codec=codec, facts=facts)
    model = MOSHI_HOST.load_for_adapter(host, folder, device=device)
    injection = load_adapter(model, folder, registry=registry)
    facts["training step"] = manifest["training_step"]
    return Talker(model=model, injection=injection, codec=codec, facts=facts)


def chosen_adapter(config: str, given: str | None) -> str | None:
    """The adapter for ``load_talker`` where the command line says ``given``.

    None given is ``SHIPPED_MEMORY`` for the tiny Moshi, and no adapter for other models. Raises ConfigError.
    """
    if given is not None:
        return None if given == NO_ADAPTER else given
    host = read_config(config).host
    return SHIPPED_MEMORY if isinstance(host, MoshiHostConfig) and host.hf_repo == BUILTIN_TINY else None


def _require(model: Any, name: str) -> None:
    require_unconditioned(model, name)
    require_audio(model, name, "a conversation")
    require_talking(model, "Conversations")


def _adapter_folder(adapter: str) -> Path:
    return memory_adapter() if adapter == SHIPPED_MEMORY else find_adapter(user_path(adapter))
