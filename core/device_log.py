"""Count what a computation does on an accelerator, without one: launches, bytes, synchronization with the CPU.

Tensors of the ``meta`` device stand for the accelerator's: they have shapes and no values, so whatever reads a value
fails or is seen here, and a tensor that lies on the CPU is seen as such.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WITHOUT_KERNEL = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.lift_fresh.default,
}  # fmt: skip
"""Operations that make a tensor, or another view of one, and run nothing."""
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
"""Operations whose result, or its shape, is known on the CPU only when the accelerator is done."""
LAUNCHES = "launches_"
"""How the namespace of operations begins that each launch one kernel of a plugin's own."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class DeviceLog(TorchDispatchMode):
    """Records operations inside ``with``.

    Args:
        device: the type of device whose tensors are counted. ``meta`` stands for an accelerator; ``cpu`` counts what
            runs for real, and has no problems.

    Attributes:
        launches: how often each operation ran that runs a kernel on a device: all but views and empty tensors. Of a
            plugin's own operations those are counted whose namespace begins with ``LAUNCHES``.
        problems: what would wait for the device, or copies a tensor from the CPU, a sentence each.
        bytes, peak: of what operations have made and is still alive, now and at most.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.launches: Counter[str] = Counter()
        self.problems: list[str] = []
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [*_tensors(args), *_tensors((kwargs or {}).values())]
        makes = not _is_view(func) and func not in WITHOUT_KERNEL
        if makes and (func.namespace in ("aten", "prims") or func.namespace.startswith(LAUNCHES)):
            self._look(func, given)
            self.launches[str(func)] += 1
        # A view, or an argument that was written to, may be of a tensor that was there before.
        there = {leaf.untyped_storage()._cdata for leaf in given if self._has_storage(leaf)}
        for leaf in _tensors((out,)):
            if self._has_storage(leaf):
                if leaf.untyped_storage()._cdata not in there:
                    self._count(leaf.untyped_storage())
            elif makes and leaf.device.type != self.device and leaf.dim() > 0:
                self.problems.append(f"{func} makes a tensor of shape {tuple(leaf.shape)} on the CPU.")
        return out

    def _has_storage(self, tensor: Tensor) -> bool:
        """Whether it is of the device, and more than a name for its parts, as a sharded one is."""
        return tensor.device.type == self.device and not isinstance(tensor, DTensor)

    def _look(self, func: Any, given: list[Tensor]) -> None:
        if func in WAITING:
            self.problems.append(f"{func} waits for the device.")
        if func in INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:]):
            self.problems.append(f"{func} with a mask waits for the device: it must count what is true.")
        for tensor in given:
            if tensor.device.type != self.device and tensor.dim() > 0:
                self.problems.append(f"{func} takes a tensor of shape {tuple(tensor.shape)} on the CPU.")

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.bytes -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation, also of those in a list."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operation gives other views of its arguments: their memory, not written to."""
    aliases = [value.alias_info for value in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
