"""Updates of in-place TTT that correct what the memory says: definition, forms, ill-conditioned chunks, the start."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.config_parsing import load_config
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import UNIFORM
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import error
from moshi_ttt.core.testing.toy_host import ToyMLP
from moshi_ttt.plugins.common.success_gate import directions
from moshi_ttt.plugins.gating_mlp import chunk, naive, ops
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from moshi_ttt.plugins.gating_mlp.corrections import RIDGE_BOUNDS, solved
from moshi_ttt.plugins.gating_mlp.naive import naive_in_place
from tests.project import ROOT
from tests.unit.plugins.gating import DIM, assert_is_the_host, build, draw, stream

BEST = {
    "update": "ridge", "lr": 1.0, "learned_lr": True, "keys": "unit", "target_norm": True, "start": "next_frame",
    "read_scale": 8.0, "success_gate": True,
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["tensor operations", "compiled"])
def compiled(request):
    return request.param


def strengths(block, x):
    config = block.config
    if not config.learned_lr:
        return torch.full(x.shape[:2], config.lr, dtype=x.dtype)
    most = config.lr * (2 if config.update == "hebbian" else 1)
    return most * torch.sigmoid(x @ block.lr_weight + block.lr_bias)


def defined(block, x, target, updated=None):
    """Outputs and accumulated updates by naive.py, row by row; ``updated [B, T]`` bool."""
    config, mlp = block.config, block.info.mlp
    gate, up = mlp.linear_in(x).chunk(2, dim=-1)
    hidden = mlp.activation(gate) * up
    keys = hidden / hidden.norm(dim=-1, keepdim=True) if config.keys == "unit" else hidden
    updated = torch.ones(x.shape[:2], dtype=torch.bool) if updated is None else updated
    rate = torch.where(updated, strengths(block, x), 0)
    ridge = block.log_ridge.exp().item() if config.update == "ridge" else 0.0
    outputs, deltas = [], []
    for b in range(x.shape[0]):
        y, delta = naive_in_place(
            keys[b], target[b], torch.zeros_like(mlp.linear_out.weight), block.conv[:, 0], block.projection, rate[b],
            chunk_size=config.chunk, left=ops.left_padding(config.conv_kernel, config.padding), decay=config.decay,
            clip=config.clip, update=config.update, ridge=ridge, updated=updated[b],
        )  # fmt: skip
        outputs.append(y)
        deltas.append(delta)
    return mlp.linear_out(hidden) + torch.stack(outputs), torch.stack(deltas)


@pytest.mark.parametrize("keys", ["raw", "unit"])
@pytest.mark.parametrize("options", [{}, {"decay": 0.2}, {"clip": 0.4}, {"learned_lr": True}], ids=str)
@pytest.mark.parametrize("update", ["hebbian", "gradient", "ridge"])
def test_call_and_stream_are_the_definition(update, options, keys, compiled):
    block = build(update=update, keys=keys, chunk=5, lr=0.2, compiled=compiled, **options)
    x, target = draw(2, 19, DIM), draw(2, 19, DIM, seed=2)
    expected, delta = defined(block, x, target)
    y, state = block(x, None, BlockContext(input_embeddings=target))
    assert error(y, expected) < 1e-12
    assert error(block.accumulated_update(state), delta) < 1e-12
    streamed, after = stream(block, x, target)
    assert error(streamed, expected) < 1e-12
    assert error(block.accumulated_update(after), delta) < 1e-12


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "gram"])
@pytest.mark.parametrize("options", [{"decay": 0.3}, {"decay": 0.3, "clip": 0.4}], ids=str)
@pytest.mark.parametrize(
    ("update", "compiled"), [("hebbian", False), ("hebbian", True), ("gradient", False), ("ridge", False)]
)
def test_a_chunk_whose_updates_are_disabled_decays_nothing(update, compiled, options, dense, monkeypatch):
    """Rows: all of chunk 1 disabled; a part of it; all of chunks 0 and 2; nothing. Cut anywhere, and streamed."""
    monkeypatch.setattr(chunk, "prefers_parallel", lambda *_: not dense)
    block = build(update=update, chunk=4, lr=0.2, compiled=compiled, **options)
    x, target, updated = draw(4, 18, DIM), draw(4, 18, DIM, seed=2), torch.ones(4, 18, dtype=torch.bool)
    updated[0, 4:8] = updated[1, 5:7] = updated[2, :4] = updated[2, 8:12] = False
    expected, delta = defined(block, x, target, updated)
    segments = [0, 2, 4, 5, 7, 8, 12, 18]
    for cuts in (segments, list(range(19))):
        state, outputs = block.allocate_state(4), []
        for start, end in pairwise(cuts):
            context = BlockContext(input_embeddings=target[:, start:end], updates=updated[:, start])
            if cuts is segments:
                y, state = block(x[:, start:end], state, context)
            else:
                y = block.step(x[:, start:end], state, context)
            outputs.append(y)
        assert error(torch.cat(outputs, dim=1), expected) < 1e-11
        assert error(block.accumulated_update(state), delta) < 1e-11
        assert not block.skipped_updates(state).any()


@pytest.mark.parametrize("compiled", [False, True], ids=["tensor operations", "compiled"])
def test_while_updates_are_disabled_memory_stays_as_it_is(compiled):
    block = build(chunk=4, decay=0.3, compiled=compiled)
    x, target = draw(3, 24, DIM), draw(3, 24, DIM, seed=2)
    for streamed in (False, True):
        _, state = stream(block, x[:, :16], target[:, :16])
        before = block.accumulated_update(state)
        for start in range(16, 24, 1 if streamed else 4):
            end = start + (1 if streamed else 4)
            context = BlockContext(input_embeddings=target[:, start:end], updates=False)
            if streamed:
                block.step(x[:, start:end], state, context)
            else:
                _, state = block(x[:, start:end], state, context)
        assert error(block.accumulated_update(state), before) < 1e-13


@pytest.mark.parametrize("kernel", [1, 2, 5, 9])
@pytest.mark.parametrize("padding", ["centered", "causal"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16])
def test_ridge_by_any_filter(chunk, padding, kernel, compiled):
    block = build(update="ridge", lr=1.0, chunk=chunk, conv_kernel=kernel, padding=padding, compiled=compiled)
    x, target = draw(2, 3 * chunk + 2, DIM), draw(2, 3 * chunk + 2, DIM, seed=2)
    expected, delta = defined(block, x, target)
    for y, state in (block(x, None, BlockContext(input_embeddings=target)), stream(block, x, target)):
        assert error(y, expected) < 1e-11
        assert error(block.accumulated_update(state), delta) < 1e-11


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("update", ["gradient", "ridge"])
def test_the_dense_and_the_gram_form_agree_in_outputs_and_gradients(update, with_state, monkeypatch):
    block = build(update=update, lr=0.2, learned_lr=True, decay=0.1, clip=2.0, success_gate=True)
    x, target = draw(2, 15, DIM), draw(2, 15, DIM, seed=2)
    context = BlockContext(input_embeddings=target)
    state = block(x[:, :6], None, BlockContext(input_embeddings=target[:, :6]))[1] if with_state else None
    state = None if state is None else {name: tensor.detach() for name, tensor in state.items()}
    found = []
    for parallel in (True, False):
        monkeypatch.setattr(chunk, "prefers_parallel", lambda *_, parallel=parallel: parallel)
        leaf = x.clone().requires_grad_()
        y, after = block(leaf, state, context)
        sources = [leaf, *block.parameters()]
        found.append((y, after, torch.autograd.grad(y.square().sum(), sources, materialize_grads=True)))
    (y, after, gradients), (other, other_after, other_gradients) = found
    assert error(y, other) < 1e-12
    assert all(error(after[name], tensor) < 1e-12 for name, tensor in other_after.items())
    assert all(error(a, b) < 1e-10 for a, b in zip(gradients, other_gradients, strict=True))


def chunk_like(kind):
    """Two chunks of 8 tokens."""
    x, target = draw(2, 20, DIM), draw(2, 20, DIM, seed=2)
    if kind == "equal keys":
        x = x[:, :1].expand(-1, 20, -1).contiguous()
    elif kind == "zero keys":
        x = torch.zeros_like(x)
    elif kind == "nearly equal keys":
        x = x[:, :1] + 1e-5 * x
    elif kind == "a few zero keys":
        x[:, 3:6] = 0
    return x, target


def exhaustive(*values):
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


# By default a ridge beyond each bound, which is taken as the bound, and no strength that is nearly as good as zero.
@pytest.mark.parametrize("strength", [0.0, *exhaustive(1e-30), 1e-6, 1.0])
@pytest.mark.parametrize("ridge", [0.0, *exhaustive(RIDGE_BOUNDS[0]), 0.3, *exhaustive(RIDGE_BOUNDS[1]), 1e30])
@pytest.mark.parametrize("keys", ["raw", "unit"])
@pytest.mark.parametrize("kind", ["equal keys", *exhaustive("zero keys", "nearly equal keys", "a few zero keys")])
def test_ill_conditioned_chunks_are_finite_and_right(kind, keys, ridge, strength, compiled):
    """In float64 against the definition; in float32, call and stream, against float64; gradients finite."""
    x, target = chunk_like(kind)
    settings = {"update": "ridge", "keys": keys, "chunk": 8, "lr": 1.0, "learned_lr": True}
    mlp = ToyMLP(DIM, torch.float64, "cpu")
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        block = build(mlp=ToyMLP(DIM, dtype, "cpu"), dtype=dtype, compiled=compiled, **settings)
        block.info.mlp.load_state_dict({name: t.to(dtype) for name, t in mlp.state_dict().items()})
        with torch.no_grad():
            block.log_ridge.fill_(math.log(ridge) if ridge else -math.inf)
            block.lr_weight.zero_()
            block.lr_bias.fill_(math.log(strength) if 0 < strength < 1 else 30 if strength else -math.inf)
        inputs = x.to(dtype).requires_grad_()
        y, state = block(inputs, None, BlockContext(input_embeddings=target.to(dtype)))
        gradients = torch.autograd.grad(y.square().sum(), [inputs, *block.parameters()], materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
        streamed, after = stream(block, inputs.detach(), target.to(dtype))
        found = [y, streamed, block.accumulated_update(state), block.accumulated_update(after)]
        for tensor, wanted in zip(found, ill_conditioned_definition(block, mlp, x, target), strict=True):
            assert error(tensor, wanted) < bound


def ill_conditioned_definition(block, mlp, x, target):
    """In float64, with the parameters of ``block`` as they are stored."""
    gate, up = mlp.linear_in(x).chunk(2, dim=-1)
    hidden = mlp.activation(gate) * up
    keys = directions(hidden) if block.config.keys == "unit" else hidden
    rate = torch.sigmoid(block.lr_bias.double()).expand(20)
    ridge = block.log_ridge.double().exp().clamp(*RIDGE_BOUNDS)
    rows = [
        naive_in_place(
            keys[b], target[b], torch.zeros_like(mlp.linear_out.weight), block.conv.double()[:, 0],
            block.projection.double(), rate, chunk_size=8, left=2, update="ridge", ridge=ridge,
        )
        for b in range(2)
    ]  # fmt: skip
    y = mlp.linear_out(hidden) + torch.stack([row[0] for row in rows])
    delta = torch.stack([row[1] for row in rows])
    return [y, y, delta, delta]


def test_the_factor_has_no_pivot_below_the_root_of_the_ridge():
    keys = torch.ones(1, 64, 16, dtype=torch.float32) / 4
    q, y, factor = solved(keys, torch.ones(1, 64, 3), torch.tensor([1e-3], dtype=torch.float64))
    assert (factor.diagonal(dim1=1, dim2=2) >= math.sqrt(1e-3) * (1 - 1e-6)).all()
    assert q.isfinite().all()
    assert error(keys @ q.mT @ y, torch.ones(1, 64, 3)) < 1e-3  # the answer to the key that was repeated


def test_a_long_chunk_of_equal_keys_streams_as_it_is_called_in_float32(compiled):
    """The worst case of the lower bound: 8e-3 with l a tenth of it."""
    block = build(update="ridge", keys="unit", lr=1.0, chunk=256, dtype=torch.float32, compiled=compiled)
    with torch.no_grad():
        block.log_ridge.fill_(-100.0)
    x, target = draw(1, 1, DIM).float().expand(-1, 257, -1).contiguous(), draw(1, 257, DIM, seed=2).float()
    _, state = block(x, None, BlockContext(input_embeddings=target))
    _, streamed = stream(block, x, target)
    assert error(block.memory.update(streamed), block.memory.update(state)) < 1e-3


def test_a_repeated_chunk_adds_up_with_hebbian_and_not_with_ridge():
    norms = {}
    for update in ("hebbian", "ridge"):
        block = build(update=update, keys="unit", lr=1.0, chunk=4)
        x, target = (draw(1, 4, DIM, seed=seed).repeat(1, 50, 1) for seed in (1, 2))
        _, state = block(x, None, BlockContext(input_embeddings=target))
        _, first = block(x[:, :4], None, BlockContext(input_embeddings=target[:, :4]))
        norms[update] = (block.drift(state) / block.drift(first)).item()
    assert norms["hebbian"] == pytest.approx(50)
    assert norms["ridge"] < 5


def test_a_gradient_step_that_diverges_skips_updates_and_stays_finite(compiled):
    block = build(update="gradient", lr=1e3, chunk=4, dtype=torch.float32, compiled=compiled)
    x = draw(1, 1, DIM).float().expand(-1, 400, -1).contiguous()
    y, state = block(x, None, BlockContext(input_embeddings=x))
    streamed, after = stream(block, x, x)
    for tensor in (y, streamed, *state.values(), *after.values()):
        assert tensor.isfinite().all()
    assert block.skipped_updates(state).item() > 0
    assert torch.equal(block.skipped_updates(state), block.skipped_updates(after))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", ["hebbian", "gradient", "ridge"])
def test_next_frame_is_the_host_at_step_0_and_still_learns(update, dtype):
    mlp = ToyMLP(DIM, dtype, "cpu")
    block = build(mlp=mlp, dtype=dtype, excite=False, **{**BEST, "update": update})
    x = draw(2, 13, DIM).to(dtype)
    context = BlockContext(input_embeddings=x.flip(-1))
    state = assert_is_the_host(block, mlp, x)
    assert (block.memory.update(state) != 0).any(), "the memory has been updated, and is not in the output"
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        block(x, None, context)[0].float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, parameter in block.named_parameters() if torch.equal(parameter, before[name])]


def test_next_frame_writes_the_next_tokens_target():
    block = build(excite=False, start="next_frame", update="hebbian", lr=1.0)
    x, target = draw(1, 4, DIM), draw(1, 4, DIM, seed=2)
    _, state = block(x, None, BlockContext(input_embeddings=target))
    gate, up = block.info.mlp.linear_in(x).chunk(2, dim=-1)
    hidden = block.info.mlp.activation(gate) * up
    assert error(block.memory.update(state), hidden[:, :3].mT @ target[:, 1:]) < 1e-14


def test_the_gate_knows_the_target_of_its_own_token_and_no_later_one():
    block = build(**{**BEST, "target": "input_embed"}, chunk=4)
    x, target = draw(1, 12, DIM), draw(1, 12, DIM, seed=2)
    base, _ = block(x, None, BlockContext(input_embeddings=target))
    for t in range(12):
        changed = target.clone()
        changed[:, t] += 1
        y, _ = block(x, None, BlockContext(input_embeddings=changed))
        assert torch.equal(y[:, :t], base[:, :t])
        assert torch.equal(y[:, t], base[:, t]) == (t <= 4), "the first answer is given at token 4, and judged at 5"


def test_updates_off_answer_and_write_nothing():
    block = build(**BEST, chunk=4)
    x, target = draw(2, 11, DIM), draw(2, 11, DIM, seed=2)
    _, state = block(x, None, BlockContext(input_embeddings=target))
    before = block.accumulated_update(state)
    off = BlockContext(input_embeddings=target[:, :9], updates=False)
    pieces = [block(x[:, :1], state, BlockContext(input_embeddings=target[:, :1]))[1]]  # ends the chunk
    ended = block.accumulated_update(pieces[0])
    _, after = block(x[:, :9], pieces[0], off)
    assert not torch.equal(before, ended)
    assert error(block.accumulated_update(after), ended) < 1e-14


@pytest.mark.parametrize(
    "options", [{"padding": "causal"}, {"conv_kernel": 1}, {"chunk": 1}, {"padding": "causal", "chunk": "2s"}], ids=str
)
def test_a_filter_that_cannot_see_the_next_token_is_refused(options):
    with pytest.raises(ValueError, match=r"does not see the next token\. Take padding: centered"):
        GatingMLPConfig(start="next_frame", **options)


def test_ridge_in_a_bfloat16_state_is_refused():
    info = build().info
    with pytest.raises(ConfigError, match=r"fp32_state"):
        GatingMLP(GatingMLPConfig(update="ridge"), info, UNIFORM.roles(torch.bfloat16))


@pytest.mark.parametrize(
    "options", [{"update": "newton"}, {"keys": "norm"}, {"read_scale": 0}, {"start": "x"}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GatingMLPConfig(**options)


@pytest.mark.parametrize("update", ["gradient", "ridge"])
def test_inner_losses_are_what_the_update_lowers(update):
    """Before the projection, against the definition; a chunk of known keys is answered better after it."""
    block = build(update=update, keys="unit", lr=0.5, chunk=4)
    x, target = draw(2, 12, DIM), draw(2, 12, DIM, seed=2)
    found = block.inner_losses(x, BlockContext(input_embeddings=target))
    gate, up = block.info.mlp.linear_in(x).chunk(2, dim=-1)
    keys = directions(block.info.mlp.activation(gate) * up)
    for b in range(2):
        wanted = torch.cat([naive.filtered(part, block.conv[:, 0], 2) for part in target[b].split(4)])
        _, first = naive_in_place(
            keys[b, :4], target[b, :4], torch.zeros(DIM, keys.shape[-1], dtype=torch.float64), block.conv[:, 0], None,
            torch.full((4,), 0.5), chunk_size=4, left=2, update=update,
            ridge=block.log_ridge.exp().item() if update == "ridge" else 0.0,
        )  # fmt: skip
        assert error(found["initial"][b, 0], wanted.square().sum(-1) / 2) < 1e-12
        second = (keys[b, 4:8] @ first.T - wanted[4:8]).square().sum(-1) / 2
        assert error(found["before"][b, 0, 4:8], second) < 1e-12
    assert (found["after"].sum(-1) < found["before"].sum(-1)).all()


def test_the_published_form_is_every_options_default_and_the_shipped_one_corrects():
    registry = default_registry()
    folder = ROOT / "configs"
    published, shipped, tiny = (
        load_config(folder / f"{name}.yaml", registry=registry).ttt[0]
        for name in ("moshi-7b-in-place-published", "moshi-7b-gating-mlp", "tiny-gating-mlp")
    )
    new = ("update", "keys", "target_norm", "start", "read_scale", "success_gate", "train_w_down", "learned_lr")
    assert {name: getattr(published, name) for name in new} == {
        name: GatingMLPConfig.model_fields[name].default for name in new
    }
    for config in (shipped, tiny):
        assert {name: getattr(config, name) for name in BEST} == BEST
        assert config.train_w_down is False
