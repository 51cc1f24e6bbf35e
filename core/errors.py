"""Every error a user can meet. Each message says what was given, what is allowed, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoshiTTTError(Exception):
    """Base of all errors raised by moshi_ttt."""


class ConfigError(MoshiTTTError, ValueError):
    """A configuration that cannot be read or does not mean anything."""


class LayerSpecError(ConfigError):
    """A layer specification that selects nothing, something twice, or something that does not exist."""


class UnknownNameError(ConfigError):
    """A name that no plugin registered."""


class BackendError(ConfigError):
    """A backend that was asked for by name and cannot be had, on this device or with these options."""


class PluginError(MoshiTTTError, RuntimeError):
    """A plugin that failed to load, is outdated, or broke a rule of registration."""


class DuplicateNameError(PluginError):
    """One name, claimed by two plugins."""


class InjectionError(MoshiTTTError, ValueError):
    """A plan that cannot be carried out; the model is as it was."""


class PrecisionError(MoshiTTTError, ValueError):
    """A tensor that does not have the dtype of its role; the message names the tensor."""


class AdapterError(MoshiTTTError, ValueError):
    """An adapter folder that is damaged, incomplete, or made for something else."""


class WeightMapError(MoshiTTTError, ValueError):
    """Weights that are not a block's in the layout they were said to be in, or that a layout cannot express."""


class ContextError(MoshiTTTError, ValueError):
    """A block called without something it needs, or with a state it cannot continue."""


class HostError(MoshiTTTError, ValueError):
    """A host model that cannot be loaded or does not have the form that its host class expects."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence for the end of an error message: the closest allowed names, then all of them."""
    options = sorted(allowed)
    if not options:
        return "Nothing is allowed here."
    close = difflib.get_close_matches(name, options, n=2, cutoff=0.6)
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}Allowed: {', '.join(options)}."
