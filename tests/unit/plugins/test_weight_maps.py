"""Weights in other implementations' layouts: strict both ways, nothing lost in silence."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import UnknownNameError, WeightMapError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import BlockCase
from moshi_ttt.core.weight_map import export_weights, import_weights

D, H, DH, C = 16, 2, 8, 4
COMMON = {
    "learnable_ttt_lr_weight": (H, 1, D), "learnable_ttt_lr_bias": (H, 1), "ttt_norm_weight": (H, DH),
    "ttt_norm_bias": (H, DH), "post_norm.weight": (D,), "post_norm.bias": (D,),
}  # fmt: skip
FAST = {
    "ttt_linear": {"W1": (H, DH, DH), "b1": (H, 1, DH)},
    "ttt_mlp": {"W1": (H, DH, 4 * DH), "b1": (H, 1, 4 * DH), "W2": (H, 4 * DH, DH), "b2": (H, 1, DH)},
}
LAYOUTS = {
    "video_dit": {
        **{f"w{letter}.weight": (D, D) for letter in "qkvo"}, **{f"w{letter}.bias": (D,) for letter in "qkvo"},
        **COMMON, "gating_alpha": (D,),
    },
    "lm": {**{f"{letter}_proj.weight": (D, D) for letter in "qkvo"}, **COMMON, "learnable_token_idx": (C,)},
}  # fmt: skip


def block_of(variant, causal=True, seed=0):
    config = parse_block({"variant": variant, "chunk": C, "causal": causal}, registry=default_registry())
    return BlockCase(variant=variant, config=config, seed=seed).block()


def theirs(variant, layout):
    generator = torch.Generator().manual_seed(3)
    shapes = LAYOUTS[layout] | FAST[variant]
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request):
    return request.param


@pytest.mark.parametrize("variant", sorted(FAST))
def test_in_and_out_again_is_bit_equal(variant, layout):
    weight_map, tensors = default_registry().weight_map(f"{variant}-{layout}"), theirs(variant, layout)
    block = block_of(variant)
    gate = block.gate.detach().clone()
    import_weights(block, weight_map, tensors)
    assert torch.equal(block.fast_weight[0].detach(), tensors["W1"])
    if layout == "lm":
        assert torch.equal(block.token_scale_offset.detach(), tensors["learnable_token_idx"])
        assert not block.wq.bias.detach().any()
        assert torch.equal(block.gate.detach(), gate)
    else:
        assert not block.token_scale_offset.detach().any()
    back = export_weights(block, weight_map)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    other = block_of(variant, seed=9)
    import_weights(other, weight_map, back)
    rest = {"gate"} if layout == "lm" else set()
    mine = dict(block.named_parameters())
    assert all(torch.equal(p, mine[name]) for name, p in other.named_parameters() if name not in rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("W1"), "missing W1"),
        (lambda t: t.update({"g_proj.weight": torch.zeros(D, D)}), "unexpected g_proj.weight"),
        (lambda t: t.update(b1=torch.zeros(H, 1, 3)), r"b1 has shape \(2, 1, 3\), the block's fast_bias.0"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_anything_else_is_refused_and_nothing_written(layout, change, message):
    block, tensors = block_of("ttt_linear"), theirs("ttt_linear", layout)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    change(tensors)
    with pytest.raises(WeightMapError, match=message):
        import_weights(block, default_registry().weight_map(f"ttt_linear-{layout}"), tensors)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def test_what_a_layout_cannot_say_is_not_dropped():
    block = block_of("ttt_mlp")  # every parameter is disturbed
    with pytest.raises(WeightMapError, match=r"no place for: token_scale_offset\. Set them"):
        export_weights(block, default_registry().weight_map("ttt_mlp-video_dit"))
    with pytest.raises(WeightMapError, match=r"no place for: wq\.bias, wk\.bias, wv\.bias, wo\.bias"):
        export_weights(block, default_registry().weight_map("ttt_mlp-lm"))
    export_weights(block_of("ttt_mlp", causal=False), default_registry().weight_map("ttt_mlp-video_dit"))


def test_an_unknown_map_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'ttt_mlp-video_dit'"):
        default_registry().weight_map("ttt_mlp-videodit")


@pytest.mark.parametrize(("variant", "other"), [("ttt_linear", "ttt_mlp"), ("ttt_mlp", "ttt_linear")])
def test_a_map_of_another_variant_is_refused_both_ways(variant, other, layout):
    block, weight_map = block_of(variant), default_registry().weight_map(f"{other}-{layout}")
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    with pytest.raises(
        WeightMapError, match=r"differ in fast_bias\.1, fast_weight\.1\. Take the map of the block's own"
    ):
        import_weights(block, weight_map, theirs(other, layout))
    with pytest.raises(WeightMapError, match="not for the block"):
        export_weights(block, weight_map)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"gate": {"alpha": "fixed"}, "causal": False}], ids=str)
def test_gates_of_both_directions_go_along_and_a_fixed_one_does_not(options, layout):
    config = parse_block({"variant": "ttt_linear", "chunk": C, **options}, registry=default_registry())
    block, weight_map = (
        BlockCase(variant="ttt_linear", config=config).block(),
        default_registry().weight_map(f"ttt_linear-{layout}"),
    )
    with torch.no_grad():
        for letter in "qkvo":
            getattr(block, f"w{letter}").bias.zero_()
    gates = {name for name in export_weights(block, weight_map) if "gating" in name}
    both = {"gating_alpha", "backward_gating_alpha"} if options.get("bidirectional") else set()
    assert gates == (both if layout == "video_dit" else set())
