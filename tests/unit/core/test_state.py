"""Block states: rows, copies and what they refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

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


def misaligned(tensor):
    """The same values, contiguous, from an address that is no multiple of the alignment."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def test_a_state_is_computed_on_in_one_memory_layout():
    learned = torch.arange(15.0).view(1, 3, 5)
    given = {
        "expanded": learned.expand(2, 3, 5),
        "transposed": learned.expand(2, 3, 5).transpose(1, 2).contiguous().transpose(1, 2),
        "offset by one element": misaligned(learned.expand(2, 3, 5)),
    }
    for name, tensor in states.contiguous(given).items():
        assert torch.equal(tensor, given[name])
        assert tensor.stride() == (15, 5, 1), name
        assert tensor.data_ptr() % states.ALIGNMENT == 0, name
    one_row = torch.empty_strided((1, 3, 5), (0, 5, 1)).copy_(learned)
    assert states.contiguous({"w": one_row})["w"].stride() == (15, 5, 1)


def test_a_state_that_lies_right_is_not_copied():
    state = {"w": torch.ones(2, 3), "one row": torch.ones(1, 3), "parameter": torch.nn.Parameter(torch.ones(2, 3))}
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in states.contiguous(state).items())
    assert states.contiguous(state)["w"] is state["w"]


def test_what_safetensors_reads_lies_anywhere_and_is_aligned(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, 5), "c": torch.ones(2, 7)}, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert any(tensor.data_ptr() % states.ALIGNMENT for tensor in loaded.values())
    assert not any(tensor.data_ptr() % states.ALIGNMENT for tensor in states.contiguous(loaded).values())


def test_gradients_flow_through_a_state_that_was_moved():
    learned = misaligned(torch.ones(2, 3)).requires_grad_()
    states.contiguous({"w": learned})["w"].sum().backward()
    assert torch.equal(learned.grad, torch.ones(2, 3))


@pytest.mark.filterwarnings("error")
def test_a_traced_state_has_no_address_and_is_left_alone():
    with FakeTensorMode():
        state = {"w": torch.ones(2, 3)}
        assert states.contiguous(state)["w"] is state["w"]
    compiled = torch.compile(states.contiguous, backend="eager", fullgraph=True)
    assert torch.equal(compiled({"w": torch.ones(2, 3)})["w"], torch.ones(2, 3))


def test_one_row_is_written_where_the_mask_says_and_nothing_else_is_touched():
    target = {"a": torch.randn(3, 2, 2), "n": torch.tensor([1, 2, 3])}
    target["a"][0] = torch.nan
    before, addresses = states.clone(target), {name: tensor.data_ptr() for name, tensor in target.items()}
    row = {"a": torch.full((1, 2, 2), 7.0), "n": torch.tensor([9])}
    states.write_rows_(target, row, torch.tensor([False, True, False]))
    assert target["a"][0].isnan().all()
    assert torch.equal(target["a"][1], row["a"][0])
    assert torch.equal(target["a"][2], before["a"][2])
    assert target["n"].tolist() == [1, 9, 3]
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == addresses


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": torch.zeros(1, 2, 2)}, "'n'. are on one side only"),
        (
            {"a": torch.zeros(3, 2, 2), "n": torch.tensor([9])},
            r"'a': expected \(1, 2, 2\) torch.float32, got \(3, 2, 2\)",
        ),
    ],
    ids=["a name is missing", "more rows than one"],
)
def test_a_row_that_does_not_fit_is_refused_whole(row, message):
    target = {"a": torch.ones(3, 2, 2), "n": torch.tensor([1, 2, 3])}
    with pytest.raises(ValueError, match=message):
        states.write_rows_(target, row, torch.tensor([True, True, True]))
    assert target["a"].min() == 1


def test_constants_that_are_made_in_a_mode_are_not_kept():
    plain, seen = torch.zeros(2), []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(states.outlives_modes(tensor))
        return tensor

    assert states.outlives_modes(plain)
    with FakeTensorMode(allow_non_fake_inputs=True):
        look(plain)
        look(torch.zeros(2))
    look(torch.nn.Parameter(plain))
    torch.func.vmap(look)(plain)
    torch.func.functionalize(look)(plain)
    torch.func.jvp(look, (plain,), (plain,))
    assert seen == [False] * 6
