"""Whether every plugin can be used: each loaded, and each target that it registers imported and of its kind."""

from __future__ import annotations

from moshi_ttt.core.accelerations import accelerations_of
from moshi_ttt.core.registrar import RUNTIME, Entry, Kind
from moshi_ttt.core.registry import Registry, default_registry


def plugin_problems(registry: Registry | None = None) -> list[str]:
    """A sentence for every plugin that is not loaded and every target that cannot be used; empty where all is well.

    Imports every target, which can take seconds. A plugin that ``MOSHI_TTT_PLUGINS`` leaves out is no problem.
    ``registry`` is the process's own by default.
    """
    registry = registry or default_registry()
    problems = [
        f"Plugin {record.provenance} is {record.status}: {record.reason}"
        for record in registry.plugins()
        if record.status not in ("loaded", "disabled")
    ]
    if registry.missing_message():
        problems.append(registry.missing_message())
    for entry in registry.all_claims():
        try:
            _use(registry, entry)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a third party's import raises is what is asked here
            said = str(error) or "no message"
            problems.append(f"{entry.kind} {entry.name!r} of {entry.provenance}: {type(error).__name__}: {said}")
    return problems


def _use(registry: Registry, entry: Entry) -> None:
    """Look the entry up as a config would: its target is imported, and has to be what its kind asks for."""
    qualified = f"{entry.provenance.distribution}:{entry.name}"
    name = entry.name if entry.provenance is RUNTIME else qualified
    kind: Kind = entry.kind
    if kind == "block":
        registry.block(name)
    elif kind == "host":
        registry.host(name)
    elif kind == "precision_policy":
        registry.policy(name)
    elif kind == "format_adapter":
        registry.format_adapter(name)
    elif kind == "weight_map":
        registry.weight_map(name)
    elif kind == "acceleration":
        accelerations_of(name, registry)
    else:
        registry.verifier(name)
