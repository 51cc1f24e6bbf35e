"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_mlp``, two fast layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.plugins.hybrid.variant_verifiers import cpp_verifiers, variant_verifiers
from moshi_ttt.plugins.hybrid.verifiers import InnerLoopTriton, InnerLoopTritonStep
from moshi_ttt.plugins.ttt_mlp.block import TTTMLP
from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig


def _made(options: Mapping[str, Any], widths: list[int]) -> tuple[type[TTTMLP], TTTMLPConfig]:
    expansion, more = divmod(widths[1], widths[0])
    if more:
        raise ConfigError(
            f"A fast network with a hidden width of {widths[1]} and heads of width {widths[0]} is none of ttt_mlp. "
            "Make vectors whose hidden width is a multiple of the head width."
        )
    return TTTMLP, TTTMLPConfig.model_validate({**options, "expansion": expansion})


NAIVE, CHUNK, RECURRENT, HYBRID, HYBRID_NAIVE, OPTIONS_NAIVE, OPTIONS_CHUNK, OPTIONS_RECURRENT = variant_verifiers(
    _made, layers=2
)
CPP, CPP_STEP, CPP_HYBRID, CPP_OPTIONS, CPP_OPTIONS_STEP = cpp_verifiers(_made, layers=2)
TRITON = InnerLoopTriton(layers=2)
TRITON_STEP = InnerLoopTritonStep(layers=2)
