"""In-place TTT token by token: the schedule of a chunk, equality with the definition, updates that are skipped."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.errors import ConfigError, ContextError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import UNIFORM
from moshi_ttt.core.state import clone
from moshi_ttt.core.testing import error
from moshi_ttt.core.testing.toy_host import ToyMLP
from moshi_ttt.plugins.gating_mlp import naive, ops
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from moshi_ttt.plugins.gating_mlp.naive import naive_in_place
from moshi_ttt.plugins.gating_mlp.schedule import FoldSchedule, StepTables
from tests.unit.plugins.gating import DIM, build, draw, stream


@pytest.fixture(params=[False, True], ids=["tensor operations", "compiled"])
def compiled(request):
    return request.param


def defined(block, x, target, taught=None):
    """Outputs and accumulated updates straight from the definition; ``taught [B, N]`` bool leaves updates out."""
    config, mlp = block.config, block.info.mlp
    gate, up = mlp.linear_in(x).chunk(2, dim=-1)
    hidden, size = mlp.activation(gate) * up, config.chunk
    rate = torch.full(x.shape[:2], config.lr, dtype=x.dtype)
    if config.learned_lr:
        rate = config.lr * 2 * torch.sigmoid(x @ block.lr_weight + block.lr_bias)
    taught = torch.ones(len(x), x.shape[1] // size + 1, dtype=torch.bool) if taught is None else taught
    taught = taught.repeat_interleave(size, dim=1)[:, : x.shape[1]]
    rows = [
        naive_in_place(
            hidden[b], target[b], mlp.linear_out.weight, block.conv[:, 0], block.projection, rate[b] * taught[b],
            chunk_size=size, left=ops.left_padding(config.conv_kernel, config.padding), decay=config.decay,
            clip=config.clip, updated=taught[b],
        )
        for b in range(x.shape[0])
    ]  # fmt: skip
    return torch.stack([y for y, _ in rows]), torch.stack([delta for _, delta in rows])


@pytest.mark.parametrize("look_ahead", [0, 1, 2, 7])
@pytest.mark.parametrize("hidden", [1, 12, 31])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 16, 40])
def test_each_channel_is_folded_once_and_each_token_ends_in_its_place(chunk, hidden, look_ahead):
    schedule = FoldSchedule(chunk, hidden, min(look_ahead, chunk - 1))
    tables, unread = StepTables(schedule, 1, torch.device("cpu")), schedule.slots - 1
    lies: dict[int, object] = {slot: ("old", slot) for slot in range(chunk)}
    folded: list[int] = []
    for step in range(chunk):
        position = torch.tensor([step])
        columns, channels, sources, key_slots, value_slots, done_channels, done, following = (
            part[0].tolist() for part in tables.at(position, None)
        )
        assert done_channels == [len(folded)] == schedule.folded(position).tolist()
        if len(folded) < hidden:
            assert all(lies[slot] == ("old", slot) for slot in range(chunk)), (
                "the old chunk is needed until it is folded"
            )
        real = [channel for channel in channels if channel < hidden]
        assert columns[: len(real)] == real
        folded += real
        moves = list(zip(sources, key_slots[:-1], strict=True))
        assert moves == list(zip(sources, value_slots[: len(moves)], strict=True))
        arrived = {target: lies.get(source) for source, target in moves if target != unread}
        assert all(content is not None and content[1] == target for target, content in arrived.items())
        assert all(content[1] < step - schedule.look_ahead + 1 for content in arrived.values()), (
            "only settled tokens move"
        )
        lies |= arrived
        lies[key_slots[-1]] = ("new", step)
        window = value_slots[len(moves) :]
        for token, slot in zip(range(step - schedule.look_ahead, step + 1), window, strict=True):
            assert slot == unread if token < 0 else lies[slot] == ("new", token)
        here = schedule.in_place(torch.tensor([step + 1]))[0].tolist()
        assert here == [lies[slot] == ("new", slot) for slot in range(chunk)]
        assert (done, following) == ([int(step == chunk - 1)], [(step + 1) % chunk])
    assert sorted(folded) == list(range(hidden))
    assert all(lies[slot] == ("new", slot) for slot in range(chunk))


def test_a_masked_step_does_nothing():
    schedule = FoldSchedule(8, 20, 2)
    tables = StepTables(schedule, 2, torch.device("cpu"))
    columns, channels, sources, key_slots, value_slots, _, done, following = tables.at(
        torch.tensor([7, 7]), torch.tensor([False, True])
    )
    unread = schedule.slots - 1
    assert set(channels[0].tolist()) == {20}
    assert {*sources[0].tolist(), *key_slots[0].tolist(), *value_slots[0].tolist()} == {unread}
    assert (done[:, 0].tolist(), following[:, 0].tolist()) == ([0, 1], [7, 0])
    assert columns.max() < 20


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.2}, {"clip": 0.6}, {"decay": 0.1, "clip": 0.4, "learned_lr": True}], ids=str
)
@pytest.mark.parametrize("padding", ["centered", "causal"])
@pytest.mark.parametrize(("chunk", "kernel"), [(1, 1), (1, 3), (2, 5), (3, 4), (5, 12), (8, 1), (9, 5), (16, 2)])
def test_a_stream_equals_the_definition(chunk, kernel, padding, options, compiled):
    block = build(compiled=compiled, chunk=chunk, conv_kernel=kernel, padding=padding, **options)
    length = 4 * chunk + 3
    x, target = draw(3, length, DIM), draw(3, length, DIM, seed=2)
    y, state = stream(block, x, target)
    expected, delta = defined(block, x, target)
    assert error(y, expected) < 1e-11
    assert error(block.accumulated_update(state), delta) < 1e-11
    assert (state["skipped"] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e80], ids=str)
@pytest.mark.parametrize("where", ["activations", "target"])
@pytest.mark.parametrize("options", [{}, {"decay": 0.2, "clip": 0.6}], ids=str)
def test_an_update_that_is_not_finite_is_skipped_and_counted_in_its_own_row(options, where, bad, compiled):
    block = build(compiled=compiled, **options)
    x, target = draw(3, 19, DIM), draw(3, 19, DIM, seed=2)
    clean, _ = stream(block, x, target)
    (x if where == "activations" else target)[1, 5, 2] = bad
    y, state = stream(block, x, target)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert state["skipped"].tolist() == [0, 1, 0]
    assert block.skipped_updates(state).tolist() == [0, 1, 0]
    assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())
    sane = torch.nan_to_num(x, 0, 0, 0).clamp(-10, 10), torch.nan_to_num(target, 0, 0, 0).clamp(-10, 10)
    taught = torch.ones(3, 5, dtype=torch.bool)
    taught[1, 1] = False
    expected, delta = defined(block, *sane, taught)
    others = [t for t in range(19) if t != 5]
    assert error(y[:, others], expected[:, others]) < 1e-11
    assert error(block.accumulated_update(state), delta) < 1e-11
    context = BlockContext(input_embeddings=target)
    whole, final = block(x, None, context)
    assert error(whole[:, others], expected[:, others]) < 1e-11
    for name, tensor in final.items():
        assert error(tensor, state[name]) < 1e-10, name
    with torch.no_grad():
        trained, _ = block(x, None, BlockContext(input_embeddings=target, want_state=False))
    assert error(trained[:, others], expected[:, others]) < 1e-11


def test_a_rate_far_too_high_updates_nothing_and_is_counted(compiled):
    block = build(compiled=compiled, dtype=torch.float32, lr=1e12)
    x, target = 50 * draw(2, 17, DIM).float(), 1e9 * draw(2, 17, DIM, seed=2).float()
    y, state = stream(block, x, target)
    assert torch.equal(y, torch.cat([block.info.mlp(x[:, t : t + 1]) for t in range(17)], dim=1))
    assert state["skipped"].tolist() == [4, 4]
    _, carried = block(x, None, BlockContext(input_embeddings=target))
    assert carried["skipped"].tolist() == [4, 4]


def test_an_update_whose_squared_norm_is_beyond_float32_is_clipped(compiled):
    block = build(compiled=compiled, dtype=torch.float32, lr=1e9, clip=1.0)
    x, target = 50 * draw(2, 17, DIM).float(), 1e9 * draw(2, 17, DIM, seed=2).float()
    _, state = stream(block, x, target)
    _, carried = block(x, None, BlockContext(input_embeddings=target))
    for after in (state, carried):
        assert after["skipped"].tolist() == [0, 0]
        norm = block.accumulated_update(after).double().flatten(1).norm(dim=1)
        assert (norm > 0.1).all()
        assert (norm <= 4 * 1.00001).all(), norm


def cancelling(length, dtype):
    """Activations and targets ``[1, T, d]`` whose updates all but cancel: equal but for 1e-4, targets of both signs."""
    x = draw(1, 1, DIM) + 1e-4 * draw(1, length, DIM, seed=3)
    sign = 1 - 2 * (torch.arange(length) % 2)
    return x.to(dtype), (sign[:, None] * draw(1, 1, DIM, seed=4)).to(dtype)


@pytest.mark.parametrize(("order", "kernel"), [("alternating", 1), ("alternating", 3), ("one sign first", 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 2e-3)], ids=str)
def test_the_clip_is_right_where_the_tokens_updates_all_but_cancel(dtype, bound, kernel, order, compiled):
    """The norms of 64 updates add to thousands of times the norm of their sum, in which float32 itself rounds."""
    size = 64
    block = build(compiled=compiled, dtype=dtype, chunk=size, conv_kernel=kernel, clip=1e-4, lr=1.0)
    x, target = cancelling(size + 1, dtype)
    if order == "one sign first":
        place = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2), torch.tensor([size])])
        x, target = x[:, place], target[:, place]
    context = BlockContext(input_embeddings=target)
    with torch.no_grad():
        gate, up = block.info.mlp.linear_in(x).chunk(2, dim=-1)
        keys = (block.info.mlp.activation(gate) * up)[0, :size].double()
        left = ops.left_padding(kernel, "centered")
        values = naive.filtered(target[0, :size].double(), block.conv[:, 0].double(), left) @ block.projection.double()
        norms = keys.norm(dim=1) * values.norm(dim=1)
        ratio = norms.sum() / (values.T @ keys).norm()
        assert ratio > (1e3 if kernel == 1 else 10), ratio  # at a chunk's edges a filter leaves what cancels nothing
        _, called = block(x, None, context)
        _, first = block(x[:, :20], None, BlockContext(input_embeddings=target[:, :20]))
        _, carried = block(x[:, 20:], first, BlockContext(input_embeddings=target[:, 20:]))
    _, streamed = stream(block, x, target)
    for name, state in {"call": called, "carried": carried, "stream": streamed}.items():
        norm = block.accumulated_update(state).double().norm() / 1e-4
        assert abs(norm - 1) < bound, f"{name}: {norm}"
        # The scale itself, for exactly the keys and values that it multiplies.
        finished = block.memory._finished(state)
        values = finished.values[0].double() @ block.projection.double()
        scaled = state["scale"][0].double() * (values.T @ finished.keys[0].double()).norm() / 1e-4
        assert abs(scaled - 1) < 1e-5, f"{name}: {scaled}"


def test_what_a_stream_reads_beyond_its_tokens_is_never_used(compiled):
    """Slots and channels that hold nothing yet are zero in a new stream: an equal output when they are not."""
    block = build(compiled=compiled, chunk=8)
    x, target = draw(2, 6, DIM), draw(2, 6, DIM, seed=2)
    expected, _ = stream(block, x, target)
    state = block.allocate_state(2)
    state["keys"][:, 8:].fill_(7.0)
    state["values"][:, 8:].fill_(7.0)
    assert torch.equal(stream(block, x, target, state)[0], expected)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_an_off_token_that_is_not_finite_spoils_its_chunk_in_a_step_as_in_one_call(offset, compiled):
    block = build(compiled=compiled)
    x, target = draw(2, 12, DIM), draw(2, 12, DIM, seed=2)
    x[0, 4 + offset] = torch.nan
    state, carried = block.allocate_state(2), block.allocate_state(2)
    for t in range(12):
        token = BlockContext(input_embeddings=target[:, t : t + 1], updates=t != 4 + offset)
        block.step(x[:, t : t + 1], state, token)
        _, carried = block(x[:, t : t + 1], carried, token)
    assert state["skipped"].tolist() == carried["skipped"].tolist() == [1, 0]
    for name, tensor in carried.items():
        assert error(state[name], tensor) < 1e-11, name


def test_embeddings_of_other_tokens_are_refused():
    block, x = build(), draw(3, 1, DIM)
    for other in (x[:1], x.expand(3, 2, DIM), x[..., :2]):
        with pytest.raises(ContextError, match="Give the embeddings of the same tokens"):
            block.step(x, block.allocate_state(3), BlockContext(input_embeddings=other))


def test_a_float16_state_is_refused():
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=DIM, num_heads=1, device=torch.device("cpu"), dtype=torch.float16,
        format=SequenceFormat(), mlp=ToyMLP(DIM, torch.float16, "cpu"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="Use a policy whose state is float32"):
        GatingMLP(GatingMLPConfig(), info, UNIFORM.roles(torch.float16))


def under_fake_tensors(block, x):
    """A state with values, which ``allocate_state`` did not make."""
    state = clone(block.init_state(len(x)))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        block.step(x, state, BlockContext(input_embeddings=x))


def functionalized(block, x):
    torch.func.functionalize(lambda x, state: block.step(x, state, BlockContext(input_embeddings=x)))(
        x, clone(block.init_state(len(x)))
    )


def batched(block, x):
    states = {name: torch.stack([tensor] * 3) for name, tensor in block.init_state(len(x)).items()}
    torch.func.vmap(lambda x, state: block.step(x, state, BlockContext(input_embeddings=x)))(
        torch.stack([x] * 3), states
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("surroundings", [under_fake_tensors, functionalized, batched])
def test_what_a_step_keeps_is_of_no_mode(surroundings):
    """Constants that were made in a mode left the position of every later stream at zero, or raised."""
    used, fresh, x = build(clip=1.0), build(clip=1.0), draw(2, 9, DIM)
    with torch.no_grad():
        surroundings(used, x[:, :1])
    (y, state), (expected, wanted) = stream(used, x, x), stream(fresh, x, x)
    assert state["position"].tolist() == [1, 1]
    assert torch.equal(y, expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
