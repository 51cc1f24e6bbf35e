"""Options of ``ttt_ridge``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moshi_ttt.core.config import BlockConfig, Length
from moshi_ttt.plugins.common.backend_options import StepBackend
from moshi_ttt.plugins.common.gate import GateConfig

REGULARIZATION = (1e-3, 1e3)
"""The least and the largest regularization. Below, float32 has no room for what a stream of an hour writes."""


class TTTRidgeConfig(BlockConfig):
    """A memory that holds the least-squares (ridge) solution of the stream's keys and values.

    The state grows with ``heads * key_width * (key_width + 2 * value_width)``, and so does a step's time.

    Attributes:
        chunk: tokens after which the solution that is read is replaced by a new one, or seconds as in ``1.28s``.
        heads: memories side by side; None: one for each 128 channels of the host, at least one.
        key_width: width of a key in each head; None: the host's width over the heads.
        value_width: width of a value in each head; None: as the key's None.
        features: what the projected and convolved keys and queries go through before they are normalized:
            ``identity``, or ``relu2``, max(0, z)^2, which makes a wider key hold more.
        conv_kernel: taps of the causal convolution that makes queries of this token and keys of the one before.
        value: what a key's value is made of: the host's input ``embedding`` of the token, or the ``hidden`` activation.
        regularization: lambda at the start; it is learned, one for each head, between 0.001 and 1000.
        decay: share of what was learned that is forgotten in a chunk of new tokens.
        novelty: write more of what the memory has just predicted badly.
        success_gate: read more of a memory that has just predicted well.
        variance_gate: scale the output up where the query is near to earlier keys. It keeps the covariance twice.
        readout_scale: what is read is multiplied by this before the output projection.
        gate: tanh(alpha) times what the layer adds.
        checkpoint_chunks: chunks that a backward pass computes again together; None keeps everything. No result depends
            on it.
        backend: what computes a streamed step: ``torch``, ``cpp``, or ``auto``, the C++ where it serves and pays. One
            that cannot be had raises BackendError. Both compute the same up to rounding, and adapters do not keep the
            option.
    """

    machine_options: ClassVar[frozenset[str]] = frozenset({"backend"})

    variant: Literal["ttt_ridge"] = "ttt_ridge"
    chunk: Length = 16
    heads: int | None = Field(default=None, ge=1)
    key_width: int | None = Field(default=None, ge=1)
    value_width: int | None = Field(default=None, ge=1)
    features: Literal["identity", "relu2"] = "identity"
    conv_kernel: int = Field(default=4, ge=2)
    value: Literal["embedding", "hidden"] = "embedding"
    regularization: float = Field(default=0.05, ge=REGULARIZATION[0], le=REGULARIZATION[1])
    decay: float = Field(default=0.0, ge=0.0, le=0.5)
    novelty: bool = False
    success_gate: bool = True
    variance_gate: bool = False
    readout_scale: float = Field(default=8.0, gt=0.0)
    gate: GateConfig = GateConfig()
    checkpoint_chunks: int | None = Field(default=None, ge=1)
    backend: StepBackend = "auto"

    @model_validator(mode="after")
    def _gate_is_heard(self) -> TTTRidgeConfig:
        if self.gate.alpha == "fixed" and self.gate.init == 0:
            raise ValueError("a gate that is fixed at 0 adds nothing and learns nothing; give another init or alpha")
        return self
