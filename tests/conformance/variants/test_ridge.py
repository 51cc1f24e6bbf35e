"""``ttt_ridge`` against its definition: every option, in one call, in pieces and streamed; ill-conditioned streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.format import ChunkLayout, GridFormat
from moshi_ttt.core.precision import FP32_STATE, UNIFORM
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.state import row_mask
from moshi_ttt.core.testing import BlockCase, Shape, error
from moshi_ttt.plugins.ttt_ridge import memory
from moshi_ttt.plugins.ttt_ridge.block import TTTRidge
from moshi_ttt.plugins.ttt_ridge.chunk import chunk_ridge
from moshi_ttt.plugins.ttt_ridge.config import REGULARIZATION
from moshi_ttt.plugins.ttt_ridge.naive import naive_layer, naive_ridge
from moshi_ttt.plugins.ttt_ridge.recurrent import recurrent_ridge

OPTIONS: list[dict[str, Any]] = [
    {"chunk": 4},
    {"chunk": 5, "heads": 2, "key_width": 6, "value_width": 3, "success_gate": False},
    {"chunk": 3, "heads": 2, "features": "relu2", "key_width": 20, "novelty": True, "conv_kernel": 2},
    {"chunk": 4, "heads": 4, "decay": 0.3, "value": "hidden", "gate": {"alpha": "layer", "init": 0.4}},
    {"chunk": 6, "heads": 2, "variance_gate": True, "decay": 0.1, "novelty": True, "regularization": 2.0},
    {"chunk": 1, "heads": 2, "gate": {"alpha": "fixed", "init": 0.3}, "readout_scale": 1.5},
]


def case_of(dtype: torch.dtype = torch.float64, **options: Any) -> BlockCase:
    registry = default_registry()
    config = parse_block({"variant": "ttt_ridge", **options}, registry=registry)
    return BlockCase(variant="ttt_ridge", config=config, shape=Shape(dim=16, heads=2, batch=2), dtype=dtype)


def weights_of(block: Any) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), "gate": block.gate}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_is_its_definition(options):
    case = case_of(**options)
    block, x = case.block(), case.inputs(23)
    context = case.context(x)
    source = context.input_embeddings if case.config.value == "embedding" else x
    expected = naive_layer(
        x, source, weights_of(block), heads=block.heads, chunk_size=block.chunk, features=case.config.features,
        keep=block.keep, readout_scale=case.config.readout_scale,
    )  # fmt: skip
    y, _ = block(x, None, context)
    assert error(y, expected) < 1e-10
    for backend in ("torch", "cpp"):
        block.use_backend("step", backend)
        state = block.allocate_state(2)
        streamed = torch.cat([case.step(block, x[:, t : t + 1], state) for t in range(23)], dim=1)
        assert error(streamed, expected) < 1e-10, backend
    cotangent = torch.randn_like(y)
    parameters = list(block.parameters())
    ours = torch.autograd.grad((y * cotangent).sum(), parameters)
    theirs = torch.autograd.grad((expected * cotangent).sum(), parameters)
    for (name, _), a, b in zip(block.named_parameters(), ours, theirs, strict=True):
        assert error(a, b) < 1e-9, name


@pytest.mark.parametrize("keep", [1.0, 0.98])
@pytest.mark.parametrize(("length", "width"), [(50, 64), (150, 24), (40, 3), (41, 41)])
@pytest.mark.parametrize("form", ["fresh", "empty state", "cut in two", "rows in different places"])
def test_chunks_solved_together_are_the_definition(form, length, width, keep):
    """One system for all chunks, several systems, and systems of one chunk: reads, variances, state and gradients."""
    generator = torch.Generator().manual_seed(3)
    batch, heads, size = 2, 2, 4

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, length, heads, *shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(drawn(width), dim=-1) for _ in range(2))
    v, strength, prior = drawn(3), drawn().sigmoid(), torch.tensor([0.05, 0.7], dtype=torch.float64)
    given = [part.requires_grad_() for part in (q, k, v, strength, prior)]
    read, variance, solution = naive_ridge(*given, chunk_size=size, keep=keep)
    rule = memory.Rule(prior, keep, variance=True)
    start = memory.initial_state(batch, heads, width, 3, q.detach(), decays=keep != 1, variance=True)
    tokens = memory.RidgeTokens(q, k, v, strength, torch.ones(batch, length, dtype=torch.bool))
    if form == "cut in two" or form == "rows in different places":
        at = 17  # in the middle of a chunk
        parts = [memory.RidgeTokens(*(part[:, span] for part in tokens)) for span in (slice(at), slice(at, None))]
        first, between = chunk_ridge(parts[0], start, rule, ChunkLayout(at, size))
        layout = ChunkLayout(length - at, size, offset=between["position"])
        second, after = chunk_ridge(parts[1], between, rule, layout)
        found = memory.Read(*(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)))
        if form == "rows in different places":  # the second row starts anew where the first goes on
            fresh = {name: torch.where(row_mask(torch.tensor([False, True]), part), start[name], part)
                     for name, part in between.items()}  # fmt: skip
            anew, _ = chunk_ridge(parts[1], fresh, rule, ChunkLayout(length - at, size, offset=fresh["position"]))
            alone, _, _ = naive_ridge(*(part[:, at:] for part in given[:4]), prior, chunk_size=size, keep=keep)
            assert error(anew.value[1], alone[1]) < 1e-10
            assert error(anew.value[0], read[0, at:]) < 1e-10
            return
    else:
        found, after = chunk_ridge(tokens, start, rule, ChunkLayout(length, size), fresh=form == "fresh")
        unwanted = chunk_ridge(tokens, start, rule, ChunkLayout(length, size), fresh=form == "fresh", want_state=False)
        assert unwanted[1] == {}
        assert torch.equal(unwanted[0].value, found.value)
    assert error(found.value, read) < 1e-10
    assert error(found.variance, variance) < 1e-9
    if length % size == 0:
        assert error(after["solution"], solution) < 1e-10
    cotangents = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in found]
    ours = torch.autograd.grad([found.value, found.variance], given, cotangents)
    theirs = torch.autograd.grad([read, variance], given, cotangents)
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 1e-8


# ---- streams that are hard to solve


def stream_of(kind: str, length: int, width: int) -> Tensor:
    """Keys ``[T, m]``, float64: as speech has them (alike, and some directions rare), all equal, or zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(length, width, generator=generator, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros_like(drawn)
    if kind == "equal":
        drawn = drawn[:1].expand(length, -1)
    if kind == "speech":
        drawn = drawn * torch.linspace(2, 0.02, width, dtype=torch.float64) + drawn[:1]
    return torch.nn.functional.normalize(drawn, dim=-1)


def tokens_of(k: Tensor, v: Tensor, strength: Tensor, dtype: torch.dtype) -> memory.RidgeTokens:
    """One stream and one head of ``k [T, m]``, ``v [T, d]``, ``strength [T]``; queries are the keys."""
    parts = (part.to(dtype)[None, :, None] for part in (k, k, v, strength))
    return memory.RidgeTokens(*parts, written=torch.ones(1, len(k), dtype=torch.bool))


def after_all(tokens: memory.RidgeTokens, rule: memory.Rule, form: str, size: int = 16) -> Tensor:
    """The solution ``[m, d]`` after all tokens, in one call or step by step."""
    k, v = tokens.k, tokens.v
    state = memory.initial_state(1, 1, k.shape[-1], v.shape[-1], k, decays=rule.keep != 1, variance=False)
    if form == "call":
        _, state = chunk_ridge(tokens, state, rule, ChunkLayout(k.shape[1], size))
    else:
        state = states.clone(state)
        for t in range(k.shape[1]):
            recurrent_ridge(memory.RidgeTokens(*(part[:, t : t + 1] for part in tokens)), state, rule, size)
    return state["pending"][0, 0].double()


# By default a call, which is slow in no case; the steps are those of a call to rounding, as the kit checks.
@pytest.mark.parametrize("form", ["call", pytest.param("steps", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("keep", [1.0, 0.999])
@pytest.mark.parametrize("regularization", [*REGULARIZATION, 0.05])
@pytest.mark.parametrize(("kind", "bound"), [("speech", 1e-4), ("equal", 0.1), ("zero", 0.0)])
def test_float32_stays_near_the_exact_solution(kind, bound, regularization, keep, form):
    """Every stream stays finite; equal keys cancel digits, and the README says how many are left."""
    length, width = 2000, 32
    generator = torch.Generator().manual_seed(1)
    k = stream_of(kind, length, width)
    v = k @ torch.randn(width, 8, generator=generator, dtype=torch.float64)
    v = v + 0.5 * torch.randn(v.shape, generator=generator, dtype=torch.float64)
    k, v = k.float().double(), v.float().double()
    strength = torch.full((length,), 0.75, dtype=torch.float64)
    prior = torch.tensor([regularization], dtype=torch.float32)
    found = after_all(tokens_of(k, v, strength, torch.float32), memory.Rule(prior, keep), form)
    exact = after_all(tokens_of(k, v, strength, torch.float64), memory.Rule(prior.double(), keep), "call")
    assert found.isfinite().all()
    said, expected = k[-200:] @ found, k[-200:] @ exact
    assert float((said - expected).norm()) <= bound * float(expected.norm())


def test_the_exact_solution_is_that_of_the_normal_equations():
    k, generator = stream_of("speech", 500, 16), torch.Generator().manual_seed(2)
    v, strength = (
        torch.randn(500, 4, generator=generator, dtype=torch.float64),
        torch.rand(500, generator=generator).double(),
    )
    found = after_all(
        tokens_of(k, v, strength, torch.float64), memory.Rule(torch.tensor([0.05], dtype=torch.float64)), "call"
    )
    weighted = k.mT * strength
    expected = torch.linalg.solve(weighted @ k + 0.05 * torch.eye(16, dtype=torch.float64), weighted @ v)
    assert error(found, expected) < 1e-10


def test_a_key_heard_once_is_recalled_and_the_variance_says_so():
    """One chunk of orthogonal keys: each reads its own value, all but the regularization's share."""
    k, v = torch.eye(4, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64).view(4, 2)
    rule = memory.Rule(torch.tensor([0.25], dtype=torch.float64), variance=True)
    twice = tokens_of(torch.cat([k, k]), torch.cat([v, v]), torch.ones(8, dtype=torch.float64), torch.float64)
    state = memory.initial_state(1, 1, 4, 2, k, decays=False, variance=True)
    read, _ = chunk_ridge(twice, state, rule, ChunkLayout(8, 4))
    assert error(read.value[0, :, 0], torch.cat([torch.zeros_like(v), v / 1.25])) < 1e-12
    assert read.variance is not None
    assert error(read.variance[0, :, 0], torch.tensor([1.0] * 4 + [0.2] * 4, dtype=torch.float64)) < 1e-12


def test_decay_keeps_the_weight_of_the_prior():
    """However long the stream, a memory that hears nothing new has its prior back, and no direction runs away."""
    case = case_of(chunk=4, heads=2, decay=0.3)
    block, x = case.block(), case.inputs(400)
    state = block.allocate_state(2)
    for t in range(400):
        case.step(block, x[:, t : t + 1], state)
    variances = torch.linalg.eigvalsh(state["covariance"])
    assert (variances > 0).all()
    assert (variances < 2).all()
    assert torch.equal(state["covariance"], state["covariance"].mT)


# ---- the block


def test_nothing_heard_is_nothing_added():
    """The first chunk reads zeros: a new block is its host but for the gated bias, which starts at zero."""
    case = case_of(chunk=4)
    block = case.block()
    block.reset_parameters(torch.Generator().manual_seed(0))
    x = case.inputs(4)
    assert torch.equal(block(x, None, case.context(x))[0], x)
    longer = case.inputs(12)
    assert torch.equal(block(longer, None, case.context(longer, updates=False))[0], longer)


def test_a_value_is_found_under_the_key_before_it():
    """The claim of the layer: a pair of frames heard once, and the second is expected when the first comes again."""
    case = BlockCase(
        variant="ttt_ridge", shape=Shape(dim=64, heads=1, batch=1), dtype=torch.float64,
        config=parse_block({"variant": "ttt_ridge", "chunk": 2, "success_gate": False}, registry=default_registry()),
    )  # fmt: skip
    block = case.block()
    block.reset_parameters(torch.Generator().manual_seed(0))
    x = case.inputs(12)
    x = torch.cat([x, x], dim=1)
    state = block.init_state(1)
    tokens, _, _ = block._tokens(x, state, BlockContext(input_embeddings=x))
    read, _ = chunk_ridge(tokens, state, block._rule(), ChunkLayout(24, 2))
    following = torch.nn.functional.cosine_similarity(read.value[0, 12:-1, 0], tokens.v[0, 13:, 0])
    first = torch.nn.functional.cosine_similarity(read.value[0, 2:11, 0], tokens.v[0, 3:12, 0])
    assert following.min() > 0.8 > 0.5 > first.abs().mean()


def test_drift_is_the_share_of_variance_that_is_gone():
    case = case_of(chunk=4, heads=2)
    block, x = case.block(), case.inputs(40)
    assert block.drift(block.init_state(2)).tolist() == [0, 0]
    _, state = block(x, None, case.context(x))
    assert ((block.drift(state) > 0.5) & (block.drift(state) < 1)).all()


def test_checkpointed_groups_keep_less_and_change_nothing():
    kept, outcomes = {}, {}
    for together in (None, 8, 1000):
        block_case = case_of(chunk=2, heads=2, key_width=24, checkpoint_chunks=together)
        block, x, sizes = block_case.block(), block_case.inputs(128), []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = block_case.call(block, x)
        gradients = torch.autograd.grad(y.square().sum(), list(block.parameters()))
        kept[together], outcomes[together] = sum(sizes), [y, *gradients]
    least = kept[1000]  # one group: what enters the memory, and what is around it
    assert kept[8] - least < (kept[None] - least) / 5
    for a, b in zip(outcomes[8], outcomes[None], strict=True):
        assert torch.equal(a, b)


def test_a_block_of_moshi_7b_keeps_six_mebibytes_a_stream():
    info = replace(case_of().info("meta"), dim=4096, num_heads=32, device=torch.device("meta"))
    block = TTTRidge(case_of().config, info, FP32_STATE.roles(torch.bfloat16))
    assert (block.heads, block.key_width, block.value_width) == (32, 128, 128)
    assert 6 * 2**20 < block.state_bytes() < 8 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "Set heads to a divisor of 16"),
        ({"regularization": 1e-4}, "greater than or equal to 0.001"),
        ({"gate": {"alpha": "fixed", "init": 0.0}}, "adds nothing"),
        ({"features": "relu"}, "'identity' or 'relu2'"),
        ({"conv_kernel": 1}, "greater than or equal to 2"),
        ({"decay": 0.5, "key_width": 512}, "Lower decay, raise chunk, or make key_width smaller"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        case_of(**options).block()


@pytest.mark.parametrize("end", REGULARIZATION)
@pytest.mark.parametrize("beyond", [0.0, 3.0, 200.0])
def test_regularization_learns_at_its_ends_and_comes_back_from_beyond(end, beyond):
    case = case_of(dtype=torch.float32, chunk=4, heads=2, regularization=end)
    block, x = case.block(), case.inputs(16)
    block.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        block.log_regularization.add_(beyond if end > 1 else -beyond)
    assert torch.allclose(block._rule().regularization, torch.tensor(end))
    case.call(block, x)[0].square().sum().backward()
    gradient = block.log_regularization.grad
    assert gradient.isfinite().all()
    assert (gradient != 0).all()
    assert block.red_flags({"regularization_least": min(1.0, end), "regularization_largest": max(1.0, end)})


def test_a_state_of_few_digits_is_refused():
    with pytest.raises(ConfigError, match=r"bfloat16.*needs the digits of float32\. Use a policy"):
        case_of(dtype=torch.bfloat16).at(policy=UNIFORM).block()


def test_a_projection_that_overflows_in_float16_is_not_written_and_is_counted():
    case = case_of(dtype=torch.float16, chunk=4)
    block, x = case.block(), case.inputs(12)
    with torch.no_grad():
        block.wqk.weight.mul_(3e4)
        x[0, 6] = 1.0  # all channels add up
        block.wqk.weight[0] = 3e4
    y, state = case.call(block, x)
    assert y.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert block.skipped_updates(state)[0] >= 1


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
def test_a_token_that_is_not_finite_counts_where_it_would_have_been_written(streamed):
    case = case_of(dtype=torch.float32, chunk=4)
    block, x = case.block(), case.inputs(6)
    x[:, 1], x[:, 4] = torch.nan, torch.inf
    mask = torch.arange(len(x)) == 0
    for updates, expected in ((True, 2), (mask, 2 * mask), (False, 0)):
        if streamed:
            state = block.allocate_state(len(x))
            for token in x.split(1, 1):
                case.step(block, token, state, updates=updates)
        else:
            _, state = case.call(block, x, updates=updates)
        assert torch.equal(block.skipped_updates(state), torch.zeros(len(x), dtype=torch.int64) + expected)


def test_a_grid_is_refused():
    with pytest.raises(ConfigError, match=r"tokens of a grid do not follow each other\. Use ttt_linear or ttt_mlp"):
        TTTRidge(case_of().config, replace(case_of().info(), format=GridFormat()), FP32_STATE.roles(torch.float32))
