"""The one module of this host that imports Moshi, private names included.

Moshi reads ``NO_TORCH_COMPILE`` when its modules are imported. It is set here, before the import, when there is no CUDA
device: the output norm of a language model that the user loaded would be compiled on the CPU, where that costs 20 s and
gains nothing. A value that the user has set is kept, and where the user imported Moshi earlier nothing can be done.
Every module of this package imports Moshi's names from here, so that none comes first. ``compiling.py`` sees to the
models that this package loads, with a CUDA device present too.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("NO_TORCH_COMPILE", "1")

from moshi.conditioners.base import ConditionFuser, ConditionType
from moshi.models import loaders
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.models.lm import _LMGenState as GeneratorState
from moshi.models.loaders import CheckpointInfo
from moshi.modules import gating
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import (
    RingKVCache,
    RMSNorm,
    StreamingMultiheadAttention,
    StreamingTransformer,
    StreamingTransformerLayer,
)
from moshi.modules.transformer import (
    _MHAState as AttentionState,
)
from moshi.utils import compile as compiling

FRAME_RATE: float = loaders.FRAME_RATE
"""Mimi's frames, and so the language model's tokens, a second."""

__all__ = [
    "FRAME_RATE",
    "ActivationGating",
    "AttentionState",
    "CheckpointInfo",
    "ConditionFuser",
    "ConditionType",
    "GeneratorState",
    "LMGen",
    "LMModel",
    "LoRALinear",
    "MimiModel",
    "RMSNorm",
    "RingKVCache",
    "State",
    "StreamingModule",
    "StreamingMultiheadAttention",
    "StreamingTransformer",
    "StreamingTransformerLayer",
    "compiling",
    "gating",
    "loaders",
    "replace_all_linear_with_lora",
]
