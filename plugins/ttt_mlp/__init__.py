"""The variant ``ttt_mlp``: registers itself, imports nothing until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moshi_ttt.core.hooks import hookimpl

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import BlockRegistrar, Registrar

MOSHI_TTT_API = 1


@hookimpl
def moshi_ttt_blocks(registrar: BlockRegistrar) -> None:
    registrar.add("ttt_mlp", config=f"{__name__}.config:TTTMLPConfig", block=f"{__name__}.block:TTTMLP")


@hookimpl
def moshi_ttt_verifiers(registrar: Registrar) -> None:
    for form in (
        "naive", "chunk", "recurrent", "hybrid", "hybrid_naive", "options_naive", "options_chunk", "options_recurrent",
    ):  # fmt: skip
        registrar.add(f"ttt_mlp-{form}", f"{__name__}.verifiers:{form.upper()}")


@hookimpl
def moshi_ttt_weight_maps(registrar: Registrar) -> None:
    for layout in ("video_dit", "lm"):
        registrar.add(f"ttt_mlp-{layout}", f"{__name__}.weight_maps:{layout.upper()}")
