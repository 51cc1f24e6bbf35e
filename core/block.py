"""The contract of a block: one test-time-training layer at one site of a host.

Shape legend: B streams, T tokens, D width of the host's activations.

A variant implements ``compute`` and ``init_state``; the base class gives it the three regimes of the design (plain
training, carried training, streaming), per-row resets and execution masks, dtype bookkeeping and meta-device
initialisation. A variant overrides ``step`` when it can stream faster than ``compute`` followed by a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moshi_ttt.core import gated_mlp
from moshi_ttt.core import state as states
from moshi_ttt.core.call_checks import check_call, check_dtypes, check_prefix, check_state
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.context import BlockContext
from moshi_ttt.core.derivatives import once_differentiable
from moshi_ttt.core.errors import ConfigError, PrecisionError
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


class SequenceBlock(nn.Module, ABC):
    """Base class of all blocks.

    A ``sequence`` block returns ``x`` plus its gated update, a ``feed_forward`` block the MLP's output without the
    residual. Parameters are created in ``roles.master`` on ``info.device`` and keep that dtype whatever casts the
    module (``.to(device)`` moves it). Forward never writes to a parameter.
    """

    kind: ClassVar[SiteKind] = SiteKind.SEQUENCE
    needs_input_embeddings: bool = False
    """Whether the context must have the input embeddings; a block may set it from its options."""
    scales_inner_lr: ClassVar[bool] = False
    """Whether the block multiplies its inner learning rate by ``inner_lr_factor``: a training schedule needs that."""
    scales_output: ClassVar[bool] = False
    """Whether what the block adds is multiplied by the volume, as ``at_volume`` does: ``output_scale`` and
    ``host.volume`` need that, and are refused without it."""
    skips_nonfinite: ClassVar[bool] = False
    """Whether a token that is not finite is left out of what its row learns, alone or with the update of its whole
    chunk (the block's docstring says which), and that is counted by ``skipped_updates``; without it, such a token may
    make its own row nan until it is reset."""
    skipped_advice: ClassVar[str] = (
        "Lower the block's learning rate, or look for values in the input that are not finite."
    )
    """What to do about ``skipped_updates``: a host says it when a stream ends."""
    learned_state: ClassVar[bool] = True
    """Whether the initial state depends on the block's own parameters (a fast weight may start at the host's)."""

    def __init__(self, config: BlockConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__()
        self.config = config
        self.info = info
        self.roles = roles
        self.inner_lr_factor = 1.0
        """The factor of a training schedule on the inner learning rate; 1 when it has ended, as in adapters."""
        self._start_checked = False

    # ---- what a variant provides

    @property
    @abstractmethod
    def causal(self) -> bool:
        """True when output t depends on tokens up to t only."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter and every buffer with its initial value, drawing from ``generator`` (on the CPU).

        A model that was built on the meta device has no values in either, in buffers that are not persistent as well.

        Write with ``core.sharding.assign``, which knows what to do when the parameter is sharded.
        """

    def reset_unsaved(self, generator: torch.Generator | None = None) -> None:
        """Fill what adapters and checkpoints do not store, the buffers that are not persistent, with initial values.

        Called instead of ``reset_parameters``, with the same generator, before parameters and persistent buffers are
        filled from a file. By default this is ``reset_parameters``, for what it sets may depend on what it draws; a
        block for which that is not so overrides this, and then draws nothing in vain.
        """
        self.reset_parameters(generator)

    @abstractmethod
    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        """The learned initial state, one row per stream, differentiable. All rows are equal, and may share storage: do
        not write.
        """

    @abstractmethod
    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        """``x [B, T, D]`` to ``(y [B, T, D], state)``; functional; the caller handles masks.

        ``state=None`` means the learned initial state, differentiably. Writes into none of its arguments.
        """

    @abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations one token adds when streaming (a multiply-add counts two)."""

    # ---- what every variant gets

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

    def base_output(self, x: Tensor) -> Tensor:
        """``[B, T, D]``: the base model's output at this site for ``x [B, T, D]``: ``x``, or that of its gated MLP.

        Raises ConfigError where a feed-forward block's host gives no GatedMLP.
        """
        if self.kind is SiteKind.SEQUENCE:
            return x
        mlp = gated_mlp.require_gated_mlp(self.info.mlp, self.info.site)
        own = None if self.info.mlp_output is None else self.info.mlp_output(mlp, x)
        return gated_mlp.output(mlp, x) if own is None else own

    def compute_segments(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        """``compute`` where ``context.token_mask`` or ``starts`` are given; see ``BlockContext`` for what they mean.

        By default the call is cut, and ``compute`` called on tokens of a row that follow each other. A block that can
        compute them together overrides this.
        """
        return compute_segments(self, x, state, context)

    def volume_in(self, context: BlockContext) -> float | Tensor:
        """The volume of a call, a number or ``[B]``: that of the context times ``output_scale``."""
        return combined(context.volume, self.config.output_scale, self.roles.output)

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
        tokens = self.info.format.to_tokens(x)
        self._check_call(tokens, state, context)
        coordinates, prefix = self.info.format.coordinates(x), self.info.format.prefix(x)
        if coordinates is not None or prefix:
            check_prefix(self, prefix, tokens.shape[1])
            context = replace(context, coordinates=coordinates, prefix=prefix or context.prefix)
        kept, given = None, tokens
        if self.causal and context.cuts and tokens.shape[1] == 1:
            kept = context.token_mask
            tokens, context = one_token(tokens, context)
        with self._without_autocast(tokens):
            if state is None and (context.exec_mask is not None or context.reset is not None):
                state = self.init_state(tokens.shape[0], tokens.device)
            elif state is not None and context.reset is not None:
                state = states.where_rows(context.reset, self.init_state(tokens.shape[0], tokens.device), state)
            if state is not None:
                state = states.contiguous(state)
            y, after = (self.compute_segments if context.cuts else self.compute)(tokens, state, context)
            y = where_kept(kept, y, self, given)
        check_state(self, after)
        if context.exec_mask is not None and state is not None and after:
            after = states.where_rows(context.exec_mask, after, state)
        if context.want_state and not tokens.is_meta and not torch.compiler.is_compiling():
            after = states.without_views(after, self.parameters())
        if context.detach_state:
            after = states.detach(after)
        y = self.info.format.from_tokens(y, x)
        if y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(partial(self._check_backward, tokens.device.type))
        return y, after

    def _check_backward(self, device: str, gradient: Tensor | None) -> None:
        check_products(self.roles, device, f"backward pass, {self.info.site}")

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        cls.step = streams(cls.step)  # type: ignore[method-assign]
        for name in ("statistics", "inner_losses", "recent_losses", "drift"):
            method = getattr(cls, name)
            if (wrapped := _unrounded(method)) is not method:  # what it inherits is wrapped where it is defined
                setattr(cls, name, wrapped)

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

    @torch.no_grad()
    def reset_state(self, state: BlockState, mask: Tensor) -> None:
        """Put the rows where ``mask [B]`` is true back to the learned initial state, in place, by masked writes."""
        device = next(iter(state.values())).device
        states.write_rows_(state, self.init_state(1, device), mask.to(device))

    def memory_names(self) -> frozenset[str]:
        """Names of the state's entries that are memory: what test-time updates write, and what belongs to it.

        All of them by default. A cache that a block only computes with (the last tokens of a causal convolution) is
        state and not memory: a block that keeps one leaves it out. Evaluations reset and exchange memory alone.
        """
        return frozenset(self.init_state(1))

    def forget(self, state: BlockState) -> BlockState:
        """``state`` with every row's memory at its learned initial values; other entries are the same tensors.

        The rows of what is new share storage: do not write.
        """
        fresh = self.init_state(1, next(iter(state.values())).device)
        names = self.memory_names()
        return {name: fresh[name].expand_as(tensor) if name in names else tensor for name, tensor in state.items()}

    @torch.no_grad()
    def drift(self, state: BlockState) -> Tensor:
        """``[B]`` float64: how far each stream's fast weights are from where they started, over the norm of the start.

        Fast weights are what starts from a learned value; a variant for which that is not so says what it means.
        """
        with torch.enable_grad():
            start = self.init_state(1)
        learned = [name for name, tensor in start.items() if tensor.requires_grad]
        device = next(iter(state.values())).device
        moved = torch.zeros(states.rows(state), dtype=torch.float64, device=device)
        size = torch.zeros(1, dtype=torch.float64, device=device)
        for name in learned:
            now, first = state[name], start[name].detach().to(device)
            if torch.finfo(now.dtype).bits < 32:
                now, first = now.float(), first.float()
            moved = torch.hypot(moved, _row_norms(now - first))
            size = torch.hypot(size, _row_norms(first))
        return moved / size.clamp(min=torch.finfo(torch.float64).tiny)

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

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gate parameters: training may give them their own learning rate."""
        return []

    def statistics(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """Scalars on the device that show whether the block is healthy on ``x [B, T, D]``; no value is read on the CPU.

        From the learned initial state. What every block shares (drift, what is not finite) need not be here. An
        autocast around it has no effect, whatever a variant does, as with the other figures.
        """
        return {}

    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """The inner loss of each token of ``x [B, T, D]``, from the learned initial state; empty for a variant without.

        Each ``[B, H, T]``, floating point:

        - ``initial``: at the learned initial fast weights;
        - ``before``: at the fast weights that the token's chunk starts from: exactly ``initial`` in the first chunk;
        - ``after``: at those after its chunk's update; NaN in an unfinished last chunk, which makes none;
        - ``baseline``: of predicting the mean target of the row's T tokens, half the targets' variance.
        """
        return {}

    def recent_losses(self, x: Tensor, state: BlockState, context: BlockContext) -> Tensor | None:
        """The inner loss of tokens at the fast weights of ``state``, ``[B, H, T]``; None for a variant without.

        ``x [B, T, D]`` are the latest tokens of a stream and ``state`` is the one after them, or the learned start for
        comparison. They are taken as if they began a chunk of a new stream, so at the learned start this is ``initial``
        of ``inner_losses``. NaN for a token whose target would need the tokens after it.
        """
        return None

    def red_flags(self, figures: Mapping[str, float]) -> list[str]:
        """A sentence for each abnormal value of ``statistics``, as read, and what to do about it."""
        return []

    def skipped_updates(self, state: BlockState) -> Tensor:
        """``[B]`` int64: updates, of tokens or chunks, that each stream skipped: see ``skips_nonfinite``.

        None is counted where updates are disabled: none was to be made. A variant that leaves none out says zero.
        """
        return torch.zeros(states.rows(state), dtype=torch.int64, device=next(iter(state.values())).device)

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

        self.compute = compute  # type: ignore[method-assign]

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

    def compile_step(self) -> None:
        """Run ``step`` as code compiled for this machine from its next call on, if the variant provides such code.

        Raises ConfigError where it has none, or where that cannot be built or does not serve this device or dtype.
        """
        raise ConfigError(
            f"{type(self).__name__} at {self.info.site} has no compiled step. Stream without compile_step: the results "
            "are the same."
        )

    @property
    def chunk_tokens(self) -> int | None:
        """Number of tokens after which the memory is updated; None if the block does not declare it."""
        return None

    def extra_repr(self) -> str:
        """Site and sizes, for ``print(model)``."""
        chunk = "" if self.chunk_tokens is None else f", chunk={self.chunk_tokens}"
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{self.info.site}, dim={self.info.dim}, num_heads={self.info.num_heads}{chunk}, parameters={count:,}"

    def state_bytes(self) -> int:
        """Bytes of state one stream occupies."""
        with torch.no_grad():
            return states.num_bytes(self.init_state(1))

    def cast_bytes(self) -> int:
        """Bytes of the copies of parameters that ``context.cast`` keeps for a stream, shared by all rows.

        A block that asks says them: ``core.casts.copy_bytes`` counts them.
        """
        return 0

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

    def _without_autocast(self, tokens: Tensor) -> AbstractContextManager[object]:
        """Autocast would round what the policy keeps in float32.

        Raises PrecisionError where that changes what the host itself computes inside the block: its gated MLP.
        """
        device = tokens.device.type
        if not self._autocast_is_on(tokens):
            return nullcontext()
        if self.kind is SiteKind.FEED_FORWARD and torch.get_autocast_dtype(device) is not self.roles.param:
            raise PrecisionError(
                f"The block at {self.info.site} computes the host's own MLP, under an autocast to "
                f"{torch.get_autocast_dtype(device)} that would round it otherwise than policy {self.roles.policy!r}, "
                f"which asks for {self.roles.param} in the role 'param'. Leave the autocast, or load the host in "
                f"{torch.get_autocast_dtype(device)}: the policy decides what is rounded."
            )
        return torch.autocast(device, enabled=False)

    @staticmethod
    def _autocast_is_on(tokens: Tensor) -> bool:
        return not tokens.is_meta and torch.is_autocast_enabled(tokens.device.type)

    def _check_call(self, tokens: Tensor, state: BlockState | None, context: BlockContext) -> None:
        check_call(self, tokens, state, context)
        check_dtypes(self, tokens)
        if state is not None:
            check_state(self, state)
        elif not self._start_checked:
            # What init_state gives is decided by the parameters' dtypes, which are checked, and by what `_apply` casts.
            check_state(self, self.init_state(1))
            self._start_checked = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SequenceBlock:
        # `.to(bfloat16)` on a whole model must not round fast weights and gates: a block's dtypes are its policy's.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._start_checked = False  # a host that is cast whole casts what a fast weight may start from
        return self


def _unrounded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a block whose first argument is a tensor or a state, run without autocast."""
    if getattr(method, "unrounded", False):
        return method

    @wraps(method)
    def without_autocast(self: SequenceBlock, *given: Any, **named: Any) -> Any:
        first = next(iter((*given, *named.values())))
        with self._without_autocast(first if isinstance(first, Tensor) else next(iter(first.values()))):
            return method(self, *given, **named)

    without_autocast.unrounded = True  # type: ignore[attr-defined]
    return without_autocast


def _row_norms(tensor: Tensor) -> Tensor:
    """``[B]`` float64: the norm of each row of ``tensor [B, ...]``, summed in float64 without a copy in it."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64)
    return norms


BlockFactory = Callable[[Any, SiteInfo, DtypeRoles], SequenceBlock]
"""What a variant registers: ``(config, site info, dtype roles) -> block``; usually the block class itself."""
