"""The block that TTT-Linear, TTT-MLP and deeper variants are: the hybrid layer around a fast network of L layers.

A variant says how wide its fast network's layers are; everything else is here, once.

Shape legend: B streams, T tokens, D width, H heads, Dh = D / H, C tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.state_ranges import StateRange
from moshi_ttt.plugins.common.finite import below, largest_factor
from moshi_ttt.plugins.common.normalization import rms_normalize
from moshi_ttt.plugins.common.short_conv import Convolutions, empty_cache
from moshi_ttt.plugins.hybrid import diagnostics, inner_loop
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.derivatives import differentiable_again
from moshi_ttt.plugins.hybrid.layer import HybridLayer, gated_output, inner_inputs, objective
from moshi_ttt.plugins.hybrid.triton.step import TritonStep
from moshi_ttt.plugins.hybrid.triton.train import TritonTrain
from moshi_ttt.plugins.hybrid.with_backends import HybridWithBackends

CACHES = ("query_cache", "key_cache")
"""State of the short convolutions."""


class HybridBlock(HybridWithBackends):
    """The hybrid layer as a block: its state, a call of any length, a streamed step, and its diagnostics.

    A subclass gives the widths of the fast network's layers (``widths``). A token that is not finite, or too large, is
    left out with the update of its whole chunk.
    """

    scales_inner_lr = True
    scales_output = True
    skips_nonfinite = True

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        def parts(parameters: nn.ParameterList) -> tuple[Tensor, ...]:
            return tuple(p.to(device=device, dtype=self.roles.state) for p in parameters)

        config, (weights, biases) = self.config, (parts(self.fast_weight), parts(self.fast_bias))
        momentum = config.start_momentum > 0
        state = inner_loop.initial_state(
            weights, biases, config.chunk, batch_size, momentum=momentum, steps=config.inner_steps
        )
        if config.conv_kernel is not None:
            like = weights[0]
            cache = empty_cache(batch_size, self.info.dim, config.conv_kernel, like.device, like.dtype)
            state |= {name: cache.clone() for name in CACHES}
        return state

    def memory_names(self) -> frozenset[str]:
        return super().memory_names() - set(CACHES)

    def state_ranges(self) -> Mapping[str, StateRange]:
        return {
            "position": StateRange(most=self.config.chunk - 1),
            "spoiled": StateRange(most=self.config.chunk - 1, up_to="position"),
            "skipped": StateRange(),
        }

    def skipped_updates(self, state: BlockState) -> Tensor:
        return state["skipped"]

    # ---- a call of any length

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        y, after = self._directions(x, state, context)
        if not y.requires_grad or torch.compiler.is_compiling():  # what is compiled, torch differentiates only once
            return y, after
        source = context.input_embeddings if self.needs_input_embeddings else None
        inputs = (x, *(() if source is None else (source,)), *self.parameters(), *(state or {}).values())
        again = partial(self._again, None if state is None else tuple(state), replace(context, input_embeddings=None))
        (y,) = differentiable_again((y,), inputs, lambda *given: (again(*given)[0],))
        if learned := [name for name, tensor in after.items() if context.want_state and tensor.requires_grad]:
            tensors = differentiable_again(
                [after[name] for name in learned], inputs, lambda *given: [again(*given)[1][name] for name in learned]
            )
            after = {**after, **dict(zip(learned, tensors, strict=True))}
        return y, after

    def _again(
        self, state: tuple[str, ...] | None, context: BlockContext, x: Tensor, *given: Tensor
    ) -> tuple[Tensor, BlockState]:
        """``compute`` as an exactly differentiable function of the tensors that it depends on.

        ``given``: the input embeddings where they are needed, the parameters' values, then the state's by name.
        """
        if self.needs_input_embeddings:
            context, given = replace(context, input_embeddings=given[0]), given[1:]
        names = [f"block.{name}" for name, _ in self.named_parameters()]
        parameters = dict(zip(names, given[: len(names)], strict=True))
        start = None if state is None else dict(zip(state, given[len(names) :], strict=True))
        with self._without_autocast(x):
            y, after = torch.func.functional_call(_Exact(self), parameters, (x, start, context))
        return y, after

    def _directions(
        self, x: Tensor, state: BlockState | None, context: BlockContext, exact: bool = False
    ) -> tuple[Tensor, BlockState]:
        """The layer in one direction or in both, of ``x [B, T, D]``.

        ``exact``: by operations with right second derivatives.
        """
        y, after = self._pass(x, state, context, self.gate, exact)
        if self.config.bidirectional:
            # Tokens change places and RoPE does not: a token is rotated by the position it is moved to.
            if self.needs_input_embeddings and context.input_embeddings is not None:
                embeddings = _reversed(context.input_embeddings, context.prefix)
                context = replace(context, input_embeddings=embeddings)
            y = self._pass(_reversed(y, context.prefix), None, context, self.gate_reversed, exact)[0]
            y = _reversed(y, context.prefix)
        return y, after

    def _pass(
        self, x: Tensor, state: BlockState | None, context: BlockContext, gate: Tensor, exact: bool
    ) -> tuple[Tensor, BlockState]:
        """The layer over the tokens in the order they are in, ``x [B, T, D]``, with its gate and residual."""
        batch, length, _ = x.shape
        run = chunk_inner_loop if exact else self._train_run(x.device)
        if isinstance(run, TritonTrain) and run.takes_layer(self, state, context, length):
            return run.layer(self, x, state, context, gate, self.token_scale().to(self.roles.state))
        offset = None if state is None else state["position"]
        state = self.init_state(batch, x.device) if state is None else state
        layout = self.info.format.chunks(x, self.config.chunk, offset)
        layer = self.layer(gate, context)
        if context.coordinates is None:
            start = torch.zeros(1, dtype=torch.int64, device=x.device) if offset is None else offset
            # [B or 1, 1] + [T] -> [B or 1, T]
            position = (start[:, None] + torch.arange(length, device=x.device)) % self.config.chunk
        else:
            position = context.coordinates[None]  # [T, A] -> [1, T, A]
        caches = [state[name] for name in CACHES if name in state]
        y, after = run(
            self._tokens(x, position, layer, context, exact, caches),
            state,
            objective(layer, exact),
            layer.token_scale.to(self.roles.state),
            layout=layout,
            causal=self.config.causal,
            checkpoint_chunks=self.config.checkpoint_chunks,
            rule=self.update_rule(),
            updated=context.updates_mask(x),
        )
        if caches:
            after |= dict(zip(CACHES, caches, strict=True))
        return gated_output(x, y, layer, self.volume_in(context)), after

    # ---- a streamed step

    @torch.no_grad()
    def step(self, x: Tensor, state: BlockState, context: BlockContext | None = None) -> Tensor:
        context = context or BlockContext()
        tokens = self.info.format.to_tokens(x)
        if tokens.shape[1] != 1 or context.reset is not None or not self.config.causal:
            return super().step(x, state, context)
        self._check_call(tokens, state, context)
        with self._without_autocast(tokens):
            run = self._step_run(tokens.device)
            if isinstance(run, TritonStep) and run.takes_layer(self):
                y = self._layer_step(run, tokens, state, context)
                return self.info.format.from_tokens(y, x)
            layer = self.layer(context=context)
            caches = [state[name] for name in CACHES if name in state]
            position = state["position"][:, None]  # [B] -> [B, 1]
            given = self._tokens(tokens, position, layer, context, caches=caches, in_place=True)
            norm, scale = objective(layer), layer.token_scale.to(self.roles.state)
            updated = context.updates_mask(tokens)
            y = run(given, state, norm, scale, context.exec_mask, self.update_rule(), updated)
            y = gated_output(tokens, y, layer, self.volume_in(context))
        return self.info.format.from_tokens(y, x)

    def _layer_step(self, run: TritonStep, x: Tensor, state: BlockState, context: BlockContext) -> Tensor:
        """The whole layer of ``x [B, 1, D]`` by kernels."""
        if not self.needs_input_embeddings:
            return run.layer(self, x, x, None, state, context)
        source = context.input_embeddings
        assert source is not None
        finite = self._finite(x) & self._finite(source)  # [B, 1]
        return run.layer(self, x, self._value_source(source), finite, state, context)

    # ---- from activations to the inner loop

    def _tokens(
        self,
        x: Tensor,
        position: Tensor,
        layer: HybridLayer,
        context: BlockContext,
        exact: bool = False,
        caches: list[Tensor] | None = None,
        in_place: bool = False,
    ) -> inner_loop.Tokens:
        """What enters the inner loop, of ``x [B, T, D]`` at ``position [B or 1, T]`` (``[1, T, A]`` on a grid).

        ``caches`` of the convolutions, of queries and keys (None: a stream's start), are replaced in the list by those
        after the call, or, ``in_place``, written to in rows where ``context.exec_mask`` is true.
        """
        source = x
        if self.needs_input_embeddings:
            assert context.input_embeddings is not None
            source = context.input_embeddings
        with torch.no_grad():
            finite = self._finite(x) if source is x else self._finite(x) & self._finite(source)  # [B, T]
        if torch.is_grad_enabled():
            # A token that is not finite keeps its nan in the residual, and enters no product with a parameter: its
            # gradient, however it is masked, would be zero times nan.
            same = source is x
            x = torch.where(finite[..., None], x, 0)  # [B, T, 1] over [B, T, D]
            source = x if same else torch.where(finite[..., None], source, 0)  # [B, T, 1] over [B, T, D]
        mix = None
        if self.config.conv_kernel is not None:
            caches = [self._empty_cache(x) for _ in CACHES] if caches is None else caches
            taps = [self.query_taps, self.key_taps]
            mix = Convolutions(taps, caches, finite, in_place=in_place, exec_mask=context.exec_mask)
        value = self._value_source(source, exact)
        tokens = inner_inputs(x, position, layer, exact, source=value, mix=mix)
        # A rate of nan tells the inner loop to leave the token out.
        lr = tokens.lr if self.inner_lr_factor == 1 else self.inner_lr_factor * tokens.lr  # [B, T, H]
        # [B, T, 1] over [B, T, H]
        return tokens._replace(lr=torch.where(finite[..., None], context.where_updated(lr), torch.nan))

    @staticmethod
    def _finite(x: Tensor) -> Tensor:
        """``[B, T]`` bool: tokens of ``x [B, T, D]`` that may enter the layer."""
        return below(x, largest_factor(torch.promote_types(x.dtype, torch.float32)))

    def _value_source(self, source: Tensor, exact: bool = False) -> Tensor:
        """What values are projected from, ``[B, T, D]``, of the hidden state or of the input embeddings."""
        return rms_normalize(source.to(self.roles.compute), exact) if self.needs_input_embeddings else source

    def _empty_cache(self, x: Tensor) -> Tensor:
        assert self.config.conv_kernel is not None
        return empty_cache(x.shape[0], x.shape[2], self.config.conv_kernel, x.device, self.roles.state)

    def _from_start(self, x: Tensor, context: BlockContext) -> tuple[HybridLayer, inner_loop.Tokens]:
        """What enters the inner loop when ``x [B, T, D]`` starts a sequence."""
        layer = self.layer()
        position = torch.arange(x.shape[1], device=x.device) % self.config.chunk
        if context.coordinates is not None:
            position = context.coordinates
        return layer, self._tokens(x, position[None], layer, context)  # [1, T], or on a grid [1, T, A]

    # ---- diagnostics

    def statistics(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        layer, tokens = self._from_start(x, context)
        tokens, finite = inner_loop.only_finite(tokens)
        source = context.input_embeddings if self.needs_input_embeddings else x
        assert source is not None
        value = layer.wv(self._value_source(source), self.roles.matmul)
        value = value.unflatten(-1, (self.info.num_heads, -1)).to(tokens.k)  # [B, T, D] -> [B, T, H, Dh]
        norm = objective(layer)
        scale = layer.token_scale.to(self.roles.state)
        state = self.init_state(x.shape[0], x.device)
        return {
            **diagnostics.target_figures(tokens, finite, value, norm),
            **diagnostics.inner_losses(tokens, finite, state, norm, scale, self.update_rule(), self._kernels(x.device)),
            "token_scale_last": scale[-1],
            "nonfinite_tokens": (~finite).float().mean(),
            "gate": torch.tanh(torch.stack(self.gates())).abs().max(),
        }

    @torch.no_grad()
    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """As the base class says; of a bidirectional block, in the forward direction."""
        layer, tokens = self._from_start(x, context)
        scale = layer.token_scale.to(self.roles.state)
        state = self.init_state(x.shape[0], x.device)
        return diagnostics.inner_loss_curves(tokens, state, objective(layer), scale, self.update_rule())

    @torch.no_grad()
    def recent_losses(self, x: Tensor, state: BlockState, context: BlockContext) -> Tensor:
        """As the base class says; of a bidirectional block, in the forward direction."""
        layer, tokens = self._from_start(x, context)
        return diagnostics.losses_at(tokens, state, objective(layer))

    def red_flags(self, figures: Mapping[str, float]) -> list[str]:
        return diagnostics.red_flags(figures)


def _reversed(x: Tensor, prefix: int) -> Tensor:
    """``x [B, T, D]`` with the tokens after the first ``prefix`` in reverse; its own inverse."""
    return torch.cat([x[:, :prefix], x[:, prefix:].flip(1)], dim=1) if prefix else x.flip(1)


class _Exact(nn.Module):
    """A block's computation by operations that can be differentiated any number of times."""

    def __init__(self, block: HybridBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        return self.block._directions(x, state, context, exact=True)
