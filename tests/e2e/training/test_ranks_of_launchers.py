"""What the variables of torchrun, mpirun and srun, whole or in part, make of a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.training import runtime as module
from moshi_ttt.training.ranks import ADDRESS, OTHERS, Place, find_place

from .conftest import records, values

MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
ALL = {*ADDRESS, *TORCHRUN, "SLURM_STEP_NUM_TASKS", *(n for each in OTHERS for n in (each.rank, each.size, each.local))}

PLACES = {
    "nothing": ({}, Place()),
    "an address alone": (MEET, Place()),
    "torchrun": ({**TORCHRUN, **MEET}, Place(3, 4, 1, "LOCAL_RANK", "torchrun")),
    "torchrun of one": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place(0, 1, 0, "LOCAL_RANK", "torchrun")),
    "torchrun, no local rank": ({"RANK": "3", "WORLD_SIZE": "4", **MEET}, Place(3, 4, None, "", "torchrun")),
    "one by hand": ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 0, "", "torchrun")),
    "a local rank alone": ({"LOCAL_RANK": "2"}, Place(0, 1, 2, "LOCAL_RANK")),
    "empty is not set": ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "SLURM_PROCID": ""}, Place()),
    "torchrun in srun": ({**SRUN, **TORCHRUN, **MEET}, Place(3, 4, 1, "LOCAL_RANK", "torchrun")),
    "ranks of srun by hand": (
        {**SRUN, "RANK": "5", "WORLD_SIZE": "8", **MEET},
        Place(5, 8, 1, "SLURM_LOCALID", "torchrun"),
    ),
    "ranks by hand that are not srun's": (
        {**SRUN, "RANK": "1", "WORLD_SIZE": "2", **MEET},
        Place(1, 2, None, "", "torchrun"),
    ),
    "srun": ({**SRUN, **MEET}, Place(5, 8, 1, "SLURM_LOCALID", "srun")),
    "srun with another local rank": ({**SRUN, "LOCAL_RANK": "0", **MEET}, Place(5, 8, 0, "LOCAL_RANK", "srun")),
    "srun of part of a job": (
        {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", **MEET},
        Place(1, 2, 1, "SLURM_LOCALID", "srun"),
    ),
    "srun of one": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
        Place(0, 1, 0, "SLURM_LOCALID", "srun"),
    ),
    "a batch script without tasks": ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}, Place()),
    "a shell in a job": ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, Place()),
    "Open MPI": ({**MPI, **MEET}, Place(2, 4, 0, "OMPI_COMM_WORLD_LOCAL_RANK", "mpirun")),
    "Open MPI in a Slurm job": ({**SRUN, **MPI, **MEET}, Place(2, 4, 0, "OMPI_COMM_WORLD_LOCAL_RANK", "mpirun")),
    "MPICH": ({**PMI, **MEET}, Place(1, 2, 1, "MPI_LOCALRANKID", "mpirun")),
    "MPICH without a local rank": ({"PMI_RANK": "1", "PMI_SIZE": "2", **MEET}, Place(1, 2, None, "", "mpirun")),
    "srun with PMI": ({**PMI, **SRUN, **MEET}, Place(5, 8, 1, "SLURM_LOCALID", "srun")),
}

REFUSED = {
    "a rank and no size": ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE is not set.*unset RANK"),
    "a size and no rank": ({"WORLD_SIZE": "2", **MEET}, "WORLD_SIZE is 2, and RANK is not set"),
    "a rank beside srun's": ({**SRUN, "RANK": "5", **MEET}, "RANK is 5, and WORLD_SIZE is not set.*SLURM_NTASKS"),
    "no address": (TORCHRUN, "rank 3 of 4 that torchrun started, and MASTER_ADDR and MASTER_PORT are not set"),
    "no port": ({**TORCHRUN, "MASTER_ADDR": "node0"}, "and MASTER_PORT is not set"),
    "srun, no address": (SRUN, r"rank 5 of 8 that srun started.*export MASTER_ADDR=\$\(scontrol show hostnames"),
    "a batch script with tasks": ({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun --ntasks 1, or RANK=0"),
    "srun, no size": ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, "SLURM_PROCID is 1, and SLURM_NTASKS is not set"),
    "Open MPI, no address": (MPI, "rank 2 of 4 that mpirun started.*mpirun -x MASTER_ADDR"),
    "Open MPI, no size": ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is not set"),
    "MPICH, no size": ({"PMI_RANK": "0"}, "PMI_SIZE is not set"),
    "no number": ({**TORCHRUN, "RANK": "one", **MEET}, "RANK is 'one'.*whole number"),
    "negative": ({**TORCHRUN, "LOCAL_RANK": "-1", **MEET}, "LOCAL_RANK is '-1'"),
    "rank out of range": ({"RANK": "4", "WORLD_SIZE": "4", **MEET}, "RANK is 4 and WORLD_SIZE is 4"),
    "no ranks": ({"RANK": "0", "WORLD_SIZE": "0", **MEET}, "RANK is 0 and WORLD_SIZE is 0"),
}


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    environment, place = PLACES[name]
    assert find_place({"PATH": "/bin", **environment}) == place


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_incomplete_is_refused_in_words(name):
    environment, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        find_place(environment)


@pytest.mark.parametrize(
    ("place", "visible", "index"),
    [
        (Place(), 4, 0),
        (Place(3, 4, 1, "LOCAL_RANK", "torchrun"), 2, 1),
        (Place(5, 8, 1, "SLURM_LOCALID", "srun"), 4, 1),
        (Place(5, 8, 1, "SLURM_LOCALID", "srun"), 1, 0),  # srun --gpus-per-task 1: each sees its own as number 0
        (Place(2, 4, 3, "OMPI_COMM_WORLD_LOCAL_RANK", "mpirun"), 1, 0),
        (Place(3, 4, None, "", "torchrun"), 4, "nothing says which.*Set LOCAL_RANK"),
        (Place(3, 4, 1, "LOCAL_RANK", "torchrun"), 1, r"LOCAL_RANK says.*number 1.*sees 1 CUDA device"),
        (Place(5, 8, 3, "SLURM_LOCALID", "srun"), 2, "SLURM_LOCALID says.*sees 2 CUDA"),
    ],
)
def test_the_device_follows_the_local_rank(place, visible, index):
    if isinstance(index, int):
        assert place.device_index(visible) == index
        return
    with pytest.raises(ConfigError, match=index):
        place.device_index(visible)


@pytest.mark.parametrize(("local", "expected"), [({"SLURM_LOCALID": "1"}, 1), ({"LOCAL_RANK": "0"}, 0)])
def test_a_rank_of_srun_takes_its_own_device(monkeypatch, local, expected):
    chosen = []
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SRUN, **MEET, **local}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(module, "check_training", lambda kind: None)

    def join(backend, **options):
        assert (options["rank"], options["world_size"]) == (5, 8)
        raise InterruptedError  # no other rank is there

    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(InterruptedError), module.start("cuda", None):
        pass
    assert chosen == [torch.device("cuda", expected)]


def launched(config: Path, environments: list[dict[str, str]]) -> list[subprocess.CompletedProcess[str]]:
    """``moshi-ttt train`` once in each environment, all at once."""
    clean = {name: value for name, value in os.environ.items() if name not in ALL}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "moshi_ttt", "train", str(config)],
            env={**clean, "OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for environment in environments
    ]  # fmt: skip
    ended = []
    for process in started:
        out, error = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, error))
    return ended


@pytest.mark.exhaustive  # where ranks come from is tested above; two ranks that train, in test_ranks.py
def test_a_run_under_srun(encoded, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**values(encoded, tmp_path / "run"), "max_steps": 2, "batch_size": 1}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_NTASKS": "2"} for n in range(2)]
    (refused,) = launched(config, tasks[:1])
    assert refused.returncode == 2
    assert "MASTER_ADDR and MASTER_PORT are not set" in " ".join(refused.stderr.split())
    assert not (tmp_path / "run").exists()
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ended = launched(config, [{**task, **meet} for task in tasks])
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr[-3000:] + ended[1].stderr[-3000:]
    assert "2 rank(s) on cpu" in ended[0].stdout
    assert len(records(tmp_path / "run")) == 2
