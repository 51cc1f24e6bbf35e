"""Sites, attaching and detaching, base weights, fingerprints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moshi_ttt.core.block import Site, SiteKind
from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import BlockSite
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm
from moshi_ttt.hosts.moshi.upstream import ActivationGating, LMGen, StreamingModule, loaders

from .toy import NonCausalToyConfig, ToyBlock, make_blocks, random_codes, stream, toy_lm

SEQUENCE, FEED_FORWARD = SiteKind.SEQUENCE, SiteKind.FEED_FORWARD


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def with_lora(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = loaders.get_lora_moshi(model, None, 4, 2.0, dtype=model.dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return model


# ------------------------------------------------------------------------------------------------------------- sites
def test_sites_lists_every_layer_of_the_main_transformer_only():
    model = random_tiny_lm(num_layers=3)
    infos = MOSHI_HOST.sites(model)
    assert [info.site for info in infos] == [Site(i, kind) for i in range(3) for kind in (SEQUENCE, FEED_FORWARD)]
    for info in infos:
        assert (info.dim, info.num_heads, info.dtype, info.device.type) == (64, 4, torch.float32, "cpu")
    gating = model.transformer.layers[1].gating
    assert isinstance(gating, ActivationGating)
    mlp = infos[3].mlp
    assert mlp is not None
    assert mlp.linear_in is gating.linear_in
    assert mlp.linear_out is gating.linear_out
    assert infos[2].mlp is None


def test_sites_without_gating_have_no_feed_forward():
    infos = MOSHI_HOST.sites(random_tiny_lm(gating="none", depformer_gating="silu"))
    assert {info.site.kind for info in infos} == {SEQUENCE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sites_give_the_layers_dtype_under_lora(dtype):
    infos = MOSHI_HOST.sites(with_lora(random_tiny_lm(dtype=dtype)))
    assert {info.dtype for info in infos} == {dtype}


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), lambda: LMGen(random_tiny_lm())])
def test_sites_of_something_else_raises(wrong):
    model = wrong if isinstance(wrong, nn.Module) else wrong()
    with pytest.raises(HostError, match="LMModel"):
        MOSHI_HOST.sites(model)


# ------------------------------------------------------------------------------------------------- attach and detach
def test_attach_renames_nothing_and_detach_leaves_no_trace():
    model = random_tiny_lm()
    codes = random_codes(model, 2, 12)
    before_classes, before_names = classes(model), list(model.state_dict())
    before_attributes = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        before = model(codes)
    blocks = make_blocks(model)
    MOSHI_HOST.attach(model, blocks)
    assert [name for name in model.state_dict() if ".ttt." not in name] == before_names
    assert list(MOSHI_HOST.base_state_dict(model)) == before_names
    assert MOSHI_HOST.blocks(model) == blocks
    with torch.no_grad():
        changed = model(codes)
        with MOSHI_HOST.carry(model):
            model(codes)
    assert not torch.equal(changed.text_logits, before.text_logits)
    assert MOSHI_HOST.detach(model) == blocks
    assert MOSHI_HOST.blocks(model) == {}
    assert classes(model) == before_classes
    assert list(model.state_dict()) == before_names
    assert [set(vars(module)) for module in model.modules()] == before_attributes
    with torch.no_grad():
        after = model(codes)
    assert torch.equal(after.text_logits, before.text_logits)
    assert torch.equal(after.logits[after.mask], before.logits[before.mask])


def test_attach_reaches_training_mode_and_module_tree():
    model = random_tiny_lm().train()
    MOSHI_HOST.attach(model, make_blocks(model, (1,)))
    site = model.transformer.layers[1].ttt
    assert isinstance(site, BlockSite)
    assert site.training
    assert site.block.training
    assert not hasattr(model.transformer.layers[0], "ttt")


def test_attach_nothing_changes_nothing():
    model = random_tiny_lm()
    before = classes(model)
    MOSHI_HOST.attach(model, {})
    assert classes(model) == before
    assert MOSHI_HOST.detach(model) == {}


def test_attach_in_two_calls():
    model = random_tiny_lm()
    MOSHI_HOST.attach(model, make_blocks(model, (2,)))
    MOSHI_HOST.attach(model, make_blocks(model, (0,)))
    assert [site.layer for site in MOSHI_HOST.blocks(model)] == [0, 2]


def test_stream_then_attach_then_stream_updates_the_block():
    model = random_tiny_lm()
    codes = random_codes(model, 1, 6)
    with model.streaming(1):
        stream(model, codes)
    MOSHI_HOST.attach(model, make_blocks(model))
    assert all(m._cached_children is None for m in model.modules() if isinstance(m, StreamingModule))
    with model.streaming(1):
        state = model.transformer.layers[0].ttt._streaming_state
        before = state.buffers["weights"].clone()
        stream(model, codes)
        assert not torch.equal(state.buffers["weights"], before)
    MOSHI_HOST.detach(model)
    with model.streaming(1):
        stream(model, codes)


def test_attach_on_meta():
    model = random_tiny_lm(device="meta")
    MOSHI_HOST.attach(model, make_blocks(model))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert MOSHI_HOST.fingerprint(model)["weights"] is None
    source = random_tiny_lm(seed=3)
    MOSHI_HOST.load_base(model, source.state_dict())
    MOSHI_HOST.detach(model)
    codes = random_codes(model, 1, 5)
    with torch.no_grad():
        assert torch.equal(model.forward_text(codes)[1], source.forward_text(codes)[1])


def test_attach_after_lora_trains():
    model = with_lora(random_tiny_lm())
    MOSHI_HOST.attach(model, make_blocks(model))
    model.forward_text(random_codes(model, 1, 9))[1].square().mean().backward()
    block = model.transformer.layers[0].ttt.block
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in block.parameters())
    with torch.no_grad(), model.streaming(1):
        stream(model, random_codes(model, 1, 3))


def test_cast_of_the_whole_model_keeps_the_blocks_dtype():
    model = toy_lm().to(torch.bfloat16)
    assert {p.dtype for p in MOSHI_HOST.blocks(model)[Site(0, SEQUENCE)].parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------- refusals
def refusal(model, blocks, match):
    before, names = classes(model), list(model.state_dict())
    with pytest.raises(HostError, match=match):
        MOSHI_HOST.attach(model, blocks)
    assert classes(model) == before
    assert list(model.state_dict()) == names


def test_attach_at_another_kind_of_site_raises_and_attaches_nothing():
    model = random_tiny_lm()
    blocks = make_blocks(model, (0,))
    blocks[Site(1, FEED_FORWARD)] = make_blocks(model, (1,))[Site(1, SEQUENCE)]
    refusal(model, blocks, "the block is for sequence sites")


def test_attach_out_of_range_raises():
    model = random_tiny_lm()
    refusal(model, {Site(9, SEQUENCE): next(iter(make_blocks(model).values()))}, "no such site; the layers are 0 to 2")


def test_attach_at_another_site_raises():
    model = random_tiny_lm()
    refusal(model, {Site(1, SEQUENCE): next(iter(make_blocks(model, (0,)).values()))}, r"built for layers\.0\.sequence")


def test_attach_twice_raises():
    model = toy_lm((0,))
    refusal(model, make_blocks(model, (0, 1)), "a block already")


def test_attach_non_causal_raises():
    model = random_tiny_lm()
    refusal(model, make_blocks(model, config=NonCausalToyConfig()), "not causal")


def test_attach_other_width_raises():
    model = random_tiny_lm()
    refusal(model, make_blocks(random_tiny_lm(dim=32)), "planned for width 32.*width 64")


def test_attach_to_a_foreign_layer_class_raises():
    model = random_tiny_lm()
    blocks = make_blocks(model)
    layer = model.transformer.layers[1]
    layer.__class__ = type("OtherLayer", (type(layer),), {})
    refusal(model, blocks, "OtherLayer")


def test_attach_to_a_foreign_model_class_raises():
    model = random_tiny_lm()
    blocks = make_blocks(model)
    model.__class__ = type("OtherModel", (type(model),), {})
    refusal(model, blocks, "OtherModel")


def test_attach_and_detach_while_streaming_raise():
    model = random_tiny_lm()
    blocks = make_blocks(model)
    with model.streaming(1):
        refusal(model, blocks, "while the model is streaming")
    MOSHI_HOST.attach(model, blocks)
    with model.streaming(1), pytest.raises(HostError, match="streaming"):
        MOSHI_HOST.detach(model)
    with MOSHI_HOST.carry(model), pytest.raises(HostError, match="carry"):
        MOSHI_HOST.detach(model)
    assert MOSHI_HOST.blocks(model) == blocks


# ------------------------------------------------------------------------------------------------------ base weights
def test_load_base_after_attach_is_bit_equal():
    model, source = toy_lm(seed=0), random_tiny_lm(seed=1)
    blocks = {site: copy.deepcopy(block.state_dict()) for site, block in MOSHI_HOST.blocks(model).items()}
    MOSHI_HOST.load_base(model, source.state_dict())
    for name, tensor in MOSHI_HOST.base_state_dict(model).items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    for site, block in MOSHI_HOST.blocks(model).items():
        assert all(torch.equal(tensor, blocks[site][name]) for name, tensor in block.state_dict().items())


def test_load_base_takes_older_names_and_other_dtypes():
    model, source = toy_lm(seed=0), random_tiny_lm(seed=1)
    state = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    for layer in range(3):
        prefix = f"transformer.layers.{layer}.self_attn."
        state[prefix + "in_proj_weight"] = state.pop(prefix + "in_projs.0.weight")
    MOSHI_HOST.load_base(model, state)
    loaded = MOSHI_HOST.base_state_dict(model)["transformer.layers.0.self_attn.in_projs.0.weight"]
    assert torch.equal(loaded, source.transformer.layers[0].self_attn.in_projs[0].weight.bfloat16().float())


def test_base_is_the_same_under_lora():
    plain = random_tiny_lm()
    names, digest = set(plain.state_dict()), MOSHI_HOST.fingerprint(plain)
    model = with_lora(plain)
    MOSHI_HOST.attach(model, make_blocks(model))
    assert set(MOSHI_HOST.base_state_dict(model)) == names
    assert MOSHI_HOST.fingerprint(model) == digest
    source = random_tiny_lm(seed=4)
    MOSHI_HOST.load_base(model, source.state_dict())
    weight = model.transformer.layers[0].gating.linear_in.frozen_W.weight
    assert torch.equal(weight, source.transformer.layers[0].gating.linear_in.weight)


@pytest.mark.parametrize("case", ["missing", "unexpected", "shape", "with_blocks"])
def test_load_base_refuses_other_weights_and_loads_nothing(case):
    model = toy_lm()
    state = {name: torch.ones_like(tensor) for name, tensor in MOSHI_HOST.base_state_dict(model).items()}
    if case == "missing":
        del state["text_emb.weight"]
    elif case == "unexpected":
        state["more"] = torch.ones(1)
    elif case == "shape":
        state["text_emb.weight"] = torch.ones(2, 2)
    else:
        state |= {name: t for name, t in model.state_dict().items() if ".ttt." in name}
    match = {"missing": "missing text_emb", "unexpected": "unexpected more", "shape": "has shape"}
    with pytest.raises(HostError, match=match.get(case, r"unexpected transformer\.layers\.0\.ttt")):
        MOSHI_HOST.load_base(model, state)
    assert not torch.equal(model.text_linear.weight, torch.ones_like(model.text_linear.weight))


def test_base_names_are_decided_by_module_not_by_name():
    model = toy_lm()
    model.ttt = nn.Linear(2, 2)  # a base module that happens to be called so
    assert "ttt.weight" in MOSHI_HOST.base_state_dict(model)


# ------------------------------------------------------------------------------------------------------- fingerprint
def test_fingerprint_is_equal_across_dtypes_and_injection_and_differs_between_models():
    model = random_tiny_lm(dtype=torch.bfloat16)
    wanted = MOSHI_HOST.fingerprint(model)
    assert wanted["weights"] is not None
    assert (wanted["num_heads"], wanted["num_layers"], wanted["context"]) == (4, 3, 48)
    MOSHI_HOST.attach(model, make_blocks(model))
    assert MOSHI_HOST.fingerprint(model) == wanted
    MOSHI_HOST.detach(model)
    assert MOSHI_HOST.fingerprint(model.float()) == wanted
    assert MOSHI_HOST.fingerprint(random_tiny_lm(seed=1))["weights"] != wanted["weights"]
    assert MOSHI_HOST.fingerprint(random_tiny_lm(num_layers=2)) != wanted


def test_a_forward_pass_calls_each_block_once():
    model = toy_lm((1,))
    with torch.no_grad():
        model.forward_text(random_codes(model, 1, 3))
    block = MOSHI_HOST.blocks(model)[Site(1, SEQUENCE)]
    assert isinstance(block, ToyBlock)
    assert block.calls == 1
