"""Which registered host a model belongs to."""

from __future__ import annotations

from torch import nn

from moshi_ttt.core.errors import HostError, PluginError
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.registry import Registry, default_registry


def host_of(model: nn.Module, *, registry: Registry | None = None) -> HostModel:
    """The one registered host that recognizes ``model``.

    A host whose modules cannot be imported is passed over; the error names it where no host recognizes the model.

    Raises:
        HostError: no host recognizes the model, or several do.
        PluginError: a host fails at looking at the model.
    """
    if not isinstance(model, nn.Module):
        raise HostError(f"A model is a torch module, got {model!r}. load_model loads one by its name.")
    registry = registry or default_registry()
    found: list[HostModel] = []
    broken: list[str] = []
    for name in registry.names("host"):
        try:
            host = registry.host(name)
        except PluginError as error:
            broken.append(f" {error}")
            continue
        try:
            recognized = host.recognizes(model)
        except Exception as error:  # a third party's host can fail in any way
            raise PluginError(
                f"The host {name!r} failed at looking at a {type(model).__name__}: {type(error).__name__}: {error}. "
                "Name the host of your model: inject(..., host=...)."
            ) from error
        if recognized:
            found.append(host)
    if len(found) == 1:
        return found[0]
    names = ", ".join(host.name for host in found)
    if found:
        raise HostError(
            f"Several hosts recognize this {type(model).__name__}: {names}. Name one of them: inject(..., host=...)."
        )
    raise HostError(
        f"No host recognizes a {type(model).__name__}. Hosts: {', '.join(registry.names('host')) or 'none'}. Give the "
        f"language model itself, not a module around it, or install a plugin with a host for it.{''.join(broken)}"
    )
