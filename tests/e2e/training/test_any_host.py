"""The trainer trains and resumes hosts that are not Moshi, and needs nothing of Moshi for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moshi_ttt import default_registry, make_plan
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.losses import LossMeans, total_loss
from moshi_ttt.core.testing import TOY_HOST, ToyModel
from moshi_ttt.hosts.audio.host import AUDIO_HOST, AudioHostConfig
from moshi_ttt.hosts.audio.model import made_up_recordings
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.training import FitConfig, TrainedModel, Trainer, TrainingError

WORKER = Path(__file__).parent / "any_host_worker.py"


def run(host: str, folder: Path, ranks: int) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), host, str(folder)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """What a host's training on one rank found; it runs once."""
    return cache(lambda host: run(host, tmp_path_factory.mktemp(host), 1))


@pytest.mark.first_by_default
@pytest.mark.parametrize("host", ["toy", "audio"])
def test_a_host_trains_and_resumes_bit_for_bit_without_moshi(alone, host):
    found = alone(host)
    assert found["moshi"] == []
    assert len(found["losses"]) == 5
    assert found["losses"][-1] != found["losses"][0]
    assert found["checkpoints"] == ["checkpoint_000002", "checkpoint_000004", "checkpoint_000005"]
    assert found["rest"] == found["losses"][2:]
    assert found["equal"]
    assert found["validation"][0] == found["validation"][1]
    *steps, evaluation = found["logged"]
    assert [record["loss"] for record in steps] == found["losses"]
    assert all(len(record["blocks"]) == 2 for record in steps)
    assert evaluation["kind"] == "eval"
    name = {"toy": "next", "audio": "denoising"}[host]
    assert evaluation[f"loss_{name}"] == evaluation[f"mean_{name}"] == found["validation"][0]
    assert f"perplexity_{name}" not in evaluation
    assert found["carried"] == [host == "toy"] * 2


@pytest.mark.exhaustive  # this host on one rank above; two ranks of Moshi in test_ranks.py
@pytest.mark.first_by_default
@pytest.mark.parametrize("host", ["toy", "audio"])
def test_two_ranks_train_a_host_as_one_does(alone, tmp_path, host):
    one, two = alone(host), run(host, tmp_path, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["rest"] == two["losses"][2:]
    assert two["equal"]


def case(name: str) -> tuple[Any, nn.Module, Any]:
    """Losses, a model, and inputs of three rows."""
    if name == "toy":
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
        return TOY_HOST.losses(), ToyModel(16, 2, num_layers=1, dtype=torch.float32), x
    return AUDIO_HOST.losses(), AUDIO_HOST.load(AudioHostConfig()), made_up_recordings(3, 7, 32, seed=0)


@pytest.mark.parametrize("name", ["toy", "audio"])
def test_losses_add_up_over_rows_and_are_the_plain_mean(name):
    losses, model, inputs = case(name)
    rows = [inputs[r : r + 1] if name == "toy" else tuple(each[r : r + 1] for each in inputs) for r in range(3)]
    sums, weights = losses.sums(model, inputs), losses.weights(model, inputs)
    assert sums.requires_grad
    torch.testing.assert_close(sum(losses.sums(model, row) for row in rows), sums)
    assert torch.equal(sum(losses.weights(model, row) for row in rows), weights)
    noisy, clean = (inputs[:, :-1], inputs[:, 1:]) if name == "toy" else inputs
    output = model(inputs)[:, :-1] if name == "toy" else model(noisy)
    expected = (output - clean).square().mean().detach()
    torch.testing.assert_close(total_loss(losses, sums, weights), expected)
    torch.testing.assert_close(losses.total(model, inputs), expected)
    means = LossMeans.of(losses, sums.detach().double(), weights)
    assert means.total == pytest.approx(float(expected))
    assert list(means.means) == list(losses.names)


def test_the_toy_host_gives_its_loss_by_position():
    losses, model, x = case("toy")
    found = losses.by_position(model, x)["next"]
    assert found.shape == (3, 7)
    assert found[:, -1].isnan().all()
    plain = float(losses.sums(model, x)[1, 0].detach() / losses.weights(model, x)[1, 0])
    assert float(found.nanmean()) == pytest.approx(plain)


@pytest.mark.parametrize("host", [TOY_HOST, AUDIO_HOST, MOSHI_HOST], ids=lambda host: host.name)
def test_options_that_losses_do_not_have_are_refused(host):
    with pytest.raises(HostError, match="option"):
        host.losses(text_wieght=0.1)


def test_ranks_that_do_not_share_a_model_are_refused():
    registry = default_registry()
    model = ToyModel(16, 2, num_layers=2, dtype=torch.float32)
    policy = registry.policy("fp32_state")
    entry = parse_block({"variant": "ttt_linear", "layers": "1"}, registry=registry)
    injection = make_plan(model, TOY_HOST, [entry], policy=policy, registry=registry).apply(model)
    trained = TrainedModel(model, injection, policy.roles(torch.float32), TOY_HOST.losses())
    with pytest.raises(TrainingError, match=r"2 ranks.*core.sharding.shard"):
        Trainer(trained, FitConfig(), SimpleNamespace(world_size=2))
