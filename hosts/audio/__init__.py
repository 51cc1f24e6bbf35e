"""A small host that is not causal: a denoising transformer with bidirectional attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moshi_ttt.core.hooks import hookimpl

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import Registrar

MOSHI_TTT_API = 1


@hookimpl
def moshi_ttt_hosts(registrar: Registrar) -> None:
    """Register the host under the name ``audio``."""
    registrar.add("audio", "moshi_ttt.hosts.audio.host:AUDIO_HOST")
