"""The registry: every name a config can use, who registered it, and what failed to load.

Two ways in, one table: distributions with an entry point (``discover``), and code at run time (``register_*``). A
plugin that cannot be loaded is recorded with its reason and is harmless until something asks for it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any, cast

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
    PluginRecord,
    Provenance,
    Registrar,
    Variant,
    checked_name,
    outdated_reason,
    refuse_repeats,
    reserved_problem,
    same_distribution,
    split_name,
    unknown_hook,
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
    "acceleration": "moshi_ttt_accelerations",
}
__all__ = ["ENVIRONMENT", "HOOKS", "PluginRecord", "Registry", "Variant", "default_registry"]

ENVIRONMENT = "MOSHI_TTT_PLUGINS"
"""Comma-separated entry-point names to load; unset means all. ``builtin`` is always loaded."""


class Registry:
    """All names, by kind. ``default_registry()`` is the one that configs use; tests make their own."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Kind, str], Entry] = {}
        self._others: dict[tuple[Kind, str], list[Entry]] = {}
        """Further claims of a name: each makes it ambiguous, and is found as ``distribution:name``."""
        self._records: list[PluginRecord] = []
        self._missing: tuple[str, ...] = ()

    # ---- discovery

    def discover(self, entry_points: list[metadata.EntryPoint] | None = None) -> None:
        """Load the plugins of all installed distributions, one at a time, in sorted order.

        A plugin that fails is recorded and warned about; the others load. Two plugins that claim one name make that
        name ambiguous: asking for it names both, and ``distribution:name`` means one. Their other names work.
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
        """A sentence about plugins in MOSHI_TTT_PLUGINS that are not installed; empty when there are none."""
        if not self._missing:
            return ""
        return f"{ENVIRONMENT} names plugins that are not installed: {', '.join(self._missing)}."

    def _load_plugin(
        self, manager: pluggy.PluginManager, entry_point: metadata.EntryPoint, provenance: Provenance
    ) -> PluginRecord:
        if problem := reserved_problem(provenance):
            return PluginRecord(provenance, "failed", problem)
        try:
            plugin = entry_point.load()
            version = getattr(plugin, "MOSHI_TTT_API", None)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a third party's import raises must not end discovery
            return PluginRecord(provenance, "failed", f"{type(error).__name__}: {error}")
        if version != HOOK_API_VERSION:
            return PluginRecord(provenance, "outdated", outdated_reason(provenance, version, HOOK_API_VERSION))
        if problem := unknown_hook(manager, plugin, HOOKS.values()):
            return PluginRecord(provenance, "failed", problem)
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
                self._others.setdefault(key, []).append(entry)
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
        self._others.pop((kind, name), None)

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
        other._entries = dict(self._entries)
        other._others = {key: list(entries) for key, entries in self._others.items()}
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
        """Who registered a name: one, or several that clash (asking for such a name is an error)."""
        return tuple(entry.provenance for entry in self._claims(kind, name))

    def _claims(self, kind: Kind, name: str) -> tuple[Entry, ...]:
        found = self._entries.get((kind, name))
        if found is None:
            return ()
        return (found,) if found.provenance is RUNTIME else (found, *self._others.get((kind, name), ()))

    def all_claims(self) -> tuple[Entry, ...]:
        """Every entry, those that clash included, sorted by kind and name."""
        return tuple(entry for kind, name in sorted(self._entries) for entry in self._claims(kind, name))

    def entry(self, kind: Kind, name: str) -> Entry:
        """The entry of a name, or of ``distribution:name`` where two distributions claim one.

        Raises:
            UnknownNameError: no plugin, or not that distribution, registered it.
            PluginError: the plugin of that name failed to load, is outdated or disabled.
            DuplicateNameError: two plugins claim it.
        """
        distribution, plain = split_name(name)
        claims = self._claims(kind, plain)
        if distribution is not None and claims:
            return self._of_distribution(kind, name, distribution, claims)
        if len(claims) > 1:
            raise DuplicateNameError(self._duplicate_message(kind, plain))
        if claims:
            return claims[0]
        broken = [r for r in self._records if r.status in ("failed", "outdated", "disabled")]
        for record in broken:
            if record.provenance.plugin == plain:
                raise PluginError(f"{kind} {name!r}: plugin {record.provenance} is {record.status}: {record.reason}")
        also = "".join(f" Plugin {r.provenance} is {r.status}: {r.reason}." for r in broken)
        raise UnknownNameError(
            f"Unknown {kind} {name!r}. {nearest(plain, self.names(kind))}{also}"
            " Names registered at run time do not exist in spawned workers: register them there too, or ship a plugin."
        )

    def _of_distribution(self, kind: Kind, name: str, distribution: str, claims: tuple[Entry, ...]) -> Entry:
        found = [entry for entry in claims if same_distribution(entry.provenance.distribution, distribution)]
        if len(found) > 1:
            raise DuplicateNameError(self._duplicate_message(kind, split_name(name)[1]))
        if found:
            return found[0]
        have = " and ".join(str(entry.provenance) for entry in claims)
        raise UnknownNameError(
            f"Unknown {kind} {name!r}: {split_name(name)[1]!r} is registered by {have}. Name one of these "
            "distributions, or leave the distribution out."
        )

    def block(self, name: str) -> Variant:
        """A variant, loaded; ``distribution:name`` is one of two that share a name.

        Raises as ``entry``, and PluginError when its modules cannot be imported.
        """
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
        return Variant(entry.name, config_class, factory, entry.provenance)

    def host(self, name: str) -> HostModel:
        """A host. Raises as ``entry``."""
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
        return tuple(self.verifier(name) for name in self.names("verifier"))

    def verifier(self, name: str) -> Verifier:
        """A verifier. Raises as ``entry``."""
        return cast(Verifier, self._typed("verifier", name, Verifier))

    def _typed(self, kind: Kind, name: str, expected: type) -> Any:
        entry = self.entry(kind, name)
        target = entry.load()
        if not isinstance(target, expected):
            raise PluginError(
                f"{kind} {name!r} of {entry.provenance} is a {type(target).__name__}, expected {expected.__name__}."
            )
        return target

    def _duplicate_message(self, kind: Kind, name: str) -> str:
        first, *others = (entry.provenance for entry in self._claims(kind, name))
        remedy = "uninstall one"
        if all(first.plugin != other.plugin for other in others):
            remedy += f", or list in {ENVIRONMENT} all plugins but one of the two"
        if all(not same_distribution(first.distribution, other.distribution) for other in others):
            remedy += f", or say whose you mean, as in {first.distribution}:{name}"
        return f"{kind} {name!r} is claimed by {' and by '.join(map(str, (first, *others)))}; {remedy}"


_default: Registry | None = None


def default_registry() -> Registry:
    """The registry of this process, with all installed plugins; discovered at first use."""
    global _default
    if _default is None:
        registry = Registry()
        registry.discover()
        _default = registry
    return _default
