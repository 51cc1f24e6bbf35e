"""Other implementations' layouts of the weights of ``ttt_mlp``: a fast network of two layers."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.weight_maps import LanguageModel, VideoDiT

VIDEO_DIT = VideoDiT(layers=2)
LM = LanguageModel(layers=2)
