"""The variant ``gating_mlp``: registers itself, imports nothing until it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moshi_ttt.core.hooks import hookimpl

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import BlockRegistrar, Registrar

MOSHI_TTT_API = 1

# Earlier names of modules are found for one version (moved/__init__.py).
__path__ = [*__path__, str(Path(__file__).parent / "moved")]


@hookimpl
def moshi_ttt_blocks(registrar: BlockRegistrar) -> None:
    registrar.add("gating_mlp", config=f"{__name__}.config:GatingMLPConfig", block=f"{__name__}.block:GatingMLP")


@hookimpl
def moshi_ttt_verifiers(registrar: Registrar) -> None:
    for form in ("naive", "parallel", "chunkwise", "recurrent", "cpp_step"):
        registrar.add(f"gating_mlp-{form}", f"{__name__}.verifiers:{form.upper()}")
    for form in ("options_naive", "options_chunk", "options_recurrent", "options_cpp_step"):
        registrar.add(f"gating_mlp-{form}", f"{__name__}.option_verifiers:{form.upper()}")


@hookimpl
def moshi_ttt_accelerations(registrar: Registrar) -> None:
    registrar.add("gating_mlp", f"{__name__}.compiled:accelerations")
