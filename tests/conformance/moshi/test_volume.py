"""``host.volume``: how much of what blocks add is heard, in forward passes, in training and in streams, row by row."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from moshi.models import LMGen

from moshi_ttt import inject, parse_config
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.audio.host import AUDIO_HOST
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import BlockSite, TTTStreamingTransformer
from moshi_ttt.hosts.moshi.streaming import restore_stream_state, stream_state
from moshi_ttt.hosts.moshi.upstream import StreamingModule
from tests.unit.hosts.toy import random_codes, toy_lm
from tests.unit.hosts.trained import tiny_with_trained

BLOCKS = [
    {"variant": "ttt_linear", "layers": "1", "chunk": 4, "gate": {"init": 0.5}},
    {"variant": "gating_mlp", "layers": "2", "chunk": 4, "lr": 0.3, "train_w_down": True},
]
HOST = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}
FRAMES = 14


def config_of(**options):
    entries = [{**block, **options} for block in BLOCKS]
    return parse_config({"host": HOST, "ttt": entries}, registry=default_registry())


def load(**options):
    return tiny_with_trained([{**block, **options} for block in BLOCKS])


@pytest.fixture(params=[False, True], ids=["tensor operations", "compiled"])
def model(request):
    model, injection = load()
    if request.param:
        for site, block in injection.blocks.items():
            if site.kind == "feed_forward":
                block.compile_step()
    return model


@pytest.fixture(scope="module")
def base():
    return MOSHI_HOST.load(MOSHI_HOST.config_class(**HOST))


def codes(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 100, (rows, 17, FRAMES), generator=torch.Generator().manual_seed(0))


def sites(model) -> list[BlockSite]:
    return [module for module in model.modules() if isinstance(module, BlockSite)]


def logits(model):
    return model(codes()).text_logits.nan_to_num()


@torch.no_grad()
def streamed(model, volume=1.0, *, at: int = 0, rows: int = 3):
    """Text logits ``[B, 1, T, card]`` at a volume from frame ``at`` on, and the states after them."""
    out = []
    with model.streaming(rows):
        for frame in codes(rows)[:, :, :at].unbind(-1):
            out.append(model.forward_text(frame[..., None])[1])
        addresses = [site._streaming_state.volume.data_ptr() for site in sites(model)]
        with MOSHI_HOST.volume(model, volume):
            for frame in codes(rows)[:, :, at:].unbind(-1):
                out.append(model.forward_text(frame[..., None])[1])
            final = [{n: t.clone() for n, t in site._streaming_state.buffers.items()} for site in sites(model)]
        assert addresses == [site._streaming_state.volume.data_ptr() for site in sites(model)], (
            "a graph would not follow"
        )
        assert all(bool((site._streaming_state.volume == 1).all()) for site in sites(model))
    return torch.cat(out, dim=2), final


def test_a_stream_follows_row_by_row(model, base):
    loud, _ = streamed(model)
    mixed, _ = streamed(model, torch.tensor([1.0, 0.0, 0.5]))
    half, _ = streamed(model, 0.5)
    plain, _ = streamed(base)
    assert torch.equal(streamed(model, 0)[0], plain)
    assert torch.equal(mixed[0], loud[0])
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[2], half[2])
    assert not torch.equal(half, loud)
    assert not torch.equal(half, plain)


def test_memory_learns_at_volume_0_as_far_as_it_hears_the_same(model):
    # The first block hears the same at every volume; the second what the first gives.
    first, *_ = streamed(model)[1]
    silent, *_ = streamed(model, 0)[1]
    for name, tensor in first.items():
        assert torch.equal(silent[name], tensor), name


def test_it_can_be_turned_while_a_stream_runs(model, base):
    late, _ = streamed(model, 0, at=9)
    loud, _ = streamed(model)
    plain, _ = streamed(base)
    assert torch.equal(late[:, :, :9], loud[:, :, :9])
    assert not torch.equal(late[:, :, 9:], plain[:, :, 9:]), "attention still has what the blocks added before"
    up = torch.zeros(3)
    with torch.no_grad(), model.streaming(3), MOSHI_HOST.volume(model, up):
        quiet = torch.cat([model.forward_text(frame)[1] for frame in codes()[:, :, :9].split(1, -1)], dim=2)
        assert torch.equal(quiet, plain[:, :, :9])
        with MOSHI_HOST.volume(model, torch.tensor([0.0, 1.0, 0.0])):
            after = torch.cat([model.forward_text(frame)[1] for frame in codes()[:, :, 9:].split(1, -1)], dim=2)
    assert torch.equal(after[[0, 2]], plain[[0, 2], :, 9:])
    assert not torch.equal(after[1], plain[1, :, 9:])


def test_a_stream_that_starts_inside_starts_at_it(model, base):
    with torch.no_grad(), MOSHI_HOST.volume(model, 0), model.streaming(3):
        inside = torch.cat([model.forward_text(frame)[1] for frame in codes().split(1, -1)], dim=2)
    assert torch.equal(inside, streamed(base)[0])


def test_it_reaches_blocks_through_the_generation_loop(model, base):
    spoken = {}
    for name, volume, lm in (("silent", 0, model), ("loud", 1, model), ("rows", torch.tensor([0.0, 1.0]), model),
                             ("base", None, base)):  # fmt: skip
        generator = LMGen(lm, use_sampling=False)
        with torch.no_grad(), ExitStack() as stack:
            if volume is not None:
                stack.enter_context(MOSHI_HOST.volume(lm, volume))
            stack.enter_context(generator.streaming(2))
            steps = [generator.step(frame) for frame in codes(2)[:, 9:].split(1, -1)]
        spoken[name] = torch.cat([step for step in steps if step is not None], dim=-1)
    assert torch.equal(spoken["silent"], spoken["base"])
    assert not torch.equal(spoken["loud"], spoken["base"])
    assert torch.equal(spoken["rows"][0], spoken["base"][0])
    assert torch.equal(spoken["rows"][1], spoken["loud"][1])


def test_output_scale_and_volume_multiply(model, base):
    quiet, _ = load(output_scale=0.25)
    with torch.no_grad():
        with MOSHI_HOST.volume(model, 0.5):
            half = logits(model)
        with MOSHI_HOST.volume(quiet, 2):
            assert torch.equal(logits(quiet), half)
        with MOSHI_HOST.volume(quiet, torch.tensor([2.0, 0.0, 2.0])):
            rows = logits(quiet)
        assert torch.equal(rows[[0, 2]], half[[0, 2]])
        assert torch.equal(rows[1], logits(base)[1])
        assert torch.equal(logits(load(output_scale=0)[0]), logits(base))


def test_gradients_with_checkpointing_are_those_of_the_forward_pass(model):
    # Backward runs layers again, after the context was left: they see what the forward pass saw.
    gradients = []
    for checkpointing in (False, True):
        model.transformer.checkpointing = checkpointing
        model.zero_grad()
        with MOSHI_HOST.volume(model, torch.tensor([1.0, 0.0, 0.3])):
            loss = model(codes()).logits.nan_to_num().square().mean()
        loss.backward()
        gradients.append(
            [p.grad.clone() for site in sites(model) for p in site.block.parameters() if p.grad is not None]
        )
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_at_volume_0_no_parameter_of_a_block_has_a_gradient_but_zero(model):
    with MOSHI_HOST.volume(model, 0):
        model(codes()).logits.nan_to_num().square().mean().backward()
    for site in sites(model):
        for name, parameter in site.block.named_parameters():
            assert parameter.grad is None or not parameter.grad.any(), name


def test_it_nests_beside_updates_and_an_error_restores(model, base):
    with torch.no_grad():
        loud, plain = logits(model), logits(base)
        with MOSHI_HOST.volume(model, 0), MOSHI_HOST.updates(model, False):
            assert torch.equal(logits(model), plain)
            with MOSHI_HOST.volume(model, 1):
                frozen = logits(model)
                with MOSHI_HOST.updates(model, True):
                    assert torch.equal(logits(model), loud)
                assert torch.equal(logits(model), frozen)
            assert torch.equal(logits(model), plain)
        assert not torch.equal(frozen, loud)
        with pytest.raises(RuntimeError, match="inside"), MOSHI_HOST.volume(model, 0):
            raise RuntimeError("inside")
        assert torch.equal(logits(model), loud)


def test_a_stream_goes_on_from_a_saved_one_at_its_own_volume(model):
    with torch.no_grad(), model.streaming(3):
        with MOSHI_HOST.volume(model, 0):
            for frame in codes()[:, :, :5].split(1, -1):
                model.forward_text(frame)
            saved = stream_state(model)
            quiet = model.forward_text(codes()[:, :, 5:6])[1]
        restore_stream_state(model, saved)
        loud = model.forward_text(codes()[:, :, 5:6])[1]
        restore_stream_state(model, saved)
        with MOSHI_HOST.volume(model, 0):
            assert torch.equal(model.forward_text(codes()[:, :, 5:6])[1], quiet)
    assert not torch.equal(loud, quiet)
    assert not any("volume" in name for name in saved)


@pytest.mark.parametrize("value", [-0.1, float("nan"), 11, True, "half", torch.tensor([1, 0, 1]), torch.ones(3, 1)])
def test_what_is_no_volume_is_refused(model, value):
    with pytest.raises(ContextError, match="volume: "), MOSHI_HOST.volume(model, value):
        pass
    assert all(site.volume == 1 for site in sites(model))


def test_another_number_of_rows_is_refused_and_changes_nothing(model):
    two = torch.zeros(2)
    with torch.no_grad(), model.streaming(3):
        with (
            pytest.raises(ContextError, match="volume has 2 rows, and the stream has 3"),
            MOSHI_HOST.volume(model, two),
        ):
            pass
        assert all(bool((site._streaming_state.volume == 1).all()) for site in sites(model))
    with MOSHI_HOST.volume(model, two):
        with pytest.raises(ContextError, match="volume has 2 rows, and the stream has 3"), model.streaming(3):
            pass
        assert not any(module.is_streaming for module in model.modules() if isinstance(module, StreamingModule))
        with pytest.raises(ContextError, match="volume of shape"):
            model(codes())
    streamed(model)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_stream_of_another_number_of_rows_is_refused_on_leaving_too(model, rows):
    with (
        torch.no_grad(),
        ExitStack() as stream,
        pytest.raises(ContextError, match=f"volume has {rows} rows, and the stream has 3"),
        MOSHI_HOST.volume(model, torch.zeros(rows)),
        MOSHI_HOST.volume(model, 1),
    ):
        stream.enter_context(model.streaming(3))
    assert all(site.volume == 1 for site in sites(model))


def test_blocks_without_a_volume_are_named_and_stream_as_before():
    model = toy_lm()
    tokens = random_codes(model, 2, 5)
    with torch.no_grad():
        loud = model.forward_text(tokens)[1]
        for value in (0, 0.5, torch.ones(2)):
            with (
                pytest.raises(ContextError, match=r"layers\.0\.sequence \(ToyBlock\), layers\.2\.sequence"),
                MOSHI_HOST.volume(model, value),
            ):
                pass
        with MOSHI_HOST.volume(model, 1):
            assert torch.equal(model.forward_text(tokens)[1], loud)
            with model.streaming(2):
                model.forward_text(tokens[..., :1])


def test_a_model_without_blocks_is_at_every_volume(base):
    assert not isinstance(base.transformer, TTTStreamingTransformer)
    with torch.no_grad():
        plain = logits(base)
        for volume in (0, 0.5, torch.ones(3)):
            with MOSHI_HOST.volume(base, volume):
                assert torch.equal(logits(base), plain)
    with pytest.raises(ContextError, match="got -1"), MOSHI_HOST.volume(base, -1):
        pass


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"causal": False}], ids=str)
def test_both_passes_of_a_bidirectional_block_are_at_the_volume(options):
    config = parse_config(
        {"host": {"name": "audio"}, "ttt": [{"variant": "ttt_mlp", "chunk": 8, "gate": {"init": 0.5}, **options}]},
        registry=default_registry(),
    )
    model, base = AUDIO_HOST.load(config.host), AUDIO_HOST.load(config.host)
    inject(model, config)
    x = torch.randn(3, 32 * 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loud, plain = model(x), base(x)
        assert not torch.equal(loud, plain)
        with AUDIO_HOST.volume(model, 0):
            assert torch.equal(model(x), plain)
            with AUDIO_HOST.volume(model, torch.tensor([0.0, 1.0, 0.5])):
                mixed = model(x)
        with AUDIO_HOST.volume(model, 0.5):
            half = model(x)
        assert torch.equal(model(x), loud)
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], loud[1])
    assert torch.equal(mixed[2], half[2])


def test_a_model_that_was_built_on_meta_has_a_volume_row_by_row():
    config = config_of()
    model = MOSHI_HOST.skeleton(config.host)
    injection = inject(model, config)
    model.to_empty(device="cpu")
    MOSHI_HOST.load_base(model, MOSHI_HOST.base_state_dict(MOSHI_HOST.load(config.host)))
    injection.initialize()
    with torch.no_grad(), MOSHI_HOST.volume(model, torch.tensor([1.0, 0.0, 1.0])):
        logits(model)
    streamed(model, torch.tensor([1.0, 0.0, 1.0]))


def test_blocks_that_are_attached_inside_are_at_volume_1():
    model, injection = load()
    with torch.no_grad():
        loud = logits(model)
        with MOSHI_HOST.volume(model, 0):
            blocks = MOSHI_HOST.detach(model)
            MOSHI_HOST.attach(model, blocks)
            assert torch.equal(logits(model), loud)
        assert torch.equal(logits(model), loud)
    assert set(injection.blocks) == set(blocks)
    MOSHI_HOST.detach(model)
    assert "_volume" not in vars(model.transformer)
