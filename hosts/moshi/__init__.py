"""The Moshi host: Kyutai's speech language model, as a plugin like any other.

Importing this module imports neither Moshi nor torch: discovery does it for every command. The names below are
imported from their modules when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moshi_ttt.core.hooks import hookimpl

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import Registrar

MOSHI_TTT_API = 1

_HOME = {
    "MOSHI_HOST": "host",
    "MoshiHost": "host",
    "MoshiHostConfig": "host",
    "MoshiBundle": "loading",
    "RowState": "row_state",
    "SlotOutput": "slots",
    "SlotSettings": "slots",
    "Slots": "slots",
    "resolve_repo": "loading",
    "shard": "fsdp",
    "load_stream_state": "streaming",
    "restore_stream_state": "streaming",
    "save_stream_state": "streaming",
    "stream_state": "streaming",
}

__all__ = ["MOSHI_TTT_API", "moshi_ttt_hosts", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


@hookimpl
def moshi_ttt_hosts(registrar: Registrar) -> None:
    """Register the host under the name ``moshi``."""
    registrar.add("moshi", "moshi_ttt.hosts.moshi.host:MOSHI_HOST")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
