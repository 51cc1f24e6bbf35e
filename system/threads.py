"""The number of CPU threads of a command: one for a small model, so that other work is not blocked.

The threads of an OpenMP program wait for each other after every operation. On small tensors they wait more than they
compute, and where another program holds a core they wait for that program too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMALL = 50_000_000
"""A model with fewer parameters computes on one thread. The tiny Moshi has 6 million, the published codec Mimi 79."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how OpenMP's threads wait, of every runtime that torch comes with."""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with which a user, or torchrun, chooses the number of threads; torch reads them when it is imported."""
RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""Variables in which torchrun and mpirun say how many ranks share a node. srun binds each to cores of its own."""
QUOTAS = (("/sys/fs/cgroup/cpu.max",), ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
"""Where Linux says which share of the cores a container may use: version 2 in one file, version 1 in two."""


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Choose how threads wait, for libraries that are imported later. What the user has chosen is kept.

    Threads of torch sleep while they wait instead of spinning, and NumPy starts no threads of its own.
    """
    if not any(environment.get(name) for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if not environment.get("OPENBLAS_NUM_THREADS"):
        environment["OPENBLAS_NUM_THREADS"] = "1"


def available_cores() -> int:
    """The processor cores that this process may use: those it is bound to, and no more than its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in QUOTAS:
        try:
            quota, period = " ".join(Path(file).read_text(encoding="ascii") for file in files).split()
            if int(quota) > 0:
                cores = min(cores, max(1, int(quota) // int(period)))
        except (OSError, ValueError):
            continue  # no such file, or no limit ("max")
    return cores


def choose(
    parameters: int, *, wanted: int | None, most: int, environment: Mapping[str, str], workers: int = 0
) -> int:  # fmt: skip
    """The number of threads for a model of so many parameters.

    Args:
        parameters: of the largest model that computes.
        wanted: what the user asked for, which is what they get; None leaves the choice to this function.
        most: the threads that torch has now.
        environment: where the user, or torchrun, may have chosen (``COUNTS``): then ``most`` is that choice.
        workers: data workers of this process, which need a core each.
    """
    if wanted is not None:
        return wanted
    if any(environment.get(name) for name in COUNTS):
        return most
    if parameters < SMALL:
        return 1
    ranks = next((int(environment[name]) for name in RANKS if environment.get(name)), 1)
    return max(1, min(most, available_cores() // ranks - workers))


@contextmanager
def computing(parameters: int, wanted: int | None = None, *, workers: int = 0) -> Iterator[int]:
    """Compute with the threads that ``choose`` gives, and afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    chosen = choose(parameters, wanted=wanted, most=before, environment=os.environ, workers=workers)
    if chosen == before:
        yield chosen
        return
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)


def largest(*models: Any) -> int:
    """The parameters of the largest of some modules, which may be on the meta device."""
    return max(sum(int(parameter.numel()) for parameter in model.parameters()) for model in models)


def of_job(wanted: int | None, at_once: int, environment: Mapping[str, str]) -> int:
    """The threads of one of ``at_once`` processes: ``wanted``, or the environment's up to an equal share of the cores.

    One where nothing is chosen.
    """
    if wanted is not None:
        return wanted
    chosen = environment.get("OMP_NUM_THREADS", "")
    return max(1, min(int(chosen), available_cores() // at_once)) if chosen.isdigit() else 1
