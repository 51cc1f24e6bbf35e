"""Moved to ``moshi_ttt.plugins.hybrid.layer``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.common.hybrid",
    "moshi_ttt.plugins.hybrid.layer",
    {
        "Linear": "moshi_ttt.plugins.common.projection:Linear",
        "l2_normalise": "moshi_ttt.plugins.common.normalization:l2_normalize",
        "over_rms": "moshi_ttt.plugins.common.normalization:rms_normalize",
    },
)
