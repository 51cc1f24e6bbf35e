"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_multilayer``, three layers and more.

One layer and two are ``ttt_linear``'s and ``ttt_mlp``'s, by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.plugins.hybrid.variant_verifiers import cpp_verifiers, variant_verifiers
from moshi_ttt.plugins.hybrid.verifiers import InnerLoopTritonStep
from moshi_ttt.plugins.ttt_multilayer.block import TTTMultilayer
from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig


def _made(options: Mapping[str, Any], widths: list[int]) -> tuple[type[TTTMultilayer], TTTMultilayerConfig]:
    return TTTMultilayer, TTTMultilayerConfig.model_validate({**options, "hidden_dims": tuple(widths[1:])})


NAIVE, CHUNK, RECURRENT, HYBRID, HYBRID_NAIVE, OPTIONS_NAIVE, OPTIONS_CHUNK, OPTIONS_RECURRENT = variant_verifiers(
    _made, at_least=3
)
CPP, CPP_STEP, CPP_HYBRID, CPP_OPTIONS, CPP_OPTIONS_STEP = cpp_verifiers(_made, at_least=3)
TRITON_STEP = InnerLoopTritonStep(at_least=3)
