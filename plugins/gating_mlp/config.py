"""Options of ``gating_mlp``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moshi_ttt.core.config import BlockConfig, Length


class GatingMLPConfig(BlockConfig):
    """In-place TTT: the down projection of the host's gated MLP learns, once per chunk.

    Attributes:
        chunk: tokens per update, or seconds as in ``20.5s`` (256 of Moshi's 12.5 tokens a second).
        lr: learning rate of the fast weight; with ``learned_lr`` times 2 sigmoid(w . x + b) per token (1 at the start).
        target: what the fast weight learns to produce from the MLP's hidden activation: a filtered version of the
            input embeddings of the same tokens, or of the MLP's own input (``hidden_states``).
        conv_kernel: taps of the depthwise filter over time, inside the chunk only.
        padding: ``centered`` lets the filter look ahead inside its own chunk (an even kernel looks one less back than
            ahead), ``causal`` does not.
        decay: share of the accumulated update that is forgotten at each chunk's end, also while updates are disabled.
        clip: largest Frobenius norm of one chunk's update, or None.
        train_w_down: also train the down projection itself, as a change that is added to the host's.
    """

    variant: Literal["gating_mlp"] = "gating_mlp"
    chunk: Length = 256
    lr: float = Field(default=0.3, gt=0.0)
    learned_lr: bool = False
    target: Literal["input_embed", "hidden_states"] = "input_embed"
    conv_kernel: int = Field(default=5, ge=1)
    padding: Literal["centered", "causal"] = "centered"
    decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    clip: float | None = Field(default=None, gt=0.0)
    train_w_down: bool = False
