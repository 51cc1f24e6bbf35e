"""A block: one test-time-training layer at one site of a host.

Shape legend: B streams, T tokens, D width of the host's activations.

A variant implements what ``BlockContract`` asks for, ``compute`` and ``init_state`` above all. The base class gives it
the three regimes of the design (plain training, carried training, streaming), resets and execution masks by row,
dtypes, and initialization of a model on the meta device. A variant overrides ``step`` when it can stream faster than
``compute`` followed by a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core import gated_mlp
from moshi_ttt.core import state as states
from moshi_ttt.core.autocast import unrounded, without_autocast
from moshi_ttt.core.block_contract import BlockContract
from moshi_ttt.core.call_checks import check_call, check_dtypes, check_prefix, check_state
from moshi_ttt.core.context import BlockContext
from moshi_ttt.core.derivatives import once_differentiable
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.gated_mlp import GatedMLP
from moshi_ttt.core.gradients import streams
from moshi_ttt.core.precision import DtypeRoles, check_products, check_role
from moshi_ttt.core.segments import Segments, compute_segments, one_token, where_kept
from moshi_ttt.core.site import Site, SiteInfo, SiteKind
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.volume import at_volume, combined

__all__ = [
    "BlockContext",
    "BlockFactory",
    "GatedMLP",
    "Segments",
    "SequenceBlock",
    "Site",
    "SiteInfo",
    "SiteKind",
]

GUARDS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "step": streams, "statistics": unrounded, "inner_losses": unrounded,
    "recent_losses": unrounded, "drift": unrounded,
}  # fmt: skip
"""What a variant's own methods are wrapped in."""


class SequenceBlock(BlockContract):
    """Base class of all blocks: what a variant writes (``BlockContract``), and what every variant gets.

    A ``sequence`` block returns ``x`` plus its gated update, a ``feed_forward`` block the MLP's output without the
    residual. Parameters are created in ``roles.master`` on ``info.device`` and keep that dtype whatever casts the
    module (``.to(device)`` moves it). Forward never writes to a parameter.
    """

    _start_checked: bool = False

    def __init_subclass__(cls, **named: Any) -> None:
        """Guard what a variant writes; what it inherits is guarded where it is defined."""
        super().__init_subclass__(**named)
        for name, guard in GUARDS.items():
            method = getattr(cls, name)
            if (guarded := guard(method)) is not method:
                setattr(cls, name, guarded)

    # ---- what it returns

    def at_volume(self, base: Tensor, added: Tensor, context: BlockContext) -> Tensor:
        """What a block returns: ``base`` plus what it adds, at the volume of this call, in the dtype of ``base``.

        The sum is computed in the role ``output``. Bit for bit ``base`` where the volume is 0, row by row. A block that
        adds more than once calls this each time, with what it gave as the next ``base``.

        Args:
            base: ``[B, T, D]``: ``x`` in a sequence block, the output of the host's MLP in a feed-forward block.
            added: ``[B, T, D]``, any floating dtype.
            context: of the call.
        """
        return at_volume(base, added, self.volume_in(context), self.roles.output)

    def volume_in(self, context: BlockContext) -> float | Tensor:
        """The volume of a call, a number or ``[B]``: that of the context times ``output_scale``."""
        return combined(context.volume, self.config.output_scale, self.roles.output)

    def base_output(self, x: Tensor) -> Tensor:
        """``[B, T, D]``: the base model's output at this site for ``x [B, T, D]``: ``x``, or that of its gated MLP.

        Raises ConfigError where a feed-forward block's host gives no GatedMLP.
        """
        if self.kind is SiteKind.SEQUENCE:
            return x
        mlp = gated_mlp.require_gated_mlp(self.info.mlp, self.info.site)
        own = None if self.info.mlp_output is None else self.info.mlp_output(mlp, x)
        return gated_mlp.output(mlp, x) if own is None else own

    # ---- a call

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: BlockContext | None = None
    ) -> tuple[Tensor, BlockState]:
        """One call of plain or carried training; returns the output and a new state.

        Args:
            x: activations ``[B, T, D]`` in the host's dtype.
            state: from an earlier call, or None for the learned initial state.
            context: see ``BlockContext``.

        Returns:
            ``y`` with the shape and dtype of ``x``, and the state after it, a new one.

        Raises:
            ContextError: something the block needs is missing, or the state has another number of rows.
        """
        context = context or BlockContext()
        tokens = self.info.format.to_tokens(x)  # [B, T, D]
        self._check_call(tokens, state, context)
        coordinates, prefix = self.info.format.coordinates(x), self.info.format.prefix(x)
        if coordinates is not None or prefix:
            check_prefix(self, prefix, tokens.shape[1])
            context = replace(context, coordinates=coordinates, prefix=prefix or context.prefix)
        kept, given = None, tokens
        if self.causal and context.cuts and tokens.shape[1] == 1:
            kept = context.token_mask  # [B, 1]
            tokens, context = one_token(tokens, context)
        with self._without_autocast(tokens):
            if state is None and (context.exec_mask is not None or context.reset is not None):
                state = self.init_state(tokens.shape[0], tokens.device)
            elif state is not None and context.reset is not None:
                start = self.init_state(tokens.shape[0], tokens.device)
                state = states.where_rows(context.reset, start, state)  # reset [B], state [B, ...]
            if state is not None:
                state = states.contiguous(state)
            y, after = (self.compute_segments if context.cuts else self.compute)(tokens, state, context)
            y = where_kept(kept, y, self, given)
        check_state(self, after)
        if context.exec_mask is not None and state is not None and after:
            after = states.where_rows(context.exec_mask, after, state)  # exec_mask [B], state [B, ...]
        if context.want_state and not tokens.is_meta and not torch.compiler.is_compiling():
            after = states.without_views(after, self.parameters())
        if context.detach_state:
            after = states.detach(after)
        y = self.info.format.from_tokens(y, x)  # [B, T, D] -> the host's layout
        if y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(partial(self._check_backward, tokens.device.type))
        return y, after

    def compute_segments(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        """``compute`` where ``context.token_mask`` or ``starts`` are given; see ``BlockContext`` for what they mean.

        By default the call is cut, and ``compute`` called on tokens of a row that follow each other. A block that can
        compute them together overrides this.
        """
        return compute_segments(self, x, state, context)

    def _check_call(self, tokens: Tensor, state: BlockState | None, context: BlockContext) -> None:
        check_call(self, tokens, state, context)
        check_dtypes(self, tokens)
        if state is not None:
            check_state(self, state)
        elif not self._start_checked:
            # What init_state gives is decided by the parameters' dtypes, which are checked, and by what `_apply` casts.
            check_state(self, self.init_state(1))
            self._start_checked = True

    def _without_autocast(self, tensor: Tensor) -> AbstractContextManager[object]:
        """A context without autocast on the device of ``tensor``; see ``core.autocast``."""
        return without_autocast(self, tensor)

    def _check_backward(self, device: str, gradient: Tensor | None) -> None:
        check_products(self.roles, device, f"backward pass, {self.info.site}")

    # ---- a streamed step, and its state

    @streams
    def step(self, x: Tensor, state: BlockState, context: BlockContext | None = None) -> Tensor:
        """Stream ``x [B, T, D]`` (usually T = 1), updating ``state`` in place. No value is read on the CPU.

        Without a graph, whatever a variant does and whether or not gradients are enabled. A backward pass that would
        carry a gradient through the output, to ``x`` or to a parameter that requires one, raises ContextError, as does
        a ``state`` with a tensor that is not contiguous (``allocate_state`` makes none): nothing is written then.
        """
        y, after = self.forward(x, state, context)
        states.copy_(state, after)
        return y

    def gradient_sources(self, x: Tensor, state: BlockState, context: BlockContext | None) -> Iterator[Tensor]:
        """What the output of a call depends on: its arguments, the block's parameters, those of the host's MLP."""
        yield x
        yield from state.values()
        if context is not None and context.input_embeddings is not None:
            yield context.input_embeddings
        yield from self.parameters()
        if self.info.mlp is not None:
            for part in (*gated_mlp.input_projections(self.info.mlp), gated_mlp.output_projection(self.info.mlp)):
                yield from part.parameters()

    def no_gradient_in_streams(self) -> str:
        """Why a gradient cannot pass through a step of this block, and what to do."""
        return (
            f"The block at {self.info.site} streamed this pass: its state was updated in place, so no gradient can "
            "pass through it, to its parameters or to what is below it. Train outside streaming, and "
            "inside host.carry(...) to continue from earlier segments; to stream while gradients are enabled, cut the "
            "output from the graph (torch.no_grad(), or detach)."
        )

    @torch.no_grad()
    def allocate_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        """The initial state with storage of its own: buffers for ``step``."""
        return states.clone(self.init_state(batch_size, device))

    def state_bytes(self) -> int:
        """Bytes of state one stream occupies."""
        with torch.no_grad():
            return states.num_bytes(self.init_state(1))

    @torch.no_grad()
    def reset_state(self, state: BlockState, mask: Tensor) -> None:
        """Put the rows where ``mask [B]`` is true back to the learned initial state, in place, by masked writes."""
        device = next(iter(state.values())).device
        states.write_rows_(state, self.init_state(1, device), mask.to(device))

    def forget(self, state: BlockState) -> BlockState:
        """``state`` with every row's memory at its learned initial values; other entries are the same tensors.

        The rows of what is new share storage: do not write.
        """
        fresh = self.init_state(1, next(iter(state.values())).device)
        names = self.memory_names()
        return {name: fresh[name].expand_as(tensor) if name in names else tensor for name, tensor in state.items()}

    # ---- its parameters and buffers

    def persistent_buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the trained block, by name: adapters and checkpoints hold them.

        They are whole on every rank. A block that changes them in training keeps them equal on all ranks. Raises
        ConfigError for state that is no tensor (``get_extra_state``), which neither can hold.
        """
        known = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        saved = self.state_dict().keys() - known
        found = {name: buffer for name, buffer in self.named_buffers(remove_duplicate=False) if name in saved}
        if lost := sorted(saved - found.keys()):
            raise ConfigError(
                f"{type(self).__name__} at {self.info.site} keeps {', '.join(lost)}, which is neither a parameter nor "
                "a buffer, and an adapter cannot hold it. Register it as a persistent buffer."
            )
        return found

    def check_precision(self, when: str) -> None:
        """Raise PrecisionError unless every stored parameter has the master dtype."""
        check_role("master", self.roles.master, self.named_parameters(), self.roles.policy, f"{when}, {self.info.site}")

    def check_shardable(self) -> None:
        """Raise ConfigError where a parameter has no dimension that can be sharded."""
        scalars = [name for name, parameter in self.named_parameters() if parameter.dim() == 0]
        if scalars:
            raise ConfigError(
                f"{type(self).__name__} at {self.info.site}: {', '.join(scalars)} has no dimension, and a parameter is "
                "divided over ranks by its first. Give it the shape [1]."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SequenceBlock:
        # `.to(bfloat16)` on a whole model must not round fast weights and gates: a block's dtypes are its policy's.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._start_checked = False  # a host that is cast whole casts what a fast weight may start from
        return self

    # ---- the module

    def compile_compute(self) -> None:
        """Compile ``compute`` with torch.compile from its next call on, again for every sequence length.

        A compiled block has first derivatives alone: a backward pass with ``create_graph`` raises RuntimeError.
        """
        compiled = torch.compile(self.compute, dynamic=False)

        def compute(x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
            y, after = compiled(x, state, context)
            reason = f"The block at {self.info.site} is compiled"
            once = {name: once_differentiable(tensor, reason) for name, tensor in after.items()}
            return once_differentiable(y, reason), once

        self.compute = compute  # type: ignore[method-assign]  # this block's own, before the class's

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: compiled code is left out, and the copy compiles its own."""
        state = dict(self.__dict__)
        state["_compiles_compute"] = state.pop("compute", None) is not None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        compiles = state.pop("_compiles_compute")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if compiles:
            self.compile_compute()

    def extra_repr(self) -> str:
        """Site and sizes, for ``print(model)``."""
        chunk = "" if self.chunk_tokens is None else f", chunk={self.chunk_tokens}"
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{self.info.site}, dim={self.info.dim}, num_heads={self.info.num_heads}{chunk}, parameters={count:,}"


BlockFactory = Callable[[Any, SiteInfo, DtypeRoles], SequenceBlock]
"""What a variant registers: ``(config, site info, dtype roles) -> block``; usually the block class itself."""
