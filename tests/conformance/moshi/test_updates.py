"""``host.updates``: one switch for test-time updates, in forward passes, in training and in streams, row by row."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from moshi.models import LMGen

from moshi_ttt import inject, parse_config
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import BlockSite
from moshi_ttt.hosts.moshi.upstream import StreamingModule
from tests.unit.hosts.trained import tiny_with_trained

BLOCKS = [
    {"variant": "ttt_linear", "layers": "1", "chunk": 4, "gate": {"init": 0.5}},
    {"variant": "gating_mlp", "layers": "2", "chunk": 4, "lr": 0.3},
]
FRAMES = 14


def config_of():
    return parse_config(
        {"host": {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}, "ttt": BLOCKS},
        registry=default_registry(),
    )


@pytest.fixture(params=[False, True], ids=["tensor operations", "compiled"])
def model(request):
    model, injection = tiny_with_trained(BLOCKS)
    if request.param:
        for site, block in injection.blocks.items():
            if site.kind == "feed_forward":
                block.compile_step()
    return model


def codes(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 100, (rows, 17, FRAMES), generator=torch.Generator().manual_seed(0))


def sites(model) -> list[BlockSite]:
    return [module for module in model.modules() if isinstance(module, BlockSite)]


@torch.no_grad()
def streamed(model, enabled=True, *, at: int = 0, rows: int = 3):
    """Text logits ``[B, T, card]``, and the final states; updates are ``enabled`` from frame ``at`` on."""
    out = []
    tokens = codes(rows)
    with model.streaming(rows):
        for frame in tokens[:, :, :at].unbind(-1):
            out.append(model.forward_text(frame[..., None])[1])
        addresses = [site._streaming_state.updates.data_ptr() for site in sites(model)]
        with MOSHI_HOST.updates(model, enabled):
            for frame in tokens[:, :, at:].unbind(-1):
                out.append(model.forward_text(frame[..., None])[1])
            final = [{n: t.clone() for n, t in site._streaming_state.buffers.items()} for site in sites(model)]
        assert addresses == [site._streaming_state.updates.data_ptr() for site in sites(model)]
        assert all(bool(site._streaming_state.updates.all()) for site in sites(model))
    return torch.cat(out, dim=2), final


def test_a_stream_follows_the_switch_row_by_row(model):
    mask = torch.tensor([True, False, True])
    on, on_state = streamed(model)
    off, off_state = streamed(model, False)
    mixed, mixed_state = streamed(model, mask)
    assert not torch.equal(on, off)
    assert torch.equal(mixed[[0, 2]], on[[0, 2]])
    assert torch.equal(mixed[1], off[1])
    for one, learned, frozen in zip(mixed_state, on_state, off_state, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor[[0, 2]], learned[name][[0, 2]]), name
            assert torch.equal(tensor[1], frozen[name][1]), name


def test_the_switch_can_be_thrown_while_a_stream_runs(model):
    late, _ = streamed(model, False, at=9)
    on, _ = streamed(model)
    off, _ = streamed(model, False)
    assert torch.equal(late[:, :, :9], on[:, :, :9])
    assert not torch.equal(late[:, :, 9:], on[:, :, 9:])
    assert not torch.equal(late[:, :, 9:], off[:, :, 9:]), "what was learned before still counts"


def test_a_stream_that_starts_inside_starts_with_it(model):
    off, _ = streamed(model, False)
    with torch.no_grad(), MOSHI_HOST.updates(model, torch.tensor([False] * 3)), model.streaming(3):
        inside = torch.cat([model.forward_text(frame)[1] for frame in codes().split(1, -1)], dim=2)
    assert torch.equal(inside, off)


def test_it_reaches_blocks_through_the_generation_loop(model):
    generator = LMGen(model, use_sampling=False)
    found = {}
    for enabled in (True, False):
        with torch.no_grad(), MOSHI_HOST.updates(model, enabled), generator.streaming(2):
            for frame in codes(2)[:, 9:].split(1, -1):
                generator.step(frame)
            found[enabled] = [site._streaming_state.buffers for site in sites(model)]
            fresh = [site.block.allocate_state(2) for site in sites(model)]
        moved = [
            any(not torch.equal(state[n], start[n]) for n in state if n.startswith(("weight", "delta", "scale")))
            for state, start in zip(found[enabled], fresh, strict=True)
        ]
        assert moved[0] is enabled


def test_gradients_with_checkpointing_are_those_of_the_forward_pass(model):
    # Backward runs layers again, after the context was left: they see what the forward pass saw.
    gradients = []
    for checkpointing in (False, True):
        model.transformer.checkpointing = checkpointing
        model.zero_grad()
        with MOSHI_HOST.updates(model, torch.tensor([True, False, True])):
            loss = model(codes()).logits.nan_to_num().square().mean()
        loss.backward()
        gradients.append(
            [p.grad.clone() for site in sites(model) for p in site.block.parameters() if p.grad is not None]
        )
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_contexts_nest_and_an_error_restores(model):
    out = lambda: model(codes()).text_logits.nan_to_num()  # noqa: E731
    with torch.no_grad():
        on = out()
        with MOSHI_HOST.updates(model, False):
            off = out()
            with MOSHI_HOST.updates(model, True):
                assert torch.equal(out(), on)
            assert torch.equal(out(), off)
        with pytest.raises(RuntimeError, match="inside"), MOSHI_HOST.updates(model, False):
            raise RuntimeError("inside")
        assert torch.equal(out(), on)


def test_the_callers_tensor_is_copied(model):
    mask = torch.tensor([True, True, True])
    with torch.no_grad():
        on = model(codes()).text_logits.nan_to_num()
        with MOSHI_HOST.updates(model, mask):
            mask.fill_(False)
            assert torch.equal(model(codes()).text_logits.nan_to_num(), on)


@pytest.mark.parametrize(
    ("enabled", "message"),
    [(torch.tensor([1, 0, 1]), "dtype torch.int64"), (torch.ones(3, 1, dtype=torch.bool), r"\(3, 1\)"), (1, "got 1")],
)
def test_what_is_no_switch_is_refused(model, enabled, message):
    with pytest.raises(ContextError, match=message), MOSHI_HOST.updates(model, enabled):
        pass


def test_another_number_of_rows_is_refused_and_changes_nothing(model):
    two = torch.tensor([False, False])
    with torch.no_grad(), model.streaming(3):
        with (
            pytest.raises(ContextError, match="updates has 2 rows, and the stream has 3"),
            MOSHI_HOST.updates(model, two),
        ):
            pass
        assert all(bool(site._streaming_state.updates.all()) for site in sites(model))
    with MOSHI_HOST.updates(model, two):
        with pytest.raises(ContextError, match="updates has 2 rows, and the stream has 3"), model.streaming(3):
            pass
        assert not any(module.is_streaming for module in model.modules() if isinstance(module, StreamingModule))
        with pytest.raises(ContextError, match="updates of shape"):
            model(codes())
    streamed(model)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_stream_of_another_number_of_rows_is_refused_on_leaving_too(model, rows):
    # The inner answer is for all rows, so a stream of three may start there; the outer one has no row for each.
    outer = torch.zeros(rows, dtype=torch.bool)
    with (
        torch.no_grad(),
        ExitStack() as stream,
        pytest.raises(ContextError, match=f"updates has {rows} rows, and the stream has 3"),
        MOSHI_HOST.updates(model, outer),
        MOSHI_HOST.updates(model, True),
    ):
        stream.enter_context(model.streaming(3))
    assert all(site.updates is True for site in sites(model))


def test_a_model_that_was_built_on_meta_is_switched_row_by_row():
    # As training builds it. Its blocks' info goes on saying meta, and a switch that was put there has no values.
    config = config_of()
    model = MOSHI_HOST.skeleton(config.host)
    injection = inject(model, config)
    model.to_empty(device="cpu")
    MOSHI_HOST.load_base(model, MOSHI_HOST.base_state_dict(MOSHI_HOST.load(config.host)))
    injection.initialize()
    out = {}
    for name, enabled in {"on": True, "off": False, "mixed": torch.tensor([True, False, True])}.items():
        with torch.no_grad(), MOSHI_HOST.updates(model, enabled):
            out[name] = model(codes()).text_logits.nan_to_num()
    assert not torch.equal(out["on"], out["off"])
    assert torch.equal(out["mixed"][[0, 2]], out["on"][[0, 2]])
    assert torch.equal(out["mixed"][1], out["off"][1])
    streamed(model, torch.tensor([True, False, True]))


def test_a_model_without_blocks_has_nothing_to_switch():
    bare = MOSHI_HOST.load(MOSHI_HOST.config_class(name="moshi", hf_repo="builtin:tiny"))
    with MOSHI_HOST.updates(bare, False):
        pass
