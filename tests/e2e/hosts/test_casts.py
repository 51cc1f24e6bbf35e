"""Projections are cast once while Moshi streams: bytes written a step, the same bits, and changes in mid-stream."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.core.adapter import fill_from_adapter, save_adapter
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import PrecisionError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import BlockCase, DeviceLog, Shape
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import block_sites
from moshi_ttt.hosts.moshi.streaming import restore_stream_state, stream_state
from tests.project import ROOT
from tests.unit.hosts.toy import generator_of, random_codes, run, user_codes
from tests.unit.hosts.trained import tiny_with_trained

pytestmark = pytest.mark.each_kind

VARIANTS = {
    "ttt_linear": {}, "ttt_mlp": {}, "ttt_multilayer": {}, "gating_mlp": {"train_w_down": True, "clip": 0.5},
}  # fmt: skip
ROWS = 2


def model_with(variant: str, dtype: str = "bfloat16", **options):
    block = {"variant": variant, "layers": "1,3", "chunk": 4, **VARIANTS[variant], **options}
    return tiny_with_trained([block], dtype)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


class Casts(TorchDispatchMode):
    """Bytes that casts of some parameters write."""

    def __init__(self, parameters) -> None:
        super().__init__()
        self.sources = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.sources:
            self.bytes += out.numel() * out.element_size()
        return out


def sites_of(model):
    return [site for layer in model.transformer.layers for site in block_sites(layer)]


class EveryTime(ParameterCasts):
    """Casts whenever it is asked."""

    def get(self, source, dtype):
        return source.to(dtype)


def without_casts(model) -> None:
    """A stream that is running casts at every step from now on."""
    for site in sites_of(model):
        site._streaming_state.casts = EveryTime(site.block)


@torch.no_grad()
def streamed(model, *, kept: bool = True, change=None, steps: int = 14):
    """Text logits ``[B, T, card]`` of a stream with masks, a reset and updates disabled, and the final state."""
    codes, out = random_codes(model, ROWS, steps), []
    with model.streaming(ROWS):
        if not kept:
            without_casts(model)
        for t in range(steps):
            model.set_exec_mask(torch.tensor([True, t % 5 != 3]))
            if t == 6:
                model.reset_streaming(torch.tensor([True, False]))
            if change is not None and t in (4, 9):
                change()
            with MOSHI_HOST.updates(model, t not in (7, 8)):
                out.append(model.forward_text(codes[..., t : t + 1])[1])
        state = stream_state(model)
    return torch.cat(out, dim=2), state


def assert_same(one, other) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


def bytes_of(block) -> int:
    """What the casts of one block write: four projections with bias in bfloat16; or the change of W_0 in bfloat16, and
    the projection in float64 for the clip's norm.
    """
    dim = block.info.dim
    return 2 * dim * block.hidden_width + 8 * dim * dim if block.info.mlp is not None else 8 * (dim * dim + dim)


def test_a_step_casts_no_parameter_after_the_first(variant):
    model, injection = model_with(variant)
    each = [bytes_of(block) for block in injection.blocks.values()]
    assert [block.cast_bytes for block in injection.plan.blocks] == each
    codes, written = random_codes(model, ROWS, 6), {}
    for kept in (False, True):
        with torch.no_grad(), model.streaming(ROWS):
            if not kept:
                without_casts(model)
            written[kept] = []
            for t in range(6):
                with Casts(injection.parameters()) as counted:
                    model.forward_text(codes[..., t : t + 1])
                written[kept].append(counted.bytes)
            if kept:
                assert [site._streaming_state.casts.bytes for site in sites_of(model)] == each
    assert written == {False: 6 * [sum(each)], True: [sum(each), 0, 0, 0, 0, 0]}


def test_a_stream_that_keeps_casts_is_bit_equal(variant):
    model, _ = model_with(variant)
    assert_same(streamed(model), streamed(model, kept=False))


def test_nothing_is_kept_where_nothing_is_cast(variant):
    model, injection = model_with(variant, "float32")
    assert injection.plan.cast_bytes == sum(block.cast_bytes() for block in injection.blocks.values())
    with torch.no_grad(), model.streaming(ROWS):
        model.forward_text(random_codes(model, ROWS, 1))
        wide = 8 * sites_of(model)[0].block.info.dim ** 2 if variant == "gating_mlp" else 0  # the clip's norm
        assert [site._streaming_state.casts.bytes for site in sites_of(model)] == [wide, wide]


def in_place(injection):
    for parameter in injection.parameters():
        parameter.mul_(1.25)


def by_data(injection):
    for parameter in injection.parameters():
        parameter.data.copy_(parameter.data * 1.25)


def by_an_optimizer(injection):
    for parameter in injection.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(injection.parameters(), lr=1e-2, fused=True).step()


def by_moving(injection):
    injection.model.to(torch.bfloat16).to("cpu")
    in_place(injection)


@pytest.mark.first_by_default
@pytest.mark.parametrize("change", [in_place, by_data, by_an_optimizer, by_moving], ids=lambda f: f.__name__)
def test_a_change_takes_effect_at_the_next_step(variant, change):
    results = []
    for kept in (True, False):
        model, injection = model_with(variant)
        results.append(streamed(model, kept=kept, change=lambda given=injection: change(given)))
    assert_same(*results)
    assert not torch.equal(results[0][0], streamed(model_with(variant)[0])[0])


@pytest.mark.first_by_default
def test_an_adapter_that_is_loaded_in_mid_stream_takes_effect_at_the_next_step(variant, tmp_path):
    model, injection = model_with(variant)
    with torch.no_grad():
        in_place(injection)
    folder = save_adapter(injection, tmp_path / "adapter")
    results = []
    for kept in (True, False):
        model, injection = model_with(variant)
        results.append(streamed(model, kept=kept, change=lambda given=injection: fill_from_adapter(given, folder)))
    assert_same(*results)
    assert not torch.equal(results[0][0], streamed(model_with(variant)[0])[0])


@pytest.mark.first_by_default
def test_a_stream_is_restored_with_its_state_and_without_casts(variant):
    model, _ = model_with(variant)
    codes = random_codes(model, ROWS, 6)
    with torch.no_grad(), model.streaming(ROWS):
        for t in range(3):
            model.forward_text(codes[..., t : t + 1])
        saved = stream_state(model)
        wanted = model.forward_text(codes[..., 3:4])[1]
    assert not any("casts" in name for name in saved)
    with torch.no_grad(), model.streaming(ROWS):
        restore_stream_state(model, saved)
        assert torch.equal(model.forward_text(codes[..., 3:4])[1], wanted)


@pytest.mark.first_by_default
def test_a_copy_of_a_streaming_model_follows_its_own_parameters(variant):
    model, _ = model_with(variant)
    codes = random_codes(model, ROWS, 3)
    with torch.no_grad(), model.streaming(ROWS):
        model.forward_text(codes[..., :1])
        other = copy.deepcopy(model)
        for site in sites_of(other):
            assert site._streaming_state.casts.bytes == 0
            for parameter in site.block.parameters():
                parameter.data.mul_(1.25)
        plain = copy.deepcopy(other)
        without_casts(plain)
        wanted, changed = (each.forward_text(codes[..., 1:2])[1] for each in (plain, other))
        assert torch.equal(wanted, changed)
        assert not torch.equal(wanted, model.forward_text(codes[..., 1:2])[1])


@pytest.mark.first_by_default
def test_casts_end_with_the_stream(variant):
    model, _ = model_with(variant)
    before = set(model.state_dict())
    with torch.no_grad(), model.streaming(ROWS):
        model.forward_text(random_codes(model, ROWS, 1))
        kept = [site._streaming_state.casts for site in sites_of(model)]
        assert set(model.state_dict()) == before
    assert [casts.bytes for casts in kept] == [0, 0]


@pytest.mark.first_by_default
def test_generation_gives_the_same_tokens(variant):
    tokens = []
    for kept in (True, False):
        model, _ = model_with(variant)
        generator = generator_of(model)
        with generator.streaming(ROWS):
            if not kept:
                without_casts(model)
            tokens.append(torch.cat(run(generator, user_codes(model, ROWS, 10)), dim=-1))
    assert torch.equal(*tokens)


def test_a_frozen_stream_is_bit_equal_and_refuses_a_change_at_the_next_step(variant):
    model, injection = model_with(variant)
    expected = streamed(model)
    with MOSHI_HOST.frozen(model):
        assert_same(streamed(model), expected)
    with pytest.raises(PrecisionError, match="declared frozen"), MOSHI_HOST.frozen(model):
        streamed(model, change=lambda: by_data(injection))
    assert not any(site.is_streaming or site.frozen for site in sites_of(model))


@pytest.mark.first_by_default
def test_a_frozen_stream_refuses_a_change_that_no_step_saw(variant):
    model, injection = model_with(variant)
    codes = random_codes(model, ROWS, 1)

    def changed_at_the_end() -> None:
        with MOSHI_HOST.frozen(model), torch.no_grad(), model.streaming(ROWS):
            model.forward_text(codes)
            in_place(injection)

    with pytest.raises(PrecisionError, match="declared frozen"):
        changed_at_the_end()
    assert not any(site.is_streaming for site in sites_of(model))
    with torch.no_grad(), model.streaming(ROWS):  # and the next stream starts
        model.forward_text(codes)


def test_frozen_parameters_are_cast_once_on_every_device():
    """The launches of a step where nothing can see a change: ``meta`` stands for an accelerator."""
    launches = {}
    for frozen in (False, True):
        model, injection = model_with("ttt_mlp")
        (block, _) = injection.blocks.values()
        block.to("meta")
        site = next(site for site in sites_of(model) if site.block is block)
        site.frozen = frozen
        state = site._init_streaming_state(ROWS)
        x = torch.empty(ROWS, 1, block.info.dim, dtype=torch.bfloat16, device="meta")
        with torch.no_grad():
            for _ in range(2):
                with DeviceLog() as log:
                    block.step(x, state.buffers, BlockContext(casts=state.casts))
        launches[frozen] = log.num_launches
    assert launches[False] - launches[True] == 8, "four weights and four biases"


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("ttt_mlp", {}),
        ("ttt_ridge", {}),
        ("gating_mlp", {}),
        ("gating_mlp", {"train_w_down": True}),
        ("gating_mlp", {"clip": 1.0}),
    ],
)
def test_the_documentation_says_what_a_block_of_7b_casts(variant, options):
    case = BlockCase(
        variant=variant, config=parse_block({"variant": variant, **options}, registry=default_registry()),
        dtype=torch.bfloat16, shape=Shape(dim=4096, heads=32, batch=1),
    )  # fmt: skip
    info = case.info("meta")
    if info.mlp is not None:
        info = replace(info, mlp=wide_mlp())
    block = case.registry.block(variant).factory(case.config, info, case.policy.roles(case.dtype))
    casts, x = ParameterCasts(block, frozen=True), torch.empty(1, 1, 4096, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        block.step(x, block.allocate_state(1), case.context(x, casts=casts))
    table = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split("## Casts in a stream")[1].split("\n## ")[0]
    name = f"`{variant}`" + "".join(f", `{key}: {json.dumps(value)}`" for key, value in options.items())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[0] == name or (variant != "gating_mlp" and name in row[0])]
    assert block.cast_bytes() == casts.bytes
    assert row[1:] == [f"{casts.bytes:,}", "0", f"{casts.bytes:,}"]


def wide_mlp() -> nn.Module:
    mlp = nn.Module()
    mlp.linear_in = nn.Linear(4096, 2 * 11_264, bias=False, device="meta", dtype=torch.bfloat16)
    mlp.linear_out = nn.Linear(11_264, 4096, bias=False, device="meta", dtype=torch.bfloat16)
    mlp.activation = nn.functional.silu
    return mlp
