"""In-place TTT: its two forms against the definition, the filter's edges, clipping, step 0, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.errors import ConfigError, ContextError
from moshi_ttt.core.format import ChunkLayout, SequenceFormat
from moshi_ttt.core.precision import FP32_STATE, UNIFORM
from moshi_ttt.core.testing import error
from moshi_ttt.core.testing.toy_host import ToyMLP
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.chunkwise import chunkwise_in_place
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from moshi_ttt.plugins.gating_mlp.naive import naive_in_place
from moshi_ttt.plugins.gating_mlp.parallel import parallel_in_place
from tests.unit.plugins.gating import DIM, assert_is_the_host, build, draw


@pytest.mark.parametrize("padding", ["centered", "causal"])
@pytest.mark.parametrize("kernel", [1, 2, 4, 5])
@pytest.mark.parametrize("length", [3, 4, 11, 16])
def test_block_equals_the_definition(length, kernel, padding):
    block = build(conv_kernel=kernel, padding=padding, decay=0.1, clip=0.7, learned_lr=True, lr=0.2)
    x, target = draw(2, length, DIM), draw(2, length, DIM, seed=2)
    y, state = block(x, None, BlockContext(input_embeddings=target))
    mlp = block.info.mlp
    gate, up = mlp.linear_in(x).chunk(2, dim=-1)
    hidden = mlp.activation(gate) * up
    rate = 0.2 * 2 * torch.sigmoid(x @ block.lr_weight + block.lr_bias)
    left = kernel - 1 if padding == "causal" else (kernel - 1) // 2
    for row in range(2):
        expected, delta = naive_in_place(
            hidden[row], target[row], mlp.linear_out.weight, block.conv[:, 0], block.projection, rate[row],
            chunk_size=4, left=left, decay=0.1, clip=0.7,
        )  # fmt: skip
        assert error(y[row], expected) < 1e-12
        assert error(block.accumulated_update(state)[row], delta) < 1e-12


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("with_start", [False, True], ids=["from zero", "carried"])
@pytest.mark.parametrize("length", [17, 20])
def test_both_forms_agree_with_gradients(length, with_start, decay):
    keys, values = draw(2, length, 9).requires_grad_(), draw(2, length, 6, seed=2).requires_grad_()
    start = draw(2, 9, 6, seed=3).requires_grad_() if with_start else None
    complete = torch.tensor([[True, True, True, True, False], [True, True, True, False, False]])
    taught = torch.tensor([[True, True, False, True, True], [False, True, True, True, True]])
    leaves = [leaf for leaf in (keys, values, start) if leaf is not None]
    results = []
    for form in (parallel_in_place, chunkwise_in_place):
        y = form(keys, values, start, complete, taught, decay, 4)
        cotangent = draw(*y.shape, seed=4)
        cotangent[1, 16:] = 0  # row 1 ends in chunk 3: its chunk 4 holds no tokens
        results.append((y, torch.autograd.grad((y * cotangent).sum(), leaves)))
    (attended, gradients), (running, running_gradients) = results
    assert error(attended[0], running[0]) < 1e-12
    assert error(attended[1, :16], running[1, :16]) < 1e-12
    for a, b in zip(gradients, running_gradients, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("length", [17, 20])
@pytest.mark.parametrize("twice", [False, True])
def test_keys_that_are_cleared_by_the_parallel_form_give_the_same(length, twice):
    keys, values = draw(2, length, 9).requires_grad_(), draw(2, length, 6, seed=2).requires_grad_()
    finite = torch.rand(2, length, 1, generator=torch.Generator().manual_seed(5)) < 0.8
    spoiled = keys.detach().masked_fill(~finite, math.nan).requires_grad_()
    given = None, torch.ones(1, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool), 0.0, 4
    results = []
    for leaf, mask in ((keys, None), (spoiled, finite)):
        cleared = torch.where(finite, leaf, 0) if mask is None else leaf
        y = parallel_in_place(cleared, values, *given, finite=mask)
        gradients = torch.autograd.grad(y.pow(2).sum(), [leaf, values], create_graph=twice)
        if twice:
            gradients += torch.autograd.grad(sum(each.pow(3).sum() for each in gradients), [leaf, values])
        results.append([y, *gradients])
    assert all(bool(found.isfinite().all()) for found in results[1])
    assert all(error(found, expected) < 1e-12 for found, expected in zip(results[1], results[0], strict=True))


def test_the_hidden_activation_is_kept_once():
    """By the host's product with W_0, and by what reads the memory: of a call's tensors this large the only one."""
    block = build(conv_kernel=2, mlp=(mlp := ToyMLP(DIM, torch.float64, "cpu")))
    hidden = 11 * 2 * DIM * 8  # bytes
    x = draw(1, 11, DIM).requires_grad_()
    kept = []
    for call in (
        lambda: mlp(x),
        lambda: block(x, None, BlockContext(input_embeddings=x.detach(), want_state=False))[0],
    ):
        storages: dict[int, int] = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = call()
        kept.append(list(storages.values()).count(hidden))
        del held
    assert kept == [2, 1], "the host keeps what the activation gives too"


def test_clip_is_the_frobenius_norm_and_finite_at_zero():
    keys, values = draw(1, 2, 4, 5), torch.stack([draw(4, 3), torch.zeros(4, 3, dtype=torch.float64)])[None]
    values.requires_grad_()
    scale = ops.clip_scale(ops.squared_norm(keys, values).sum(-1), 0.5)
    norm = (values[0, 0].T @ keys[0, 0]).norm()
    assert scale[0, 0].item() == pytest.approx(min(1.0, 0.5 / norm.item()), rel=1e-12)
    assert scale[0, 1] == 1.0
    scale.sum().backward()
    assert torch.isfinite(values.grad).all()
    assert ops.clip_scale(torch.tensor([float("inf"), float("nan")]), 0.5).tolist() == [0.0, 0.0]


def test_filter_never_crosses_a_chunks_edge():
    conv, target = draw(3, 1, 5), draw(1, 8, 3, seed=2)
    layout = ChunkLayout(8, 4)
    base = ops.filtered(layout.split(target), conv, 2)
    changed = target.clone()
    changed[:, 4] += 1
    assert torch.equal(ops.filtered(layout.split(changed), conv, 2)[:, 0], base[:, 0])


@pytest.mark.parametrize(("taps", "left", "beyond"), [(5, 2, 0), (5, 4, 3), (1, 0, 0), (4, 0, 2)])
def test_filter_and_its_derivatives_are_the_definitions(taps, left, beyond):
    target, conv = draw(2, 3, 4, 3).requires_grad_(), draw(3, 1, taps, seed=2).requires_grad_()  # [B, N, C, d]
    found = ops.filtered(target, conv, left, beyond)
    expected = torch.zeros(2, 3, 4 + beyond, 3, dtype=torch.float64)
    for token in range(4):
        for tap in range(taps):
            if 0 <= (to := token - tap + left) < 4 + beyond:
                expected[:, :, to] += target.detach()[:, :, token] * conv.detach()[:, 0, tap]
    assert error(found, expected) < 1e-14
    assert torch.autograd.gradcheck(lambda *given: ops.filtered(*given, left, beyond), (target, conv))
    assert torch.autograd.gradgradcheck(lambda *given: ops.filtered(*given, left, beyond), (target, conv))


def test_the_first_chunk_of_a_sequence_is_the_hosts_bit_for_bit():
    """Nothing was written before it: zeros are not added, which would make 0 of -0."""
    mlp = ToyMLP(DIM, torch.float64, "cpu")
    block, x = build(mlp=mlp), draw(2, 10, DIM)
    y, _ = block(x, None, BlockContext(input_embeddings=x))
    host = mlp(x)
    assert torch.equal(y[:, :4], host[:, :4])
    assert not torch.equal(y[:, 4:], host[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_0_is_the_host_bit_for_bit_and_every_parameter_moves_after_two_steps(dtype):
    mlp = ToyMLP(DIM, dtype, "cpu")
    block = build(mlp=mlp, dtype=dtype, excite=False, learned_lr=True)
    x = draw(2, 13, DIM).to(dtype)
    context = BlockContext(input_embeddings=x.flip(-1))
    assert_is_the_host(block, mlp, x)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        block(x, None, context)[0].float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, parameter in block.named_parameters() if torch.equal(parameter, before[name])]
    assert set(still) <= {"lr_weight", "lr_bias"}, "the learned rate has a gradient once the filter is not zero"


def test_missing_embeddings_raise_and_hidden_states_need_none():
    with pytest.raises(ContextError, match="input embeddings"):
        build()(draw(1, 5, DIM))
    build(target="hidden_states")(draw(1, 5, DIM))


def test_a_site_without_a_gated_mlp_is_refused():
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=DIM, num_heads=1, device=torch.device("cpu"), dtype=torch.float32,
        format=SequenceFormat(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"the host gives None\. A GatedMLP has"):
        GatingMLP(GatingMLPConfig(), info, FP32_STATE.roles(torch.float32))


def test_a_quantised_mlp_is_refused():
    mlp = ToyMLP(DIM, torch.float32, "cpu")
    mlp.linear_out.weight = nn.Parameter(torch.zeros(DIM, 2 * DIM, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        build(mlp=mlp, dtype=torch.float32)


@pytest.mark.parametrize(
    "options", [{"chunk": 0}, {"lr": 0}, {"decay": 1.0}, {"clip": 0}, {"conv_kernel": 0}, {"padding": "same"}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GatingMLPConfig(**options)


def test_drift_is_the_updates_norm_over_that_of_w_0():
    block = build(lr=0.1)
    x = draw(2, 9, DIM)
    _, state = block(x, None, BlockContext(input_embeddings=x))
    mlp = block.info.mlp
    gate, up = mlp.linear_in(x[1]).chunk(2, dim=-1)
    hidden, rate = mlp.activation(gate) * up, torch.full((9,), 0.1, dtype=torch.float64)
    _, delta = naive_in_place(
        hidden, x[1], mlp.linear_out.weight, block.conv[:, 0], block.projection, rate, chunk_size=4, left=2
    )
    expected = delta.norm() / mlp.linear_out.weight.norm()
    assert block.drift(state)[1].item() == pytest.approx(expected.item(), rel=1e-12)
    assert (block.drift(block.allocate_state(2)) == 0).all()


def test_a_trained_w_down_is_the_hosts_plus_a_change():
    """Its gradient is W_0's, and a change of it moves the output as the same change of W_0 would."""
    mlp = ToyMLP(DIM, torch.float64, "cpu")
    block = build(mlp=mlp, train_w_down=True)
    x = draw(2, 11, DIM)
    context = BlockContext(input_embeddings=x.flip(-1))
    torch.nn.init.zeros_(block.w_down_change)
    y, state = block(x, None, context)
    y.square().sum().backward()
    assert error(block.w_down_change.grad, mlp.linear_out.weight.grad) < 1e-12
    change = draw(*block.w_down_change.shape, seed=3)
    with torch.no_grad():
        block.w_down_change.copy_(change)
        changed, after = block(x, None, context)
        stream = block.allocate_state(2)
        tokens = [BlockContext(input_embeddings=x.flip(-1)[:, t : t + 1]) for t in range(11)]
        streamed = torch.cat([block.step(x[:, t : t + 1], stream, tokens[t]) for t in range(11)], dim=1)
        block.w_down_change.zero_()
        mlp.linear_out.weight.add_(change)
        expected, _ = block(x, None, context)
    assert error(changed, expected) < 1e-12
    assert error(streamed, expected) < 1e-12
    for name, tensor in state.items():
        assert error(after[name], tensor) < 1e-12, "what the fast weight learns does not depend on W_0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_w_down_changes_nothing_at_step_0(dtype):
    mlp = ToyMLP(DIM, dtype, "cpu")
    block = build(mlp=mlp, dtype=dtype, excite=False, train_w_down=True)
    x = draw(2, 13, DIM).to(dtype)
    with torch.no_grad():
        assert torch.equal(block(x, None, BlockContext(input_embeddings=x))[0], mlp(x))
    assert block.w_down_change.dtype == torch.float32


def quarter_ulp_updates(policy):
    """A fast weight's norm after 1,000 updates of a quarter of a bfloat16 ulp each, over that after the first."""
    mlp = ToyMLP(DIM, torch.bfloat16, "cpu")
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=DIM, num_heads=1, device=torch.device("cpu"), dtype=torch.bfloat16,
        format=SequenceFormat(), mlp=mlp,
    )  # fmt: skip
    block = GatingMLP(GatingMLPConfig(chunk=1, lr=1.0, conv_kernel=1), info, policy.roles(torch.bfloat16))
    block.reset_parameters()
    with torch.no_grad():
        block.conv.fill_(1.0)
        block.projection.copy_(torch.eye(DIM))
    x, state = draw(1, 1, DIM).bfloat16(), block.allocate_state(1)
    norms = []
    for step in range(1_002):
        target = torch.full_like(x, 1.0 if step == 0 else 2.0**-10)
        block.step(x, state, BlockContext(input_embeddings=target))
        norms.append(float(block.memory.update(state).float().norm()))
    return norms[-1] / norms[0]


def test_updates_below_an_ulp_survive_in_float32_state_and_are_lost_in_bfloat16():
    assert quarter_ulp_updates(FP32_STATE) == pytest.approx(1 + 1_001 / 1_024, rel=1e-4)
    assert quarter_ulp_updates(UNIFORM) == 1.0


def test_a_chunk_in_seconds():
    mlp = ToyMLP(DIM, torch.float32, "cpu")
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=DIM, num_heads=1, device=torch.device("cpu"), dtype=torch.float32,
        format=SequenceFormat(), mlp=mlp, frame_rate=12.5,
    )  # fmt: skip
    roles = FP32_STATE.roles(torch.float32)
    for seconds, tokens in (("20.5s", 256), ("2s", 25), ("0.01s", 1)):
        assert GatingMLP(GatingMLPConfig(chunk=seconds), info, roles).chunk == tokens
    with pytest.raises(ConfigError, match=r"no fixed duration\. Give a number of tokens"):
        GatingMLP(GatingMLPConfig(chunk="2s"), replace(info, frame_rate=None), roles)
    for nonsense in ("2", "2 s", "2m", "-1s", "s", 0, -3, 2.5, True):
        with pytest.raises(ValueError, match="chunk"):
            GatingMLPConfig(chunk=nonsense)
