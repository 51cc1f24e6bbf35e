"""State carried across calls of a host: the context of one forward pass, and the states for the next one.

A host that trains with carried state opens a ``Carry`` in ``HostModel.carry``, makes a ``ForwardContext`` of each
forward pass, hands it to its layers as an argument (so that activation checkpointing keeps it for the layers that it
runs again in backward), runs each block with it, and advances the carry when the pass has ended.

Shape legend: B streams, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import BlockContext, Segments, SequenceBlock, Site
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.state import BlockState


@dataclass
class ForwardContext:
    """The inputs of all blocks in one forward pass, and the states that they return.

    Attributes:
        input_embeddings: ``[B, T, D]``, the token embeddings of this pass.
        initial: the states this pass continues from; a site that is missing starts from its learned state.
        reset: ``[B]`` bool, rows that start from the learned state whatever ``initial`` holds.
        updates: whether test-time updates are enabled, for all rows or ``[B]`` bool.
        volume: of what blocks add, for all rows or ``[B]``.
        token_mask, starts: ``[B, T]`` bool; see ``BlockContext``. Their values are read once for all blocks.
        final: where the state after this pass goes, or None when nobody asked for it.
    """

    input_embeddings: Tensor | None = None
    initial: Mapping[Site, BlockState] = field(default_factory=dict)
    reset: Tensor | None = None
    updates: bool | Tensor = True
    volume: float | Tensor = 1.0
    token_mask: Tensor | None = None
    starts: Tensor | None = None
    final: dict[Site, BlockState] | None = None
    _segments: Segments | None = field(default=None, repr=False)

    def run(self, block: SequenceBlock, x: Tensor) -> Tensor:
        """``x`` through the block that is attached at its site, outside streams; its state is recorded."""
        context = BlockContext(
            # On the device of this layer: a model may lie on several.
            input_embeddings=_to(self.input_embeddings, x),
            reset=_to(self.reset, x),
            updates=_to(self.updates, x),
            volume=_to(self.volume, x),
            token_mask=_to(self.token_mask, x),
            starts=_to(self.starts, x),
            segments=self._read_segments(),
            want_state=self.final is not None,
            detach_state=True,
        )
        y, after = block(x, self.initial.get(block.info.site), context)
        self.record(block.info.site, after)
        return cast(Tensor, y)

    def record(self, site: Site, state: BlockState) -> None:
        """Keep the state of a site, once: a layer that is run again in backward does not overwrite it.

        The copy matters: a state that was never updated may be a view of a parameter, which the optimizer changes and
        which sharding frees.
        """
        if self.final is not None and site not in self.final:
            self.final[site] = states.clone(state)

    def _read_segments(self) -> Segments | None:
        given = self.token_mask if self.starts is None else self.starts
        if given is None or given.dim() != 2 or given.shape[1] == 1:  # a call of one token needs no value of them
            return None
        if self._segments is None:
            self._segments = Segments.read(self.token_mask, self.starts)
        return self._segments


def _to(value: Any, like: Tensor) -> Any:
    return value.to(like.device) if isinstance(value, Tensor) else value


class Carry:
    """An open ``host.carry``: the state from which the next forward pass continues.

    Attributes:
        state: what the host yields: the states after the last forward pass, detached.
        reset: ``[B]`` bool, rows that the next pass starts anew, or None.
    """

    def __init__(self, state: CarriedState, reset: Tensor | None = None) -> None:
        self.state = state
        self.reset = reset

    @classmethod
    def open(
        cls,
        blocks: Mapping[Site, SequenceBlock],
        state: CarriedState | None,
        document_ids: Tensor | None,
    ) -> Carry:
        """A carry that starts from ``state``, which is not changed; ``document_ids [B]`` that differ from its own reset
        the row. They are compared on the device.

        Raises ContextError when the state or the document ids do not fit the blocks or each other.
        """
        before = state or CarriedState()
        _check_fits(blocks, before, document_ids)
        known, reset = before.document_ids, None
        if document_ids is not None and known is not None:
            device = next(
                (tensor.device for block in before.blocks.values() for tensor in block.values()), known.device
            )
            reset = document_ids.to(device) != known.to(device)
        started = CarriedState(
            {site: states.detach(block) for site, block in before.blocks.items()},
            known if document_ids is None else document_ids.detach().clone(),
        )
        return cls(started, reset)

    def begin(self, input_embeddings: Tensor, **given: Any) -> ForwardContext:
        """The context of the next forward pass of ``input_embeddings [B, T, D]``; ``given`` are other attributes of it.

        Raises ContextError when its rows are not those of the document ids.
        """
        ids = self.state.document_ids
        if ids is not None and ids.shape[0] != input_embeddings.shape[0]:
            raise ContextError(
                f"document_ids has {ids.shape[0]} rows and this batch {input_embeddings.shape[0]}: give one per row."
            )
        return ForwardContext(input_embeddings, dict(self.state.blocks), self.reset, final={}, **given)

    def advance(self, context: ForwardContext) -> None:
        """Continue after a forward pass that has ended: from its final states, with no row to reset."""
        self.state.blocks = dict(context.final or {})
        self.reset = None


def _check_fits(blocks: Mapping[Site, SequenceBlock], before: CarriedState, document_ids: Tensor | None) -> None:
    """ContextError unless a pass of ``blocks`` can continue from ``before`` with these document ids."""
    if before.blocks and before.blocks.keys() != blocks.keys():
        raise ContextError(
            f"The carried state has the sites {', '.join(map(str, sorted(before.blocks)))}, the model "
            f"{', '.join(map(str, blocks)) or 'none'}. Carry a state that this model made, or start from None."
        )
    if document_ids is None:
        return
    if document_ids.dim() != 1:
        raise ContextError(f"document_ids must be [B], one per row, got shape {tuple(document_ids.shape)}.")
    known = before.document_ids
    if known is None and before.blocks:
        raise ContextError(
            "document_ids are given, and the carried state does not know the ids of its rows, so none could be reset. "
            "Give document_ids from the first segment on, or start from None."
        )
    rows = {states.rows(block) for block in before.blocks.values()}
    rows |= {known.shape[0]} if known is not None else set()
    if rows - {document_ids.shape[0]}:
        raise ContextError(
            f"document_ids has {document_ids.shape[0]} rows and the carried state {sorted(rows)}. "
            "Keep the rows of a batch in place from segment to segment."
        )
