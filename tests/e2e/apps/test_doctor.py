"""``moshi-ttt doctor``: green on a healthy model, red on each planted fault, and nothing read while training runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.apps.doctor import measure
from moshi_ttt.core.adapter import save_adapter
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.health import HealthMonitor
from moshi_ttt.plugins.hybrid import layer
from tests.e2e.apps.injected import injected

VARIANTS = ("ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge", "gating_mlp")


def flags(injection):
    (health,) = measure(injection, batches=2, length=24).values()
    return health.red_flags


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_healthy_block_is_green_and_unchanged(variant, dtype):
    injection = injected(chunk=8, variant=variant, dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in injection.named_parameters()}
    assert flags(injection) == []
    for name, parameter in injection.named_parameters():
        assert torch.equal(parameter.detach(), before[name])
        assert parameter.grad is None


def test_a_wrong_standard_deviation(monkeypatch):
    def by_variance(v, k, weight, bias, eps, exact=False):
        difference = v - k
        centred = difference - difference.mean(-1, keepdim=True)
        return weight * centred / (difference.var(-1, keepdim=True) + eps) + bias + k

    monkeypatch.setattr(layer, "reconstruction_target", by_variance)
    found = flags(injected(chunk=8))
    assert any("variance is off by" in flag and "not divided by the standard deviation" in flag for flag in found)


def test_keys_that_are_not_normalized(monkeypatch):
    monkeypatch.setattr(layer, "l2_normalize", lambda x, exact=False: 7 * x)
    assert any("keys must be L2-normalized" in flag for flag in flags(injected(chunk=8)))


def test_a_gate_at_zero_without_a_gradient():
    injection = injected(chunk=8, gate={"init": 0.0})
    assert flags(injection) == [], "a gate at zero that has a gradient will open"
    (block,) = injection.blocks.values()
    block.gate.requires_grad_(False)
    (flag,) = flags(injection)
    assert "will never learn" in flag
    assert "Frozen: gate" in flag


def test_a_bfloat16_state():
    found = flags(injected(chunk=8, precision="uniform", dtype="bfloat16"))
    assert any("state is torch.bfloat16" in flag and "are lost" in flag for flag in found)


@pytest.mark.parametrize(("variant", "options"), [("ttt_mlp", {"base_lr": 1e4}), ("gating_mlp", {"lr": 1e12})], ids=str)
def test_an_exploding_learning_rate(variant, options):
    found = flags(injected(chunk=8, variant=variant, **options))
    assert any("lower the inner learning rate" in flag or "lower lr" in flag for flag in found)


def test_a_token_scale_stuck_at_zero():
    injection = injected(chunk=8)
    (block,) = injection.blocks.values()
    with torch.no_grad():
        block.token_scale_offset[-1] = -1.0
    assert any("no update changes the state" in flag for flag in flags(injection))


def test_an_input_that_is_not_finite():
    injection = injected(chunk=8)
    (block,) = injection.blocks.values()
    with torch.no_grad():
        block.wo.bias[0] = torch.nan
    assert any("output is not finite" in flag for flag in flags(injection))


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_measuring_reads_nothing_until_asked_and_changes_no_gradient(variant):
    injection = injected(chunk=8, variant=variant)
    x = torch.randn(1, 24, injection.model.dim, generator=torch.Generator().manual_seed(0))
    ((site, block),) = injection.blocks.items()

    def backward():
        block.zero_grad()
        y, _ = block(x, None, BlockContext(input_embeddings=x))
        y.square().sum().backward()
        return [parameter.grad for parameter in block.parameters()]

    plain = backward()
    with HealthMonitor(injection.blocks) as monitor, NoReads():
        measured = backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert monitor.read()[site].red_flags == []
    assert not block._forward_hooks


def test_the_command(cli, tmp_path):
    result = cli("doctor", "tiny-ttt-linear", "--batches", "1", "--json")
    assert result.exit_code == 0, result.said
    report = json.loads(result.stdout)
    assert report["healthy"]
    for block in report["blocks"].values():
        wanted = {
            "key_norm",
            "amplification",
            "std_below_eps",
            "gate",
            "inner_loss_before",
            "inner_loss_after",
            "drift",
        }
        assert wanted | {"state_norm", "state_not_finite", "token_scale_last"} <= block["figures"].keys()
        assert block["figures"]["state_norm"] > 0
    sick = tmp_path / "sick.yaml"
    sick.write_text(
        "host: {name: moshi, hf_repo: builtin:tiny}\n"
        "ttt: [{variant: ttt_mlp, layers: last:1, chunk: 8, base_lr: 10000.0}]\n"
    )
    result = cli("doctor", sick, "--batches", "1")
    assert result.exit_code == 1
    assert "lower the inner learning rate" in " ".join(result.said.split())
    assert "RED" in result.said


def test_an_adapter_is_examined_and_a_config_without_blocks_refused(cli, tmp_path):
    injection = injected(chunk=8)
    with torch.no_grad():
        next(iter(injection.blocks.values())).token_scale_offset[-1] = -1.0
    save_adapter(injection, tmp_path / "adapter")
    config = tmp_path / "config.yaml"
    config.write_text("host: {name: moshi, hf_repo: builtin:tiny, dtype: float32}\nttt: []\n")
    result = cli("doctor", config, "--adapter", tmp_path / "adapter", "--batches", "1")
    assert result.exit_code == 1
    assert "token scale" in result.said
    result = cli("doctor", config)
    assert result.exit_code == 2
    assert "no blocks to examine" in result.said


def test_too_few_tokens_for_an_update_are_refused(cli):
    result = cli("doctor", "tiny-gating-mlp", "--batches", "1", "--length", "16")
    assert result.exit_code == 2
    assert "no update could take effect" in " ".join(result.said.split())


def test_each_flag_is_given_once():
    found = flags(injected(chunk=8, variant="gating_mlp", lr=1e12))
    assert len(found) == len(set(found)) == len({flag.split()[1] for flag in found})


def test_a_block_called_by_keyword_is_measured_and_a_monitor_is_entered_once():
    injection = injected(chunk=8)
    ((site, block),) = injection.blocks.items()
    with HealthMonitor(injection.blocks) as monitor:
        block(x=torch.randn(1, 24, injection.model.dim))
        with pytest.raises(RuntimeError, match="measuring already"):
            monitor.__enter__()
    assert monitor.read()[site].figures["key_norm"] == pytest.approx(1.0, rel=1e-5)
