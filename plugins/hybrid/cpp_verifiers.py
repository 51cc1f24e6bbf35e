"""The forms in C++ as verifiers of reference vectors: the inner loop, the layer with it, and the block with ``cpp``.

They are built before they run, so ``moshi-ttt verify`` runs them where ``--backend cpp`` asks for them. Each raises
BackendError where it cannot be built.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moshi_ttt.plugins.hybrid import compiled
from moshi_ttt.plugins.hybrid.cpp import chunk as cpp
from moshi_ttt.plugins.hybrid.option_verifiers import OptionsChunk, OptionsRecurrent
from moshi_ttt.plugins.hybrid.verifiers import HybridChunk, InnerLoopChunk, InnerLoopRecurrent


class InnerLoopCpp(InnerLoopChunk):
    """The inner loop of a call."""

    backend = "cpp"
    builds = True

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(cpp.load(self), inputs, metadata)


class InnerLoopCppStep(InnerLoopRecurrent):
    """The inner loop token by token. No gradients, causal only."""

    backend = "cpp"
    builds = True

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(compiled.load(self), inputs, metadata)


class HybridCpp(HybridChunk):
    """The hybrid layer by the functions that the block consists of, with the inner loop in C++."""

    backend = "cpp"
    builds = True

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(cpp.load(self), inputs, metadata)


def _published(verifier: OptionsChunk | OptionsRecurrent, metadata: Mapping[str, str], names: frozenset[str]) -> bool:
    """Whether ``verifier`` takes a file, and it has the published inner loop, whatever it has around it."""
    plain = metadata["inner_norm"] == "true" and metadata["inner_steps"] == "1"
    return verifier.accepts(metadata) and plain and "in.momentum_logit" not in names


class OptionsCpp(OptionsChunk):
    """All tokens in one call of the block, its training backend ``cpp``."""

    backend = "cpp"
    builds = True
    takes = _published


class OptionsCppStep(OptionsRecurrent):
    """Token by token, the block's step backend ``cpp``. No gradients, causal only."""

    backend = "cpp"
    builds = True
    takes = _published
