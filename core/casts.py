"""A block's parameters in another dtype, cast once for a stream instead of at every step.

A block's parameters are kept in the master dtype and multiplied in the dtype of the products. One step casts them all
for one token, so a stream keeps the copies. They belong to the stream and end with it: a block has none of its own, and
outside a stream ``BlockContext.cast`` is a cast.

A copy must never be older than its parameter. Version counters do not see every write: ``parameter.data`` has a counter
of its own, and a fused optimizer advances none. So on a CPU a copy keeps a lazy clone of the parameter, which shares
its memory until somebody writes there: torch then gives the parameter other memory, and its address says so without a
value being read. A parameter that shares its memory with another tensor (an array of numpy's, a buffer of many
parameters) could be written through a pointer that torch never sees again: it is cast at every step.

On other devices a captured graph keeps addresses and runs no Python, so nothing could see a change there. A parameter
is cast at every step, in the graph too, unless the caller of the stream declares the parameters frozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moshi_ttt.core.errors import PrecisionError
from moshi_ttt.core.state import outlives_modes

_CAN_WATCH = hasattr(torch, "_lazy_clone") and all(
    hasattr(torch._C, name) for name in ("_data_address", "_storage_Use_Count")
)
_ALONE = 2
"""References to a storage that one tensor has: the tensor's, and that of the Python object which is asked."""


@dataclass
class _Copy:
    """``cast`` holds the values of ``source`` as they were when it lay at ``address`` in ``layout``.

    Attributes:
        twin: the lazy clone; it keeps the address from being given to other memory. None where ``source`` cannot be
            watched: only a frozen one has a copy then.
        version: of ``source``, for where there is no twin.
    """

    source: Tensor
    cast: Tensor
    twin: Tensor | None
    address: int
    layout: tuple[Any, ...]
    version: int

    @property
    def is_current(self) -> bool:
        if _layout(self.source) != self.layout:
            return False
        unwritten = self.twin is not None or _version(self.source) == self.version
        return unwritten and _address(self.source) == self.address


class ParameterCasts:
    """The copies of one block for one stream. Not for several threads at once.

    A copy, a pickle or a deep copy of this object holds no copies: it makes its own.

    Args:
        block: whose parameters and buffers are copied; any other tensor is cast when asked for.
        frozen: the caller declares that no parameter changes until ``check_frozen``. Copies are then kept on every
            device and read by captured graphs.
    """

    def __init__(self, block: nn.Module, *, frozen: bool = False) -> None:
        self.block = block
        self.frozen = frozen
        self._copies: dict[tuple[int, torch.dtype], _Copy] = {}

    def get(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """``source.to(dtype)``, bit for bit, by a copy where one can be kept. Do not write to it.

        Where a gradient would be recorded it is a cast, and the gradient passes.

        Raises PrecisionError where ``source`` is frozen and was changed.
        """
        if source.dtype == dtype:
            return source
        recorded = source.requires_grad and torch.is_grad_enabled()
        if recorded or torch.compiler.is_compiling() or type(source) not in (Tensor, nn.Parameter):
            return source.to(dtype)
        copy = self._copies.get((id(source), dtype))
        if copy is not None and copy.is_current:
            return copy.cast
        if copy is not None and self.frozen:
            raise PrecisionError(self._changed(source))
        return self._cast(source, dtype, copy)

    @property
    def bytes(self) -> int:
        """Bytes that the copies occupy now."""
        return sum(copy.cast.numel() * copy.cast.element_size() for copy in self._copies.values())

    def check_frozen(self) -> None:
        """Raise PrecisionError where frozen parameters are not what was copied. Reads values; for a stream's end."""
        for (_, dtype), copy in self._copies.items() if self.frozen else ():
            same = copy.source.shape == copy.cast.shape and copy.source.device == copy.cast.device
            now = copy.source.detach().to(dtype) if same else None
            if now is None or not torch.equal(_bits(now), _bits(copy.cast)) or not self._owns(copy.source):
                raise PrecisionError(self._changed(copy.source))

    def clear(self) -> None:
        """Drop all copies."""
        self._copies.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}

    @torch.no_grad()
    def _cast(self, source: Tensor, dtype: torch.dtype, old: _Copy | None) -> Tensor:
        self._copies.pop((id(source), dtype), None)
        capturing = source.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or not self._owns(source) or not outlives_modes(source.detach()):
            return source.detach().to(dtype)
        # Where a parameter was replaced, its copies go.
        self._copies = {key: copy for key, copy in self._copies.items() if self._owns(copy.source)}
        with torch.inference_mode(False):
            twin = _twin(source)
            if twin is None and not self.frozen:
                return source.detach().to(dtype)
            # Into the buffer that is there, where it still fits: a step allocates nothing new.
            if old is not None and old.layout == _layout(source):
                cast = old.cast.copy_(source)
            else:
                cast = source.detach().to(dtype)
            copy = _Copy(source, cast, twin, _address(source), _layout(source), _version(source))
        self._copies[id(source), dtype] = copy
        return copy.cast

    def _owns(self, source: Tensor) -> bool:
        return any(source is own for own in (*self.block.parameters(), *self.block.buffers()))

    def _changed(self, source: Tensor) -> str:
        named = (*self.block.named_parameters(), *self.block.named_buffers())
        name = next((name for name, own in named if own is source), "one that was replaced")
        return (
            f"A parameter of a block ({name}) was changed in a stream whose parameters were declared frozen, and steps "
            "may have computed with the earlier values. End the stream before parameters change, or start it outside "
            "host.frozen(...)."
        )


def copy_bytes(sources: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes of the copies of ``sources`` in ``dtype``: nothing for what is in it."""
    return sum(source.numel() * dtype.itemsize for source in sources if source.dtype != dtype)


def _twin(source: Tensor) -> Tensor | None:
    """A lazy clone of ``source``; None where a write to ``source`` could go unseen."""
    if not _CAN_WATCH or source.device.type != "cpu" or not source.numel():
        return None
    storage = source.untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) != _ALONE:
        return None
    try:
        return torch._lazy_clone(source.detach())
    except RuntimeError:  # memory that torch did not allocate: a file's, another process's
        return None


def _address(tensor: Tensor) -> int:
    """Where the values lie. Unlike ``data_ptr``, this does not count as a write. 0 where there are none (meta)."""
    return 0 if tensor.is_meta or not hasattr(torch._C, "_data_address") else int(torch._C._data_address(tensor))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def _bits(tensor: Tensor) -> Tensor:
    """The same numbers as whole ones, so that a nan equals itself."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(whole[tensor.element_size()])
