"""Registrars, with which hooks register names, and the entries that they create."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moshi_ttt.core.errors import PluginError, nearest

if TYPE_CHECKING:
    import pluggy

    from moshi_ttt.core.block import BlockFactory
    from moshi_ttt.core.config import BlockConfig

Kind = Literal["block", "format_adapter", "precision_policy", "host", "verifier", "weight_map", "acceleration"]
"""What can be registered: the extension points."""


@dataclass(frozen=True)
class Provenance:
    """Where a name comes from."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (plugin {self.plugin!r})"


DISTRIBUTION = "moshi-ttt"
"""The distribution of this package."""
RESERVED = "builtin"
"""In a qualified name it means ``DISTRIBUTION``; no other distribution, and no plugin of one, may be called so."""
RUNTIME = Provenance("(registered at run time)", "(none)", "0")


@dataclass(frozen=True)
class Entry:
    """One registered name. ``target`` is an object, or ``"module:attribute"`` imported at first use."""

    kind: Kind
    name: str
    target: Any
    provenance: Provenance
    config: Any = None

    def load(self) -> Any:
        """The target itself. Raises PluginError when its module or attribute cannot be imported."""
        return _resolve(self.target, self)

    def load_config(self) -> Any:
        """The variant's config class."""
        return _resolve(self.config, self)


def _resolve(target: Any, entry: Entry) -> Any:
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plugin's module can fail in any way; the reason is passed on
        raise PluginError(
            f"{entry.kind} {entry.name!r} of {entry.provenance} cannot be imported from {target!r}: "
            f"{type(error).__name__}: {error}. Reinstall or remove that distribution."
        ) from error


@dataclass(frozen=True)
class PluginRecord:
    """One entry point and the result of loading it."""

    provenance: Provenance
    status: Literal["loaded", "failed", "outdated", "disabled", "duplicate"]
    reason: str = ""
    names: tuple[tuple[Kind, str], ...] = ()


@dataclass(frozen=True)
class Variant:
    """A registered variant, loaded: its config model, its factory, and who provides it."""

    name: str
    config_class: type[BlockConfig]
    factory: BlockFactory
    provenance: Provenance


class Registrar:
    """The argument of a hook: collects a plugin's names of one kind. None is registered if the plugin fails later."""

    def __init__(self, kind: Kind, provenance: Provenance) -> None:
        self.kind: Kind = kind
        self.provenance = provenance
        self.entries: list[Entry] = []

    def add(self, name: str, target: Any) -> None:
        """Register ``target`` (an object, or ``"module:attribute"``) under ``name``."""
        self.entries.append(Entry(self.kind, checked_name(name), target, self.provenance))


def refuse_repeats(registrar: Registrar) -> None:
    """Raise PluginError when one plugin registers a name twice."""
    names = [entry.name for entry in registrar.entries]
    for name in names:
        if names.count(name) > 1:
            raise PluginError(f"it registers the {registrar.kind} {name!r} {names.count(name)} times")


def outdated_reason(provenance: Provenance, declared: Any, version: int) -> str:
    """Why a plugin that declares another version of the hook API, or None, is not loaded."""
    if declared is None:
        return f"it declares no MOSHI_TTT_API. Its author writes MOSHI_TTT_API = {version} into the plugin's module."
    return (
        f"it declares MOSHI_TTT_API = {declared!r}, this is version {version}. Install a version of "
        f"{provenance.distribution} made for it, or of moshi-ttt made for the plugin."
    )


def unknown_hook(manager: pluggy.PluginManager, plugin: Any, hooks: Iterable[str]) -> str:
    """What to say of the first function of a plugin that is marked as a hook and has the name of none; or nothing."""
    known = set(hooks)
    for name in dir(plugin):
        marked = manager.parse_hookimpl_opts(plugin, name)
        if marked is not None and (hook := marked.get("specname") or name) not in known:
            return f"unknown hook {hook!r}. {nearest(hook, known)}"
    return ""


class BlockRegistrar(Registrar):
    """The registrar of variants, which come with a config model."""

    def add(self, name: str, target: Any = None, *, config: Any = None, block: Any = None) -> None:
        """Register a variant: ``config`` a BlockConfig subclass, ``block`` a block class; or strings naming them."""
        block = target if block is None else block
        if config is None or block is None:
            raise PluginError(f"Variant {name!r} of {self.provenance} needs both config=... and block=....")
        self.entries.append(Entry(self.kind, checked_name(name), block, self.provenance, config))


def split_name(name: str) -> tuple[str | None, str]:
    """``distribution:name`` in its two parts; a name without a distribution has None."""
    distribution, colon, plain = name.rpartition(":")
    return (distribution if colon else None), plain


def same_distribution(given: str, other: str) -> bool:
    """Whether two names are of one distribution: case, ``-``, ``_`` and ``.`` make no difference (PEP 503)."""
    return _normalized(given) == _normalized(other)


def _normalized(distribution: str) -> str:
    plain = re.sub(r"[-_.]+", "-", distribution).lower()
    return DISTRIBUTION if plain == RESERVED else plain


def reserved_problem(provenance: Provenance) -> str:
    """Why a plugin may not have this name; empty where it may."""
    own = provenance.distribution == DISTRIBUTION
    if provenance.plugin == RESERVED and not own:
        return f"the name {RESERVED!r} of a plugin is reserved for {DISTRIBUTION}. Give the entry point another name"
    if not own and same_distribution(provenance.distribution, RESERVED):
        return f"the name {provenance.distribution!r} of a distribution is reserved. Give the distribution another name"
    return ""


def checked_name(name: str) -> str:
    """``name`` itself, or PluginError."""
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise PluginError(f"A registered name is letters, digits, '_' and '-', got {name!r}.")
    return name
