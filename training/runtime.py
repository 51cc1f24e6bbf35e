"""The processes of a run: one, or several under a launcher, on CUDA with NCCL or on the CPU with gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.system.allocator import keep_freed_memory
from moshi_ttt.system.platforms import check_training
from moshi_ttt.training.ranks import Place, find_place

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Runtime:
    """This process among the others.

    Attributes:
        rank, world_size: which of how many.
        device: what this process computes on.
        mesh: the ranks over which the model is sharded; of two dimensions where copies of it are replicated.
        saving: a gloo group of its own for checkpoints that are written while training goes on.
        control: another, for what ranks agree on in the middle of a step, without waiting for a device.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    saving: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, logs and writes what there is one of."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added up over the ranks, in float64 on the CPU; one small collective."""
        total = values.double().to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def most(self, values: Tensor) -> Tensor:
        """The largest of each of ``values`` over the ranks, in float64 on the CPU; without a device synchronization."""
        largest = values.double()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return largest

    def agree(self, value: ValueT) -> ValueT:
        """Rank 0's ``value`` on every rank: something small that can be sent."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Wait until every rank has called this."""
        dist.barrier()


def device_kind(device: str | None) -> str:
    """``cpu`` or ``cuda``: what was asked for, or CUDA where there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def start(device: str | None, shard_size: int | None) -> Iterator[Runtime]:
    """Join the process group, if there are other ranks, and leave it at the end. An existing group is kept.

    On a CPU the process keeps the memory that it frees (``system.allocator``).

    Args:
        device: ``cpu`` or ``cuda``; CUDA where there is one when None.
        shard_size: ranks that share a copy of the model; all when None.

    Raises:
        ConfigError: no such device, the number of ranks is no multiple of ``shard_size``, or the launcher's variables
            are incomplete (``ranks.find_place``).
    """
    kind = device_kind(device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, and this machine has no CUDA device. Set device: cpu, or leave it out.")
    check_training(kind)
    if kind == "cpu":
        keep_freed_memory()
    joined = dist.is_initialized()
    place = _joined(kind) if joined else find_place(os.environ)
    rank, world = place.rank, place.world_size
    if shard_size is not None and world % shard_size:
        raise ConfigError(f"shard_size is {shard_size}, and {world} ranks are no multiple of it.")
    here = torch.device("cpu")
    if kind == "cuda":
        here = torch.device("cuda", place.device_index(torch.cuda.device_count()))
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    try:
        with _without_greetings() if world == 1 else nullcontext():
            if not joined:
                meeting: dict[str, Any] = {"store": HashStore()} if world == 1 else {"init_method": "env://"}
                dist.init_process_group(backend, rank=rank, world_size=world, **meeting)
            shards = shard_size or world
            if shards == world:
                mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
            else:
                mesh = init_device_mesh(kind, (world // shards, shards), mesh_dim_names=("replicate", "shard"))
            saving, control = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        yield Runtime(rank, world, here, mesh, saving, control)
    finally:
        if not joined and dist.is_initialized():
            dist.destroy_process_group()


def _joined(kind: str) -> Place:
    """The place of a process whose group was there before: who made it has chosen the device, or says LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK") or (torch.cuda.current_device() if kind == "cuda" else 0)
    return Place(dist.get_rank(), dist.get_world_size(), int(local), "LOCAL_RANK")


@contextmanager
def _without_greetings() -> Iterator[None]:
    """Gloo writes to standard output how many peers it found: a single process does not need it."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
