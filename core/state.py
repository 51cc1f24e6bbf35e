"""State of one block: a flat mapping from names to tensors, each with one row per stream.

Everything a stream carries from call to call is here and nowhere else, and every tensor's first dimension is the
stream. So all that a host does with a state (reset a row, hold a row, copy, save) is done without knowing the block.

Shape legend: B streams (rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

BlockState = dict[str, Tensor]
"""Name -> tensor ``[B, ...]``. Floating-point entries have the policy's ``state`` dtype; counters are int64."""


def rows(state: Mapping[str, Tensor]) -> int:
    """Number of streams B. Raises ValueError for an empty state or rows that disagree."""
    sizes = {tensor.shape[0] for tensor in state.values()}
    if len(sizes) != 1:
        raise ValueError(f"A block state needs one common number of rows, got {sorted(sizes)}.")
    return sizes.pop()


def map_state(function: Callable[[Tensor], Tensor], state: Mapping[str, Tensor]) -> BlockState:
    """``function`` applied to every tensor."""
    return {name: function(tensor) for name, tensor in state.items()}


def detach(state: Mapping[str, Tensor]) -> BlockState:
    """The same values, cut from the graph."""
    return map_state(Tensor.detach, state)


def clone(state: Mapping[str, Tensor]) -> BlockState:
    """A copy with storage of its own, contiguous: what streaming writes into."""
    return map_state(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), state)


ALIGNMENT = 64
"""Bytes. PyTorch starts every buffer at a multiple of this on a CPU (of 512 on CUDA)."""


def contiguous(state: Mapping[str, Tensor]) -> BlockState:
    """The same values, each tensor contiguous and aligned; what is so already is the same tensor. Gradients flow on.

    A matrix product over other strides, or from an address that is no multiple of ``ALIGNMENT``, may round differently,
    and on some CPUs does. So a call computes on one layout, whether its state was expanded from the learned initial
    one, chosen row by row, streamed into buffers, or read from a file (safetensors gives addresses within it).
    """
    return map_state(lambda tensor: _aligned(_row_major(tensor)), state)


def _row_major(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    # A dimension of size 1 may have any stride and still be contiguous; a view gives it the usual one.
    return tensor.view(tensor.shape) if 1 in tensor.shape else tensor


def _aligned(tensor: Tensor) -> Tensor:
    # A traced tensor (torch.compile, FakeTensorMode) has no address. Reading one waits for no device.
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return tensor
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def without_views(state: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> BlockState:
    """The same values, with storage of its own where a tensor is a view of a parameter; gradients flow on.

    What was never updated may be such a view, and sharding frees a gathered parameter when the forward pass ends.
    """
    taken = {parameter.untyped_storage()._cdata for parameter in parameters}
    return map_state(lambda tensor: tensor.clone() if tensor.untyped_storage()._cdata in taken else tensor, state)


def row_mask(mask: Tensor, like: Tensor) -> Tensor:
    """``mask [B]`` viewed as ``[B, 1, ...]`` for broadcasting against ``like [B, ...]``."""
    return mask.view(-1, *(1 for _ in like.shape[1:]))


def where_rows(mask: Tensor, chosen: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> BlockState:
    """Row b of ``chosen`` where ``mask [B]`` is true, of ``other`` elsewhere. No value is read on the CPU."""
    return {name: torch.where(row_mask(mask, old), chosen[name], old) for name, old in other.items()}


def write_rows_(target: Mapping[str, Tensor], row: Mapping[str, Tensor], mask: Tensor) -> None:
    """Write the one row of ``row [1, ...]`` into the rows of ``target [B, ...]`` where ``mask [B]`` is true.

    Nothing is allocated, no value is read on the host, and other rows keep their bits. Raises ValueError as ``copy_``.
    """
    _check_fits(target, row, rows=1)
    for name, tensor in target.items():
        torch.where(row_mask(mask, tensor), row[name], tensor, out=tensor)


def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Write ``source`` into the storage of ``target``; addresses stay, so a captured graph stays valid.

    Raises ValueError when names, shapes or dtypes differ: nothing is written then.
    """
    _check_fits(target, source)
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _check_fits(target: Mapping[str, Tensor], source: Mapping[str, Tensor], rows: int | None = None) -> None:
    """Raise ValueError unless ``source`` has the names, shapes (with ``rows`` rows) and dtypes of ``target``."""
    if target.keys() != source.keys():
        raise ValueError(f"State names differ: {sorted(target.keys() ^ source.keys())} are on one side only.")
    for name, tensor in target.items():
        given, shape = source[name], (rows or tensor.shape[0], *tensor.shape[1:])
        if given.shape != shape or given.dtype != tensor.dtype:
            raise ValueError(
                f"State tensor {name!r}: expected {shape} {tensor.dtype}, got {tuple(given.shape)} {given.dtype}."
            )


def num_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that the state occupies when every row has storage of its own."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def outlives_modes(like: Tensor) -> bool:
    """Whether constants that are made for ``like`` now can be kept for later calls.

    Not those made on fake tensors (FakeTensorMode, also around a tensor with values), under another tensor subclass, or
    inside a transform of ``torch.func``: each is a tensor of that mode or level, and computes nothing after it.
    """
    if torch.compiler.is_dynamo_compiling():  # what it traces leaves real tensors behind
        return True
    made = (like, like.new_empty(0), torch.empty(0, device=like.device))
    return all(type(tensor) is Tensor and not _is_wrapped(tensor) for tensor in made)


def _is_wrapped(tensor: Tensor) -> bool:
    # Such a tensor says that its type is Tensor.
    return torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
