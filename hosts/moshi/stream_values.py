"""What a stream carries from step to step: every tensor and counter in Moshi's streaming state, one by one.

All rows together (``streaming.stream_state``) and one row (``slots.Slots.save_row``) are read and written by the same
``StreamValue``. Nothing beyond the end of a row's stream is read: Moshi resets a row by masking what is in its buffers
and leaves it there, so they hold the keys and tokens of the row's former stream.

Shape legend: B streams (rows), H heads, N slots of a ring of keys and values, Dh head width, Q rows of the language
model, C slots of its token cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.state_ranges import LARGEST_COUNT
from moshi_ttt.hosts.moshi.upstream import (
    AttentionState,
    GeneratorState,
    LMGen,
    LMModel,
    MimiModel,
    RingKVCache,
    State,
    StreamingModule,
    StreamingMultiheadAttention,
)

# Made anew by every stream, and the same in each: configuration, callbacks, captured graphs.
_NOT_CARRIED = {
    "batch_size", "device", "block", "graphed_main", "graphed_depth", "exit_stack", "reset_callback",
    "set_exec_mask_callback", "_set_exec_mask_graphed", "skipped_before", "updates", "volume", "casts",
    "graphed_tr_enc", "graphed_tr_dec", "graphed_encoder", "graphed_decoder", "recent",
}  # fmt: skip
# Carried for all rows together, and no row's own: set before every step, a constant, counters that nothing reads
# where rows are out of step.
_NOT_OF_A_ROW = {"exec_mask", "initial", "offset_cpu"}
# Filled by the first step, None before: the keys and values of what cross-attention looks at.
_FILLED_LATER = ("k_cross", "v_cross")

Form = Literal["plain", "ring", "tokens"]


@dataclass(frozen=True)
class StreamValue:
    """One value that a stream carries, and where it is kept.

    Attributes:
        name: of the module, then ``/``, then of the value in its state.
        owner, key: where it is now; Moshi replaces some tensors by new ones, so it is looked up each time.
        module: whose state it is in.
        form: ``ring`` is a ring of keys and values ``[2, B, H, N, Dh]``, ``tokens`` the token cache of an LMGen
            ``[B, Q, C]``: of both a part may lie beyond the end of a row's stream.
    """

    name: str
    owner: Any
    key: str
    module: nn.Module
    form: Form = "plain"

    @property
    def value(self) -> Any:
        return self.owner[self.key] if isinstance(self.owner, dict) else getattr(self.owner, self.key)

    # ---- all rows

    def snapshot(self) -> Tensor:
        """A copy of all rows, with nothing from beyond the end of a stream; a counter becomes int64 ``[]``."""
        value = self.value
        if isinstance(value, Tensor):
            return self._ended(value.detach()).clone(memory_format=torch.contiguous_format)
        return torch.tensor(value, dtype=torch.int64)

    def problem(self, given: Tensor) -> str | None:
        """Why ``given`` cannot be written here, or None."""
        value = self.value
        if value is None:
            attention = cast(StreamingMultiheadAttention, self.module)
            rows, heads = self.owner.batch_size, attention.num_heads
            dtype = cast(Tensor, attention.in_projs[0].weight).dtype
            shape: tuple[Any, ...] = (rows, heads, "any length", attention.embed_dim // heads)
            fits = given.dim() == 4 and (*given.shape[:2], "any length", given.shape[3]) == shape
        else:
            shape, dtype = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else ((), torch.int64)
            fits = tuple(given.shape) == shape
        if fits and given.dtype == dtype:
            return None if given.is_floating_point() else self._number_problem(given)
        return f"{self.name}: expected {shape} {dtype}, got {tuple(given.shape)} {given.dtype}"

    def write(self, given: Tensor) -> None:
        """Write ``given`` into all rows, in place where there is a buffer."""
        value = self.value
        if isinstance(value, Tensor):
            value.copy_(given)
        elif value is None:
            setattr(self.owner, self.key, given.detach().to(self.owner.device, copy=True))
        else:
            setattr(self.owner, self.key, int(given))

    def erase(self) -> None:
        """Clear, in every row, what lies beyond the end of its stream."""
        if self.form != "plain":
            self.value.copy_(self._ended(self.value))

    # ---- one row

    @property
    def is_of_a_row(self) -> bool:
        """Whether rows have a value each."""
        return self.key not in _NOT_OF_A_ROW and self.value is not None

    def row(self, row: int) -> Tensor:
        """The values of one row, without a copy: a view, whose first dimension is not the row."""
        return cast(Tensor, self.value).select(1 if self.form == "ring" else 0, row)

    def row_snapshot(self, row: int) -> Tensor:
        """A copy of one row on the CPU; of a ring ``[2, H, n, Dh]``, the n slots that are in use."""
        kept = self.row(row).detach()
        if self.form == "ring":
            kept = kept[:, :, : min(int(self.owner.end_offset[row]), self.owner.capacity)]
        elif self.form == "tokens":
            held = _held_tokens(self.owner.offsets, self.owner, self.module)[row]
            kept = torch.where(held, kept, _ungenerated(self.module))
        return kept.to("cpu", copy=True).contiguous()

    def row_problem(self, given: Tensor) -> str | None:
        """Why ``given`` cannot be written into a row, or None."""
        like = self.row(0)
        shape: tuple[Any, ...] = tuple(like.shape)
        fits = tuple(given.shape) == shape
        if self.form == "ring":
            shape = (*shape[:2], f"up to {shape[2]}", shape[3])
            fits = given.dim() == 4 and given.shape[2] <= like.shape[2]
            fits = fits and (*given.shape[:2], given.shape[3]) == (*like.shape[:2], like.shape[3])
        if not fits or given.dtype != like.dtype:
            return f"{self.name}: expected {shape} {like.dtype}, got {tuple(given.shape)} {given.dtype}"
        if given.is_floating_point():
            all_finite = bool(given.isfinite().all())
            return None if all_finite else f"{self.name}: not all of it is finite"
        return self._number_problem(given)

    def holds(self, tokens: Tensor, offset: Tensor) -> bool:
        """Whether ``tokens [Q, C]`` has a token in each slot that a stream at the frame ``offset []`` has written, and
        in no other. What stands for no token at a stream's beginning is never written, and the codec cannot decode it.
        """
        held = _held_tokens(offset[None].to(self.value.device), self.owner, self.module)[0].cpu()
        written = (tokens >= 0) & (tokens < _largest_tokens(self.module).to(tokens))
        return torch.equal(written, held) and bool((tokens[~held] == _ungenerated(self.module)).all())

    def _number_problem(self, given: Tensor) -> str | None:
        """Why whole numbers or truth values are none that a stream has, whatever else the stream holds, or None."""
        if given.dtype == torch.bool:
            known = bool((given.view(torch.uint8) <= 1).all())
            return None if known else f"{self.name}: it holds bytes that are neither true nor false"
        if self.form == "tokens":
            wrong = (given < _ungenerated(self.module)) | (given > _largest_tokens(self.module).to(given))
            allowed = f"a token of this model, or {_ungenerated(self.module)} where there is none"
        else:
            wrong = (given < 0) | (given > LARGEST_COUNT)
            allowed = f"0 to {LARGEST_COUNT}"
        return f"{self.name} holds {int(given[wrong][0])}: allowed is {allowed}" if bool(wrong.any()) else None

    def row_write(self, row: int, given: Tensor) -> None:
        """Write ``given``, as ``row_snapshot`` returned it, into one row, in place; the rest of a ring is cleared."""
        target = self.row(row)
        if self.form == "ring":
            target.zero_()
            target = target[:, :, : given.shape[2]]
        target.copy_(given)

    def row_clear(self, row: int) -> None:
        """Erase what a reset leaves of a row's former stream: masked, it would still be multiplied by zero."""
        if self.form == "ring":
            self.row(row).zero_()
        elif self.form == "tokens":
            self.row(row).fill_(_ungenerated(self.module))

    def _ended(self, value: Tensor) -> Tensor:
        if self.form == "ring":
            # [N] and [B or 1, 1] -> [B or 1, N] -> [B or 1, 1, N, 1], for [2, B, H, N, Dh]
            used = torch.arange(value.shape[3], device=value.device) < self.owner.end_offset[:, None]
            return torch.where(used[:, None, :, None], value, 0)
        if self.form == "tokens":
            held = _held_tokens(self.owner.offsets, self.owner, self.module)
            return torch.where(held, value, _ungenerated(self.module))
        return value


def stream_values(root: LMGen | LMModel | MimiModel) -> list[StreamValue]:
    """Everything that a streaming ``root`` carries from step to step.

    Raises HostError where it is not streaming, or keeps something that this version does not know.
    """
    if root._streaming_state is None:
        raise HostError(
            f"This {type(root).__name__} is not streaming. Enter `with module.streaming(batch_size):` first."
        )
    values: list[StreamValue] = []
    for path, module in root.named_modules():
        # The depth transformer streams inside a step only: between steps it has no state, and there is nothing to keep.
        if isinstance(module, StreamingModule) and module._streaming_state is not None:
            values.extend(_values_of(f"{path}/" if path else "", module._streaming_state, module))
    return values


def _values_of(prefix: str, state: State, module: nn.Module) -> Iterator[StreamValue]:
    for key, value in vars(state).items():
        if key in _NOT_CARRIED:
            continue
        if isinstance(value, Tensor | int):
            form: Form = "tokens" if key == "cache" and isinstance(state, GeneratorState) else "plain"
            yield StreamValue(prefix + key, state, key, module, form)
        elif isinstance(value, RingKVCache):
            yield StreamValue(f"{prefix}{key}.cache", value, "cache", module, "ring")
            yield StreamValue(f"{prefix}{key}.end_offset", value, "end_offset", module)
        elif isinstance(value, dict):
            for name in value:
                yield StreamValue(f"{prefix}{key}.{name}", value, name, module)
        elif value is None:
            # None for good in a self-attention; in a cross-attention, only until the first step.
            if key in _FILLED_LATER and isinstance(state, AttentionState) and module.cross_attention:
                yield StreamValue(prefix + key, state, key, module)
        else:
            raise HostError(
                f"{prefix}{key} holds a {type(value).__name__}, which this version cannot save. "
                "Use the version of Moshi that pyproject.toml asks for."
            )


def _largest_tokens(module: nn.Module) -> Tensor:
    """``[Q, 1]``: the largest token of each row of the language model that has an embedding."""
    model = cast(LMGen, module).lm_model
    return torch.tensor([[model.text_card], *[[model.card]] * model.n_q])


def _ungenerated(module: nn.Module) -> int:
    return cast(LMGen, module).lm_model.ungenerated_token_id


def _held_tokens(offsets: Tensor, state: GeneratorState, module: nn.Module) -> Tensor:
    """``[B, Q, C]`` bool: the slots of the token cache that streams at the frames ``offsets [B]`` have written.

    A frame writes the tokens of the user's rows at the frame's number plus the row's delay, and those of the model's
    own rows at the number of the next frame.
    """
    generator = cast(LMGen, module)
    own = generator.lm_model.dep_q + 1
    size = state.cache.shape[2]
    first = generator.delays_cuda.clone()  # [Q]
    first[:own] = 1
    last = offsets[:, None] + first - 1  # [B, 1] + [Q] -> [B, Q]
    slot = torch.arange(size, device=last.device)
    latest = last[..., None] - (last[..., None] - slot) % size  # [B, Q, C]: the last position that went to each slot
    return latest >= first[:, None]  # [Q, 1] over [B, Q, C]
