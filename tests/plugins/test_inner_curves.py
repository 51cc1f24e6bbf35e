"""The inner loss by token against its definition, token by token; the first chunk's equality; what is NaN."""

from __future__ import annotations

import pytest
import torch
from tests.plugins import gating

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.testing import error
from moshi_ttt.core.testing.toy_host import ToyMLP
from moshi_ttt.plugins.common import inner_curves
from moshi_ttt.plugins.gating_mlp.naive import filtered
from moshi_ttt.plugins.hybrid import naive
from moshi_ttt.plugins.hybrid.diagnostics import inner_loss_curves
from moshi_ttt.plugins.hybrid.naive import naive_inputs
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
from moshi_ttt.plugins.ttt_mlp.block import TTTMLP
from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig
from moshi_ttt.plugins.ttt_multilayer.block import TTTMultilayer
from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig
from moshi_ttt.plugins.ttt_ridge.block import TTTRidge
from moshi_ttt.plugins.ttt_ridge.config import TTTRidgeConfig

DIM, HEADS, CHUNK = 16, 2, 4
HYBRIDS = [
    (TTTLinear, TTTLinearConfig), (TTTMLP, TTTMLPConfig), (TTTMultilayer, TTTMultilayerConfig),
]  # fmt: skip
NAMES = ["initial", "before", "after", "baseline"]


def hybrid(block=TTTLinear, config=TTTLinearConfig, *, dtype=torch.float64, **options):
    info = SiteInfo(
        site=Site(0, SiteKind.SEQUENCE), dim=DIM, num_heads=HEADS, device=torch.device("cpu"), dtype=dtype,
        format=SequenceFormat(),
    )  # fmt: skip
    made = block(config(**{"chunk": CHUNK, "base_lr": 0.7, **options}), info, FP32_STATE.roles(dtype))
    generator = torch.Generator().manual_seed(0)
    made.reset_parameters(generator)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def hybrid_by_definition(block, x):
    """The four curves ``[B, H, T]``, every token's loss on its own, the updates by autograd."""
    given, config = dict(block.named_parameters()), block.config
    with torch.no_grad():
        _, k, v, lr = naive_inputs(
            x, given, num_heads=HEADS, chunk_size=CHUNK, base_lr=config.base_lr, theta=config.rope_theta,
            target_eps=config.target_eps,
        )  # fmt: skip
    target = v - k
    batch, _, length, _ = k.shape

    def loss(t, fast):
        predicted = naive.layer_norm(
            naive.network(k[:, :, t, None], fast), block.norm_weight, block.norm_bias, config.norm_eps
        )
        return 0.5 * ((predicted[:, :, 0] - target[:, :, t]) ** 2).sum(-1)

    scale = max(0.0, 1 / CHUNK + block.token_scale_offset[-1].item())
    weights = [p for pair in zip(block.fast_weight, block.fast_bias, strict=True) for p in pair]
    start = [w.detach().expand(batch, *w.shape).clone().requires_grad_() for w in weights]

    def pairs(flat):
        return list(zip(flat[::2], flat[1::2], strict=True))

    held = after = start
    found = {name: torch.full(k.shape[:3], torch.nan, dtype=k.dtype) for name in NAMES}
    for t in range(length):
        if t and t % CHUNK == 0:
            held = after
        tokens = range(t - t % CHUNK, t - t % CHUNK + CHUNK)
        found["initial"][:, :, t] = loss(t, pairs(start)).detach()
        found["before"][:, :, t] = loss(t, pairs(held)).detach()
        if tokens[-1] < length:
            total = sum((lr[:, :, s] * loss(s, pairs(held))).sum() for s in tokens)
            gradients = torch.autograd.grad(total, held)
            after = [(w - scale * g).detach().requires_grad_() for w, g in zip(held, gradients, strict=True)]
            found["after"][:, :, t] = loss(t, pairs(after)).detach()
        mean = sum(target[:, :, s] for s in range(length)) / length
        found["baseline"][:, :, t] = 0.5 * ((target[:, :, t] - mean) ** 2).sum(-1)
    return found


def gating_by_definition(block, x, source):
    """The same of an in-place block: one stream and one chunk after the other, the update written out."""
    config, (batch, length, _) = block.config, x.shape
    mlp, projection = block.info.mlp, block.projection.detach()
    left = config.conv_kernel - 1 if config.padding == "causal" else (config.conv_kernel - 1) // 2
    gate, up = mlp.linear_in(x).detach().chunk(2, -1)
    hidden = mlp.activation(gate) * up
    rate = 2 * config.lr * torch.sigmoid(x @ block.lr_weight + block.lr_bias).detach()
    found = {name: torch.full((batch, 1, length), torch.nan, dtype=x.dtype) for name in NAMES}
    for row in range(batch):
        chunks = source[row].split(config.chunk)
        wanted = torch.cat([filtered(chunk, block.conv[:, 0].detach(), left) @ projection for chunk in chunks])
        delta = torch.zeros(x.shape[-1], hidden.shape[-1], dtype=x.dtype)
        for start in range(0, length, config.chunk):
            tokens, after = range(start, min(start + config.chunk, length)), None
            if len(tokens) == config.chunk:
                update = sum(rate[row, t] * torch.outer(wanted[t], hidden[row, t]) for t in tokens)
                if config.clip is not None:
                    update = update * min(1.0, config.clip / float(update.norm()))
                after = (1 - config.decay) * delta + update
            for t in tokens:
                found["initial"][row, 0, t] = 0.5 * (wanted[t] ** 2).sum()
                found["before"][row, 0, t] = 0.5 * ((delta @ hidden[row, t] - wanted[t]) ** 2).sum()
                if after is not None:
                    found["after"][row, 0, t] = 0.5 * ((after @ hidden[row, t] - wanted[t]) ** 2).sum()
                found["baseline"][row, 0, t] = 0.5 * ((wanted[t] - wanted.mean(0)) ** 2).sum()
            delta = delta if after is None else after
    return found


def assert_same(actual, expected):
    assert list(actual) == NAMES
    for name in NAMES:
        assert actual[name].shape == expected[name].shape
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name
        assert error(actual[name].nan_to_num(), expected[name].nan_to_num()) < 1e-10, name


def assert_indices(losses, chunk):
    """``initial`` and ``before`` are bit-equal in the first chunk, and in every head differ from then on."""
    same = losses["initial"] == losses["before"]
    assert same[..., :chunk].all()
    assert not same[..., chunk:].any()
    whole = losses["initial"].shape[-1] // chunk * chunk
    assert torch.equal(~losses["after"].isnan(), (torch.arange(same.shape[-1]) < whole).expand_as(same))


@pytest.mark.parametrize(("block", "config"), HYBRIDS)
@pytest.mark.parametrize("length", [3, 4, 9, 15])
def test_hybrid_equals_the_definition(block, config, length):
    made, x = hybrid(block, config), gating.draw(2, length, DIM)
    losses = made.inner_losses(x, BlockContext())
    assert_same(losses, hybrid_by_definition(made, x))
    assert_indices(losses, CHUNK)


@pytest.mark.parametrize("padding", ["centered", "causal"])
@pytest.mark.parametrize(("length", "clip"), [(3, None), (4, 0.7), (11, 0.7), (15, None)])
def test_gating_equals_the_definition(length, clip, padding):
    block = gating.build(padding=padding, clip=clip, decay=0.1, learned_lr=True, lr=0.2)
    x, source = gating.draw(2, length, gating.DIM), gating.draw(2, length, gating.DIM, seed=2)
    losses = block.inner_losses(x, BlockContext(input_embeddings=source))
    assert_same(losses, gating_by_definition(block, x, source))
    assert_indices(losses, 4)


def test_a_gating_block_that_learns_nothing_yet_loses_nothing():
    # The filter starts at zero, and so do all targets.
    block = gating.build(excite=False, target="hidden_states")
    losses = block.inner_losses(gating.draw(1, 12, gating.DIM), BlockContext())
    assert all((loss == 0).all() for loss in losses.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_chunk_is_equal_in_every_dtype(dtype):
    x = gating.draw(3, 15, DIM).to(dtype)
    losses = hybrid(TTTMLP, TTTMLPConfig, dtype=dtype).inner_losses(x, BlockContext())
    assert losses["before"].dtype == torch.float32
    assert_indices(losses, CHUNK)
    x = gating.draw(3, 15, gating.DIM).to(dtype)
    block = gating.build(mlp=ToyMLP(gating.DIM, dtype, "cpu"), dtype=dtype, target="hidden_states")
    assert_indices(block.inner_losses(x, BlockContext()), 4)


def test_weights_before_a_chunk_are_those_of_the_state():
    # The loss before the third chunk's update is that of a fresh chunk at the weights a real call ends with.
    made, x = hybrid(TTTMLP, TTTMLPConfig), gating.draw(2, 12, DIM)
    _, state = made(x[:, :8])
    _, tokens = made._from_start(x[:, 8:], BlockContext())
    norm = InnerNorm(made.norm_weight, made.norm_bias, made.config.norm_eps)
    expected = inner_loss_curves(tokens, state, norm, made.token_scale(), made.update_rule())
    losses = made.inner_losses(x, BlockContext())
    assert error(losses["before"][..., 8:], expected["initial"]) < 1e-12
    assert error(losses["after"][..., 8:], expected["after"]) < 1e-12


def test_the_future_changes_no_earlier_loss():
    made, x = hybrid(), gating.draw(1, 15, DIM)
    changed = x.clone()
    changed[:, 9] += 1
    first, second = (made.inner_losses(each, BlockContext()) for each in (x, changed))
    for name, until in (("initial", 9), ("before", 9), ("after", 8)):
        assert torch.equal(first[name][..., :until], second[name][..., :until])
    assert not torch.equal(first["before"][..., 12:], second["before"][..., 12:])
    assert not torch.equal(first["after"][..., 8:9], second["after"][..., 8:9])


def test_without_updates_all_weights_are_the_initial_ones():
    made, x = hybrid(), gating.draw(1, 12, DIM)
    losses = made.inner_losses(x, BlockContext(updates=False))
    assert torch.equal(losses["before"], losses["initial"])
    assert torch.equal(losses["after"], losses["initial"])
    block, x = gating.build(target="hidden_states"), gating.draw(1, 12, gating.DIM)
    losses = block.inner_losses(x, BlockContext(updates=False))
    assert torch.equal(losses["after"], losses["initial"])


def test_a_chunk_that_teaches_nothing_changes_no_weight():
    block, x = gating.build(), gating.draw(1, 12, gating.DIM)
    source = gating.draw(1, 12, gating.DIM, seed=2)
    source[:, 5] = torch.nan
    losses = block.inner_losses(x, BlockContext(input_embeddings=source))
    assert torch.equal(losses["after"][..., 4:8], losses["before"][..., 4:8])
    assert all(loss.isfinite().all() for loss in losses.values())


def test_the_baseline_is_the_target_variance():
    target = gating.draw(2, 3, 11, 5)
    losses = inner_curves.curves(target, {})
    assert list(losses) == ["baseline"]
    expected = target.var(2, unbiased=False).sum(-1) / 2
    assert error(losses["baseline"].mean(-1), expected) < 1e-12


def test_measuring_changes_nothing_and_keeps_no_gradient():
    made, x = hybrid(), gating.draw(1, 12, DIM).requires_grad_()
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    losses = made.inner_losses(x, BlockContext())
    assert not any(loss.requires_grad for loss in losses.values())
    assert all(torch.equal(before[name], parameter) for name, parameter in made.named_parameters())


def ridge(**options):
    made = TTTRidge(
        TTTRidgeConfig(**{"chunk": CHUNK, **options}),
        SiteInfo(
            site=Site(0, SiteKind.SEQUENCE), dim=DIM, num_heads=HEADS, device=torch.device("cpu"), dtype=torch.float64,
            format=SequenceFormat(),
        ),
        FP32_STATE.roles(torch.float64),
    )  # fmt: skip
    made.reset_parameters(torch.Generator().manual_seed(0))
    return made


# Block, tokens whose target needs later ones, and tokens that a filter computes from earlier ones.
RECENT = {
    "ttt_linear": (lambda: hybrid(), 0, 0),
    "ttt_mlp": (lambda: hybrid(TTTMLP, TTTMLPConfig), 0, 0),
    "ttt_mlp conv": (lambda: hybrid(TTTMLP, TTTMLPConfig, conv_kernel=3), 0, 2),
    "ttt_multilayer": (lambda: hybrid(TTTMultilayer, TTTMultilayerConfig), 0, 0),
    "ttt_ridge": (lambda: ridge(), 0, 3),
    "gating_mlp": (lambda: gating.build(lr=0.2), 2, 0),
    "gating_mlp causal": (lambda: gating.build(lr=0.2, padding="causal"), 0, 0),
    "gating_mlp ridge": (lambda: gating.build(update="ridge", keys="unit", lr=0.5), 2, 0),
}


@pytest.mark.parametrize("case", RECENT)
def test_recent_losses_are_those_before_the_chunk_at_a_streams_weights(case):
    make, ahead, filtered_from = RECENT[case]
    block, width = make(), gating.DIM if case.startswith("gating") else DIM
    x, source = gating.draw(2, 12, width), gating.draw(2, 12, width, seed=2)
    whole = block.inner_losses(x, BlockContext(input_embeddings=source))
    state = block.allocate_state(2)
    with torch.no_grad():
        for t in range(8):
            block.step(x[:, t : t + 1], state, BlockContext(input_embeddings=source[:, t : t + 1]))
    late = BlockContext(input_embeddings=source[:, 8:])
    before = {name: tensor.clone() for name, tensor in state.items()}
    found = block.recent_losses(x[:, 8:], state, late)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert found.shape == whole["before"][..., 8:].shape
    known = slice(filtered_from, 4 - ahead)
    assert error(found[..., known], whole["before"][..., 8:][..., known]) < 1e-10
    assert bool(found[..., 4 - ahead :].isnan().all())
    start = block.recent_losses(x[:, 8:], block.init_state(1), late)
    fresh = block.inner_losses(x[:, 8:], late)["initial"]
    assert error(start[..., : 4 - ahead], fresh[..., : 4 - ahead]) < 1e-10
    assert not torch.equal(found[..., known], start[..., known])
