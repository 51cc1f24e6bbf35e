"""A row's state whose numbers no stream has is refused in words before anything is written: in every variant."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.state_ranges import LARGEST_COUNT
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import SlotSettings
from moshi_ttt.hosts.moshi.streaming import restore_stream_state, stream_state

from .slot_schedules import OPTIONS, VARIANTS, assert_same_state, frame_of, make_slots

pytestmark = pytest.mark.each_kind

EVERY = [*VARIANTS, *OPTIONS]
BEYOND = (-1, -(2**63), 2**63 - 1, LARGEST_COUNT + 1)
"""In no field of any variant."""


@pytest.fixture(params=EVERY)
def rows(request):
    """Slots with somebody in row 1, and a memory and a session of a row in the middle of a chunk."""
    with make_slots(request.param, rows=2) as slots:
        slots.join(0, SlotSettings(seed=4))
        for n in range(7):
            slots.tick({0: frame_of(1, n)})
        states = {kind: slots.save_row(0, kind) for kind in ("memory", "session")}
        slots.leave(0)
        slots.join(1, SlotSettings(seed=8))
        yield slots, states


def edited(state, name, value, at=0):
    tensor = state.tensors[name].clone()
    tensor.view(-1)[at] = value
    return replace(state, tensors={**state.tensors, name: tensor})


def refuse(slots, forged, words):
    """Nothing of it is written: row 1 has the same bits, and row 0 is still nobody's. Both then work."""
    before = slots.save_row(1, "session")
    with pytest.raises(HostError, match=words):
        slots.join(0, SlotSettings(), forged)
    with pytest.raises(HostError, match=words):
        slots.join(1, SlotSettings(seed=9), forged)
    assert_same_state(slots.save_row(1, "session"), before)
    with pytest.raises(HostError, match="Nobody is in row 0"):
        slots.save_row(0, "memory")


def whole(state):
    return [n for n, t in state.tensors.items() if t.dtype == torch.int64]


def test_every_whole_number_is_checked(rows):
    slots, states = rows
    for state in states.values():
        assert state.kind == "memory" or whole(state)
        for name in whole(state):
            for value in BEYOND:
                short = name.rpartition("/")[2]
                refuse(slots, edited(state, name, value), rf"{short}.*{value}.*allowed|{short}: the tokens are not")
    for state in states.values():
        slots.join(0, SlotSettings(), state)
        slots.tick({0: frame_of(2, 0), 1: frame_of(3, 0)})
        slots.leave(0)


def test_every_other_number_is_finite(rows):
    slots, states = rows
    for name, tensor in states["session"].tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            for value in (float("nan"), float("inf"), -float("inf")):
                with pytest.raises(HostError, match="not all of it is finite"):
                    slots.join(0, SlotSettings(), edited(states["session"], name, value, at=tensor.numel() - 1))


def test_a_number_of_another_kind_is_refused(rows):
    """NaN where a position is can only be a tensor of another dtype."""
    slots, states = rows
    for name in whole(states["session"]):
        nan = torch.full(states["session"].tensors[name].shape, float("nan"))
        forged = replace(states["session"], tensors={**states["session"].tensors, name: nan})
        refuse(slots, forged, r"expected .*int64, got .*float32")


def test_the_bounds_are_those_that_the_block_declares(rows):
    """Beside each bound is refused; at each bound a tick of both rows works."""
    slots, states = rows
    for block in slots._streams.blocks:
        for key, allowed in block.block.state_ranges().items():
            name = next(n for n, v in slots._streams.memory.items() if v.owner is block.buffers and v.key == key)
            state = states["memory"]
            for value in {allowed.least - 1, allowed.most + 1}:
                refuse(slots, edited(state, name, value), rf"{key}.* is {value}|{key} holds {value}")
            for value in (allowed.least, allowed.most):
                given = state
                if allowed.up_to is not None:
                    given = edited(given, name.removesuffix(key) + allowed.up_to, value)
                for other, theirs in block.block.state_ranges().items():
                    if theirs.up_to in (key, allowed.up_to) and theirs.up_to is not None:
                        given = edited(given, name.removesuffix(key) + other, min(value, theirs.most))
                slots.join(0, SlotSettings(), edited(given, name, value))
                for n in range(4):
                    slots.tick({0: frame_of(2, n), 1: frame_of(3, n)})
                slots.leave(0)


def test_numbers_that_contradict_each_other_are_refused(rows):
    slots, states = rows
    session = states["session"]
    for name in whole(session):
        if name.rpartition("/")[2].rpartition(".")[2] in ("offset", "offsets", "end_offset"):
            refuse(
                slots, edited(session, name, int(session.tensors[name]) + 1), "equal in every stream|not those of|keeps"
            )
    for name in session.tensors:
        if name.endswith("kv_cache.cache"):
            ring = session.tensors[name]
            forged = replace(session, tensors={**session.tensors, name: ring[:, :, :-1].contiguous()})
            refuse(slots, forged, r"tokens, and a stream of \d+ keeps")
    for key in ("spoiled", "enabled"):
        for name in (n for n in states["memory"].tensors if n.endswith(f"buffers.{key}")):
            prefix = name.removesuffix(key)
            forged = edited(edited(states["memory"], f"{prefix}position", 1), name, 2)
            refuse(slots, forged, f"{key} is 2, and no more than position is allowed")


@pytest.mark.parametrize("value", ["beginning", "none"])
def test_tokens_that_are_none_are_refused(rows, value):
    """The codec has no code for what stands for no token, and would raise in the step of all rows."""
    slots, states = rows
    session = states["session"]
    tokens = session.tensors["lm/cache"]
    number = slots.model.card if value == "beginning" else slots.model.ungenerated_token_id
    for row in range(1, tokens.shape[0]):
        for at in range(tokens.shape[1]):
            if tokens[row, at] != number:
                refuse(
                    slots,
                    edited(session, "lm/cache", number, at=row * tokens.shape[1] + at),
                    "lm/cache: the tokens are",
                )
                break


def test_truth_values_are_true_or_false(rows):
    slots, states = rows
    session = states["session"]
    names = [n for n, t in session.tensors.items() if t.dtype == torch.bool]
    assert names
    forged = torch.full((), 2, dtype=torch.uint8).view(torch.bool)
    for name in names:
        refuse(slots, replace(session, tensors={**session.tensors, name: forged}), "neither true nor false")


# ---- beside the tensors: one variant, for they do not depend on it


@pytest.fixture
def session():
    with make_slots("ttt_mlp", rows=2) as slots:
        slots.join(0, SlotSettings(seed=4))
        for n in range(7):
            slots.tick({0: frame_of(1, n)})
        yield slots, slots.save_row(0, "session")
        slots.leave(0)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (8, (0).to_bytes(4, "little")), (8, (-1).to_bytes(4, "little", signed=True)),
        (8, (625).to_bytes(4, "little")), (12, bytes(4)),
        (16, (625).to_bytes(8, "little")), (16, (2**63).to_bytes(8, "little")), (16, (624).to_bytes(8, "little")),
    ],
)  # fmt: skip
def test_a_generator_that_would_read_beyond_its_numbers_is_refused(session, at, value):
    slots, state = session
    forged = state.tensors["generator"].clone()
    forged[at : at + len(value)] = torch.tensor(list(value), dtype=torch.uint8)
    with pytest.raises(HostError, match="generator: it is not the state of a generator"):
        slots.join(1, SlotSettings(), replace(state, tensors={**state.tensors, "generator": forged}))


def test_generators_that_have_drawn_any_number_are_accepted(session):
    slots, state = session
    generator = torch.Generator().manual_seed(1)
    for draws in (0, 1, 622, 1, 1, 300, 2000):
        torch.rand(draws, generator=generator)
        slots.join(1, SlotSettings(), replace(state, tensors={**state.tensors, "generator": generator.get_state()}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", -1), ("frames", 2**60), ("frames", 2.0), ("frames", float("nan")), ("frames", True), ("frames", "7"),
        ("tokens", -1), ("tokens", 10**30), ("tokens", None), ("tokens", [1]), ("seed", -1), ("seed", 2**64),
        ("seed", 1.5), ("seed", float("nan")), ("updates", {"3": -1}), ("updates", {"3": 10**6}), ("updates", {"0": 0}),
        ("updates", {"-3": 0}), ("updates", {"x": 0}), ("updates", {"3": 0.5}), ("updates", 3),
        ("updates", {"3": float("nan")}),
        ("enabled", {"3": 1}), ("enabled", {"0": True}), ("enabled", []), ("model", 5), ("model", None), ("codec", 5),
        ("adapter", ["x"]), ("variants", 5), ("variants", {"layers.1.sequence": 5}), ("variants", {}), ("model", {}),
        ("kind", ["memory"]), ("kind", 7),
    ],
)  # fmt: skip
def test_every_field_of_the_header_is_checked(session, field, value):
    slots, state = session
    header = {**json.loads(state.metadata()["header"]), field: value}
    forged = save(dict(state.tensors), {**state.metadata(), "header": json.dumps(header)})
    with pytest.raises(HostError, match=r"damaged|cannot be continued here"):
        slots.join(1, SlotSettings(), RowState.from_bytes(forged))


def test_a_header_that_is_nested_too_deeply_is_refused(session):
    state = session[1]
    forged = save(dict(state.tensors), {**state.metadata(), "header": "[" * 100_000 + "]" * 100_000})
    with pytest.raises(HostError, match="damaged"):
        RowState.from_bytes(forged)


# ---- all rows of a stream


@pytest.mark.parametrize("variant", [name for name in EVERY if name != "base"])
def test_the_state_of_all_rows_is_checked_too(variant):
    with make_slots(variant, rows=2) as slots:
        slots.join(0, SlotSettings())
        slots.tick({0: frame_of(1, 0)})
        state = stream_state(slots._generator)
        for block in slots._streams.blocks:
            for key, allowed in block.block.state_ranges().items():
                (name, *_) = (n for n in state if n.endswith(f"/buffers.{key}"))
                for value in (allowed.least - 1, allowed.most + 1):
                    forged = {**state, name: state[name].clone()}
                    forged[name][1] = value
                    with pytest.raises(HostError, match=rf"{key}.*{value}.*allowed.*Nothing was restored"):
                        restore_stream_state(slots._generator, forged)
        assert all(torch.equal(state[n], t) for n, t in stream_state(slots._generator).items())
        restore_stream_state(slots._generator, state)
