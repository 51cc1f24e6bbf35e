"""The contract of ``host.updates`` and ``host.volume``: in calls, in training and in streams, row by row."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from moshi.models import LMGen

from moshi_ttt import inject, parse_config
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.upstream import StreamingModule
from tests.conformance.moshi.switches import (
    BLOCKS,
    HOST,
    UPDATES,
    VOLUME,
    codes,
    heard,
    load,
    logits,
    sites,
    streamed,
)


@pytest.fixture(params=[UPDATES, VOLUME], ids=str)
def switch(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["tensor operations", "compiled"])
def model(request):
    return load(compiled=request.param)


@pytest.fixture
def uncompiled():
    """For calls of several tokens, in which a compiled step has no part."""
    return load()


def test_a_stream_follows_row_by_row(model, switch):
    on, on_state = streamed(model, switch, switch.on)
    off, off_state = streamed(model, switch, switch.off)
    mixed, mixed_state = streamed(model, switch, switch.rows(True, False, True))
    assert not torch.equal(on, off)
    assert torch.equal(mixed[[0, 2]], on[[0, 2]])
    assert torch.equal(mixed[1], off[1])
    for one, started, stopped in zip(mixed_state, on_state, off_state, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor[[0, 2]], started[name][[0, 2]]), name
            assert torch.equal(tensor[1], stopped[name][1]), name


@pytest.mark.first_by_default
def test_it_can_be_thrown_while_a_stream_runs(model, switch):
    late, _ = streamed(model, switch, switch.off, at=9)
    on, _ = streamed(model, switch, switch.on)
    off, _ = streamed(model, switch, switch.off)
    assert torch.equal(late[:, :, :9], on[:, :, :9])
    assert not torch.equal(late[:, :, 9:], on[:, :, 9:])
    assert not torch.equal(late[:, :, 9:], off[:, :, 9:]), "what happened before still counts"
    with torch.no_grad(), model.streaming(3), switch.thrown(model, switch.rows(False, False, False)):
        assert torch.equal(heard(model, codes()[..., :4]), off[:, :, :4])
        with switch.thrown(model, switch.rows(False, True, False)):
            after = heard(model, codes()[..., 4:])
    assert torch.equal(after[[0, 2]], off[[0, 2], :, 4:])
    assert not torch.equal(after[1], off[1, :, 4:])


@pytest.mark.first_by_default
@pytest.mark.parametrize("row_by_row", [False, True])
def test_a_stream_that_starts_inside_starts_with_it(model, switch, row_by_row):
    off, _ = streamed(model, switch, switch.off)
    value = switch.rows(False, False, False) if row_by_row else switch.off
    with torch.no_grad(), switch.thrown(model, value), model.streaming(3):
        assert torch.equal(heard(model, codes()), off)


def test_updates_reach_blocks_through_the_generation_loop(model):
    generator = LMGen(model, use_sampling=False)
    for enabled in (True, False):
        with torch.no_grad(), MOSHI_HOST.updates(model, enabled), generator.streaming(2):
            for frame in codes(2)[:, 9:].split(1, -1):
                generator.step(frame)
            found = [site._streaming_state.buffers for site in sites(model)]
            fresh = [site.block.allocate_state(2) for site in sites(model)]
        moved = [
            any(not torch.equal(state[n], start[n]) for n in state if n.startswith(("weight", "delta", "scale")))
            for state, start in zip(found, fresh, strict=True)
        ]
        assert moved[0] is enabled


def test_gradients_with_checkpointing_are_those_of_the_forward_pass(uncompiled, switch):
    # Backward runs layers again, after the context was left: they see what the forward pass saw.
    gradients = []
    for checkpointing in (False, True):
        uncompiled.transformer.checkpointing = checkpointing
        uncompiled.zero_grad()
        value = switch.rows(True, False, True) if switch is UPDATES else torch.tensor([1.0, 0.0, 0.3])
        with switch.thrown(uncompiled, value):
            loss = uncompiled(codes()).logits.nan_to_num().square().mean()
        loss.backward()
        gradients.append(
            [p.grad.clone() for site in sites(uncompiled) for p in site.block.parameters() if p.grad is not None]
        )
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_contexts_nest_and_an_error_restores(uncompiled, switch):
    with torch.no_grad():
        on = logits(uncompiled)
        with switch.thrown(uncompiled, switch.off):
            off = logits(uncompiled)
            with switch.thrown(uncompiled, switch.on):
                assert torch.equal(logits(uncompiled), on)
            assert torch.equal(logits(uncompiled), off)
        assert not torch.equal(on, off)
        with pytest.raises(RuntimeError, match="inside"), switch.thrown(uncompiled, switch.off):
            raise RuntimeError("inside")
        assert torch.equal(logits(uncompiled), on)


def test_the_callers_tensor_is_copied(uncompiled, switch):
    value = switch.rows(True, True, True)
    with torch.no_grad():
        on = logits(uncompiled)
        with switch.thrown(uncompiled, value):
            value.fill_(switch.off)
            assert torch.equal(logits(uncompiled), on)


@pytest.mark.parametrize(
    ("switch", "value", "message"),
    [
        (UPDATES, torch.tensor([1, 0, 1]), "dtype torch.int64"),
        (UPDATES, torch.ones(3, 1, dtype=torch.bool), r"\(3, 1\)"),
        (UPDATES, 1, "got 1"),
        *(
            (VOLUME, value, "volume: ")
            for value in (-0.1, float("nan"), 11, True, "half", torch.tensor([1, 0, 1]), torch.ones(3, 1))
        ),
    ],
    ids=str,
)
def test_what_is_no_value_is_refused(uncompiled, switch, value, message):
    with pytest.raises(ContextError, match=message), switch.thrown(uncompiled, value):
        pass
    assert switch.is_default(uncompiled)


def test_another_number_of_rows_is_refused_and_changes_nothing(model, switch):
    two, message = switch.rows(False, False), f"{switch} has 2 rows, and the stream has 3"
    with torch.no_grad(), model.streaming(3):
        with pytest.raises(ContextError, match=message), switch.thrown(model, two):
            pass
        assert switch.is_on(model)
    with switch.thrown(model, two):
        with pytest.raises(ContextError, match=message), model.streaming(3):
            pass
        assert not any(module.is_streaming for module in model.modules() if isinstance(module, StreamingModule))
        with pytest.raises(ContextError, match=f"{switch} of shape"):
            model(codes())
    streamed(model, switch)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_stream_of_another_number_of_rows_is_refused_on_leaving_too(model, switch, rows):
    # The inner answer is for all rows, so a stream of three may start there; the outer one has no row for each.
    with (
        torch.no_grad(),
        ExitStack() as stream,
        pytest.raises(ContextError, match=f"{switch} has {rows} rows, and the stream has 3"),
        switch.thrown(model, switch.rows(*[False] * rows)),
        switch.thrown(model, switch.on),
    ):
        stream.enter_context(model.streaming(3))
    assert switch.is_default(model)


def test_a_model_that_was_built_on_meta_is_switched_row_by_row(switch):
    # As training builds it. Its blocks' info goes on saying meta, and a switch that was put there has no values.
    config = parse_config({"host": HOST, "ttt": BLOCKS}, registry=default_registry())
    model = MOSHI_HOST.skeleton(config.host)
    injection = inject(model, config)
    model.to_empty(device="cpu")
    MOSHI_HOST.load_base(model, MOSHI_HOST.base_state_dict(MOSHI_HOST.load(config.host)))
    injection.initialize()
    mask, out = switch.rows(True, False, True), {}
    for name, value in {"on": switch.on, "off": switch.off, "mixed": mask}.items():
        with torch.no_grad(), switch.thrown(model, value):
            out[name] = logits(model)
    assert not torch.equal(out["on"], out["off"])
    assert torch.equal(out["mixed"][[0, 2]], out["on"][[0, 2]])
    assert torch.equal(out["mixed"][1], out["off"][1])
    streamed(model, switch, mask)


def test_a_model_without_blocks_has_nothing_to_switch(switch):
    bare = MOSHI_HOST.load(MOSHI_HOST.config_class(**HOST))
    with torch.no_grad():
        plain = logits(bare)
        with switch.thrown(bare, switch.off):
            assert torch.equal(logits(bare), plain)
