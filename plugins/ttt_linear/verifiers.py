"""The forms of ``ttt_linear`` that reference vectors are checked against: a fast network of 1 layer(s)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.plugins.common.option_verifiers import OptionsCalled, OptionsReference, OptionsStreamed
from moshi_ttt.plugins.common.verifiers import Chunked, Hybrid, HybridReference, Reference, Streamed
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig


def _made(options: Mapping[str, Any], widths: list[int]) -> tuple[type[TTTLinear], TTTLinearConfig]:
    return TTTLinear, TTTLinearConfig.model_validate(options)


REFERENCE = Reference(layers=1)
CHUNKED = Chunked(layers=1)
STREAMED = Streamed(layers=1)
HYBRID = Hybrid(layers=1)
HYBRID_REFERENCE = HybridReference(layers=1)
OPTIONS_REFERENCE = OptionsReference(_made, layers=1)
OPTIONS_CALLED = OptionsCalled(_made, layers=1)
OPTIONS_STREAMED = OptionsStreamed(_made, layers=1)
