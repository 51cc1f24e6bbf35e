"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_multilayer``, three layers and more.

One layer and two are ``ttt_linear``'s and ``ttt_mlp``'s, by the same code.
"""

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
from moshi_ttt.plugins.ttt_multilayer.block import TTTMultilayer
from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig


def _made(options: Mapping[str, Any], widths: list[int]) -> tuple[type[TTTMultilayer], TTTMultilayerConfig]:
    return TTTMultilayer, TTTMultilayerConfig.model_validate({**options, "hidden_dims": tuple(widths[1:])})


NAIVE = InnerLoopNaive(at_least=3)
CHUNK = InnerLoopChunk(at_least=3)
RECURRENT = InnerLoopRecurrent(at_least=3)
HYBRID = HybridChunk(at_least=3)
HYBRID_NAIVE = HybridNaive(at_least=3)
OPTIONS_NAIVE = OptionsNaive(_made, at_least=3)
OPTIONS_CHUNK = OptionsChunk(_made, at_least=3)
OPTIONS_RECURRENT = OptionsRecurrent(_made, at_least=3)
