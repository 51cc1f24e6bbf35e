"""The verifiers of a variant of the hybrid layer: one of each form, for its fast network."""

from __future__ import annotations

from moshi_ttt.core.verification import Verifier
from moshi_ttt.plugins.hybrid.cpp_verifiers import HybridCpp, InnerLoopCpp, InnerLoopCppStep, OptionsCpp, OptionsCppStep
from moshi_ttt.plugins.hybrid.option_verifiers import Make, OptionsChunk, OptionsNaive, OptionsRecurrent
from moshi_ttt.plugins.hybrid.verifiers import (
    HybridChunk,
    HybridNaive,
    InnerLoopChunk,
    InnerLoopNaive,
    InnerLoopRecurrent,
)


def variant_verifiers(make: Make, *, layers: int | None = None, at_least: int = 1) -> tuple[Verifier, ...]:
    """The verifiers in the order of ``registration.FORMS``, for ``layers`` fast layers or for ``at_least`` so many."""
    forms = (InnerLoopNaive, InnerLoopChunk, InnerLoopRecurrent, HybridChunk, HybridNaive)
    options = (OptionsNaive, OptionsChunk, OptionsRecurrent)
    return (
        *(form(layers=layers, at_least=at_least) for form in forms),
        *(form(make, layers=layers, at_least=at_least) for form in options),
    )


def cpp_verifiers(make: Make, *, layers: int | None = None, at_least: int = 1) -> tuple[Verifier, ...]:
    """As ``variant_verifiers``, those in C++ in the order of ``registration.CPP_FORMS``."""
    return (
        *(form(layers=layers, at_least=at_least) for form in (InnerLoopCpp, InnerLoopCppStep, HybridCpp)),
        *(form(make, layers=layers, at_least=at_least) for form in (OptionsCpp, OptionsCppStep)),
    )
