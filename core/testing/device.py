"""What a computation asks of an accelerator, without one: launches, bytes, and what would make it wait for the CPU.

Tensors of the ``meta`` device stand for the accelerator's: they have shapes and no values, so whatever reads a value
fails or is seen here, and a tensor that lies on the CPU is seen as such.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.testing.case import BlockCase

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
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class DeviceLog(TorchDispatchMode):
    """Records operations on tensors of the meta device, inside ``with``.

    Attributes:
        launches: how often each operation ran that runs a kernel on a device: all but views and empty tensors.
        problems: what would wait for the device, or copies a tensor from the CPU, a sentence each.
        bytes, peak: of what operations have made and is still alive, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        self.problems: list[str] = []
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("aten", "prims") and not _is_view(func) and func not in WITHOUT_KERNEL:
            self._look(func, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
            self.launches[str(func)] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf.untyped_storage())
            elif isinstance(leaf, Tensor) and leaf.dim() > 0 and func not in WITHOUT_KERNEL:
                self.problems.append(f"{func} makes a tensor of shape {tuple(leaf.shape)} on the CPU.")
        return out

    def _look(self, func: Any, given: list[Tensor]) -> None:
        if func in WAITING:
            self.problems.append(f"{func} waits for the device.")
        if func in INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:]):
            self.problems.append(f"{func} with a mask waits for the device: it must count what is true.")
        for tensor in given:
            if not tensor.is_meta and tensor.dim() > 0:
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


def _is_view(func: Any) -> bool:
    """Whether an operation gives other views of its arguments: their memory, not written to."""
    aliases = [value.alias_info for value in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


@dataclass(frozen=True)
class DeviceCost:
    """What a block costs on an accelerator.

    Attributes:
        forward, backward, step: launches of a training call, of its backward pass, and of a streamed token.
        kept_bytes: alive after a training call that were not before: its output, and what the backward pass needs.
        peak_bytes: the most that is alive in the call and its backward pass, gradients of parameters among them.
    """

    forward: int
    backward: int
    step: int
    kept_bytes: int
    peak_bytes: int


def device_cost(block: SequenceBlock, *, batch: int, tokens: int, carried: bool = False) -> DeviceCost:
    """The cost of a block that is on the meta device, for ``batch`` streams of so many tokens.

    ``carried``: the call continues a state, and gives the state after it, which is cut from the graph.
    """
    x = torch.empty(batch, tokens, block.info.dim, dtype=block.roles.param, device="meta", requires_grad=True)
    context = BlockContext(input_embeddings=x.detach(), want_state=carried, detach_state=carried)
    state = block.allocate_state(batch) if carried else None
    with DeviceLog() as log:
        y, after = block(x, state, context)
        after = {name: tensor.detach() for name, tensor in after.items()}
        forward, kept = log.num_launches, log.bytes
        y.sum().backward()
        backward = log.num_launches - forward
    step = 0
    if block.causal:
        buffers, token = block.allocate_state(batch), x.detach()[:, :1]
        with torch.no_grad(), DeviceLog() as streamed:
            block.step(token, buffers, BlockContext(input_embeddings=token))
        step = streamed.num_launches
    return DeviceCost(forward, backward, step, kept, log.peak)


def check_device(case: BlockCase) -> None:
    """Nothing waits for an accelerator, and no tensor lies on the CPU: in calls, backward passes, steps, resets.

    Tensors without a dimension may lie on the CPU: they are arguments of a launch.
    """
    block, rows = case.block(device="meta"), case.shape.batch
    x = torch.empty(rows, 2 * case.chunk + 1, case.shape.dim, dtype=case.dtype, device="meta", requires_grad=True)
    mask = torch.empty(rows, dtype=torch.bool, device="meta")
    runs: dict[str, Callable[[], object]] = {
        "a training call and its backward pass": lambda: case.call(block, x, want_state=False)[0].sum().backward(),
        "a call that gives its state, row by row": lambda: case.call(block, x, updates=mask)[0].sum().backward(),
        "statistics": lambda: block.statistics(x.detach(), case.context(x.detach())),
        "inner losses": lambda: block.inner_losses(x.detach(), case.context(x.detach())),
    }
    if case.causal:
        buffers = block.allocate_state(rows)
        token = x.detach()[:, :1]
        runs |= {
            "a call that continues a state": lambda: case.call(block, x, buffers, reset=mask, exec_mask=mask),
            "a step": lambda: case.step(block, token, buffers),
            "a step with masks": lambda: case.step(block, token, buffers, exec_mask=mask, updates=mask),
            "a step with a reset": lambda: case.step(block, token, buffers, reset=mask),
            "several tokens streamed": lambda: case.step(block, x.detach(), buffers),
            "a reset": lambda: block.reset_state(buffers, mask),
            "forgetting": lambda: block.forget(buffers),
            "skipped updates": lambda: block.skipped_updates(buffers),
        }
    for name, run in runs.items():
        with DeviceLog() as log:
            try:
                run()
            except (RuntimeError, NotImplementedError) as error:  # what reads a value of a meta tensor
                raise AssertionError(f"{name}: a value is read: {error}") from error
        assert not log.problems, f"{name}: {' '.join(dict.fromkeys(log.problems))}"
