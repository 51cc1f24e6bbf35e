"""The options of the TTT layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from moshi_ttt.core.config import BlockConfig, FrozenConfig
from moshi_ttt.plugins.common.backend_options import by_operation
from moshi_ttt.plugins.common.backends import BackendName
from moshi_ttt.plugins.common.gate import GateConfig

START_MOMENTUM = 0.9
"""The initial value of a learned momentum, where ``momentum`` is left out."""


class HybridBackends(FrozenConfig):
    """The backend of each operation of the TTT layer; see ``plugins.common.backends``.

    Attributes:
        train: of a call of any length, with gradients.
        step: of one streamed token.
        tune: where Triton kernels compute training calls on a GPU, measure at the first call which of a few sizes of
            their tiles is the fastest, and keep the choice in the user's cache folder. Of calls that kernels compute
            whole; where only one size is recorded to fit the GPU, nothing is measured, which is logged.
    """

    train: Literal["auto", "naive", "torch", "compile", "cpp", "triton"] = "auto"
    step: Literal["auto", "naive", "torch", "cpp", "triton"] = "auto"
    tune: bool = False

    @model_validator(mode="after")
    def _tuned_kernels_are_of_triton(self) -> HybridBackends:
        if self.tune and self.train not in ("auto", "triton"):
            raise ValueError(
                f"tune: true is for Triton kernels, and train is {self.train!r}; set train: triton or auto"
            )
        return self


class HybridConfig(BlockConfig):
    """Options of the TTT layer. With each of them left out the layer is the published one.

    Attributes:
        chunk: tokens per inner-loop step (mini-batch).
        base_lr: inner learning rate before the learned per-token factor, divided by the head width. Without
            ``inner_norm`` at most the head width.
        causal: False lets a token see its whole chunk; a causal host refuses that.
        bidirectional: run over the sequence, then over the reversed result, with the same weights and one gate for
            each pass. Not causal (``causal`` is then False when it is left out). As published (arXiv:2504.05298) tokens
            are reversed and rotary positions are not, and a prefix that the host's format declares, a text before a
            video, stays in front.
        gate: the gate, or gates.
        rope_theta: base of the rotary frequencies.
        checkpoint_chunks: chunks of the inner loop in one activation checkpoint. The backward pass then needs only the
            tokens and the fast weights between such groups; None keeps everything. No result depends on it.
        norm_eps, target_eps, post_norm_eps: eps of the inner LayerNorm, the target's standard deviation, the post norm.
        conv_kernel: taps of a short causal convolution over time on queries and keys, learned for each channel, before
            they are normalized. It starts at lag 0 for queries and at lag 1 for keys: a key is then that of the token
            before, and its value is what came after it. None leaves it out. Refused on a grid.
        value: what values are projected from: the ``hidden`` state x, or the ``embedding``, the host's input embedding
            e of the token over its root mean square.
        init_std: standard deviation of the initial fast weights.
        inner_norm: False leaves the inner LayerNorm out. The inner loss is then ``lr / 2 |f(k) - v|^2`` with v the
            projected value (not normalized, k not subtracted), and the output is ``f(q)``, without q.
        inner_steps: gradient steps on a finished chunk. Each step takes the gradients of all its tokens at the weights
            that the step before left. Within the chunk a query sees the first step alone, over the keys up to its own.
        momentum: eta of S <- eta S - gradient step, W <- W + S (Titans, arXiv:2501.00663, by chunk). S is part of the
            memory. Neither changes in a chunk whose tokens all have updates disabled. None or 0 leaves it out.
        learned_momentum: eta is learned, one for each head, between 0 and 1. It starts at ``momentum`` (0.9 where that
            is left out).
        backend: what computes the inner loop. ``auto`` takes the first backend that can. A name is that of every
            operation that has a backend of this name, and the others are ``auto``; ``{train: ..., step: ...}`` names
            one for each. One that cannot be had raises BackendError, at the first training call or when a stream's
            state is allocated. All compute the same up to rounding, and adapters do not keep the option.
    """

    machine_options: ClassVar[frozenset[str]] = frozenset({"backend"})

    chunk: int = Field(default=32, ge=1)
    base_lr: float = Field(gt=0.0)
    causal: bool = True
    bidirectional: bool = False
    gate: GateConfig = GateConfig()
    rope_theta: float = Field(default=10_000.0, gt=1.0)
    norm_eps: float = Field(default=1e-6, gt=0.0)
    target_eps: float = Field(default=1e-8, gt=0.0)
    post_norm_eps: float = Field(default=1e-6, gt=0.0)
    checkpoint_chunks: int | None = Field(default=None, ge=1)
    conv_kernel: int | None = Field(default=None, ge=2)
    value: Literal["hidden", "embedding"] = "hidden"
    init_std: float = Field(default=0.02, gt=0.0, le=100.0)
    inner_norm: bool = True
    inner_steps: int = Field(default=1, ge=1)
    momentum: float | None = Field(default=None, ge=0.0, lt=1.0)
    learned_momentum: bool = False
    backend: Annotated[BackendName | HybridBackends, BeforeValidator(by_operation(HybridBackends))] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _both_directions_are_not_causal(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("bidirectional") is True:
            return {"causal": False, **values}
        return values

    @model_validator(mode="after")
    def _not_causal_and_bidirectional(self) -> HybridConfig:
        if self.bidirectional and self.causal:
            raise ValueError("a bidirectional block sees the future: it cannot be causal; leave causal out")
        return self

    @model_validator(mode="after")
    def _no_eps_of_a_norm_that_is_left_out(self) -> HybridConfig:
        if not self.inner_norm:
            fields = HybridConfig.model_fields
            changed = [n for n in ("norm_eps", "target_eps") if getattr(self, n) != fields[n].default]
            if changed:
                raise ValueError(
                    f"{' and '.join(changed)} belong to the inner LayerNorm, which inner_norm: false leaves out; leave "
                    f"{'it' if len(changed) == 1 else 'them'} out, or set inner_norm: true"
                )
        return self

    @model_validator(mode="after")
    def _a_learned_momentum_starts_above_zero(self) -> HybridConfig:
        if self.learned_momentum and self.momentum == 0:
            raise ValueError(
                "a learned momentum cannot start at 0, from where it would not move; give a momentum between 0 and 1, "
                f"or leave it out for {START_MOMENTUM}"
            )
        return self

    def backends(self) -> HybridBackends:
        """``backend`` for each operation."""
        if isinstance(self.backend, HybridBackends):
            return self.backend
        fields = HybridBackends.model_fields
        named = {name: self.backend for name, field in fields.items() if self.backend in get_args(field.annotation)}
        return HybridBackends.model_validate(named)

    @property
    def start_momentum(self) -> float:
        """eta, fixed or initial; 0 where the updates have no momentum."""
        if self.momentum is None:
            return START_MOMENTUM if self.learned_momentum else 0.0
        return self.momentum
