"""The registry: every name a config can use, who registered it, and what failed to load.

Two ways in, one table: distributions with an entry point (``discover``), and code at run time (``register_*``). A
plugin that cannot be loaded is recorded with its reason and is harmless until something asks for it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal, cast

import pluggy

from moshi_ttt.core.block import BlockFactory
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.errors import DuplicateNameError, PluginError, UnknownNameError, nearest
from moshi_ttt.core.format import FormatAdapter
from moshi_ttt.core.hooks import ENTRY_POINT_GROUP, HOOK_API_VERSION, HookSpecs
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.precision import PrecisionPolicy
from moshi_ttt.core.registrar import (
    RUNTIME,
    BlockRegistrar,
    Entry,
    Kind,
    Provenance,
    Registrar,
    checked_name,
    refuse_repeats,
)
from moshi_ttt.core.verification import Verifier
from moshi_ttt.core.weight_map import WeightMap

HOOKS: dict[Kind, str] = {
    "block": "moshi_ttt_blocks",
    "format_adapter": "moshi_ttt_format_adapters",
    "precision_policy": "moshi_ttt_precision_policies",
    "host": "moshi_ttt_hosts",
    "verifier": "moshi_ttt_verifiers",
    "weight_map": "moshi_ttt_weight_maps",
}
ENVIRONMENT = "MOSHI_TTT_PLUGINS"
"""Comma-separated entry-point names to load; unset means all. ``builtin`` is always loaded."""


@dataclass(frozen=True)
class PluginRecord:
    """One entry point and what became of it."""

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


class Registry:
    """All names, by kind. ``default_registry()`` is the one that configs use; tests make their own."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Kind, str], Entry] = {}
        self._conflicts: dict[tuple[Kind, str], tuple[Provenance, Provenance]] = {}
        self._records: list[PluginRecord] = []
        self._missing: tuple[str, ...] = ()

    # ---- discovery

    def discover(self, entry_points: list[metadata.EntryPoint] | None = None) -> None:
        """Load the plugins of all installed distributions, one at a time, in sorted order.

        A plugin that fails is recorded and warned about; the others load. Two plugins that claim one name make that
        name unusable (asking for it names both); their other names work.
        """
        if self._records:
            raise PluginError("This registry has discovered its plugins already; make a new one to discover again.")
        if entry_points is None:
            entry_points = list(metadata.entry_points(group=ENTRY_POINT_GROUP))
        wanted = os.environ.get(ENVIRONMENT)
        allowed = None if wanted is None else {part.strip() for part in wanted.split(",")} | {"builtin"}
        manager = pluggy.PluginManager("moshi_ttt")
        manager.add_hookspecs(HookSpecs)
        for entry_point in sorted(entry_points, key=lambda e: (e.name, (e.dist.name if e.dist else None) or "")):
            provenance = Provenance(
                entry_point.name,
                (entry_point.dist.name if entry_point.dist else None) or "(unknown)",
                entry_point.dist.version if entry_point.dist else "0",
            )
            if allowed is not None and entry_point.name not in allowed:
                self._records.append(PluginRecord(provenance, "disabled", f"not listed in {ENVIRONMENT}"))
                continue
            record = self._load_plugin(manager, entry_point, provenance)
            self._records.append(record)
            if record.status != "loaded":
                warnings.warn(f"Plugin {provenance} is {record.status}: {record.reason}", stacklevel=2)
        missing = sorted((allowed or set()) - {entry_point.name for entry_point in entry_points} - {"builtin", ""})
        self._missing = tuple(missing)
        if missing:
            warnings.warn(self.missing_message(), stacklevel=2)

    def missing_message(self) -> str:
        """What MOSHI_TTT_PLUGINS asks for and nobody installed, as a sentence; empty when there is nothing."""
        if not self._missing:
            return ""
        return f"{ENVIRONMENT} names plugins that are not installed: {', '.join(self._missing)}."

    def _load_plugin(
        self, manager: pluggy.PluginManager, entry_point: metadata.EntryPoint, provenance: Provenance
    ) -> PluginRecord:
        try:
            plugin = entry_point.load()
            version = getattr(plugin, "MOSHI_TTT_API", None)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a third party's import raises must not end discovery
            return PluginRecord(provenance, "failed", f"{type(error).__name__}: {error}")
        if version != HOOK_API_VERSION:
            return PluginRecord(
                provenance,
                "outdated",
                f"it declares MOSHI_TTT_API = {version!r}, this is version {HOOK_API_VERSION}. "
                f"Install a version of {provenance.distribution} made for it, or of moshi-ttt made for the plugin.",
            )
        registrars = [(BlockRegistrar if kind == "block" else Registrar)(kind, provenance) for kind in HOOKS]
        name = f"{provenance.distribution}:{provenance.plugin}"
        try:
            manager.register(plugin, name)
            manager.check_pending()
            others = [other for other in manager.get_plugins() if other is not plugin]
            for registrar in registrars:
                manager.subset_hook_caller(HOOKS[registrar.kind], others)(registrar=registrar)
                refuse_repeats(registrar)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if manager.has_plugin(name):
                manager.unregister(name=name)
            return PluginRecord(provenance, "failed", f"{type(error).__name__}: {error}")
        entries = [entry for registrar in registrars for entry in registrar.entries]
        names = tuple((entry.kind, entry.name) for entry in entries)
        if not names:
            reason = "it registers nothing; a hook needs the decorator `hookimpl` of moshi_ttt.core.hooks"
            return PluginRecord(provenance, "failed", reason)
        clashes = [entry for entry in entries if (entry.kind, entry.name) in self._entries]
        for entry in entries:
            key = (entry.kind, entry.name)
            if key in self._entries:
                self._conflicts[key] = (self._entries[key].provenance, provenance)
            else:
                self._entries[key] = entry
        if clashes:
            reason = "; ".join(self._duplicate_message(entry.kind, entry.name) for entry in clashes)
            return PluginRecord(provenance, "duplicate", reason, names)
        return PluginRecord(provenance, "loaded", "", names)

    # ---- the programmatic face

    def register(self, kind: Kind, name: str, target: Any, *, config: Any = None) -> None:
        """Register at run time. Raises DuplicateNameError when the name exists (``override`` replaces one for a while).

        A name registered at run time exists in this process only: spawned workers do not know it.
        """
        if kind not in HOOKS:
            raise PluginError(f"Unknown kind {kind!r}. {nearest(str(kind), HOOKS)}")
        if (kind, name) in self._entries:
            raise DuplicateNameError(
                f"{kind} {name!r} is already registered by {self._entries[kind, name].provenance}. "
                "Choose another name, unregister it, or use registry.override(...)."
            )
        if kind == "block" and config is None:
            raise PluginError(f"Variant {name!r} needs config=..., a BlockConfig subclass.")
        self._entries[kind, name] = Entry(kind, checked_name(name), target, RUNTIME, config)

    def register_block(self, name: str, *, config: type[BlockConfig] | str, block: BlockFactory | str) -> None:
        """Register a variant at run time; see ``register``."""
        self.register("block", name, block, config=config)

    def unregister(self, kind: Kind, name: str) -> None:
        """Forget a name. Raises UnknownNameError when there is none."""
        if (kind, name) not in self._entries:
            self.entry(kind, name)  # raises, with the nearest names
        del self._entries[kind, name]
        self._conflicts.pop((kind, name), None)

    @contextmanager
    def override(self, kind: Kind, name: str, target: Any, *, config: Any = None) -> Iterator[None]:
        """Within the context ``name`` means ``target``; afterwards it means what it did before. For tests."""
        before = self._entries.get((kind, name))
        if config is None and before is not None:
            config = before.config
        self._entries[kind, name] = Entry(kind, checked_name(name), target, RUNTIME, config)
        try:
            yield
        finally:
            if before is None:
                self._entries.pop((kind, name), None)
            else:
                self._entries[kind, name] = before

    def copy(self) -> Registry:
        """A registry with the same names, to add to without touching this one."""
        other = Registry()
        other._entries, other._conflicts = dict(self._entries), dict(self._conflicts)
        other._records, other._missing = list(self._records), self._missing
        return other

    # ---- lookup

    def names(self, kind: Kind) -> tuple[str, ...]:
        """All names of a kind, sorted."""
        return tuple(sorted(name for k, name in self._entries if k == kind))

    def entries(self) -> tuple[Entry, ...]:
        """All entries, sorted by kind and name."""
        return tuple(self._entries[key] for key in sorted(self._entries))

    def plugins(self) -> tuple[PluginRecord, ...]:
        """Every entry point that discovery saw, in the order it loaded them."""
        return tuple(self._records)

    def claims(self, kind: Kind, name: str) -> tuple[Provenance, ...]:
        """Who registered a name: one, or two that clash (asking for such a name is an error)."""
        entry = self._entries.get((kind, name))
        if entry is None:
            return ()
        clash = self._conflicts.get((kind, name))
        return (entry.provenance,) if clash is None or entry.provenance is RUNTIME else clash

    def entry(self, kind: Kind, name: str) -> Entry:
        """The entry of a name.

        Raises:
            UnknownNameError: no plugin registered it.
            PluginError: the plugin of that name failed to load, is outdated or disabled.
            DuplicateNameError: two plugins claim it.
        """
        found = self._entries.get((kind, name))
        if len(self.claims(kind, name)) > 1:
            raise DuplicateNameError(self._duplicate_message(kind, name))
        if found is not None:
            return found
        broken = [r for r in self._records if r.status in ("failed", "outdated", "disabled")]
        for record in broken:
            if record.provenance.plugin == name:
                raise PluginError(f"{kind} {name!r}: plugin {record.provenance} is {record.status}: {record.reason}")
        also = "".join(f" Plugin {r.provenance} is {r.status}: {r.reason}." for r in broken)
        raise UnknownNameError(
            f"Unknown {kind} {name!r}. {nearest(name, self.names(kind))}{also}"
            " Names registered at run time do not exist in spawned workers: register them there too, or ship a plugin."
        )

    def block(self, name: str) -> Variant:
        """A variant, loaded. Raises as ``entry``, and PluginError when its modules cannot be imported."""
        entry = self.entry("block", name)
        config_class = entry.load_config()
        if not (isinstance(config_class, type) and issubclass(config_class, BlockConfig)):
            raise PluginError(f"The config of variant {name!r} from {entry.provenance} is not a BlockConfig subclass.")
        factory = entry.load()
        if not callable(factory):
            raise PluginError(
                f"The block of variant {name!r} from {entry.provenance} is a {type(factory).__name__}; "
                "register a block class, or a function (config, site info, dtype roles) -> block."
            )
        return Variant(name, config_class, factory, entry.provenance)

    def host(self, name: str) -> HostModel:
        """A host adapter. Raises as ``entry``."""
        return cast(HostModel, self._typed("host", name, HostModel))

    def policy(self, name: str) -> PrecisionPolicy:
        """A precision policy, under the name it is registered by. Raises as ``entry``."""
        policy = cast(PrecisionPolicy, self._typed("precision_policy", name, PrecisionPolicy))
        return policy if policy.name == name else replace(policy, name=name)

    def format_adapter(self, name: str) -> FormatAdapter:
        """A format adapter. Raises as ``entry``."""
        return cast(FormatAdapter, self._typed("format_adapter", name, FormatAdapter))

    def weight_map(self, name: str) -> WeightMap:
        """A weight map. Raises as ``entry``."""
        return cast(WeightMap, self._typed("weight_map", name, WeightMap))

    def verifiers(self) -> tuple[Verifier, ...]:
        """All verifiers, by name."""
        return tuple(cast(Verifier, self._typed("verifier", name, Verifier)) for name in self.names("verifier"))

    def _typed(self, kind: Kind, name: str, expected: type) -> Any:
        entry = self.entry(kind, name)
        target = entry.load()
        if not isinstance(target, expected):
            raise PluginError(
                f"{kind} {name!r} of {entry.provenance} is a {type(target).__name__}, expected {expected.__name__}."
            )
        return target

    def _duplicate_message(self, kind: Kind, name: str) -> str:
        first, second = self._conflicts[kind, name]
        remedy = "uninstall one"
        if first.plugin != second.plugin:
            remedy += f", or list in {ENVIRONMENT} all plugins but one of the two"
        return f"{kind} {name!r} is claimed by {first} and by {second}; {remedy}"


_default: Registry | None = None


def default_registry() -> Registry:
    """The registry of this process, with all installed plugins; discovered at first use."""
    global _default
    if _default is None:
        registry = Registry()
        registry.discover()
        _default = registry
    return _default
