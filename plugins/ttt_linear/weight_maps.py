"""Other implementations' layouts of the weights of ``ttt_linear``: a fast network of one layer."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.weight_maps import LanguageModel, VideoDiT

VIDEO_DIT = VideoDiT(layers=1)
LM = LanguageModel(layers=1)
