"""What the three TTT layers register alike: the verifiers of their forms, and their weight maps. Imports nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moshi_ttt.core.registrar import Registrar

FORMS = ("naive", "chunk", "recurrent", "hybrid", "hybrid_naive", "options_naive", "options_chunk", "options_recurrent")
"""Forms that ``moshi-ttt verify`` compares with reference vectors."""
CPP_FORMS = ("cpp", "cpp_step", "cpp_hybrid", "cpp_options", "cpp_options_step")
"""Those in C++, which it compares where ``--backend cpp`` asks for them."""
STEP_FORMS = (*FORMS, *CPP_FORMS, "triton_step")
"""Those of a variant whose streamed step Triton kernels compute."""
KERNEL_FORMS = (*STEP_FORMS, "triton")
"""Those of one whose training calls they compute too."""


def add_verifiers(registrar: Registrar, variant: str, package: str, forms: Sequence[str] = FORMS) -> None:
    """Register the verifier of every form: the entries of ``forms``, in capitals, in ``package.verifiers``."""
    for form in forms:
        registrar.add(f"{variant}-{form}", f"{package}.verifiers:{form.upper()}")


def add_weight_maps(registrar: Registrar, variant: str, package: str) -> None:
    """Register the maps of both published layouts: ``VIDEO_DIT`` and ``LM`` in ``package.weight_maps``."""
    for layout in ("video_dit", "lm"):
        registrar.add(f"{variant}-{layout}", f"{package}.weight_maps:{layout.upper()}")
