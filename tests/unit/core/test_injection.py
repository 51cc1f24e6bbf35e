"""Injection on a toy host: plan, validate, apply, remove. Nothing is half-done."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from moshi_ttt.core.adapter import fill_from_adapter, save_adapter
from moshi_ttt.core.block import Site, SiteKind
from moshi_ttt.core.config_parsing import parse_config
from moshi_ttt.core.errors import InjectionError, MoshiTTTError
from moshi_ttt.core.injection import Injection, Plan, inject, make_plan
from moshi_ttt.core.precision import FP32, FP32_STATE, PrecisionPolicy
from moshi_ttt.core.registry import Registry
from tests.unit.core.toy import DIM, LAYERS, AnyNameConfig, ToyBlock, ToyConfig, ToyHost, ToyMLP, ToyModel, toy_registry


def plan_for(
    model: nn.Module,
    *entries: ToyConfig,
    registry: Registry | None = None,
    policy: PrecisionPolicy = FP32_STATE,
    seed: int = 0,
) -> Plan:
    registry = registry or toy_registry()
    return make_plan(model, registry.host("toy"), entries, policy=policy, registry=registry, seed=seed)


class Untouched:
    """Context in which the model must not change: module names, parameters, buffers, outputs, gradient flags."""

    def __init__(self, model: ToyModel) -> None:
        self.model = model

    def look(self) -> dict[str, Any]:
        x = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(3)).to(self.model.layers[0].mix.weight.dtype)
        return {
            "modules": [(name, id(module)) for name, module in self.model.named_modules()],
            "state": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "flags": [parameter.requires_grad for parameter in self.model.parameters()],
            "output": self.model(x),
        }

    def __enter__(self) -> None:
        self.before = self.look()

    def __exit__(self, *_: object) -> None:
        after = self.look()
        assert after["modules"] == self.before["modules"]
        assert after["flags"] == self.before["flags"]
        assert after["state"].keys() == self.before["state"].keys()
        assert all(torch.equal(after["state"][name], tensor) for name, tensor in self.before["state"].items())
        assert torch.equal(after["output"], self.before["output"])


# ---- what a plan says and does


def test_figures_of_the_plan_are_what_is_added():
    model = ToyModel()
    before = sum(parameter.numel() for parameter in model.parameters())
    plan = plan_for(model, ToyConfig(layers="last:2"), ToyConfig(variant="toy_mlp", layers="0"))
    assert sum(parameter.numel() for parameter in model.parameters()) == before, "a plan touches nothing"
    injection = plan.apply(model)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters()) - before
    assert plan.parameters == sum(parameter.numel() for parameter in injection.parameters())
    states = [block.allocate_state(1) for block in injection.blocks.values()]
    assert plan.state_bytes == sum(t.numel() * t.element_size() for state in states for t in state.values())
    assert [str(block.site) for block in plan.blocks] == [
        "layers.0.feed_forward", "layers.2.sequence", "layers.3.sequence",
    ]  # fmt: skip


def test_plan_on_the_meta_device_has_the_same_figures():
    entry = ToyConfig(layers="all")
    on_meta, real = plan_for(ToyModel(device="meta"), entry), plan_for(ToyModel(), entry)
    assert (on_meta.parameters, on_meta.state_bytes) == (real.parameters, real.state_bytes)


def test_base_parameters_keep_their_names_and_remove_gives_the_base_back():
    model = ToyModel()
    with Untouched(model):
        names = set(model.state_dict())
        injection = plan_for(model, ToyConfig(), ToyConfig(variant="toy_mlp", layers="0-2")).apply(model)
        assert names < set(model.state_dict())
        x = torch.randn(2, 5, DIM)
        assert not torch.equal(model(x), ToyModel()(x)), "the blocks do something"
        injection.remove()


def test_same_seed_gives_the_same_values_whatever_else_is_injected():
    def values(seed: int, *entries: ToyConfig) -> dict[str, torch.Tensor]:
        return dict(plan_for(ToyModel(), *entries, seed=seed).apply(ToyModel()).named_parameters())

    alone = values(7, ToyConfig(layers="2"))
    torch.manual_seed(99)
    among = values(7, ToyConfig(layers="all"), ToyConfig(variant="toy_mlp", layers="2"))
    assert all(torch.equal(among[name], tensor) for name, tensor in alone.items())
    other = values(8, ToyConfig(layers="2"))
    assert not torch.equal(other["layers.2.sequence.initial"], alone["layers.2.sequence.initial"])
    initial = [tensor for name, tensor in among.items() if name.endswith("initial")]
    assert len({tuple(tensor.tolist()) for tensor in initial}) == LAYERS + 1, "every site draws its own"


def test_injection_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    model = ToyModel()
    plan_for(model, ToyConfig()).apply(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_freeze_base_leaves_the_declared_trainable_set():
    model = ToyModel()
    injection = plan_for(model, ToyConfig(layers="1,3")).apply(model)
    injection.freeze_base()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"layers.{layer}.ttt_sequence.{name}" for layer in (1, 3) for name in ("gate", "initial", "projection.weight")
    }
    assert {name for name, _ in injection.named_parameters()} == {n.replace("ttt_", "") for n in trainable}


def test_meta_model_is_initialized_once_it_has_storage():
    model = ToyModel(device="meta")
    injection = plan_for(model, ToyConfig(layers="2"), seed=7).apply(model)
    assert all(parameter.is_meta for parameter in injection.parameters())
    model.to_empty(device="cpu")
    injection.initialize()
    real_model = ToyModel()
    real = dict(plan_for(real_model, ToyConfig(layers="2"), seed=7).apply(real_model).named_parameters())
    assert all(torch.equal(parameter, real[name]) for name, parameter in injection.named_parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "policy", "stored"),
    [
        (torch.bfloat16, FP32_STATE, torch.float32),
        (torch.float32, FP32, torch.float32),
        (torch.float64, FP32_STATE, torch.float64),
    ],
)
def test_blocks_are_stored_as_the_policy_says(dtype, policy, stored):
    model = ToyModel(dtype=dtype)
    injection = plan_for(model, ToyConfig(), policy=policy).apply(model)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in injection.parameters()} == {stored}
    injection.check_precision("cast")


def test_each_replacement_is_one_log_line(caplog):
    model = ToyModel()
    with caplog.at_level(logging.INFO, logger="moshi_ttt.injection"):
        plan_for(model, ToyConfig(layers="2,3")).apply(model)
    assert len(caplog.messages) == 2
    for fact in ("layers.3.sequence", "toy", "80 parameters", "torch.float32", "cpu", "initial[8]"):
        assert fact in caplog.messages[1]


def test_inject_is_plan_and_apply():
    registry, model = toy_registry(), ToyModel()
    values = {"host": {"name": "toy"}, "seed": 7, "ttt": [{"variant": "toy", "layers": "last:1"}]}
    injection = inject(model, parse_config(values, registry=registry), registry=registry)
    other = ToyModel()
    planned = plan_for(other, ToyConfig(layers="last:1"), seed=7).apply(other)
    for (name, have), (_, want) in zip(injection.named_parameters(), planned.named_parameters(), strict=True):
        assert torch.equal(have, want), name


def test_none_injects_nothing():
    model = ToyModel()
    with Untouched(model):
        injection = plan_for(model, ToyConfig(layers="none")).apply(model)
    assert injection.blocks == {}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last:1", [2]),
        ("last:2", [1, 2]),
        ("all", [0, 1, 2]),
        ("every:2", [0, 2]),
        ("first:1,-2", [0, 2]),
        ("middle", [0, 1]),
    ],
)  # fmt: skip
def test_words_count_over_the_layers_that_have_such_a_site(layers, expected):
    plan = plan_for(ToyModel(), ToyConfig(variant="toy_mlp", layers=layers))
    assert [block.site.layer for block in plan.blocks] == expected


def test_more_sites_than_there_are_is_an_error_that_lists_them():
    with pytest.raises(InjectionError, match="from 1 to 3; the layers are 0 to 2"):
        plan_for(ToyModel(), ToyConfig(variant="toy_mlp", layers="last:4"))


# ---- plans that cannot be carried out


def build_feed_forward(config: ToyConfig, info: Any, roles: Any) -> ToyBlock:
    """A factory, not a class: it carries no ``kind``, and what it builds is of another kind than the site."""
    return ToyMLP(config, info, roles)


def build_nothing(config: ToyConfig, info: Any, roles: Any) -> nn.Module:
    return nn.Linear(1, 1)


def build_with_a_bug(config: ToyConfig, info: Any, roles: Any) -> nn.Module:
    raise ZeroDivisionError("a bug of the plugin")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([ToyConfig(layers="4")], "out of range"),
        ([ToyConfig(layers="2,2")], "claimed twice"),
        ([ToyConfig(layers="1"), ToyConfig(layers="0-1")], r"layers\.1\.sequence is already claimed by ttt\[0\]"),
        ([ToyConfig(variant="toy_mlp", layers="3")], r"no site layers\.3\.feed_forward; feed_forward sites: "),
        ([ToyConfig(causal=False)], "'toy' is causal and this block is not"),
        ([ToyConfig(heads=3)], "heads = 3 does not divide the width 8"),
        ([AnyNameConfig(variant="toi")], "Did you mean 'toy'"),
        ([AnyNameConfig(variant="wrong_kind", layers="1")], "feed_forward"),
        ([AnyNameConfig(variant="no_block", layers="1")], "SequenceBlock"),
        ([AnyNameConfig(variant="buggy", layers="1")], "a bug of the plugin"),
    ],
    ids=["range", "twice", "claimed", "no site", "causal", "options", "variant", "kind", "type", "bug"],
)  # fmt: skip
def test_conflict_is_one_clear_error(entries, message):
    model = ToyModel()
    registry = toy_registry(wrong_kind=build_feed_forward, no_block=build_nothing, buggy=build_with_a_bug)
    with Untouched(model), pytest.raises(InjectionError, match=message):
        plan_for(model, *entries, registry=registry)


def test_all_conflicts_are_in_one_error():
    model = ToyModel()
    entries = [
        ToyConfig(layers="1"),
        ToyConfig(layers="1-2"),
        ToyConfig(layers="9"),
        ToyConfig(variant="toy_mlp", layers="3"),
        ToyConfig(layers="3", causal=False),
        ToyConfig(layers="0", heads=5),
        AnyNameConfig(variant="nothing_like_it"),
    ]
    with Untouched(model), pytest.raises(InjectionError) as caught:
        plan_for(model, *entries)
    problems = str(caught.value).splitlines()[1:]
    assert [problem[: problem.index("(") - 1] for problem in problems] == [f"- ttt[{i}]" for i in range(1, 7)]


def test_second_injection_is_refused():
    model = ToyModel()
    injection = plan_for(model, ToyConfig(layers="1")).apply(model)
    with Untouched(model), pytest.raises(InjectionError, match=r"already has blocks; remove them first"):
        plan_for(model, ToyConfig(layers="2"))
    injection.remove()
    plan_for(model, ToyConfig(layers="2")).apply(model)


def test_stale_plan_is_refused():
    model = ToyModel()
    plan = plan_for(model, ToyConfig(layers="1"))
    plan.apply(model)
    with Untouched(model), pytest.raises(InjectionError, match="already has blocks"):
        plan.apply(model)


def test_host_in_another_dtype_than_the_policy_asks_for_is_refused():
    model = ToyModel(dtype=torch.bfloat16)
    with Untouched(model), pytest.raises(InjectionError, match=r"bfloat16, policy 'fp32' asks for torch\.float32"):
        plan_for(model, ToyConfig(), policy=FP32)


def test_host_without_sites_is_refused():
    class Bare(ToyHost):
        def sites(self, model: nn.Module) -> tuple[()]:
            return ()

    with pytest.raises(MoshiTTTError):
        make_plan(ToyModel(), Bare(), [ToyConfig()], policy=FP32_STATE, registry=toy_registry())


# ---- an application that fails midway


class FailsMidway(ToyBlock):
    """Fails for the layers after the first: in its constructor or later, as ``where`` says; not on the meta device."""

    where: ClassVar[str]

    def __init__(self, config: Any, info: Any, roles: Any) -> None:
        super().__init__(config, info, roles)
        late = info.site.layer > 0 and info.device.type != "meta"
        if late and self.where == "constructor":
            raise RuntimeError("out of memory")
        if late and self.where == "dtype":
            self.gate = nn.Parameter(self.gate.detach().bfloat16())
        self.late = late

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self.late and self.where == "reset_parameters":
            raise RuntimeError("out of memory")


class FailingHost(ToyHost):
    def attach(self, model: nn.Module, blocks: Any) -> None:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["constructor", "reset_parameters", "dtype", "attach"])
def test_application_that_fails_midway_leaves_the_model_untouched(where):
    block = type("Failing", (FailsMidway,), {"where": where})
    registry, model = toy_registry(failing=block), ToyModel()
    host = FailingHost() if where == "attach" else ToyHost()
    plan = make_plan(
        model, host, [AnyNameConfig(variant="failing", layers="all")], policy=FP32_STATE, registry=registry
    )
    with Untouched(model), pytest.raises((InjectionError, RuntimeError, MoshiTTTError), match=r"out of memory|gate"):
        plan.apply(model)
    assert host.blocks(model) == {}


def test_copy_of_an_injected_model_is_independent():
    model = ToyModel()
    injection = plan_for(model, ToyConfig(layers="1")).apply(model)
    twin = Injection(model=copy.deepcopy(model), plan=injection.plan)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(next(twin.parameters()), next(injection.parameters()))
    assert list(twin.blocks) == [Site(1, SiteKind.SEQUENCE)]


# ---- an injection whose blocks are no longer in the model


def removed(injection):
    injection.remove()


def replaced(injection):
    injection.remove()
    injection.plan.apply(injection.model)


def replaced_elsewhere(injection):
    injection.remove()
    plan_for(injection.model, ToyConfig(layers="0,2")).apply(injection.model)


def replaced_by_hand(injection):
    blocks = injection.host.detach(injection.model)
    again = {site: copy.deepcopy(block) for site, block in blocks.items()}
    injection.host.attach(injection.model, again)


def test_the_earlier_name_of_initialize():
    model = ToyModel()
    injection = plan_for(model, ToyConfig(layers="2")).apply(model)
    with pytest.warns(DeprecationWarning, match=r"Injection\.initialise is now Injection\.initialize"):
        injection.initialise()


USES = {
    "remove": Injection.remove,
    "blocks": lambda injection: injection.blocks,
    "parameters": lambda injection: list(injection.parameters()),
    "named_buffers": lambda injection: list(injection.named_buffers()),
    "freeze_base": Injection.freeze_base,
    "set_inner_lr_factor": lambda injection: injection.set_inner_lr_factor(1.0),
    "initialize": Injection.initialize,
    "check_precision": lambda injection: injection.check_precision("now"),
    "save_adapter": lambda injection: save_adapter(injection, "nowhere"),
    "fill_from_adapter": lambda injection: fill_from_adapter(injection, "nowhere"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("since", [removed, replaced, replaced_elsewhere, replaced_by_hand], ids=lambda f: f.__name__)
def test_a_stale_injection_is_refused_and_touches_nothing(use, since, tmp_path, monkeypatch):
    """Before: ``remove`` took out the blocks of the newer injection, and the others changed or saved them."""
    monkeypatch.chdir(tmp_path)
    model = ToyModel()
    stale = plan_for(model, ToyConfig(layers="1,3")).apply(model)
    since(stale)
    blocks = stale.host.blocks(model)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    message = "they were removed. Inject again" if since is removed else "are of another injection"
    with Untouched(model), pytest.raises(MoshiTTTError, match=rf"made blocks at layers\.1\.\w+, layers\.3.*{message}"):
        USES[use](stale)
    assert stale.host.blocks(model) == blocks
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not list(tmp_path.iterdir())


def test_an_injection_of_blocks_that_are_put_back_holds_again():
    model = ToyModel()
    injection = plan_for(model, ToyConfig(layers="1,3")).apply(model)
    blocks = injection.host.detach(model)
    injection.host.attach(model, blocks)
    injection.remove()
    assert injection.host.blocks(model) == {}


def test_an_injection_of_nothing_can_be_removed_and_does_not_take_a_later_ones_blocks():
    model = ToyModel()
    nothing = plan_for(model, ToyConfig(layers="none")).apply(model)
    nothing.remove()
    nothing.remove()
    later = plan_for(model, ToyConfig(layers="1")).apply(model)
    with pytest.raises(InjectionError, match=r"made blocks at no site, and .* of another injection"):
        nothing.remove()
    assert list(later.blocks) == [Site(1, SiteKind.SEQUENCE)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copied_injection_stands_for_the_blocks_of_the_copied_model(copied):
    model = ToyModel()
    injection = plan_for(model, ToyConfig(layers="1")).apply(model)
    twin = copied(injection)
    twin.remove()
    assert list(injection.blocks) == [Site(1, SiteKind.SEQUENCE)]
    injection.remove()
