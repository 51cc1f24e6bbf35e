"""The layer around the inner loop: what the rules say of its numbers (rule 10), its gate, its refusals."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import ConfigError, ContextError, PrecisionError
from moshi_ttt.core.format import GridFormat, SequenceFormat
from moshi_ttt.core.precision import FP32, FP32_STATE, UNIFORM
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import BlockCase, Shape
from moshi_ttt.core.testing.case import error
from moshi_ttt.plugins.common.normalization import l2_normalize
from moshi_ttt.plugins.hybrid import layer, naive
from moshi_ttt.plugins.hybrid.checks import NARROWEST_HEAD
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop, naive_inputs, naive_output
from moshi_ttt.plugins.hybrid.rope import rotate
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
from moshi_ttt.plugins.ttt_mlp.block import TTTMLP
from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig

UNIFORM_WITH_FLOAT32_STATE = replace(UNIFORM, name="float32_state_alone", state="float32")


def build(block=TTTLinear, config=None, *, dim=16, heads=2, dtype=torch.float32, policy=FP32_STATE):
    config = config or TTTLinearConfig(chunk=4)
    info = SiteInfo(
        site=Site(0, SiteKind.SEQUENCE), dim=dim, num_heads=heads, device=torch.device("cpu"), dtype=dtype,
        format=SequenceFormat(),
    )  # fmt: skip
    made = block(config, info, policy.roles(dtype))
    made.reset_parameters(torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rope_keeps_the_dtype_and_rotates_as_defined(dtype):
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    position = torch.arange(9)[None] % 4
    expected = naive.rotated(x.transpose(1, 2), 4, 10_000.0).transpose(1, 2)
    actual = rotate(x.to(dtype), position, dtype=torch.promote_types(dtype, torch.float32))
    assert actual.dtype == dtype
    bound = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert (actual.double() - expected).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_l2_norm_is_at_most_one(dtype):
    x = 100 * torch.randn(64, 33, dtype=dtype)
    norm = l2_normalize(x).double().norm(dim=-1)
    assert norm.max() <= 1 + 8 * torch.finfo(dtype).eps
    assert torch.isfinite(l2_normalize(torch.zeros(3, 8, dtype=dtype))).all()


def test_a_constant_difference_has_a_finite_target_and_gradient():
    k = torch.randn(1, 5, 2, 8, requires_grad=True)
    v = (k.detach() + 3.0).requires_grad_()
    target = layer.reconstruction_target(v, k, torch.ones(2, 8), torch.zeros(2, 8), 1e-8)
    target.sum().backward()
    assert torch.isfinite(target).all()
    assert torch.isfinite(k.grad).all()
    assert torch.isfinite(v.grad).all()
    exact = layer.reconstruction_target(
        torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), torch.ones(1, 4), torch.zeros(1, 4), 1e-8
    )
    assert (exact == 0).all()


def test_target_standard_deviation_is_unbiased():
    v, k = torch.randn(1, 3, 1, 8, dtype=torch.float64), torch.zeros(1, 3, 1, 8, dtype=torch.float64)
    target = layer.reconstruction_target(v, k, torch.ones(1, 8), torch.zeros(1, 8), 0.0)
    assert torch.allclose(target.std(-1, unbiased=True), torch.ones(1, 3, 1, dtype=torch.float64))


def test_initial_values():
    block = build(TTTMLP, TTTMLPConfig(chunk=8), dim=256, heads=2)
    for weight in (block.wq.weight, block.wo.weight, block.fast_weight[0], block.fast_weight[1], block.lr_weight):
        assert weight.detach().std() == pytest.approx(0.02, rel=0.1)
    for zero in (block.wq.bias, block.lr_bias, block.fast_bias[0], block.token_scale_offset, block.post_norm.bias):
        assert (zero == 0).all()
    assert (block.norm_weight == 1).all()
    assert (block.gate == 0.05).all()
    assert torch.equal(block.token_scale(), 1 / torch.arange(1.0, 9.0))
    assert block.fast_weight[0].shape == (2, 128, 512)


def test_a_token_scale_is_never_negative():
    block = build()
    with torch.no_grad():
        block.token_scale_offset.copy_(torch.tensor([-5.0, -0.1, 0.0, 1.0]))
    assert block.token_scale().tolist() == pytest.approx([0.0, 0.4, 1 / 3, 1.25])


def test_gate_zero_is_the_identity_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        block = build(config=TTTLinearConfig(chunk=4, gate={"init": 0.0}), dtype=dtype)
        x = torch.randn(2, 9, 16, dtype=dtype)
        assert torch.equal(block(x)[0], x)
        assert torch.equal(block.step(x[:, :1], block.allocate_state(2)), x[:, :1])


@pytest.mark.parametrize(
    ("policy", "state", "master"),
    [
        (FP32_STATE, torch.float32, torch.float32),
        (UNIFORM, torch.bfloat16, torch.bfloat16),
        (FP32, torch.float32, torch.float32),
    ],
    ids=["fp32_state", "uniform", "fp32"],
)
def test_policies_decide_dtypes(policy, state, master):
    host = torch.float32 if policy is FP32 else torch.bfloat16
    block = build(dtype=host, policy=policy)
    y, after = block(torch.randn(2, 9, 16, dtype=host))
    assert y.dtype == host
    assert after["weight.0"].dtype == state
    assert block.wq.weight.dtype == master


def test_updates_off_freezes_the_fast_weights():
    block, x = build(), torch.randn(1, 9, 16)
    _, frozen = block(x, None, BlockContext(updates=False))
    _, learned = block(x)
    assert torch.equal(frozen["weight.0"], block.init_state(1)["weight.0"])
    assert not torch.equal(learned["weight.0"], frozen["weight.0"])


def test_non_causal_block_refuses_a_state():
    block = build(config=TTTLinearConfig(chunk=4, causal=False))
    with pytest.raises(ContextError, match="not causal"):
        block(torch.randn(1, 4, 16), block.init_state(1))


@pytest.mark.parametrize(("dim", "heads"), [(15, 2), (6, 2)], ids=["not whole", "odd"])
def test_head_width_must_be_even(dim, heads):
    with pytest.raises(ConfigError, match="even"):
        build(dim=dim, heads=heads)


@pytest.mark.parametrize(
    "options",
    [{"chunk": 0}, {"base_lr": 0.0}, {"base_lr": -1}, {"gate": {"init": 1.5}}, {"gate": {"init": -0.1}}, {"chunks": 4}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TTTLinearConfig(**options)


def test_lora_leaves_a_block_alone():
    from moshi.modules.lora import replace_all_linear_with_lora

    block = build()
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    replace_all_linear_with_lora(torch.nn.ModuleList([block]), rank=2, scaling=1.0)
    assert before.keys() == dict(block.named_parameters()).keys()


@pytest.mark.parametrize("block", [TTTLinear, TTTMLP])
def test_a_token_of_zeros_does_not_swamp_the_gradients(block):
    made = build(block, TTTLinearConfig(chunk=4) if block is TTTLinear else TTTMLPConfig(chunk=4))
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    made(x)[0].square().sum().backward()
    assert max(float(parameter.grad.abs().max()) for parameter in made.parameters()) < 1e4


def test_a_constant_difference_is_finite_in_float16():
    v, k = torch.full((1, 1, 1, 4), 2.0, dtype=torch.float16), torch.zeros(1, 1, 1, 4, dtype=torch.float16)
    target = layer.reconstruction_target(v, k, torch.ones(1, 4).half(), torch.zeros(1, 4).half(), 1e-8)
    assert torch.isfinite(target).all()


def test_autocast_does_not_round_the_state():
    block = build()
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    _, expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = block(x)
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.exhaustive  # torch traces, for seconds; options are traced in test_hybrid_options.py
@pytest.mark.first_by_default
@pytest.mark.parametrize("block", [TTTMLP, TTTLinear])
def test_blocks_can_be_traced_whole(block):
    made = build(block, TTTLinearConfig(chunk=4) if block is TTTLinear else TTTMLPConfig(chunk=4))
    x = torch.randn(1, 9, 16)
    made(x)  # the first call checks the dtypes
    traced = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(traced(x)[0], made(x)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_mask_that_is_not_bool_is_refused_before_anything_is_written(dtype):
    block = build()
    state = block.allocate_state(2)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ContextError, match="one bool per row"):
        block.step(torch.randn(2, 1, 16), state, BlockContext(exec_mask=torch.ones(2, dtype=dtype)))
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_no_tokens_are_refused():
    with pytest.raises(ContextError, match="no tokens"):
        build()(torch.randn(2, 0, 16))


def test_activations_in_another_dtype_than_planned_are_refused():
    with pytest.raises(PrecisionError, match=r"activations.*bfloat16"):
        build()(torch.randn(1, 4, 16, dtype=torch.bfloat16))


def reference_weights(block, gate):
    """A block's parameters under the names of the reference vectors."""
    given = {name: parameter.detach() for name, parameter in block.named_parameters()}
    return {**given, "alpha": gate.detach(), "token_scale": block.token_scale().detach()}


def one_direction(block, x, gate):
    given, config = reference_weights(block, gate), block.config
    q, k, v, lr = naive_inputs(
        x, given, num_heads=block.info.num_heads, chunk_size=config.chunk, base_lr=config.base_lr,
        theta=config.rope_theta, target_eps=config.target_eps,
    )  # fmt: skip
    fast = [[p.detach() for p in part] for part in (block.fast_weight, block.fast_bias)]
    y, _, _ = naive_inner_loop(
        q, k, v, lr, given["token_scale"], given["norm_weight"], given["norm_bias"], *fast, chunk_size=config.chunk,
        eps=config.norm_eps, causal=config.causal,
    )  # fmt: skip
    return naive_output(x, y, given, eps=config.post_norm_eps)


@pytest.mark.parametrize("length", [3, 8, 11])
@pytest.mark.parametrize("alpha", ["channel", "layer"])
def test_both_directions_are_the_definition_run_twice(alpha, length):
    config = TTTLinearConfig(chunk=4, bidirectional=True, gate={"alpha": alpha})
    block = build(config=config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, length, 16, generator=generator, dtype=torch.float64)
    forward = one_direction(block, x, block.gate)
    expected = one_direction(block, forward.flip(1), block.gate_reversed).flip(1)
    assert (block(x)[0] - expected).abs().max() < 1e-11
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.equal(block(changed)[0][:, 0], block(x)[0][:, 0]), "the first token hears the last"


def test_a_bidirectional_block_is_not_causal():
    assert not TTTLinearConfig(bidirectional=True).causal
    with pytest.raises(ValueError, match="cannot be causal; leave causal out"):
        TTTLinearConfig(bidirectional=True, causal=True)


def test_a_fixed_gate_is_no_parameter_and_keeps_its_value():
    block = build(config=TTTLinearConfig(chunk=4, gate={"alpha": "fixed", "init": 0.25}), dtype=torch.bfloat16)
    assert "gate" not in dict(block.named_parameters())
    assert "gate" not in block.state_dict()
    assert (block.to(torch.bfloat16).gate == 0.25).all()
    assert block.gate.dtype == torch.float32
    meta = TTTLinear(block.config, replace(block.info, device=torch.device("meta")), block.roles)
    meta.to_empty(device="cpu")
    meta.reset_parameters()
    assert (meta.gate == 0.25).all()


def grid_block(**options):
    info = SiteInfo(
        site=Site(0, SiteKind.SEQUENCE), dim=32, num_heads=2, device=torch.device("cpu"), dtype=torch.float64,
        format=GridFormat(),
    )  # fmt: skip
    block = TTTLinear(TTTLinearConfig(chunk=4, **options), info, FP32_STATE.roles(torch.float64))
    block.reset_parameters(torch.Generator().manual_seed(0))
    return block


def test_rope_on_a_grid_turns_each_axis_by_its_own_coordinate():
    x = torch.randn(1, 24, 2, 16, dtype=torch.float64)
    where = GridFormat().coordinates(torch.empty(1, 2, 3, 4, 1))
    assert where[(1 * 3 + 2) * 4 + 3].tolist() == [1, 2, 3]
    turned = rotate(x, where[None], dtype=torch.float64)
    for axis, channels in enumerate((slice(0, 4), slice(4, 10), slice(10, 16))):
        alone = rotate(x[..., channels], where[None, :, axis], dtype=torch.float64)
        assert torch.equal(turned[..., channels], alone)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("options", [{"causal": False}, {"bidirectional": True}], ids=str)
def test_a_block_on_a_grid_is_the_block_on_its_tokens_with_their_coordinates(options):
    block = grid_block(**options)
    grid = torch.randn(2, 2, 3, 4, 32, dtype=torch.float64)
    y, _ = block(grid)
    assert y.shape == grid.shape
    context = BlockContext(coordinates=GridFormat().coordinates(grid))
    expected, _ = block.compute(grid.flatten(1, 3), None, context)
    assert torch.equal(y.flatten(1, 3), expected)
    other, _ = block.compute(grid.flatten(1, 3), None, BlockContext(coordinates=context.coordinates.flip(0)))
    assert not torch.equal(other, expected), "where a token is matters"


def test_a_grid_refuses_a_causal_block_and_an_odd_head_width():
    with pytest.raises(ConfigError, match=r"no causal order\. Set causal: false"):
        grid_block()
    info = replace(grid_block(causal=False).info, num_heads=4)
    with pytest.raises(ConfigError, match="head width is a multiple of 16"):
        TTTLinear(TTTLinearConfig(causal=False), info, FP32_STATE.roles(torch.float64))


@pytest.mark.parametrize("options", [{"causal": False}, {"bidirectional": True}], ids=str)
def test_a_grid_refuses_a_convolution_over_time(options):
    with pytest.raises(ConfigError, match=r"conv_kernel: 4.*tokens of a grid do not follow each other\. Leave it out"):
        grid_block(conv_kernel=4, **options)


def test_a_schedule_scales_the_inner_learning_rate():
    half, full = (
        build(config=TTTLinearConfig(chunk=4, base_lr=0.5)),
        build(config=TTTLinearConfig(chunk=4, base_lr=1.0)),
    )
    x = torch.randn(2, 11, 16)
    full.inner_lr_factor = 0.5
    assert torch.equal(full(x)[0], half(x)[0])
    state, other = full.allocate_state(2), half.allocate_state(2)
    for t in range(11):
        assert torch.equal(full.step(x[:, t : t + 1], state), half.step(x[:, t : t + 1], other))


def test_a_rate_whose_updates_overflow_is_refused():
    case = BlockCase(variant="ttt_mlp", config=TTTMLPConfig(base_lr=1e7))
    with pytest.raises(ConfigError, match=r"updates of 2 layers .* stay finite up to 6.55e\+04. Lower base_lr"):
        case.block()


@pytest.mark.parametrize("block", [TTTLinear, TTTMLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "noncausal"])
@pytest.mark.parametrize("policy", [FP32_STATE, UNIFORM_WITH_FLOAT32_STATE], ids=lambda policy: policy.name)
@pytest.mark.parametrize("more", [{}, {"conv_kernel": 3}, {"conv_kernel": 2, "inner_norm": False, "momentum": 0.9}])
def test_a_projection_that_overflows_spoils_no_gradient(block, causal, policy, more):
    """Finite activations whose projection is past 65504: left out like a nan, and no parameter learns a nan from it."""
    config = {TTTLinear: TTTLinearConfig, TTTMLP: TTTMLPConfig}[block](chunk=4, causal=causal, **more)
    made = build(block, config, dtype=torch.float16, policy=policy)
    with torch.no_grad():
        for projection in (made.wq, made.wk, made.wv):
            projection.weight.fill_(0.5)
    x = torch.randn(2, 13, 16, generator=torch.Generator().manual_seed(1)).half()
    sane, _ = made(x)
    spoiled = x.clone()
    spoiled[1, 5] = 60_000.0
    y, state = made(spoiled)
    others = torch.arange(13) != 5
    assert torch.equal(y[0], sane[0])
    assert torch.equal(y[1, :4], sane[1, :4])
    assert y[1, others].isfinite().all()
    assert made.skipped_updates(state).tolist() == [0, 1]
    torch.where(others[:, None], y, 0).double().square().mean().backward()
    wrong = [n for n, p in made.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not wrong
    if causal:
        stream = made.allocate_state(2)
        for t in spoiled.split(1, 1):
            made.step(t, stream)
        assert made.skipped_updates(stream).tolist() == [0, 1]


@pytest.mark.parametrize("block", [TTTLinear, TTTMLP], ids=["linear", "mlp"])
def test_a_float16_state_is_refused(block):
    config = {TTTLinear: TTTLinearConfig, TTTMLP: TTTMLPConfig}[block](chunk=4)
    with pytest.raises(ConfigError, match="Use a policy whose state is float32"):
        build(block, config, dtype=torch.float16, policy=UNIFORM)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("block", [TTTLinear, TTTMLP], ids=["linear", "mlp"])
def test_health_is_that_of_the_tokens_that_are_finite(block, bad):
    """The last token of a sequence that ends with its chunk: what is measured is what the others give."""
    config = {TTTLinear: TTTLinearConfig, TTTMLP: TTTMLPConfig}[block](chunk=4)
    made = build(block, config)
    x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    spoiled = x.clone()
    spoiled[0, 7] = bad
    with torch.no_grad():
        figures = {name: float(value) for name, value in made.statistics(spoiled, BlockContext()).items()}
        sane = {name: float(value) for name, value in made.statistics(x[:, :7], BlockContext()).items()}
        losses = made.inner_losses(x[:, :7], BlockContext())
    for name in ("key_norm", "std_smallest", "std_largest", "std_below_eps", "target_variance_error", "amplification"):
        assert figures[name] == pytest.approx(sane[name], rel=1e-6, abs=1e-7), name
    assert figures["inner_loss_before"] == pytest.approx(float(losses["before"].mean()), rel=1e-6)
    flags = made.red_flags(figures)
    assert len(flags) == 1
    assert "are not finite or too large" in flags[0]


def test_health_without_a_finite_token_is_no_false_alarm():
    made = build()
    with torch.no_grad():
        figures = made.statistics(torch.full((2, 8, 16), torch.nan), BlockContext())
    flags = made.red_flags({name: float(value) for name, value in figures.items()})
    assert len(flags) == 1
    assert "100.0% of the tokens are not finite or too large" in flags[0]


@pytest.mark.parametrize("block", [TTTLinear, TTTMLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_heads_are_warned_of(block, dtype):
    config = {TTTLinear: TTTLinearConfig, TTTMLP: TTTMLPConfig}[block](chunk=4)
    for width in (2, 4, 6):
        with pytest.warns(UserWarning, match=rf"Heads of width {width}: from width 8 on.*1e-5.*wider heads"):
            build(block, config, dim=3 * width, heads=3, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(block, config, dim=3 * NARROWEST_HEAD, heads=3, dtype=dtype)
        build(block, config, dim=12, heads=3, dtype=torch.float64)


def test_narrow_heads_are_warned_of_once_for_a_model():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(4):
            build(dim=8, heads=2)
    assert len([warning for warning in shown if "Heads of width 4" in str(warning.message)]) == 1


@pytest.mark.first_by_default
@pytest.mark.each_kind
@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_mlp", "ttt_multilayer"])
def test_the_narrowest_heads_stream_as_they_train(variant):
    """1,000 tokens of 48 heads of the narrowest width that no warning is given for (of width 4: up to 5e-3)."""
    config = parse_block({"variant": variant, "layers": "all", "chunk": 16}, registry=default_registry())
    shape = Shape(dim=4 * NARROWEST_HEAD, heads=4, batch=12)
    case = BlockCase(variant=variant, config=config, shape=shape, dtype=torch.float32)
    block, x = case.block(), case.inputs(1000)
    with torch.no_grad():
        y, after = case.call(block, x)
        state = block.allocate_state(12)
        streamed = torch.cat([case.step(block, token, state) for token in x.split(1, 1)], dim=1)
    assert error(streamed, y) < 1e-5
    assert all(error(state[name], tensor) < 1e-5 for name, tensor in after.items())
