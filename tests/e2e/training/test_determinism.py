"""The option ``deterministic``: what it sets while a run lasts, and that nothing is left of it."""

from __future__ import annotations

import os

import pytest
import torch

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.training import run as command
from moshi_ttt.training.determinism import FIXED, WORKSPACE, deterministic

from .conftest import records


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark, os.environ.get(WORKSPACE),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = switches()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.backends.cudnn.benchmark = before[2]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("warn_only", [None, False, True])
@pytest.mark.parametrize(("device", "workspace"), [("cpu", None), ("cuda", FIXED[0])])
def test_every_switch_is_set_inside_and_as_it_was_outside(device, workspace, warn_only, fails):
    torch.backends.cudnn.benchmark = True
    if warn_only is not None:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
    before = switches()
    try:
        with deterministic(True, device):
            assert switches() == (True, False, False, workspace)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert switches() == before


def test_without_the_option_nothing_is_set():
    before = switches()
    with deterministic(False, "cuda"):
        assert switches() == before


@pytest.mark.parametrize("value", FIXED)
def test_a_workspace_that_is_deterministic_is_kept(value, monkeypatch):
    monkeypatch.setenv(WORKSPACE, value)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with deterministic(True, "cuda"):
        assert os.environ[WORKSPACE] == value
    assert os.environ[WORKSPACE] == value


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with (
        pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'. Set it to :4096:8 or :16:8"),
        deterministic(True, "cuda"),
    ):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_cuda_that_has_started_without_a_workspace_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"CUDA has started.*before the process starts"), deterministic(True, "cuda"):
        pass
    with deterministic(True, "cpu"):
        assert WORKSPACE not in os.environ


@pytest.mark.first_by_default
@pytest.mark.parametrize("asked", [False, True])
def test_a_run_takes_the_option_and_leaves_nothing_of_it(train, tmp_path, monkeypatch, asked):
    seen = []

    def started(device, shard_size):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return start(device, shard_size)

    start = command.start
    monkeypatch.setattr(command, "start", started)
    before = switches()
    train(max_steps=2, deterministic=asked, run_dir=str(tmp_path / "one"))
    train(max_steps=2, deterministic=asked, run_dir=str(tmp_path / "two"))
    assert seen == [asked, asked]
    assert switches() == before
    one, two = ([record["loss"] for record in records(tmp_path / name)] for name in ("one", "two"))
    assert one == two
