"""An adapter is loaded without drawing a number first, and nothing that it does not hold is left without a value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.adapter import load_adapter, save_adapter
from moshi_ttt.core.errors import AdapterError, InjectionError
from moshi_ttt.core.injection import Injection, make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.hosts.moshi import lora
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.plugins.common.gate import GateConfig
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig

pytestmark = pytest.mark.each_kind

BLOCKS = {
    "ttt_linear": {"chunk": 8, "gate": {"alpha": "fixed", "init": 0.25}},
    "ttt_mlp": {"chunk": 8},
    "ttt_multilayer": {"chunk": 8, "depth": 3},
    "ttt_ridge": {"chunk": 8, "heads": 2, "gate": {"alpha": "fixed", "init": 0.25}},
    "gating_mlp": {"chunk": 8, "train_w_down": True, "conv_kernel": 3},
}


def base() -> torch.nn.Module:
    return resolve_repo("builtin:tiny").load_lm(dtype=torch.float32)


class Draws(TorchDispatchMode):
    """Counts the numbers that are drawn, from any generator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(out, torch.Tensor) and not out.is_meta:
            self.count += out.numel()
        return out


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, or the largest integer, until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def trained(*entries: dict, with_lora: bool = False) -> Injection:
    """Blocks, and a LoRA, with values that no initialization gives."""
    config = parse_config(
        {"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": list(entries)}, registry=default_registry()
    )
    model = base()
    if with_lora:
        lora.add_lora(model, rank=2, scaling=2.0)
    injection = inject(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*injection.parameters(), *MOSHI_HOST.extra_parameters(model).values()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return injection


@pytest.mark.first_by_default
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("variant", BLOCKS)
def test_loading_draws_nothing_and_leaves_nothing_without_a_value(tmp_path, variant, with_lora):
    injection = trained({"variant": variant, "layers": "1,2", **BLOCKS[variant]}, with_lora=with_lora)
    save_adapter(injection, tmp_path / "adapter")
    model, before = base(), torch.get_rng_state()
    with poisoned_memory(), Draws() as draws:
        loaded = load_adapter(model, tmp_path / "adapter")
    assert draws.count == 0
    assert torch.equal(torch.get_rng_state(), before)
    saved = {**dict(injection.model.named_parameters()), **dict(injection.model.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, saved.pop(name)), name
    assert not saved
    codes = torch.randint(0, 16, (1, model.num_codebooks, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model.forward_text(codes)[1], injection.model.forward_text(codes)[1])


class Projected(TTTLinear):
    """A third party's block: a fixed random projection, which no adapter holds."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.register_buffer("directions", torch.empty(4, info.dim, device=info.device), persistent=False)

    def reset_parameters(self, generator=None):
        super().reset_parameters(generator)
        self.directions.copy_(torch.randn(4, self.info.dim, generator=generator))


class ProjectedConfig(TTTLinearConfig):
    variant: str = "projected"


def test_a_buffer_that_is_drawn_and_not_saved_has_the_value_of_a_fresh_injection(tmp_path):
    registry = default_registry().copy()
    registry.register_block("projected", config=ProjectedConfig, block=Projected)
    entry = ProjectedConfig(layers="1", chunk=8, gate=GateConfig(alpha="fixed", init=0.5))
    plan = make_plan(tiny := base(), MOSHI_HOST, [entry], policy=FP32_STATE, registry=registry, seed=7)
    injection = plan.apply(tiny)
    (block,) = injection.blocks.values()
    with torch.no_grad():
        block.wq.weight.mul_(2)
    save_adapter(injection, tmp_path / "adapter")
    with poisoned_memory():
        loaded = load_adapter(base(), tmp_path / "adapter", registry=registry)
    (other,) = loaded.blocks.values()
    assert other.directions.std() > 0.5
    own = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        assert torch.equal(own[name], tensor), name


def test_values_of_other_blocks_are_refused_and_nothing_is_injected():
    injection = trained({"variant": "ttt_linear", "layers": "1", "chunk": 8})
    values = {**dict(injection.named_parameters()), **dict(injection.named_buffers())}
    lost = next(iter(values))
    configs = [block.config for block in injection.plan.blocks]
    for wrong, message in (
        ({name: t for name, t in values.items() if name != lost}, rf"not those of the blocks.*{lost}"),
        ({**values, "layers.1.sequence.other": values[lost]}, r"not those of the blocks.*sequence\.other"),
        ({**values, lost: values[lost].double()}, r"float64, and .* torch\.float32 is needed"),
        ({**values, lost: values[lost][:1]}, rf"{lost} is \[1"),
    ):
        model = base()
        before = set(model.state_dict())
        plan = make_plan(model, MOSHI_HOST, configs, policy=FP32_STATE)
        with pytest.raises(InjectionError, match=f"Nothing was injected: .*{message}"):
            plan.apply(model, wrong)
        assert set(model.state_dict()) == before
    skeleton = MOSHI_HOST.skeleton(MoshiHostConfig(hf_repo="builtin:tiny", dtype="float32"))
    with pytest.raises(InjectionError, match="meta device and cannot hold a value"):
        make_plan(skeleton, MOSHI_HOST, configs, policy=FP32_STATE).apply(skeleton, values)
    assert MOSHI_HOST.blocks(skeleton) == {}
    assert torch.equal(
        plan.apply(model, values).model.get_parameter(f"transformer.{lost.replace('sequence', 'ttt.block')}"),
        values[lost],
    )


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_load_that_fails_after_the_blocks_are_in_takes_them_out(tmp_path, monkeypatch, error):
    injection = trained({"variant": "gating_mlp", "layers": "1,2", **BLOCKS["gating_mlp"]}, with_lora=True)
    save_adapter(injection, tmp_path / "adapter")
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]

    def fail(tensor, value):
        raise error

    monkeypatch.setattr("moshi_ttt.core.adapter.assign", fail)  # the LoRA's factors, which come last
    with pytest.raises((AdapterError, KeyboardInterrupt)):
        load_adapter(model, tmp_path / "adapter")
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
