"""Each role of each policy in the tiny Moshi: stored, carried and streamed, through load, LoRA, casts and meta init."""

from __future__ import annotations

import pytest
import torch
from moshi.models import LMGen
from moshi.modules.lora import replace_all_linear_with_lora

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.errors import InjectionError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import block_sites

from .conftest import VARIANTS

pytestmark = pytest.mark.each_kind

POLICIES = {"fp32_state": torch.bfloat16, "uniform": torch.bfloat16, "fp32": torch.float32}


def configuration(policy, dtype):
    entries = [{"variant": "gating_mlp", "layers": "0", "chunk": 4}, {"variant": "ttt_mlp", "layers": "1", "chunk": 4}]
    entries += [{"variant": "ttt_linear", "layers": "2"}, {"variant": "ttt_multilayer", "layers": "3", "expansion": 1}]
    assert {entry["variant"] for entry in entries} == set(VARIANTS) - {"ttt_ridge"}
    if policy != "uniform":  # whose bfloat16 state ttt_ridge refuses
        entries += [{"variant": "ttt_ridge", "layers": "0"}]
    host = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": str(dtype)[6:]}
    return parse_config({"host": host, "precision": policy, "ttt": entries}, registry=default_registry())


def from_meta(config):
    weights = MOSHI_HOST.base_state_dict(MOSHI_HOST.load(config.host))
    model = MOSHI_HOST.skeleton(config.host)
    injection = inject(model, config)
    assert all(parameter.is_meta for parameter in injection.parameters())
    model.to_empty(device="cpu")
    injection.initialize()
    MOSHI_HOST.load_base(model, weights)
    return model, injection


def directly(config):
    model = MOSHI_HOST.load(config.host)
    return model, inject(model, config)


def with_lora(config):
    model, injection = directly(config)
    replace_all_linear_with_lora(model, rank=2, scaling=1.0)
    return model, injection


def cast(config):
    model, injection = directly(config)
    return model.to(POLICIES[config.precision]), injection


@pytest.mark.first_by_default
@pytest.mark.parametrize("way", [directly, from_meta, with_lora, cast], ids=lambda way: way.__name__)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_role_has_its_dtype(policy, way):
    config = configuration(policy, POLICIES[policy])
    model, injection = way(config)
    roles = injection.plan.blocks[0].roles
    own = {id(parameter) for parameter in injection.parameters()}
    for name, parameter in injection.named_parameters():
        assert parameter.dtype == roles.master, name
    for name, parameter in model.named_parameters():
        assert id(parameter) in own or parameter.dtype == roles.param, name
    with torch.no_grad(), MOSHI_HOST.carry(model) as carried:
        out = model(torch.randint(0, 128, (1, 17, 9), generator=torch.Generator().manual_seed(0)))
    assert out.logits.isfinite().any()
    for site, state in carried.blocks.items():
        for name, tensor in state.items():
            assert tensor.dtype == (roles.state if tensor.is_floating_point() else torch.int64), (site, name)
    generator = LMGen(model, use_sampling=False)
    with torch.no_grad(), generator.streaming(1):
        for _ in range(6):
            generator.step(torch.zeros(1, 8, 1, dtype=torch.long))
        sites = [site for layer in model.transformer.layers for site in block_sites(layer)]
        assert len(sites) == len(config.ttt)
        for site in sites:
            for name, tensor in site._streaming_state.buffers.items():
                assert tensor.dtype == (roles.state if tensor.is_floating_point() else torch.int64), (site.site, name)


def test_a_host_in_another_dtype_than_the_policy_asks_for_is_refused():
    config = configuration("fp32", torch.bfloat16)
    with pytest.raises(InjectionError, match=r"parameters are torch\.bfloat16, policy 'fp32' asks for torch\.float32"):
        inject(MOSHI_HOST.load(config.host), config)
