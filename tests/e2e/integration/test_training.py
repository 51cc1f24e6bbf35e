"""The variants in training on the tiny Moshi: sharded against one process, checkpointing, LoRA, the 7B plan."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import load_file, save_file

from moshi_ttt import default_registry, inject, load_adapter, make_plan, parse_config, save_adapter
from moshi_ttt.core.errors import AdapterError, ContextError, HostError, InjectionError, PrecisionError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm
from tests.ranks import launch

from . import fsdp_worker
from .conftest import tiny_with

WORKER = Path(__file__).parent / "fsdp_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("fsdp")
    launch(WORKER, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.first_by_default
@pytest.mark.parametrize(("run", "config"), [("all", fsdp_worker.CONFIG), ("ridge", fsdp_worker.RIDGE)])
def test_two_ranks_train_with_the_losses_of_one_process(ranks, run, config):
    ranks = [rank[run] for rank in ranks]
    alone = fsdp_worker.train([0, 1], sharded=False, config=config)
    reference = torch.tensor(alone["losses"])  # [step, row]
    sharded = torch.tensor([rank["losses"] for rank in ranks])[..., 0].T
    # The first step is the same arithmetic; later ones differ by the order in which two gradients are added.
    assert torch.equal(sharded[0], reference[0])
    torch.testing.assert_close(sharded, reference, rtol=2e-4, atol=0)
    assert reference[-1].mean() < reference[0].mean()
    for name, values in alone["final"].items():
        torch.testing.assert_close(torch.tensor(ranks[0]["final"][name]), torch.tensor(values), rtol=1e-3, atol=2e-5)


def test_state_and_parameters_are_float32_on_every_rank(ranks):
    for rank in (rank[name] for rank in ranks for name in ("all", "ridge")):
        assert rank["state_dtypes"] == ["torch.float32"]
        assert rank["block_dtypes"] == ["torch.float32"]
        assert rank["base_dtypes"] == ["torch.bfloat16"]


def codes(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128, (batch, 17, length), generator=generator)


def gradients(model, injection) -> dict[str, torch.Tensor]:
    out = model(codes(2, 13))
    (out.text_logits[out.text_mask].square().mean() + out.logits[out.mask].square().mean()).backward()
    found = {name: parameter.grad.clone() for name, parameter in injection.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.each_kind
@pytest.mark.parametrize("training", [True, False])
def test_a_training_forward_inside_streaming_is_refused_when_its_gradient_is_needed(variant, training):
    """Before: the blocks, and all below the last of them, were left without a gradient and nothing was said."""
    model, _ = tiny_with({"variant": variant, "layers": "1,3", "chunk": 4})
    model.train(training)
    with model.streaming(2):
        for token in codes(2, 5).split(1, dim=-1):
            loss = model.forward_text(token)[1].square().mean()
        with pytest.raises(ContextError, match=r"layers\.3\..* streamed this pass.*outside streaming"):
            loss.backward()


def test_streaming_with_gradients_enabled_refuses_nothing_that_it_does_not_lose(variant):
    model, injection = tiny_with({"variant": variant, "layers": "1,3", "chunk": 4})
    token = codes(2, 1)
    with model.streaming(2), torch.no_grad():
        expected = model.forward_text(token)[1]
    model.requires_grad_(False)
    with model.streaming(2):
        assert torch.equal(model.forward_text(token)[1], expected)
    model.text_linear.requires_grad_(True)  # above the blocks: it has its gradient
    with model.streaming(2):
        model.forward_text(token)[1].square().mean().backward()
    assert model.text_linear.weight.grad is not None
    next(injection.parameters()).requires_grad_(True)
    with model.streaming(2), pytest.raises(ContextError, match="streamed this pass"):
        model.forward_text(token)[1].square().mean().backward()


def test_the_gradient_of_a_lora_in_a_streaming_mlp_is_not_lost_in_silence():
    model, _ = tiny_with({"variant": "gating_mlp", "layers": "3", "chunk": 4})
    replace_all_linear_with_lora(model, rank=2, scaling=1.0)
    model.requires_grad_(False)
    model.transformer.layers[3].gating.linear_out.lora_B.requires_grad_(True)
    with model.streaming(2), pytest.raises(ContextError, match="streamed this pass"):
        model.forward_text(codes(2, 1))[1].square().mean().backward()


@pytest.mark.each_kind
def test_gradients_are_bit_equal_under_the_hosts_checkpointing(variant):
    model, injection = tiny_with({"variant": variant, "layers": "1,3", "chunk": 4})
    plain = gradients(model, injection)
    model.transformer.checkpointing = True
    for name, gradient in gradients(model, injection).items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.first_by_default
@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge"])
def test_groups_of_chunks_change_no_gradient_alone_and_inside_the_hosts_checkpointing(variant):
    entry = {"variant": variant, "layers": "1,3", "chunk": 3}
    plain = gradients(*tiny_with(entry))
    for around in (False, True):
        model, injection = tiny_with({**entry, "checkpoint_chunks": 2})
        model.transformer.checkpointing = around
        for name, gradient in gradients(model, injection).items():
            assert torch.equal(gradient, plain[name]), name


def test_only_the_blocks_train_and_every_parameter_moves(variant):
    model, injection = tiny_with({"variant": variant, "layers": "last:2", "chunk": 4}, excite=False)
    injection.freeze_base()
    declared = {id(parameter) for parameter in injection.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == declared
    before = {name: parameter.detach().clone() for name, parameter in injection.named_parameters()}
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-3)
    for _ in range(2):
        gradients_ = gradients(model, injection)
        for name, parameter in injection.named_parameters():
            parameter.grad = gradients_[name]
        optimizer.step()
    assert not [name for name, parameter in injection.named_parameters() if torch.equal(parameter, before[name])]


@pytest.mark.first_by_default
@pytest.mark.parametrize("order", ["LoRA first", "blocks first"])
def test_lora_and_blocks_in_either_order(variant, order):
    model = random_tiny_lm(dtype=torch.bfloat16)
    registry = default_registry()
    host = {"name": "moshi", "hf_repo": "builtin:tiny"}
    config = parse_config({"host": host, "ttt": [{"variant": variant, "layers": "last:1"}]}, registry=registry)
    if order == "LoRA first":
        replace_all_linear_with_lora(model, rank=2, scaling=1.0)
    injection = inject(model, config)
    if order == "blocks first":
        replace_all_linear_with_lora(model, rank=2, scaling=1.0)
    injection.check_precision("after LoRA")
    assert not [name for name, _ in injection.named_parameters() if "lora" in name]
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    model.to(torch.bfloat16)
    injection.check_precision("after .to(bfloat16)")


@pytest.mark.parametrize("order", ["LoRA first", "blocks first"])
def test_gating_mlp_learns_on_top_of_the_loras_down_projection(order):
    """W_0 is the frozen matrix plus the LoRA, whichever came first."""
    model = random_tiny_lm()
    registry = default_registry()
    entry = {"variant": "gating_mlp", "layers": "last:1", "chunk": 4, "lr": 0.1}
    config = parse_config({"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": [entry]}, registry=registry)
    if order == "LoRA first":
        replace_all_linear_with_lora(model, rank=2, scaling=1.0)
    injection = inject(model, config)
    if order == "blocks first":
        replace_all_linear_with_lora(model, rank=2, scaling=1.0)
    lora = model.transformer.layers[2].gating.linear_out
    x = torch.randint(0, 32, (1, 17, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.nn.init.zeros_(lora.lora_B.weight)
        without = model.forward_text(x)[1]
        torch.nn.init.normal_(lora.lora_B.weight)
        with_lora = model.forward_text(x)[1]
        assert not torch.equal(without, with_lora), "the LoRA of the down projection is ignored"
        injection.remove()
        assert torch.equal(model.forward_text(x)[1], with_lora), "at step 0 the block changes nothing"


def test_gating_mlp_warns_once_where_no_update_can_take_effect():
    model, _ = tiny_with({"variant": "gating_mlp", "layers": "last:1", "chunk": 64})
    with pytest.warns(UserWarning, match="not longer than one chunk of 64"):
        model.forward_text(codes(1, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward_text(codes(1, 64))
    model, _ = tiny_with({"variant": "gating_mlp", "layers": "last:1", "chunk": 64})
    with warnings.catch_warnings(), MOSHI_HOST.carry(model):
        warnings.simplefilter("error")
        model.forward_text(codes(1, 64))


def test_a_parameter_in_the_wrong_dtype_is_named():
    _, injection = tiny_with({"variant": "ttt_linear", "layers": "last:1"})
    block = next(iter(injection.blocks.values()))
    block.gate.data = block.gate.data.bfloat16()
    with pytest.raises(PrecisionError, match=r"gate.*bfloat16.*float32"):
        injection.check_precision("load")


def test_the_7b_plan_on_the_meta_device_counts_what_it_adds():
    registry = default_registry()
    host = {"name": "moshi", "hf_repo": "builtin:moshi-7b"}
    entries = [
        {"variant": "ttt_mlp", "layers": "29,30,31"},
        {"variant": "ttt_linear", "layers": "first:2"},
    ]
    config = parse_config({"host": host, "ttt": entries}, registry=registry)
    model = MOSHI_HOST.skeleton(config.host)
    before = sum(parameter.numel() for parameter in model.parameters())
    assert before == 7_687_729_152
    plan = make_plan(model, MOSHI_HOST, config.ttt, policy=registry.policy(config.precision), registry=registry)
    # q, k, v, o with bias; learning rate; two norms; token scale; gate; fast network
    shared = 4 * (4096 * 4096 + 4096) + 32 * 4096 + 32 + 2 * 4096 + 2 * 4096 + 32 + 4096
    mlp, linear = 32 * (2 * 128 * 512 + 512 + 128), 32 * (128 * 128 + 128)
    assert [block.parameters for block in plan.blocks] == [shared + linear] * 2 + [shared + mlp] * 3
    plan.apply(model)
    assert sum(parameter.numel() for parameter in model.parameters()) - before == plan.parameters


def test_an_adapter_of_another_moshi_is_refused(tmp_path):
    _, injection = tiny_with({"variant": "ttt_linear", "layers": "last:1"})
    save_adapter(injection, tmp_path / "adapter")
    other = random_tiny_lm()
    names = set(other.state_dict())
    with pytest.raises(AdapterError, match=r"another base model.*dim"):
        load_adapter(other, tmp_path / "adapter")
    assert set(other.state_dict()) == names


@pytest.mark.each_kind
def test_adapter_round_trip_on_moshi(variant, tmp_path):
    model, injection = tiny_with({"variant": variant, "layers": "1,3", "chunk": 4}, dtype=torch.bfloat16)
    save_adapter(injection, tmp_path / "adapter", training_step=7)
    other, _ = tiny_with(dtype=torch.bfloat16)
    load_adapter(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other.forward_text(codes(1, 9))[1], model.forward_text(codes(1, 9))[1])


def test_an_adapter_brings_its_lora_and_refuses_another(tmp_path):
    def with_lora(rank: int):
        model = random_tiny_lm()
        replace_all_linear_with_lora(model, rank=rank, scaling=1.0)
        return model

    registry = default_registry()
    host = {"name": "moshi", "hf_repo": "builtin:tiny"}
    config = parse_config({"host": host, "ttt": [{"variant": "ttt_linear", "layers": "last:1"}]}, registry=registry)
    model = with_lora(2)
    injection = inject(model, config)
    with torch.no_grad():
        for parameter in MOSHI_HOST.extra_parameters(model).values():
            parameter.normal_()
    x = torch.randint(0, 32, (1, 17, 9))
    expected = model.forward_text(x)[1]
    save_adapter(injection, tmp_path / "adapter")
    for other in (random_tiny_lm(), with_lora(2)):
        load_adapter(other, tmp_path / "adapter")
        assert torch.equal(other.forward_text(x)[1], expected)
    wrong = with_lora(3)
    before = set(wrong.state_dict())
    with pytest.raises(AdapterError, match=r"'rank': 2.*'rank': 3"):
        load_adapter(wrong, tmp_path / "adapter")
    assert set(wrong.state_dict()) == before


def test_a_lora_that_was_added_is_taken_away_when_the_adapter_does_not_fit(tmp_path):
    model = random_tiny_lm()
    MOSHI_HOST.add_extra(model, {"lora": {"rank": 2, "scaling": 1.0}})
    config = parse_config(
        {"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": []}, registry=default_registry()
    )  # fmt: skip
    folder = save_adapter(inject(model, config), tmp_path / "adapter")
    tensors = load_file(folder / "adapter.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter.safetensors")
    base = random_tiny_lm()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(AdapterError, match="missing host"):
        load_adapter(base, folder)
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_removed_injection_is_not_saved(tmp_path):
    _, injection = tiny_with({"variant": "ttt_linear", "layers": "last:1"})
    injection.remove()
    with pytest.raises(AdapterError, match=r"they were removed.*Nothing was saved"):
        save_adapter(injection, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_folder_with_other_files_is_not_replaced(tmp_path):
    _, injection = tiny_with({"variant": "ttt_linear", "layers": "last:1"})
    folder = save_adapter(injection, tmp_path / "adapter")
    (folder / "notes.md").write_text("keep me")
    with pytest.raises(AdapterError, match=r"notes\.md"):
        save_adapter(injection, folder)
    assert (folder / "notes.md").read_text() == "keep me"


def test_document_ids_that_come_late_are_refused():
    model, _ = tiny_with({"variant": "ttt_linear", "layers": "last:1"})
    with MOSHI_HOST.carry(model) as state:
        model.forward_text(codes(2, 5))
    with (
        pytest.raises(ContextError, match="from the first segment on"),
        MOSHI_HOST.carry(model, state, document_ids=torch.tensor([1, 2])),
    ):
        pass


def test_a_model_built_on_meta_and_sharded_there_is_filled_like_a_whole_one(ranks):
    whole = fsdp_worker.filled()
    for rank in ranks:
        assert rank["meta"].keys() == whole.keys()
        for name, values in whole.items():
            assert rank["meta"][name] == values, name


def test_a_stale_injection_does_not_take_out_newer_blocks_of_a_moshi(variant):
    """Before: the newer injection's blocks were gone, and nothing was said."""
    entry = {"variant": variant, "layers": "1,3", "chunk": 4}
    model, stale = tiny_with(entry)
    with model.streaming(1), pytest.raises(HostError, match="streaming"):
        stale.remove()
    stale.remove()
    newer = stale.plan.apply(model)
    with pytest.raises(InjectionError, match="are of another injection"):
        stale.remove()
    assert len(newer.blocks) == 2
    newer.remove()
    with pytest.raises(InjectionError, match="they were removed"):
        newer.remove()
