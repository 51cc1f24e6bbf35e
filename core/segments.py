"""Masked tokens of a call, and tokens that reset their row: left padding, and documents packed in a row.

A block computes rows of tokens that follow each other. Where ``BlockContext.token_mask`` or ``starts`` say otherwise,
the call is cut into pieces: the tokens of one row that follow each other, without those that are masked. Each piece is
a row of a call of its own, from the state of its row or, after a start, from the learned initial one. This works for
every block, because it asks of ``compute`` nothing but what any call does.

Shape legend: B streams, T tokens, D width, P pieces that are computed together, L tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.state import BlockState

if TYPE_CHECKING:
    from moshi_ttt.core.block import SequenceBlock
    from moshi_ttt.core.context import BlockContext

SHORTEST = 0.75
"""Pieces are padded to the longest of their call where nobody needs the state after them, if they have this share of
its tokens: fewer calls, for at most a third more tokens."""


@dataclass(frozen=True)
class SegmentPiece:
    """Tokens of one row that follow each other.

    Attributes:
        row: which of the B.
        tokens: ``[n]`` int64 on the CPU, their places among the T, ascending; one or more.
        continued: whether the piece goes on from the row's state; False after a start.
        last: whether the row's state after the call is that after this piece.
    """

    row: int
    tokens: Tensor
    continued: bool
    last: bool


@dataclass(frozen=True)
class Segments:
    """A token mask and starts, read on the CPU, as pieces of rows.

    Attributes:
        shape: ``(B, T)``.
        pieces: every token that is not masked is in one of them.
        begun: rows that end after a start with no token: their state after the call is the learned initial one.
    """

    shape: tuple[int, int]
    pieces: tuple[SegmentPiece, ...]
    begun: tuple[int, ...]

    @classmethod
    def read(cls, token_mask: Tensor | None, starts: Tensor | None) -> Segments:
        """Of ``token_mask`` and ``starts``, each ``[B, T]`` bool or None. Reads their values: a device is waited for.

        A host with several blocks does this once for a forward pass, and gives the result to every block.

        Raises ContextError where neither is given, their shapes differ, or there are no values (on the meta device).
        """
        given = [mask for mask in (token_mask, starts) if mask is not None]
        if not given or len({tuple(mask.shape) for mask in given}) > 1 or given[0].dim() != 2:
            shapes = ", ".join(str(tuple(mask.shape)) for mask in given) or "none"
            raise ContextError(f"Segments.read: give token_mask, starts or both, of one shape [B, T]; got {shapes}.")
        if any(mask.is_meta for mask in given):
            raise ContextError(
                "token_mask and starts are on the meta device, and a call of several tokens needs their values. Give "
                "BlockContext(segments=...), read from tensors that have values."
            )
        rows, length = given[0].shape
        kept = torch.ones(rows, length, dtype=torch.bool) if token_mask is None else token_mask.cpu()
        begins = torch.zeros(rows, length, dtype=torch.bool) if starts is None else starts.cpu()
        document = begins.long().cumsum(1)  # [B, T]: 0 goes on from the row's state, later ones begin anew
        pieces, begun = [], []
        for row in range(rows):
            places = kept[row].nonzero()[:, 0]  # [n]
            numbers, counts = document[row, places].unique_consecutive(return_counts=True)
            last = int(document[row, -1])
            for number, tokens in zip(numbers.tolist(), places.split(counts.tolist()), strict=True):
                pieces.append(SegmentPiece(row, tokens, continued=number == 0, last=number == last))
            if last > 0 and last not in numbers.tolist():
                begun.append(row)
        return cls((rows, length), tuple(pieces), tuple(begun))

    @property
    def num_masked(self) -> int:
        """Tokens that are in no piece."""
        return self.shape[0] * self.shape[1] - sum(len(piece.tokens) for piece in self.pieces)

    @property
    def whole(self) -> bool:
        """Whether nothing is cut: every row is one piece that goes on from its state."""
        return self.num_masked == 0 and not self.begun and all(piece.continued for piece in self.pieces)


def compute_segments(
    block: SequenceBlock, x: Tensor, state: BlockState | None, context: BlockContext
) -> tuple[Tensor, BlockState]:
    """``block.compute`` of ``x [B, T, D]`` with ``context.token_mask`` and ``starts``, piece by piece.

    Differentiable. A masked token's output is the base model's.

    Raises ContextError for tokens with a prefix, which a reversed pass leaves in place.
    """
    if context.prefix:
        raise ContextError(
            f"The block at {block.info.site} got a prefix of {context.prefix} tokens, and token_mask or starts. A call "
            "with a prefix cannot be cut: leave token_mask and starts out, or give each row a call of its own."
        )
    segments = context.segments or Segments.read(context.token_mask, context.starts)
    context = replace(context, token_mask=None, starts=None, segments=None, exec_mask=None, reset=None)
    if segments.whole:
        return block.compute(x, state, context)
    flat = x.flatten(0, 1)  # [B, T, D] -> [B T, D]
    places: list[Tensor] = []
    outputs: list[Tensor] = []
    after: BlockState | None = None
    if context.want_state:
        start = block.init_state(x.shape[0], x.device)
        after = start if state is None else dict(state)
        if segments.begun:
            rows = torch.zeros(x.shape[0], dtype=torch.bool)
            rows[list(segments.begun)] = True
            after = states.where_rows(rows.to(x.device), start, after)  # [B] over [B, ...]
    for pieces in _together(segments.pieces, block, state, context):
        call = _SegmentedCall(pieces, x, state)
        # [B T, D] -> [P, L, D]
        y, ended = block.compute(call.gather(flat), call.state(state), call.context(context, flat))
        places.append(call.places)
        outputs.append(y.flatten(0, 1)[call.filled])  # [P, L, D] -> [P L, D] -> [tokens of the pieces, D]
        if after is not None and call.wanted:
            # A block that is not causal may give no state: there is none to go on from.
            # rows [P] of [B, ...] become those of [P, ...]
            after = {name: t.index_copy(0, call.rows, ended[name]) for name, t in after.items()} if ended else None
    base = block.base_output(x) if segments.num_masked else x
    if places:
        # [B, T, D] -> [B T, D], tokens of all pieces written into it, -> [B, T, D]
        base = base.flatten(0, 1).index_copy(0, torch.cat(places), torch.cat(outputs)).view(base.shape)
    return base, after or {}


class _SegmentedCall:
    """The indices of one call of pieces that are computed together, on the device of ``x [B, T, D]``."""

    def __init__(self, pieces: Sequence[SegmentPiece], x: Tensor, state: BlockState | None) -> None:
        self.pieces, self.device = pieces, x.device
        self.size = (len(pieces), max(len(piece.tokens) for piece in pieces))  # P, L
        index, filled = torch.zeros(self.size, dtype=torch.int64), torch.zeros(self.size, dtype=torch.bool)
        for number, piece in enumerate(pieces):
            index[number, : len(piece.tokens)] = piece.row * x.shape[1] + piece.tokens
            index[number, len(piece.tokens) :] = index[number, 0]
            filled[number, : len(piece.tokens)] = True
        flat = filled.flatten()  # [P L]
        self.padding = None if flat.all() else filled[..., None].to(self.device)  # [P, L, 1]
        self.index = index.flatten().to(self.device)  # [P L] into [B T]
        self.filled = flat.nonzero()[:, 0].to(self.device)
        self.places = index.flatten()[flat].to(self.device)
        self.rows = torch.tensor([piece.row for piece in pieces]).to(self.device)  # [P] into [B]

    @property
    def wanted(self) -> bool:
        """Whether the state after these pieces is that of their rows."""
        return self.pieces[0].last

    def gather(self, flat: Tensor) -> Tensor:
        """``flat [B T, D]`` to ``[P, L, D]``, zero where a piece is shorter."""
        found = flat.index_select(0, self.index).view(*self.size, -1)
        return found if self.padding is None else torch.where(self.padding, found, 0)

    def state(self, state: BlockState | None) -> BlockState | None:
        """What the pieces start from, a row each."""
        if state is None or not self.pieces[0].continued:
            return None
        return states.contiguous({name: tensor.index_select(0, self.rows) for name, tensor in state.items()})

    def context(self, context: BlockContext, flat: Tensor) -> BlockContext:
        """The context of the whole call, for these pieces."""
        embeddings, updates, volume = context.input_embeddings, context.updates, context.volume
        coordinates = context.coordinates
        return replace(
            context,
            input_embeddings=None if embeddings is None else self.gather(embeddings.flatten(0, 1)),
            updates=updates.index_select(0, self.rows) if isinstance(updates, Tensor) else updates,
            volume=volume.index_select(0, self.rows) if isinstance(volume, Tensor) else volume,
            coordinates=None if coordinates is None else coordinates[self.pieces[0].tokens.to(coordinates.device)],
            want_state=context.want_state and self.wanted,
        )


def _together(
    pieces: Iterable[SegmentPiece], block: SequenceBlock, state: BlockState | None, context: BlockContext
) -> list[list[SegmentPiece]]:
    """Pieces that one call can compute: of one length, or where no state is needed after them of nearly one.

    A token that is added at a piece's end changes no output before it where the block is causal.
    """
    groups: dict[tuple[object, ...], list[list[SegmentPiece]]] = {}
    for piece in sorted(pieces, key=lambda piece: -len(piece.tokens)):
        continued, wanted = piece.continued and state is not None, piece.last and context.want_state
        exact = wanted or not block.causal or context.coordinates is not None
        at = tuple(piece.tokens.tolist()) if context.coordinates is not None else None
        calls = groups.setdefault((continued, wanted, at, len(piece.tokens) if exact else None), [])
        if calls and len(piece.tokens) >= SHORTEST * len(calls[-1][0].tokens):
            calls[-1].append(piece)
        else:
            calls.append([piece])
    return [call for calls in groups.values() for call in calls]


def one_token(x: Tensor, context: BlockContext) -> tuple[Tensor, BlockContext]:
    """A call of one token: ``x [B, 1, D]`` with zeros where it is masked, and a context in which the mask is an
    ``exec_mask`` and a start a ``reset``. No value is read.

    A row that ``exec_mask`` leaves out has no token here, and so no start.
    """
    mask, starts, executed = context.token_mask, context.starts, context.exec_mask
    reset, embeddings = context.reset, context.input_embeddings
    if starts is not None:
        begins = starts[:, 0] if executed is None else starts[:, 0] & executed  # [B, 1] -> [B]
        reset = begins if reset is None else reset | begins
    if mask is not None:
        x = torch.where(mask[..., None], x, 0)  # what is not finite there would reach gradients, or a state by 0 * nan
        embeddings = None if embeddings is None else torch.where(mask[..., None], embeddings, 0)
        executed = mask[:, 0] if executed is None else mask[:, 0] & executed
    given = replace(context, input_embeddings=embeddings, exec_mask=executed, reset=reset)
    return x, replace(given, token_mask=None, starts=None, segments=None)


def where_kept(mask: Tensor | None, y: Tensor, block: SequenceBlock, x: Tensor) -> Tensor:
    """``y [B, T, D]`` where ``mask [B, T]`` is true, and the base model's output for ``x [B, T, D]`` elsewhere."""
    return y if mask is None else torch.where(mask[..., None], y, block.base_output(x))


def stepped(
    step: Callable[..., Tensor], block: SequenceBlock, x: Tensor, state: BlockState, context: BlockContext | None
) -> Tensor:
    """A variant's ``step`` with a context that may mask and start tokens, which the variant itself need not know of.

    Of one token nothing is read: its mask is an execution mask, its start a reset in place. A call of several tokens
    reads the masks where the context has no ``segments``.
    """
    if context is None or (context.token_mask is None and context.starts is None):
        return step(block, x, state, context)
    tokens = block.info.format.to_tokens(x)  # [B, T, D]
    if tokens.shape[1] != 1:
        y, after = block.forward(x, state, context)
        states.copy_(state, after)
        return y
    block._check_call(tokens, state, context)
    token, one = one_token(tokens, context)
    if one.reset is not None:
        block.reset_state(state, one.reset)
    y = step(block, block.info.format.from_tokens(token, x), state, replace(one, reset=None))
    kept = where_kept(context.token_mask, block.info.format.to_tokens(y), block, tokens)
    return block.info.format.from_tokens(kept, x)
