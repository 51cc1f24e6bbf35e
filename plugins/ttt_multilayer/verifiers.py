"""The forms of ``ttt_multilayer`` that reference vectors are checked against: fast networks of three layers and more.

One layer and two are ``ttt_linear``'s and ``ttt_mlp``'s, by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.plugins.common.option_verifiers import OptionsCalled, OptionsReference, OptionsStreamed
from moshi_ttt.plugins.common.verifiers import Chunked, Hybrid, HybridReference, Reference, Streamed
from moshi_ttt.plugins.ttt_multilayer.block import TTTMultilayer
from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig


def _made(options: Mapping[str, Any], widths: list[int]) -> tuple[type[TTTMultilayer], TTTMultilayerConfig]:
    return TTTMultilayer, TTTMultilayerConfig.model_validate({**options, "hidden_dims": tuple(widths[1:])})


REFERENCE = Reference(at_least=3)
CHUNKED = Chunked(at_least=3)
STREAMED = Streamed(at_least=3)
HYBRID = Hybrid(at_least=3)
HYBRID_REFERENCE = HybridReference(at_least=3)
OPTIONS_REFERENCE = OptionsReference(_made, at_least=3)
OPTIONS_CALLED = OptionsCalled(_made, at_least=3)
OPTIONS_STREAMED = OptionsStreamed(_made, at_least=3)
