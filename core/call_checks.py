"""Checks of every call of a block: it has the inputs that the block needs, and dtypes follow the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moshi_ttt.core import state as states
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.precision import check_products, check_role
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.volume import number_problem, require_volume

if TYPE_CHECKING:
    from moshi_ttt.core.block import BlockContext, SequenceBlock


def check_call(block: SequenceBlock, tokens: Tensor, state: BlockState | None, context: BlockContext) -> None:
    """Raise ContextError where a call lacks something the block needs, or its arguments do not match."""
    shape = tokens.shape
    if block.needs_input_embeddings:
        given = context.input_embeddings
        if given is None:
            raise ContextError(
                f"The block at {block.info.site} needs the input embeddings of the same tokens, and the context has "
                "none. Call it through its host, or pass BlockContext(input_embeddings=...)."
            )
        if given.shape != shape:
            raise ContextError(
                f"The block at {block.info.site} got tokens of shape {tuple(shape)} and input embeddings of shape "
                f"{tuple(given.shape)}. Give the embeddings of the same tokens."
            )
    if 0 in shape:
        raise ContextError(f"The block at {block.info.site} got no tokens: shape {tuple(shape)}.")
    if shape[-1] != block.info.dim:
        raise ContextError(f"The block at {block.info.site} is for width {block.info.dim}, got shape {tuple(shape)}.")
    if context.exec_mask is not None:
        _check_mask(block, "exec_mask", context.exec_mask, shape[0])
    if context.reset is not None:
        _check_mask(block, "reset", context.reset, shape[0])
    check_token_masks(block, tokens, context)
    if isinstance(context.updates, Tensor):
        _check_mask(block, "updates", context.updates, shape[0])
    check_volume(block, context.volume, tokens)
    check_prefix(block, context.prefix, shape[1])
    if context.prefix and block.causal:
        raise ContextError(
            f"The block at {block.info.site} is causal and got a prefix of {context.prefix} tokens: it has no "
            "reversed pass that could leave them in place. Leave prefix out, or set bidirectional: true where the "
            "host allows it."
        )
    if state is not None:
        if not block.causal:
            raise ContextError(
                f"The block at {block.info.site} is not causal: it has no state to continue from. Pass state=None."
            )
        if states.rows(state) != shape[0]:
            raise ContextError(
                f"The block at {block.info.site} got {shape[0]} rows and a state of {states.rows(state)}. "
                "Every stream needs a row of its own."
            )


def check_token_masks(block: SequenceBlock, tokens: Tensor, context: BlockContext) -> None:
    """Raise ContextError unless ``token_mask`` and ``starts`` have one bool for each of ``tokens [B, T, D]``."""
    rows, length = tokens.shape[:2]
    for name, mask in (("token_mask", context.token_mask), ("starts", context.starts)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (rows, length)):
            raise ContextError(
                f"The block at {block.info.site} got {rows} rows of {length} tokens and {name} of shape "
                f"{tuple(mask.shape)} and dtype {mask.dtype}. Give one bool per token, [B, T]."
            )
        if mask is not None and mask.device != tokens.device:
            raise ContextError(
                f"The block at {block.info.site} got tokens on {tokens.device} and {name} on {mask.device}. Put it "
                "where the tokens are."
            )
    if context.segments is not None and (not context.cuts or context.segments.shape != (rows, length)):
        raise ContextError(
            f"The block at {block.info.site} got {rows} rows of {length} tokens and segments of "
            f"{context.segments.shape}. Give Segments.read(token_mask, starts) of this call, beside these themselves."
        )


def check_dtypes(block: SequenceBlock, tokens: Tensor) -> None:
    """Raise PrecisionError where activations, parameters or products do not have the precision of their role.

    At every call: each may change between two of them, and the answer must not depend on what ran before.
    """
    roles = block.roles
    check_products(roles, tokens.device.type, f"call, {block.info.site}")
    if tokens.dtype is not roles.param:
        activations = [("the host's activations", tokens)]
        check_role("param", roles.param, activations, roles.policy, f"call, {block.info.site}")
    if not _all_have(roles.master, block):
        block.check_precision("call")


def check_state(block: SequenceBlock, state: BlockState) -> None:
    """Raise PrecisionError where a tensor of the state does not have the dtype of its role."""
    expected = block.roles.state
    for tensor in state.values():
        if tensor.dtype is not expected and tensor.is_floating_point():
            check_role("state", expected, state.items(), block.roles.policy, f"call, {block.info.site}")


def check_buffers(block: SequenceBlock, state: BlockState) -> None:
    """Raise ContextError where a buffer of a step is not contiguous: writes to a copy of it would be lost."""
    for name, tensor in state.items():
        if not tensor.is_contiguous():
            raise ContextError(
                f"The block at {block.info.site} was given a state to stream into whose {name!r} is not contiguous: "
                f"shape {tuple(tensor.shape)}, strides {tensor.stride()}. Take the state from allocate_state, or make "
                "buffers of this one by core.state.clone."
            )


def check_volume(block: SequenceBlock, volume: float | Tensor, tokens: Tensor) -> None:
    """Raise ContextError unless the block supports ``volume``: a number, or one per row of ``tokens [B, T, D]``."""
    if not isinstance(volume, Tensor):
        if problem := number_problem(volume):
            raise ContextError(f"The block at {block.info.site} got a volume that is none: {problem}")
        if volume == 1:
            return
    elif not volume.is_floating_point() or volume.dim() != 1 or len(volume) != len(tokens):
        raise ContextError(
            f"The block at {block.info.site} got {len(tokens)} rows and volume of shape {tuple(volume.shape)} and "
            f"dtype {volume.dtype}. Give one number per row, floating point."
        )
    elif volume.device != tokens.device:
        raise ContextError(
            f"The block at {block.info.site} got tokens on {tokens.device} and volume on {volume.device}. Put it where "
            "the tokens are."
        )
    require_volume({block.info.site: block})


def check_prefix(block: SequenceBlock, prefix: object, length: int) -> None:
    """Raise ContextError unless ``prefix`` is a number of tokens from 0 to ``length``."""
    if not isinstance(prefix, int) or isinstance(prefix, bool) or not 0 <= prefix <= length:
        raise ContextError(
            f"The block at {block.info.site} got {length} tokens and a prefix of {prefix!r}. Give a whole number of "
            f"tokens from 0 to {length}, the same for every row."
        )


def _check_mask(block: SequenceBlock, name: str, mask: Tensor, rows: int) -> None:
    if mask.dtype != torch.bool or mask.dim() != 1 or len(mask) != rows:
        raise ContextError(
            f"The block at {block.info.site} got {rows} rows and {name} of shape {tuple(mask.shape)} and dtype "
            f"{mask.dtype}. Give one bool per row."
        )


def _all_have(dtype: torch.dtype, module: nn.Module) -> bool:
    """Whether every floating-point parameter has the dtype; five times as fast as ``named_parameters``."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dtype is not dtype and parameter.is_floating_point():
            return False
    return all(_all_have(dtype, child) for child in module._modules.values() if child is not None)
