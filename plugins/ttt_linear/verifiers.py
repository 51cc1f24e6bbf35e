"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_linear``, one fast layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.plugins.hybrid.option_verifiers import OptionsChunk, OptionsNaive, OptionsRecurrent
from moshi_ttt.plugins.hybrid.verifiers import (
    HybridChunk,
    HybridNaive,
    InnerLoopChunk,
    InnerLoopNaive,
    InnerLoopRecurrent,
)
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig


def _made(options: Mapping[str, Any], widths: list[int]) -> tuple[type[TTTLinear], TTTLinearConfig]:
    return TTTLinear, TTTLinearConfig.model_validate(options)


NAIVE = InnerLoopNaive(layers=1)
CHUNK = InnerLoopChunk(layers=1)
RECURRENT = InnerLoopRecurrent(layers=1)
HYBRID = HybridChunk(layers=1)
HYBRID_NAIVE = HybridNaive(layers=1)
OPTIONS_NAIVE = OptionsNaive(_made, layers=1)
OPTIONS_CHUNK = OptionsChunk(_made, layers=1)
OPTIONS_RECURRENT = OptionsRecurrent(_made, layers=1)
