"""What a variant provides: the methods it must write, and what it may declare and say about itself.

Shape legend: B streams, T tokens, D width of the host's activations, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moshi_ttt.core import state as states
from moshi_ttt.core.autocast import unrounded
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.context import BlockContext
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.site import SiteInfo, SiteKind
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.state_ranges import StateRange, counters


class BlockContract(nn.Module, ABC):
    """The part of ``SequenceBlock`` that a variant writes; ``SequenceBlock`` is the part that it gets.

    Abstract methods must be written. The others have a default, which a variant overrides where it is not true of it.
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

    # ---- what every variant provides

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

    # ---- what a variant may say about its parameters and its state

    def reset_unsaved(self, generator: torch.Generator | None = None) -> None:
        """Fill what adapters and checkpoints do not store, the buffers that are not persistent, with initial values.

        Called instead of ``reset_parameters``, with the same generator, before parameters and persistent buffers are
        filled from a file. By default this is ``reset_parameters``, for what it sets may depend on what it draws; a
        block for which that is not so overrides this, and then draws nothing in vain.
        """
        self.reset_parameters(generator)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gate parameters: training may give them their own learning rate."""
        return []

    def memory_names(self) -> frozenset[str]:
        """Names of the state's entries that are memory: what test-time updates write, and what belongs to it.

        All of them by default. A cache that a block only computes with (the last tokens of a causal convolution) is
        state and not memory: a block that keeps one leaves it out. Evaluations reset and exchange memory alone.
        """
        return frozenset(self.init_state(1))

    def cast_bytes(self) -> int:
        """Bytes of the copies of parameters that ``context.cast`` keeps for a stream, shared by all rows.

        A block that asks says them: ``core.casts.copy_bytes`` counts them.
        """
        return 0

    @property
    def chunk_tokens(self) -> int | None:
        """Number of tokens after which the memory is updated; None if the block does not declare it."""
        return None

    def compile_step(self) -> None:
        """Run ``step`` as code compiled for this machine from its next call on, if the variant provides such code.

        Raises ConfigError where it has none, or where that cannot be built or does not serve this device or dtype.
        """
        raise ConfigError(
            f"{type(self).__name__} at {self.info.site} has no compiled step. Stream without compile_step: the results "
            "are the same."
        )

    # ---- its figures

    @unrounded
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

    @unrounded
    def statistics(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """Scalars on the device that show whether the block is healthy on ``x [B, T, D]``; no value is read on the CPU.

        From the learned initial state. What every block shares (drift, what is not finite) need not be here. An
        autocast around it has no effect, whatever a variant does, as with the other figures.
        """
        return {}

    @unrounded
    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """The inner loss of each token of ``x [B, T, D]``, from the learned initial state; empty for a variant without.

        Each ``[B, H, T]``, floating point:

        - ``initial``: at the learned initial fast weights;
        - ``before``: at the fast weights that the token's chunk starts from: exactly ``initial`` in the first chunk;
        - ``after``: at those after its chunk's update; NaN in an unfinished last chunk, which makes none;
        - ``baseline``: of predicting the mean target of the row's T tokens, half the targets' variance.
        """
        return {}

    @unrounded
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

    def upgrade_state(self, state: Mapping[str, Tensor]) -> BlockState:
        """A saved ``state`` with today's names, where an earlier version of the block saved others; else as it is.

        Called before a stream is restored and before a training run is resumed. What it cannot complete it leaves, and
        the restore then reports what is missing. ``state`` itself stays.
        """
        return dict(state)

    def state_ranges(self) -> Mapping[str, StateRange]:
        """The whole numbers that entries of the state can hold, by name: a state from a file is refused outside them.

        By default every entry of whole numbers counts from 0. A block whose steps use one as an index (a position in
        the chunk) declares its bounds: a number beyond them would raise in a step, for all rows.
        """
        return counters(self.init_state(1))

    def skipped_updates(self, state: BlockState) -> Tensor:
        """``[B]`` int64: updates, of tokens or chunks, that each stream skipped: see ``skips_nonfinite``.

        None is counted where updates are disabled: none was to be made. A variant that leaves none out says zero.
        """
        return torch.zeros(states.rows(state), dtype=torch.int64, device=next(iter(state.values())).device)


def _row_norms(tensor: Tensor) -> Tensor:
    """``[B]`` float64: the norm of each row of ``tensor [B, ...]``, summed in float64 without a copy in it."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64)
    return norms
