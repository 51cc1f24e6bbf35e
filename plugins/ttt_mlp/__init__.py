"""The variant ``ttt_mlp``: registers itself, imports nothing until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moshi_ttt.core.hooks import hookimpl
from moshi_ttt.plugins.hybrid.registration import KERNEL_FORMS, add_verifiers, add_weight_maps

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import BlockRegistrar, Registrar

MOSHI_TTT_API = 1


@hookimpl
def moshi_ttt_blocks(registrar: BlockRegistrar) -> None:
    registrar.add("ttt_mlp", config=f"{__name__}.config:TTTMLPConfig", block=f"{__name__}.block:TTTMLP")


@hookimpl
def moshi_ttt_verifiers(registrar: Registrar) -> None:
    add_verifiers(registrar, "ttt_mlp", __name__, KERNEL_FORMS)


@hookimpl
def moshi_ttt_weight_maps(registrar: Registrar) -> None:
    add_weight_maps(registrar, "ttt_mlp", __name__)
