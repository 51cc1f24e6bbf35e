"""Rank and number of processes from the launcher's variables: torchrun, Open MPI, srun, or MPICH.

Each launcher describes its processes in environment variables of its own. Which device a rank computes on follows from
its number on its node, the local rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moshi_ttt.core.errors import ConfigError

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
"""Where the ranks find each other. torchrun sets both."""
STEP_TASKS = "SLURM_STEP_NUM_TASKS"
"""What srun alone sets; ``SLURM_NTASKS`` is of the whole job and stands in a batch script too."""


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher says the rank, the number of ranks and the local rank; all are set together."""

    name: str
    rank: str
    size: str
    local: str


GENERAL = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Also what a user sets by hand. It comes before the others, which may have started torchrun."""
SLURM = Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
OTHERS = (
    Launcher("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    SLURM,
    Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""Open MPI before Slurm and MPICH: inside a Slurm job, or under srun, a process has variables of both."""


@dataclass(frozen=True)
class Place:
    """One process among all.

    Attributes:
        rank, world_size: which of how many.
        local_rank: which of those on its node; None where nothing says so.
        source: the variable that says the local rank.
        launcher: the name of what started the processes; empty for a process that is alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    source: str = ""
    launcher: str = ""

    def device_index(self, visible: int) -> int:
        """Which of ``visible`` CUDA devices this rank computes on: that of its local rank.

        srun and mpirun can show each process one device alone; that is then the rank's, whatever its local rank.

        Raises ConfigError where nothing says the local rank, or there is no such device.
        """
        if self.local_rank is None:
            raise ConfigError(
                f"RANK and WORLD_SIZE say that this is rank {self.rank} of {self.world_size}, and nothing says which "
                "of the ranks on its node it is, so no CUDA device can be chosen. Set LOCAL_RANK for each process, "
                "from 0 on every node (under srun: LOCAL_RANK=$SLURM_LOCALID)."
            )
        if self.local_rank < visible:
            return self.local_rank
        if visible == 1 and self.source not in ("", GENERAL.local):
            return 0
        raise ConfigError(
            f"{self.source} says that this rank is number {self.local_rank} on its node, counted from 0, and it sees "
            f"{visible} CUDA device(s). Start no more ranks on a node than it has devices, and let each see all of "
            "them, or set LOCAL_RANK to the number of the device among those that the process sees."
        )


def find_place(environment: Mapping[str, str]) -> Place:
    """The place of this process by the variables of ``environment``; a single process where there are none.

    Variables that are empty count as not set. ``LOCAL_RANK`` is obeyed beside every launcher's own.

    Raises ConfigError: variables that belong together are missing, are no whole numbers, or contradict each other; or
    there are several ranks, and nothing says where they find each other.
    """
    env = {name: value for name, value in environment.items() if value}
    place = _general(env) if GENERAL.rank in env or GENERAL.size in env else _other(env)
    if GENERAL.local in env:
        place = replace(place, local_rank=_number(env, GENERAL.local), source=GENERAL.local)
    if place.world_size > 1 and (missing := [name for name in ADDRESS if name not in env]):
        raise ConfigError(_no_address(place, missing))
    return place


def _general(env: Mapping[str, str]) -> Place:
    """As RANK and WORLD_SIZE say. The local rank may come from a launcher that agrees with them."""
    if missing := [name for name in (GENERAL.rank, GENERAL.size) if name not in env]:
        given = GENERAL.rank if missing[0] == GENERAL.size else GENERAL.size
        raise ConfigError(
            f"{given} is {env[given]}, and {missing[0]} is not set, so it is not known how this process belongs to "
            f"others. Set both for each process (under srun: RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS), start with "
            f"torchrun, which does; or unset {given} to train with one process."
        )
    place = _of(GENERAL, env, GENERAL.size)
    for launcher in OTHERS:
        if place.local_rank is None and launcher.local in env and env.get(launcher.rank) == env[GENERAL.rank]:
            return replace(place, local_rank=_number(env, launcher.local), source=launcher.local)
    return replace(place, local_rank=0) if place.world_size == 1 and place.local_rank is None else place


def _other(env: Mapping[str, str]) -> Place:
    """As the first launcher says whose variables are there."""
    for launcher in OTHERS:
        if launcher.rank not in env:
            continue  # the job's variables alone: no process of a launcher
        size = STEP_TASKS if launcher is SLURM and STEP_TASKS in env else launcher.size
        if size not in env:
            if launcher is SLURM and _number(env, launcher.rank) == 0:
                continue  # a batch script of a job that was not asked for tasks
            raise ConfigError(
                f"{launcher.rank} is {env[launcher.rank]}, and {size} is not set, so it is not known how many "
                f"processes there are. {launcher.name} sets both: pass its environment on, or set RANK and WORLD_SIZE "
                "for each process."
            )
        place = _of(launcher, env, size)
        if place.world_size > 1:
            return place
        return replace(place, local_rank=0)
    return Place()


def _of(launcher: Launcher, env: Mapping[str, str], size: str) -> Place:
    rank, world = _number(env, launcher.rank), _number(env, size)
    if not rank < world:
        raise ConfigError(f"{launcher.rank} is {rank} and {size} is {world}: ranks are numbered from 0 to {size} - 1.")
    local = _number(env, launcher.local) if launcher.local in env else None
    return Place(rank, world, local, launcher.local if local is not None else "", launcher.name)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env[name].strip()
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name} is {env[name]!r}, and a launcher sets it to a whole number of 0 or more. Set it so.")
    return int(text)


def _no_address(place: Place, missing: list[str]) -> str:
    hints = {
        "srun": "In the job script, before srun: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | "
        "head -n 1) MASTER_PORT=29500. To train with one process: srun --ntasks 1, or RANK=0 WORLD_SIZE=1.",
        "mpirun": "Set them to the first node's name and a free port, and pass them on: mpirun -x MASTER_ADDR -x "
        "MASTER_PORT (Open MPI), or -genv (MPICH).",
    }
    hint = hints.get(place.launcher, "Set them to the first node's name and a free port, or start with torchrun.")
    return (
        f"This is rank {place.rank} of {place.world_size} that {place.launcher} started, and {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not set, so the ranks cannot find each other. {hint}"
    )
