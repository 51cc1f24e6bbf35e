"""The forms of ``ttt_mlp`` that reference vectors are checked against: a fast network of 2 layer(s)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.plugins.common.option_verifiers import OptionsCalled, OptionsReference, OptionsStreamed
from moshi_ttt.plugins.common.verifiers import Chunked, Hybrid, HybridReference, Reference, Streamed
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


REFERENCE = Reference(layers=2)
CHUNKED = Chunked(layers=2)
STREAMED = Streamed(layers=2)
HYBRID = Hybrid(layers=2)
HYBRID_REFERENCE = HybridReference(layers=2)
OPTIONS_REFERENCE = OptionsReference(_made, layers=2)
OPTIONS_CALLED = OptionsCalled(_made, layers=2)
OPTIONS_STREAMED = OptionsStreamed(_made, layers=2)
