"""Threads: one for a small model, the user's choice always, no more than the cores there are for the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from moshi_ttt.apps.quickstart.setup import Request
from moshi_ttt.data.dataset import loader
from moshi_ttt.hosts.moshi.loading import load_skeleton
from moshi_ttt.system import threads
from study.jobs import Job, run_jobs

LARGE, TINY = threads.SMALL, threads.SMALL - 1
ALL = (*threads.WAITING, *threads.COUNTS, "OPENBLAS_NUM_THREADS")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    for name in (*ALL, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("parameters", "options", "chosen"),
    [
        (TINY, {}, 1),
        (LARGE, {}, 8),
        (TINY, {"wanted": 3}, 3),
        (LARGE, {"wanted": 1}, 1),
        (LARGE, {"wanted": 20}, 20),  # what is asked for is done
        (LARGE, {"most": 4}, 4),  # torch was told already
        (LARGE, {"most": 64}, 8),  # torch sees a whole machine, a container has a share of it
        (LARGE, {"workers": 3}, 5),
        (LARGE, {"workers": 30}, 1),
        (LARGE, {"environment": {"LOCAL_WORLD_SIZE": "4"}}, 2),
        (LARGE, {"environment": {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "LOCAL_WORLD_SIZE": ""}}, 2),
        (LARGE, {"environment": {"LOCAL_WORLD_SIZE": "4"}, "workers": 1}, 1),
        (LARGE, {"environment": {"LOCAL_WORLD_SIZE": "100"}}, 1),
        (TINY, {"environment": {"OMP_NUM_THREADS": "2"}, "most": 2}, 2),
        (TINY, {"environment": {"MKL_NUM_THREADS": "2"}, "most": 2}, 2),
        (LARGE, {"environment": {"OMP_NUM_THREADS": "2"}, "most": 2, "workers": 5}, 2),
        (TINY, {"environment": {"OMP_NUM_THREADS": "2"}, "most": 2, "wanted": 4}, 4),
        (TINY, {"environment": {"OMP_NUM_THREADS": ""}}, 1),
    ],
)
def test_threads_follow_the_size_and_the_user(parameters, options, chosen):
    assert threads.choose(parameters, **{"wanted": None, "most": 8, "environment": {}, **options}) == chosen


def test_the_tiny_model_is_a_small_one():
    tiny = load_skeleton("builtin:tiny")
    assert threads.largest(tiny) < threads.SMALL
    assert threads.largest(tiny, torch.nn.Linear(8192, 8192, device="meta")) > threads.SMALL


def test_threads_are_given_back_whatever_happens():
    torch.set_num_threads(2)
    try:
        with threads.computing(TINY) as chosen:
            assert chosen == torch.get_num_threads() == 1
            with pytest.raises(ZeroDivisionError), threads.computing(TINY, 3):
                1 / (torch.get_num_threads() - 3)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 6),
        ({"cpu.max": "nonsense"}, 6),
        ({"quota": "300000\n", "period": "100000\n"}, 3),
        ({"quota": "-1\n", "period": "100000\n"}, 6),
    ],
)
def test_a_containers_share_counts(tmp_path, monkeypatch, files, cores):
    monkeypatch.undo()  # the real function
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    quotas = ((str(tmp_path / "cpu.max"),), (str(tmp_path / "quota"), str(tmp_path / "period")))
    monkeypatch.setattr(threads, "QUOTAS", quotas)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert threads.available_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows have none
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.available_cores() == cores


# ---- the environment, which must be there before torch is


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_NUM_THREADS": "1"}),
        ({"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9", "OPENBLAS_NUM_THREADS": "1"}),
        ({"KMP_BLOCKTIME": "9"}, {"KMP_BLOCKTIME": "9", "OPENBLAS_NUM_THREADS": "1"}),
        ({"OPENBLAS_NUM_THREADS": "4"}, {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "4"}),
        ({"OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}),
    ],
    ids=lambda value: ",".join(value) or "nothing",
)
def test_how_threads_wait_is_chosen_unless_the_user_did(given, made):
    environment = dict(given)
    threads.prepare_environment(environment)
    assert environment == made


PROGRAM = """
import json, os, runpy, sys
from moshi_ttt.system import threads
seen, choose = {}, threads.choose
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not seen:
            seen.update(os.environ, numpy="numpy" in sys.modules)
def chosen(*arguments, **options):
    seen["threads"] = choose(*arguments, **options)
    return seen["threads"]
sys.meta_path.insert(0, Watch())
threads.choose = chosen
try:
    runpy.run_module("moshi_ttt", run_name="__main__")
finally:
    print(json.dumps(seen))
"""
"""Runs ``python -m moshi_ttt``; then the environment when torch was first looked for, and the threads."""


DOCTOR = ("doctor", "tiny-ttt-linear", "--batches", "1", "--length", "40")


def run_program(*arguments: str, **environment: str) -> dict:
    inherited = {name: value for name, value in os.environ.items() if name not in ALL}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env={**inherited, **environment}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive  # a process; what it prepares is tested above
def test_python_m_prepares_the_environment_before_torch_is_imported():
    seen = run_program(*DOCTOR)
    assert (seen["OMP_WAIT_POLICY"], seen["OPENBLAS_NUM_THREADS"], seen["numpy"]) == ("PASSIVE", "1", False)
    assert "OMP_NUM_THREADS" not in seen
    assert seen["threads"] == 1


@pytest.mark.exhaustive  # what is kept is tested in one process above
def test_python_m_keeps_what_the_user_chose():
    seen = run_program(*DOCTOR, OMP_NUM_THREADS="2", GOMP_SPINCOUNT="0")
    assert (seen["OMP_NUM_THREADS"], seen["GOMP_SPINCOUNT"]) == ("2", "0")
    assert "OMP_WAIT_POLICY" not in seen
    assert seen["threads"] == min(2, os.cpu_count())  # torch takes no more than there are


# ---- commands


@pytest.mark.parametrize(
    "command",
    [
        ["quickstart"], ["doctor", "tiny-ttt-linear"],
        *(["evaluate", kind, "c", "--data", "d", "--out", "o"] for kind in ("long-context", "recall", "inner-loop")),
        ["evaluate", "zero-shot", "c", "--dataset", "csv", "--source", "s", "--out", "o"],
    ],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_number_of_threads_that_is_none_is_refused(cli, tmp_path, command, value):
    result = cli(*command, "--threads", value)
    assert result.exit_code == 2
    assert "--threads" in result.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0, -1, "two", 1.5])
def test_train_refuses_such_a_number_too(cli, tmp_path, value):
    config = {"data": {"train_data": "a"}, "run_dir": "run", "ttt": [{"variant": "ttt_linear", "layers": "1"}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "threads": value}))
    result = cli("train", "c.yaml", "moshi_paths.hf_repo_id=builtin:tiny")
    assert result.exit_code == 2
    assert "threads" in result.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("wanted", "used"), [(None, 1), (2, 2)])
def test_quickstart_computes_with_what_is_chosen(monkeypatch, tmp_path, wanted, used):
    from rich.console import Console

    from moshi_ttt.apps.quickstart import run as quickstart

    torch.set_num_threads(4)
    seen = []

    def prepare(settings, audio):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "prepare", prepare)
    try:
        with pytest.raises(KeyboardInterrupt):
            quickstart.run(Request(out=tmp_path / "run", threads=wanted), Console(quiet=True))
        assert seen == [used]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("wanted", "environment", "each"),
    [(None, {}, "1"), (3, {}, "3"), (None, {"OMP_NUM_THREADS": "2"}, "2"), (None, {"OMP_NUM_THREADS": "64"}, "4"),
     (3, {"OMP_NUM_THREADS": "64"}, "3"), (None, {"OMP_NUM_THREADS": "junk"}, "1")],
)  # fmt: skip
def test_jobs_of_a_study_do_not_take_more_than_their_share(tmp_path, monkeypatch, wanted, environment, each):
    given = []

    class Process:
        def __init__(self, command, stdout, stderr, env):
            given.append(env["OMP_NUM_THREADS"])

        def wait(self):
            return 0

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", Process)
    job = Job(name="a", arguments=("--version",), result=tmp_path / "logs" / "a.log")
    run_jobs([job], tmp_path / "logs", at_once=2, say=lambda text: None, threads=wanted)
    assert given == [each]


class Counting:
    """Data whose batches are the number of threads of the process that makes them."""

    corpus = SimpleNamespace(encodes_on="cpu")
    microbatches = 1

    def __getitem__(self, index: int) -> int:
        return torch.get_num_threads()


@pytest.mark.parametrize(("workers", "each"), [(0, 2), (2, 1)])
def test_a_data_worker_has_one_thread(workers, each):
    torch.set_num_threads(2)
    try:
        batches = iter(loader(Counting(), start_step=0, num_workers=workers))
        assert [next(batches) for _ in range(3)] == [each] * 3
    finally:
        torch.set_num_threads(1)
