"""The options of the hybrid variants that change keys, values and updates: against the definition, and together."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt import inject, parse_config
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.errors import ConfigError, ContextError, WeightMapError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import error
from moshi_ttt.core.weight_map import export_weights
from moshi_ttt.plugins.hybrid import naive
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop, naive_inputs, naive_output
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
from moshi_ttt.plugins.ttt_mlp.block import TTTMLP
from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig
from moshi_ttt.plugins.ttt_multilayer.block import TTTMultilayer
from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig
from tests.conformance.variants.test_hybrid import build

VARIANTS = {
    "ttt_linear": (TTTLinear, TTTLinearConfig, {}),
    "ttt_mlp": (TTTMLP, TTTMLPConfig, {"expansion": 2}),
    "ttt_multilayer": (TTTMultilayer, TTTMultilayerConfig, {"hidden_dims": (12, 6)}),
}
EACH = [
    {"conv_kernel": 4},
    {"value": "embedding"},
    {"init_std": 0.4},
    {"inner_norm": False},
    {"inner_steps": 3},
    {"momentum": 0.8},
    {"learned_momentum": True},
]
ALL = {"conv_kernel": 3, "value": "embedding", "init_std": 0.3, "inner_norm": False, "inner_steps": 2}
ALL |= {"learned_momentum": True, "momentum": 0.6}


def excited(variant="ttt_linear", *, dtype=torch.float64, spread=0.2, dim=16, heads=2, **options):
    """A block with disturbed parameters."""
    block_class, config_class, more = VARIANTS[variant]
    block = build(block_class, config_class(**{**more, **options}), dim=dim, heads=heads, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((spread * noise).to(parameter))
        if block.causal:  # above zero, or no update arrives
            block.token_scale_offset.copy_(block.token_scale_offset.abs())
    return block


def drawn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(block, x, embeddings):
    """``x`` and ``embeddings [B, T, D]``, from the naive definition."""
    config = block.config
    given = {name: parameter.detach() for name, parameter in block.named_parameters()}
    q, k, v, lr = naive_inputs(
        x, given, num_heads=block.info.num_heads, chunk_size=config.chunk, base_lr=config.base_lr,
        theta=config.rope_theta, target_eps=config.target_eps,
        embeddings=embeddings if config.value == "embedding" else None,
    )  # fmt: skip
    fast = [[p.detach() for p in part] for part in (block.fast_weight, block.fast_bias)]
    momentum = None
    if config.learned_momentum:
        momentum = torch.sigmoid(given["momentum_logit"])[:, None, None]
    elif config.momentum:
        momentum = torch.tensor(config.momentum, dtype=torch.float64)
    norm = [given.get(name) for name in ("norm_weight", "norm_bias")]
    y, _, _ = naive_inner_loop(
        q, k, v, lr, block.token_scale().detach(), *norm, *fast, chunk_size=config.chunk, eps=config.norm_eps,
        causal=config.causal, steps=config.inner_steps, momentum=momentum, norm=config.inner_norm,
    )  # fmt: skip
    output = {**given, "alpha": given["gate"]}
    return naive_output(x, y.detach(), output, eps=config.post_norm_eps)


def streamed(block, x, embeddings, *, pieces=1, **context):
    state = block.allocate_state(len(x))
    parts = zip(x.split(pieces, 1), embeddings.split(pieces, 1), strict=True)
    found = [block.step(a, state, BlockContext(input_embeddings=e, **context)) for a, e in parts]
    return torch.cat(found, 1), state


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [*EACH, ALL], ids=lambda options: "-".join(options))
def test_a_call_is_the_definition(options, variant, causal):
    block = excited(variant, chunk=4, causal=causal, **options)
    x, embeddings = drawn(2, 15, 16), drawn(2, 15, 16, seed=2)
    y, _ = block(x, None, BlockContext(input_embeddings=embeddings))
    assert error(y, by_definition(block, x, embeddings)) < 1e-10


@pytest.mark.parametrize("options", EACH, ids=lambda options: "-".join(options))
def test_each_changes_what_the_block_computes(options):
    x, embeddings = drawn(2, 13, 16), drawn(2, 13, 16, seed=2)
    context = BlockContext(input_embeddings=embeddings)
    plain, other = (
        build(config=TTTLinearConfig(chunk=4, **given), dtype=torch.float64)(x, None, context)[0]
        for given in ({}, options)
    )
    assert (plain - other).abs().max() > 1e-9


# With longer chunks nothing is computed otherwise, and a stream takes as many steps.
@pytest.mark.parametrize("chunk", [16, *(pytest.param(chunk, marks=pytest.mark.exhaustive) for chunk in (32, 64, 128))])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_streaming_is_training_at_chunks_that_are_used(variant, chunk, dtype, bound):
    for options in ({**ALL, "spread": 0.05}, {**ALL, "inner_norm": True, "spread": 0.05}):
        block = excited(variant, chunk=chunk, dtype=dtype, **options)
        length = 2 * chunk + 5
        x, embeddings = drawn(2, length, 16, dtype=dtype), drawn(2, length, 16, seed=2, dtype=dtype)
        with torch.no_grad():
            whole, final = block(x, None, BlockContext(input_embeddings=embeddings))
        for pieces in (1, 7):
            y, state = streamed(block, x, embeddings, pieces=pieces)
            assert error(y, whole) < bound
            assert all(error(state[name], final[name]) < bound for name in final)


def test_the_convolution_starts_as_queries_of_now_and_keys_of_the_token_before():
    block = build(config=TTTLinearConfig(chunk=4, conv_kernel=4), dtype=torch.float64)
    plain = build(config=TTTLinearConfig(chunk=4), dtype=torch.float64)
    plain.load_state_dict({n: t for n, t in block.state_dict().items() if not n.endswith("_taps")})
    x = drawn(1, 9, 16)
    _, mixed = block._from_start(x, BlockContext())
    _, tokens = plain._from_start(x, BlockContext())
    assert torch.equal(mixed.q, tokens.q)
    q, k = (plain.wq.tensors()(x, x.dtype), plain.wk.tensors()(x, x.dtype))
    assert not torch.allclose(q, k)
    before = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], 1).unflatten(-1, (2, -1))
    expected = before / before.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    assert error(mixed.k.norm(dim=-1), expected.norm(dim=-1)) < 1e-12
    # RoPE turns a pair and keeps its length
    lengths = mixed.k.unflatten(-1, (-1, 2)).norm(dim=-1)
    assert error(lengths, expected.unflatten(-1, (-1, 2)).norm(dim=-1)) < 1e-12


def test_starting_values():
    config = TTTMLPConfig(chunk=8, conv_kernel=3, init_std=0.5, learned_momentum=True)
    block = build(TTTMLP, config, dim=256, heads=2)
    assert all(float(w.detach().std()) == pytest.approx(0.5, rel=0.05) for w in block.fast_weight)
    assert float(block.wq.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(block.query_taps, torch.tensor([1.0, 0.0, 0.0]).expand(256, 3))
    assert torch.equal(block.key_taps, torch.tensor([0.0, 1.0, 0.0]).expand(256, 3))
    assert torch.sigmoid(block.momentum_logit).tolist() == pytest.approx([0.9, 0.9])
    block = build(TTTMLP, TTTMLPConfig(learned_momentum=True, momentum=0.3))
    assert torch.sigmoid(block.momentum_logit).tolist() == pytest.approx([0.3, 0.3])


def test_options_draw_the_other_parameters_as_without_them():
    plain = build(TTTMLP, TTTMLPConfig(chunk=4))
    block = build(TTTMLP, TTTMLPConfig(chunk=4, **{**ALL, "init_std": 0.02, "inner_norm": True}))
    for name, parameter in plain.named_parameters():
        assert torch.equal(block.get_parameter(name), parameter), name


def test_no_momentum_is_none():
    x = drawn(2, 13, 16)
    plain, zero = (excited(chunk=4, momentum=momentum) for momentum in (None, 0.0))
    assert zero.init_state(1).keys() == plain.init_state(1).keys()
    assert torch.equal(zero(x)[0], plain(x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 2])
def test_updates_disabled_stop_momentum(dtype, steps):
    """A memory that moves does not go on moving while updates are disabled, row by row."""
    block = excited(chunk=4, momentum=0.9, inner_steps=steps, dtype=dtype)
    x = drawn(2, 12, 16, dtype=dtype)
    on, off = torch.tensor([True, True]), torch.tensor([True, False])
    with torch.no_grad():
        _, before = block(x[:, :4], None, BlockContext(updates=on))
        _, after = block(x[:, 4:], before, BlockContext(updates=off))
        state = block.allocate_state(2)
        for t in range(12):
            block.step(x[:, t : t + 1], state, BlockContext(updates=on if t < 4 else off))
    for found in (after, state):
        for name in ("weight.0", "bias.0", "velocity_weight.0", "velocity_bias.0"):
            reference_row = before[name][1]
            assert error(found[name][1], reference_row) < (1e-12 if dtype is torch.float64 else 1e-6), name
            assert not torch.equal(found[name][0], before[name][0]), name
    assert torch.equal(after["weight.0"][1], before["weight.0"][1])


def test_the_convolutions_caches_are_state_and_not_memory():
    block = excited(chunk=4, conv_kernel=4)
    caches = {"query_cache", "key_cache"}
    assert block.init_state(1).keys() - block.memory_names() == caches
    x = drawn(2, 6, 16)
    with torch.no_grad():
        _, on = block(x)
        _, off = block(x, None, BlockContext(updates=False))
    forgotten = block.forget(on)
    for name in caches:
        assert on[name].shape == (2, 3, 16)
        assert torch.equal(on[name], off[name])
        assert forgotten[name] is on[name]
    state = block.allocate_state(2)
    block.step(x[:, :1], state)
    assert state["key_cache"][:, -1].abs().min() > 0
    block.reset_state(state, torch.tensor([True, False]))
    assert (state["key_cache"][0] == 0).all()
    assert (state["key_cache"][1, -1] != 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("in_steps", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_a_bad_token_reaches_later_ones_as_zero(bad, in_steps, graph):
    """At the last token of a chunk: the next chunk's keys would have been made of it."""
    block = excited(chunk=4, conv_kernel=4, dtype=torch.float32)
    x = drawn(2, 12, 16, dtype=torch.float32)
    x[1, 7] = bad
    with torch.set_grad_enabled(graph and not in_steps):
        y, state = streamed(block, x, x) if in_steps else block(x)
    assert y[0].isfinite().all()
    assert y[1, torch.arange(12) != 7].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert block.skipped_updates(state).tolist() == [0, 1]
    # the same with z = 0 where the token was: the first chunk, then tokens that teach nothing, then the third chunk
    with torch.no_grad():
        _, first = block(x[1:, :4])
        kept = dict(first)
        caches = [torch.cat([first[n], p.tensors()(x[1:, 4:7], x.dtype), torch.zeros(1, 1, 16)], 1)[:, -3:]
                  for n, p in (("query_cache", block.wq), ("key_cache", block.wk))]  # fmt: skip
        kept |= dict(zip(("query_cache", "key_cache"), caches, strict=True))
        expected, _ = block(x[1:, 8:], kept)
    assert error(y[1, 8:], expected[0]) < 1e-5


@pytest.mark.parametrize("in_steps", [True, False])
def test_a_bad_embedding_spoils_its_own_chunk_alone(in_steps):
    block = excited(chunk=4, value="embedding")
    x, embeddings = drawn(2, 12, 16), drawn(2, 12, 16, seed=2)
    sane, _ = block(x, None, BlockContext(input_embeddings=embeddings))
    embeddings[1, 5] = torch.nan
    if in_steps:
        y, state = streamed(block, x, embeddings)
    else:
        y, state = block(x, None, BlockContext(input_embeddings=embeddings))
        gradients = torch.autograd.grad(y.sum(), list(block.parameters()), allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert y.isfinite().all()
    assert error(y[0], sane[0]) < 1e-10
    assert error(y[1, :5], sane[1, :5]) < 1e-10
    assert block.skipped_updates(state).tolist() == [0, 1]


def test_embeddings_of_zero_are_a_value_of_zero():
    block = excited(chunk=4, value="embedding")
    x, embeddings = drawn(1, 9, 16), drawn(1, 9, 16, seed=2)
    embeddings[:, 3] = 0
    embeddings.requires_grad_()
    y, _ = block(x, None, BlockContext(input_embeddings=embeddings))
    (gradient,) = torch.autograd.grad(y.sum(), embeddings)
    assert gradient.isfinite().all()
    assert y.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives_of_the_embeddings(variant):
    block = excited(variant, chunk=2, dim=8, **{**ALL, "momentum": 0.5, "inner_norm": True})
    x, embeddings = drawn(1, 5, 8), drawn(1, 5, 8, seed=2).requires_grad_()

    def function(embeddings):
        return block(x, None, BlockContext(input_embeddings=embeddings))[0]

    assert torch.autograd.gradcheck(function, (embeddings,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (embeddings,), fast_mode=True)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1e4, *(pytest.param(size, marks=pytest.mark.exhaustive) for size in (1e2, 1e6))])
def test_a_plain_loss_that_runs_away_leaves_the_state_finite(variant, size, graph):
    """Without the guard TTT-MLP at 1e4 and rate 1 had nan in its state within 100 chunks."""
    block = excited(variant, chunk=4, inner_norm=False, base_lr=1.0, momentum=0.9, inner_steps=2, dtype=torch.float32)
    x = size * drawn(2, 400, 16, dtype=torch.float32)
    with torch.set_grad_enabled(graph):
        y, state = block(x)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert y.isfinite().all()
    if not graph:
        y, state = streamed(block, x, x)
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert y.isfinite().all()


def test_an_update_that_runs_away_is_left_out_and_counted():
    block = excited("ttt_mlp", chunk=4, inner_norm=False, dtype=torch.float32)
    x = drawn(2, 12, 16, dtype=torch.float32)
    x[1, 5] *= 1e8  # finite, and below what only_finite leaves out
    with torch.no_grad():
        y, state = block(x)
        _, first = block(x[:, :4])
        parts = [block(x[:, :6])[1]]
        _, cut = block(x[:, 6:], parts[0])
    assert y.isfinite().all()
    for found in (state, cut, streamed(block, x, x)[1]):
        assert block.skipped_updates(found).tolist() == [0, 1]
    rest, _ = block(x[1:, 8:], {name: tensor[1:] for name, tensor in first.items()})
    assert error(y[1, 8:], rest[0]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_kernel": 1}, "conv_kernel"),
        ({"init_std": 0.0}, "init_std"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"value": "both"}, "hidden.*embedding"),
        ({"inner_norm": False, "norm_eps": 1e-3}, "norm_eps belong.*inner_norm: false leaves out; leave it out"),
        ({"inner_norm": False, "norm_eps": 1e-3, "target_eps": 1e-3}, "norm_eps and target_eps.*leave them out"),
        ({"learned_momentum": True, "momentum": 0.0}, "cannot start at 0.*leave it out for 0.9"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TTTLinearConfig(**options)


def test_a_rate_at_which_a_plain_loss_grows_without_end_is_refused():
    build(config=TTTLinearConfig(inner_norm=False, base_lr=8.0))
    with pytest.raises(ConfigError, match=r"base_lr 8\.5 with inner_norm: false.*above the head width, 8,.*Lower"):
        build(config=TTTLinearConfig(inner_norm=False, base_lr=8.5))
    build(config=TTTLinearConfig(base_lr=8.5))


def test_fast_weights_that_would_start_too_large_for_a_plain_loss_are_refused():
    deep = {"hidden_dims": (8,) * 5, "base_lr": 0.1}
    build(TTTMultilayer, TTTMultilayerConfig(**deep, inner_norm=False, init_std=1.0))
    build(TTTMultilayer, TTTMultilayerConfig(**deep, init_std=10.0))
    with pytest.raises(
        ConfigError, match=r"init_std 10 with inner_norm: false.* 6 layers .* below 40\.3.*less than 6\.72"
    ):
        build(TTTMultilayer, TTTMultilayerConfig(**deep, inner_norm=False, init_std=10.0))


def test_missing_embeddings_are_refused():
    block = excited(value="embedding")
    with pytest.raises(ContextError, match="needs the input embeddings"):
        block(drawn(1, 4, 16))
    assert not excited().needs_input_embeddings


def test_state_and_cost_are_counted():
    figures = {}
    for options in ({}, *EACH):
        block = build(TTTMLP, TTTMLPConfig(chunk=32, **options), dim=64, heads=4)
        figures["-".join(options)] = (block.state_bytes(), block.flops_per_token())
    base_state, base_flops = figures[""]
    # 16 x 64 and 64 x 16 weights and their biases, four heads, four bytes
    fast = 4 * 4 * (2 * 16 * 64 + 64 + 16)
    assert figures["momentum"][0] - base_state == fast == figures["learned_momentum"][0] - base_state
    assert figures["inner_steps"][0] - base_state == 4 * 4 * 32 * (16 + 1)
    assert figures["conv_kernel"][0] - base_state == 2 * 4 * 3 * 64
    for free in ("value", "init_std", "inner_norm"):
        assert figures[free][0] == base_state
    for costly in ("conv_kernel", "inner_steps", "momentum", "learned_momentum"):
        assert figures[costly][1] > base_flops


@pytest.mark.parametrize("options", [*EACH, ALL], ids=lambda options: "-".join(options))
def test_health_and_curves(options):
    block = excited("ttt_mlp", chunk=4, **options)
    x, embeddings = drawn(2, 13, 16), drawn(2, 13, 16, seed=2)
    context = BlockContext(input_embeddings=embeddings)
    figures = {name: float(value.detach()) for name, value in block.statistics(x, context).items()}
    assert all(value == value for value in figures.values()), figures
    assert ("std_smallest" in figures) == block.config.inner_norm
    block.red_flags(figures)
    losses = block.inner_losses(x, context)
    assert losses["before"].shape == (2, 2, 13)
    # the loss before the third chunk's update, from the state that a call ends with
    with torch.no_grad():
        _, state = block(x[:, :8], None, context=BlockContext(input_embeddings=embeddings[:, :8]))
    _, tokens = block._from_start(x, context)
    k, v = (part[:, 8:12].transpose(1, 2) for part in (tokens.k, tokens.v))
    fast = [(state[f"weight.{i}"], state[f"bias.{i}"]) for i in range(2)]
    z = naive.network(k, fast)
    if block.config.inner_norm:
        z, v = naive.layer_norm(z, block.norm_weight, block.norm_bias, 1e-6), v - k
    assert error(losses["before"][..., 8:12], (z - v).square().sum(-1).detach() / 2) < 1e-10


@pytest.mark.exhaustive  # torch traces, for seconds
@pytest.mark.first_by_default
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_with_all_of_them_can_be_traced_whole(variant):
    block = excited(variant, chunk=4, dtype=torch.float32, **ALL)
    x = drawn(2, 9, 16, dtype=torch.float32)
    context = BlockContext(input_embeddings=x.flip(-1), want_state=False)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert error(compiled(x, None, context)[0], block(x, None, context)[0]) < 1e-6


@pytest.mark.parametrize(
    ("options", "named"),
    [({"conv_kernel": 2}, "key_taps, query_taps"), ({"inner_norm": False}, "norm_bias, norm_weight")],
)
def test_other_layouts_have_no_place_for_their_weights(options, named):
    weight_map = default_registry().weight_map("ttt_linear-video_dit")
    with pytest.raises(WeightMapError, match=f"differ in {named}.*without the options that these belong to"):
        export_weights(excited(causal=False, **options), weight_map)


def test_the_audio_host_hands_on_its_input_embeddings():
    registry, entry = default_registry(), {"variant": "ttt_linear", "layers": "all", "bidirectional": True, "chunk": 4}
    entries = [{**entry, "value": "embedding", "gate": {"init": 1.0}}]
    config = parse_config({"host": {"name": "audio"}, "ttt": entries}, registry=registry)
    model = registry.host("audio").load(config.host)
    samples = drawn(2, 9 * 32, dtype=torch.float32)
    base = model(samples)
    inject(model, config, registry=registry)
    changed = model(samples)
    assert changed.isfinite().all()
    assert not torch.equal(changed, base)
