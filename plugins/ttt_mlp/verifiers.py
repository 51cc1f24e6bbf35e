"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_mlp``, two fast layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.plugins.hybrid.option_verifiers import OptionsChunk, OptionsNaive, OptionsRecurrent
from moshi_ttt.plugins.hybrid.verifiers import (
    HybridChunk,
    HybridNaive,
    InnerLoopChunk,
    InnerLoopNaive,
    InnerLoopRecurrent,
)
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


NAIVE = InnerLoopNaive(layers=2)
CHUNK = InnerLoopChunk(layers=2)
RECURRENT = InnerLoopRecurrent(layers=2)
HYBRID = HybridChunk(layers=2)
HYBRID_NAIVE = HybridNaive(layers=2)
OPTIONS_NAIVE = OptionsNaive(_made, layers=2)
OPTIONS_CHUNK = OptionsChunk(_made, layers=2)
OPTIONS_RECURRENT = OptionsRecurrent(_made, layers=2)
