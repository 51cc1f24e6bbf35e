"""Options of ``gating_mlp``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moshi_ttt.core.config import BlockConfig, Length
from moshi_ttt.plugins.common.backend_options import StepBackend

Update = Literal["hebbian", "gradient", "ridge"]


class GatingMLPConfig(BlockConfig):
    """In-place TTT: the down projection of the host's gated MLP is updated once per chunk.

    Attributes:
        chunk: tokens per update, or seconds as in ``20.5s`` (256 of Moshi's 12.5 tokens a second).
        update: what a chunk of keys K, values V and answers O (the memory's output for those keys at the chunk's start)
            adds to the memory, with b the write strength of each token. ``hebbian``: K^T diag(b) V, the published
            rule, whose sum grows with the stream. ``gradient``: K^T diag(b) (V - O), one step of gradient descent; it
            diverges where the sum of b |k|^2 over a chunk's like keys is above 2. ``ridge``:
            K^T (K K^T + l diag(1 / b))^-1 (V - O), which solves for the chunk and is stable for every strength; l is
            learned, and 0.3 at the start.
        lr: write strength b of every token. With ``ridge``, l / b alone counts: twice the lr is half the l.
        learned_lr: a write strength per token: ``lr`` times 2 sigmoid(w . x + c) with ``hebbian``, sigmoid(w . x + c)
            else. At the start w is 0, and c 0, with ``ridge`` 2.
        keys: ``raw``, the MLP's hidden activation, or ``unit``, the same over its norm.
        target: what the fast weight learns to produce from the MLP's hidden activation: a filtered version of the
            input embeddings of the same tokens, or of the MLP's own input (``hidden_states``).
        target_norm: divide each token's target by its root mean square before the filter.
        conv_kernel: taps of the depthwise filter over time, inside the chunk only.
        padding: ``centered`` lets the filter look ahead inside its own chunk (an even kernel looks one less back than
            ahead), ``causal`` does not.
        start: ``published``, a filter of zeros and a small diagonal projection, or ``next_frame``, a filter that is one
            at the next token and a projection of zeros. Either way nothing is added at step 0.
        read_scale: factor of the memory's output.
        success_gate: scale the memory's output by how well its last outputs predicted the tokens that followed.
        decay: share of the accumulated update that is forgotten with each chunk's update; nothing is forgotten in a
            chunk whose tokens all have updates disabled.
        clip: largest Frobenius norm of one chunk's update, or None.
        train_w_down: also train the down projection itself, as a change that is added to the host's.
        backend: what computes a streamed step: ``torch``, ``cpp``, or ``auto``, the C++ where it serves and pays. One
            that cannot be had raises BackendError. Both compute the same up to rounding, and adapters do not keep the
            option.
    """

    machine_options: ClassVar[frozenset[str]] = frozenset({"backend"})

    variant: Literal["gating_mlp"] = "gating_mlp"
    chunk: Length = 256
    update: Update = "hebbian"
    lr: float = Field(default=0.3, gt=0.0)
    learned_lr: bool = False
    keys: Literal["raw", "unit"] = "raw"
    target: Literal["input_embed", "hidden_states"] = "input_embed"
    target_norm: bool = False
    conv_kernel: int = Field(default=5, ge=1)
    padding: Literal["centered", "causal"] = "centered"
    start: Literal["published", "next_frame"] = "published"
    read_scale: float = Field(default=1.0, gt=0.0)
    success_gate: bool = False
    decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    clip: float | None = Field(default=None, gt=0.0)
    train_w_down: bool = False
    backend: StepBackend = "auto"

    @model_validator(mode="after")
    def _next_frame_is_in_the_filter(self) -> GatingMLPConfig:
        if self.start == "next_frame" and (self.padding == "causal" or self.conv_kernel < 2 or self.chunk == 1):
            raise ValueError(
                f"start: next_frame with padding: {self.padding}, conv_kernel: {self.conv_kernel} and chunk: "
                f"{self.chunk}: this filter does not see the next token. Take padding: centered, a conv_kernel and a "
                "chunk of 2 or more, or start: published"
            )
        return self
