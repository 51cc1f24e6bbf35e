"""Block states: rows, copies and what they refuse."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core import state as states


def make_state(rows: int = 3, offset: float = 0.0) -> states.BlockState:
    weight = torch.arange(rows * 4, dtype=torch.float32).view(rows, 2, 2) + offset
    return {"weight": weight, "position": torch.arange(rows) + int(offset)}


def test_rows_counts_the_streams():
    assert states.rows(make_state(5)) == 5


@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(2, 1), "b": torch.zeros(3)}])
def test_rows_that_disagree_raise(state):
    with pytest.raises(ValueError, match="one common number of rows"):
        states.rows(state)


def test_where_rows_chooses_whole_rows():
    old, new = make_state(), make_state(offset=100)
    mixed = states.where_rows(torch.tensor([True, False, True]), new, old)
    for name in old:
        assert torch.equal(mixed[name][0], new[name][0])
        assert torch.equal(mixed[name][1], old[name][1])
        assert torch.equal(mixed[name][2], new[name][2])
        assert mixed[name].dtype == old[name].dtype


def test_where_rows_is_not_poisoned_by_the_row_it_drops():
    old, new = make_state(), make_state(offset=100)
    new["weight"][1] = float("nan")
    mixed = states.where_rows(torch.tensor([True, False, True]), new, old)
    assert torch.isfinite(mixed["weight"]).all()


def test_where_rows_passes_gradients_to_the_chosen_rows_only():
    chosen, other = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    states.where_rows(torch.tensor([True, False]), {"w": chosen}, {"w": other})["w"].sum().backward()
    assert torch.equal(chosen.grad, torch.tensor([[1.0] * 3, [0.0] * 3]))
    assert torch.equal(other.grad, torch.tensor([[0.0] * 3, [1.0] * 3]))


def test_copy_keeps_the_storage():
    target, source = make_state(), make_state(offset=7)
    addresses = {name: tensor.data_ptr() for name, tensor in target.items()}
    states.copy_(target, source)
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == addresses
    assert all(torch.equal(target[name], source[name]) for name in source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"extra": torch.zeros(3)}, r"\['extra'\] are on one side only"),
        (lambda s: {"weight": s["weight"]}, r"\['position'\] are on one side only"),
        (lambda s: s | {"position": s["position"].float()}, "'position'.*torch.int64.*torch.float32"),
        (lambda s: s | {"position": torch.zeros(1, dtype=torch.int64)}, r"'position'.*\(3,\).*\(1,\)"),
    ],
)
def test_copy_refuses_another_form_and_writes_nothing(change, message):
    target, before = make_state(), make_state()
    with pytest.raises(ValueError, match=message):
        states.copy_(target, change(make_state(offset=7)))
    assert all(torch.equal(target[name], before[name]) for name in before)


def test_clone_has_rows_of_its_own():
    learned = torch.ones(4, requires_grad=True)
    shared = {"memory": learned.expand(3, -1)}
    copy = states.clone(shared)
    assert copy["memory"].is_contiguous()
    assert not copy["memory"].requires_grad
    copy["memory"][0] = 5
    assert torch.equal(copy["memory"][1], torch.ones(4))
    assert torch.equal(learned, torch.ones(4))


def test_detach_cuts_the_graph():
    assert not states.detach({"w": torch.ones(2, 1, requires_grad=True) * 2})["w"].requires_grad


def test_num_bytes_counts_every_row():
    assert states.num_bytes(make_state(3)) == 3 * 4 * 4 + 3 * 8
    assert states.num_bytes({"w": torch.zeros(4).expand(3, -1)}) == 3 * 16


def test_views_of_parameters_get_storage_of_their_own_and_gradients_flow_on():
    parameter = torch.nn.Parameter(torch.ones(1, 3))
    state = {"view": parameter.expand(2, 3), "itself": parameter, "made": 2 * parameter}
    owned = states.without_views(state, [parameter])
    assert all(torch.equal(owned[name], tensor) for name, tensor in state.items())
    storage = parameter.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() != storage for tensor in owned.values())
    assert owned["made"] is state["made"]
    owned["view"].sum().backward()
    assert torch.equal(parameter.grad, torch.full((1, 3), 2.0))
