"""The host that is not causal: attaching and detaching, both directions, adapters, refusals, the example."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moshi_ttt import default_registry, inject, load_adapter, parse_config, save_adapter
from moshi_ttt.core.errors import AdapterError, ConfigError, HostError, InjectionError
from moshi_ttt.hosts.audio.host import AUDIO_HOST, AudioHostConfig
from moshi_ttt.hosts.audio.losses import denoising_loss
from moshi_ttt.hosts.audio.model import made_up_recordings
from tests.project import ROOT

SMALL = {"dim": 16, "num_heads": 2, "num_layers": 2, "frame": 8}


def model_of():
    return AUDIO_HOST.load(AudioHostConfig(**SMALL))


def injected(**options):
    entry = {"variant": "ttt_linear", "layers": "all", "chunk": 4, **options}
    config = parse_config({"host": {"name": "audio", **SMALL}, "ttt": [entry]}, registry=default_registry())
    model = model_of()
    return model, inject(model, config)


def recordings(seed=0):
    return made_up_recordings(2, 12, 8, seed)[0]


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"bidirectional": True}], ids=str)
def test_blocks_of_every_kind_train_here_and_go_without_a_trace(options):
    with torch.no_grad():
        base = model_of()(recordings())
    model, injection = injected(**options)
    names = set(AUDIO_HOST.base_state_dict(model))
    assert names == set(model_of().state_dict())
    injection.freeze_base()
    assert not torch.equal(model(recordings()), base)
    denoising_loss(model, 2, 12, seed=0).backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())
    injection.remove()
    with torch.no_grad():
        assert torch.equal(model(recordings()), base)


@pytest.mark.parametrize(("options", "hears"), [({}, False), ({"bidirectional": True}, True)], ids=str)
def test_only_a_block_that_is_not_causal_hears_the_future(options, hears):
    """Attention hears everything: it is taken out, so that the block alone decides."""
    model, _ = injected(**options)
    for layer in model.layers:
        torch.nn.init.zeros_(layer.attention.out_proj.weight)
    x = recordings()
    changed = x.clone()
    changed[:, -8:] += 1
    assert torch.equal(model(changed)[:, :8], model(x)[:, :8]) is not hears


def test_learning_switched_off_is_another_model_and_switches_back():
    model, _ = injected(bidirectional=True)
    x = recordings()
    on = model(x)
    with AUDIO_HOST.updates(model, False):
        off = model(x)
    assert not torch.equal(on, off)
    assert torch.equal(model(x), on)


def test_an_adapter_goes_out_and_in(tmp_path):
    model, injection = injected(bidirectional=True)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.1)
    expected = model(recordings())
    save_adapter(injection, tmp_path / "adapter")
    other = model_of()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(recordings()), expected)


def test_a_causal_host_refuses_both_ways():
    config = parse_config(
        {"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": [{"variant": "ttt_mlp", "bidirectional": True}]},
        registry=default_registry(),
    )
    model = default_registry().host("moshi").load(config.host)
    with pytest.raises(InjectionError, match="is causal and this block is not: it would see the future"):
        inject(model, config)


def test_refusals():
    model, injection = injected()
    with pytest.raises(InjectionError, match="already has blocks"):
        inject(model, parse_config({"host": {"name": "audio"}, "ttt": []}, registry=default_registry()))
    with pytest.raises(HostError, match="no free sequence site"):
        AUDIO_HOST.attach(model, injection.blocks)
    with pytest.raises(HostError, match="works on its own AudioDenoiser, got Linear"):
        AUDIO_HOST.sites(torch.nn.Linear(2, 2))
    with pytest.raises(HostError, match="no multiple of num_heads"):
        AUDIO_HOST.load(AudioHostConfig(dim=10, num_heads=4))
    state = AUDIO_HOST.base_state_dict(model)
    with pytest.raises(HostError, match=r"missing decode\.bias; unexpected more\. Nothing was loaded"):
        AUDIO_HOST.load_base(model, {**{k: v for k, v in state.items() if k != "decode.bias"}, "more": torch.zeros(1)})
    with pytest.raises(ConfigError, match="Did you mean 'frame'"):
        parse_config({"host": {"name": "audio", "frames": 3}, "ttt": []}, registry=default_registry())


def test_base_weights_load_before_and_after_injection():
    model, injection = injected()
    other = AUDIO_HOST.base_state_dict(AUDIO_HOST.load(AudioHostConfig(**SMALL, seed=5)))
    AUDIO_HOST.load_base(model, other)
    injection.remove()
    assert torch.equal(model(recordings()), AUDIO_HOST.load(AudioHostConfig(**SMALL, seed=5))(recordings()))


@pytest.mark.exhaustive  # its parts are tested above, and its host trains in test_any_host.py
def test_the_example_runs():
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "bidirectional_audio.py", "3"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "with their learning switched off" in result.stdout


def test_an_adapter_is_not_saved_in_the_middle_of_a_schedule(tmp_path):
    _, injection = injected()
    injection.set_inner_lr_factor(0.25)
    assert {block.inner_lr_factor for block in injection.blocks.values()} == {0.25}
    with pytest.raises(AdapterError, match=r"scaled by 0\.25.*set_inner_lr_factor\(1\).*Nothing was saved"):
        save_adapter(injection, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    injection.set_inner_lr_factor(1)
    save_adapter(injection, tmp_path / "adapter")
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            injection.set_inner_lr_factor(wrong)
