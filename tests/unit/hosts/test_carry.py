"""Carried training, and activation checkpointing."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.errors import ContextError, HostError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm

from .toy import EmbeddingToyBlock, make_blocks, random_codes, toy_lm


def logits(model, codes) -> torch.Tensor:
    return model.forward_text(codes)[1]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_segment_starts_from_the_firsts_state():
    model = toy_lm()
    first, second = random_codes(model, 2, 10, seed=1), random_codes(model, 2, 10, seed=2)
    with torch.no_grad():
        plain = logits(model, second)
        with MOSHI_HOST.carry(model) as carried:
            logits(model, first)
            middle = carried.detach()
            inside = logits(model, second)
        before = {site: {name: t.clone() for name, t in state.items()} for site, state in middle.blocks.items()}
        with MOSHI_HOST.carry(model, middle) as again:
            assert torch.equal(logits(model, second), inside)
        assert not torch.equal(inside, plain)
        for site, state in carried.blocks.items():
            assert equal(state, again.blocks[site])
            assert equal(middle.blocks[site], before[site])  # functional: what was passed in is as it was
        assert torch.equal(logits(model, second), plain)


def test_frozen_updates_keep_the_state():
    model = toy_lm()
    codes = random_codes(model, 1, 12)
    with torch.no_grad(), MOSHI_HOST.updates(model, False), MOSHI_HOST.carry(model) as carried:
        frozen = logits(model, codes)
        assert torch.equal(logits(model, codes), frozen)
    block = next(iter(MOSHI_HOST.blocks(model).values()))
    assert torch.equal(carried.blocks[block.info.site]["weights"][0], block.initial)


@pytest.mark.parametrize("updates", [True, False])
def test_carried_state_is_detached_and_has_storage_of_its_own(updates):
    model = toy_lm((0,))
    with MOSHI_HOST.updates(model, updates), MOSHI_HOST.carry(model) as carried:
        logits(model, random_codes(model, 2, 3)).sum().backward()  # without updates, W is a view of the parameter
    (block,), (state,) = MOSHI_HOST.blocks(model).values(), carried.blocks.values()
    assert not any(tensor.requires_grad for tensor in state.values())
    before = state["weights"].clone()
    with torch.no_grad():
        block.initial.add_(1.0)  # an optimizer step
    assert torch.equal(state["weights"], before)


def test_a_new_document_resets_its_row_only():
    model = toy_lm()
    first, second = random_codes(model, 2, 10, seed=1), random_codes(model, 2, 10, seed=2)
    with torch.no_grad():
        with MOSHI_HOST.carry(model, document_ids=torch.tensor([7, 8])) as carried:
            logits(model, first)
        with MOSHI_HOST.carry(model, carried, document_ids=torch.tensor([7, 8])) as same:
            continued = logits(model, second)
        with MOSHI_HOST.carry(model) as fresh_state:
            fresh = logits(model, second)
        with MOSHI_HOST.carry(model, carried, document_ids=torch.tensor([7, 9])) as mixed:
            out = logits(model, second)
            third = logits(model, first)  # the reset happened once
        with MOSHI_HOST.carry(model, fresh_state):
            fresh_third = logits(model, first)
    assert torch.equal(out[0], continued[0])
    assert torch.equal(out[1], fresh[1])
    assert torch.equal(third[1], fresh_third[1])
    assert mixed.document_ids.tolist() == [7, 9]
    assert same.document_ids.tolist() == [7, 8]


def test_a_reset_row_trains_the_initial_state():
    model = toy_lm((1,))
    with MOSHI_HOST.carry(model, document_ids=torch.tensor([1, 2])) as carried:
        logits(model, random_codes(model, 2, 8))
    for ids, reaches in ([1, 2], False), ([1, 3], True):
        model.zero_grad()
        with MOSHI_HOST.carry(model, carried, document_ids=torch.tensor(ids)):
            logits(model, random_codes(model, 2, 8)).square().mean().backward()
        (block,) = MOSHI_HOST.blocks(model).values()
        assert (block.initial.grad is not None and bool(block.initial.grad.abs().max() > 0)) is reaches


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_one_backward(checkpointing):
    model = toy_lm(block=EmbeddingToyBlock, gradient_checkpointing=checkpointing)
    a, b = random_codes(model, 2, 9, seed=1), random_codes(model, 2, 9, seed=2)
    with MOSHI_HOST.carry(model) as start:
        logits(model, a)
    start = start.detach()

    def loss(codes, state):
        with MOSHI_HOST.carry(model, state):
            return logits(model, codes).square().mean()

    separate: dict[str, torch.Tensor] = {}
    for codes, state in ((a, start), (b, None)):
        model.zero_grad()
        loss(codes, state).backward()
        for name, gradient in gradients(model).items():
            separate[name] = separate.get(name, 0) + gradient
    model.zero_grad()
    first, second = loss(a, start), loss(b, None)
    (first + second).backward()
    together = gradients(model)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, separate[name], rtol=1e-4, atol=1e-7, msg=name)


def test_checkpointing_is_bit_equal_and_records_states_once():
    results = []
    for checkpointing in (False, True):
        model = toy_lm(block=EmbeddingToyBlock, gradient_checkpointing=checkpointing)
        first, second = random_codes(model, 2, 9, seed=1), random_codes(model, 2, 9, seed=2)
        with MOSHI_HOST.carry(model) as carried:
            one = logits(model, first).square().mean()
            two = logits(model, second).square().mean()
            before = {site: {n: t.clone() for n, t in state.items()} for site, state in carried.blocks.items()}
            (one + two).backward()
        calls = {block.calls for block in MOSHI_HOST.blocks(model).values()}
        assert calls == {4 if checkpointing else 2}
        for site, state in carried.blocks.items():
            assert equal(state, before[site])
        results.append((gradients(model), before))
    (plain, states), (again, states_again) = results
    assert equal(plain, again)
    assert all(equal(states[site], states_again[site]) for site in states)


def test_backward_after_a_reset_and_a_stream():
    model = toy_lm(gradient_checkpointing=True)
    codes = random_codes(model, 1, 9)
    logits(model, codes).square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    loss = logits(model, codes).square().mean()
    # What a validation run between forward and backward does.
    model.eval()
    with torch.no_grad(), MOSHI_HOST.carry(model, document_ids=torch.tensor([1])):
        logits(model, random_codes(model, 1, 5, seed=9))
    loss.backward()
    assert equal(gradients(model), expected)


def test_carry_without_blocks_does_nothing():
    model = random_tiny_lm()
    with torch.no_grad(), MOSHI_HOST.carry(model, document_ids=torch.tensor([1])) as carried:
        logits(model, random_codes(model, 1, 4))
    assert carried.blocks == {}
    assert carried.document_ids.tolist() == [1]


def test_an_error_inside_leaves_the_model_usable():
    model = toy_lm()
    codes = random_codes(model, 1, 4)
    with pytest.raises(RuntimeError, match="stop"), MOSHI_HOST.carry(model):
        raise RuntimeError("stop")
    with torch.no_grad(), MOSHI_HOST.carry(model) as carried:
        logits(model, codes)
    assert len(carried.blocks) == 2


# ---------------------------------------------------------------------------------------------------------- refusals
def test_nested_carry_raises():
    model = toy_lm()
    with MOSHI_HOST.carry(model):
        with pytest.raises(ContextError, match="do not nest"), MOSHI_HOST.carry(model):
            pass
        with torch.no_grad():
            logits(model, random_codes(model, 1, 3))


def test_carry_and_streaming_exclude_each_other():
    model = toy_lm()
    with model.streaming(1), pytest.raises(HostError, match="streaming"), MOSHI_HOST.carry(model):
        pass
    with MOSHI_HOST.carry(model), pytest.raises(HostError, match="cannot start"):
        model.streaming(1)
    with torch.no_grad(), model.streaming(1):
        logits(model, random_codes(model, 1, 1))


@pytest.mark.parametrize("ids", [torch.tensor([1, 2, 3]), torch.tensor([[1], [2]])])
def test_document_ids_of_another_shape_raise(ids):
    model = toy_lm()
    with torch.no_grad(), MOSHI_HOST.carry(model, document_ids=torch.tensor([1, 2])) as carried:
        logits(model, random_codes(model, 2, 4))
    with pytest.raises(ContextError, match="document_ids"), MOSHI_HOST.carry(model, carried, document_ids=ids):
        pass


def test_document_ids_of_another_batch_raise():
    model = toy_lm()
    with (
        MOSHI_HOST.carry(model, document_ids=torch.tensor([1, 2, 3])),
        pytest.raises(ContextError, match="3 rows and this batch 2"),
    ):
        logits(model, random_codes(model, 2, 4))


def test_another_batch_size_raises():
    model = toy_lm()
    with torch.no_grad(), MOSHI_HOST.carry(model) as carried:
        logits(model, random_codes(model, 2, 4))
    with MOSHI_HOST.carry(model, carried), pytest.raises(ContextError, match="3 rows and a state of 2"):
        logits(model, random_codes(model, 3, 4))


def test_the_state_of_other_sites_raises():
    model = toy_lm((0,))
    with torch.no_grad(), MOSHI_HOST.carry(model) as carried:
        logits(model, random_codes(model, 1, 4))
    MOSHI_HOST.detach(model)
    MOSHI_HOST.attach(model, make_blocks(model, (1,)))
    with pytest.raises(ContextError, match=r"layers\.0\.sequence"), MOSHI_HOST.carry(model, carried):
        pass
    with MOSHI_HOST.carry(model, CarriedState()):
        pass
