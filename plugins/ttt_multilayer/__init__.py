"""The variant ``ttt_multilayer``: registers itself, imports nothing until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moshi_ttt.core.hooks import hookimpl
from moshi_ttt.plugins.hybrid.registration import STEP_FORMS, add_verifiers

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import BlockRegistrar, Registrar

MOSHI_TTT_API = 1


@hookimpl
def moshi_ttt_blocks(registrar: BlockRegistrar) -> None:
    registrar.add(
        "ttt_multilayer", config=f"{__name__}.config:TTTMultilayerConfig", block=f"{__name__}.block:TTTMultilayer"
    )


@hookimpl
def moshi_ttt_verifiers(registrar: Registrar) -> None:
    add_verifiers(registrar, "ttt_multilayer", __name__, STEP_FORMS)


@hookimpl
def moshi_ttt_accelerations(registrar: Registrar) -> None:
    registrar.add("ttt_multilayer", "moshi_ttt.plugins.hybrid.accelerations:multilayer")
