"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_linear``, one fast layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.plugins.hybrid.variant_verifiers import cpp_verifiers, variant_verifiers
from moshi_ttt.plugins.hybrid.verifiers import InnerLoopTriton, InnerLoopTritonStep
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig


def _made(options: Mapping[str, Any], widths: list[int]) -> tuple[type[TTTLinear], TTTLinearConfig]:
    return TTTLinear, TTTLinearConfig.model_validate(options)


NAIVE, CHUNK, RECURRENT, HYBRID, HYBRID_NAIVE, OPTIONS_NAIVE, OPTIONS_CHUNK, OPTIONS_RECURRENT = variant_verifiers(
    _made, layers=1
)
CPP, CPP_STEP, CPP_HYBRID, CPP_OPTIONS, CPP_OPTIONS_STEP = cpp_verifiers(_made, layers=1)
TRITON = InnerLoopTriton(layers=1)
TRITON_STEP = InnerLoopTritonStep(layers=1)
