"""Slots: against Moshi's own loop, faulty input, what a caller leaves behind, and what is refused."""

from __future__ import annotations

import functools
import math
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.core.errors import ContextError, HostError
from moshi_ttt.hosts.moshi.slots import Slots, SlotSettings
from moshi_ttt.hosts.moshi.stream_values import StreamValue
from moshi_ttt.hosts.moshi.streaming import save_stream_state
from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS, random_tiny_lm
from moshi_ttt.hosts.moshi.upstream import LMGen
from tests.conformance.moshi.slot_schedules import (
    LM_OPTIONS,
    VARIANTS,
    assert_same,
    assert_same_state,
    codec,
    frame_of,
    make_slots,
    model_with,
)
from tests.unit.hosts.toy import toy_lm

pytestmark = pytest.mark.each_kind


def hear(slots: Slots, caller: int, row: int, frames: range, others: dict[int, int] | None = None) -> list:
    """What ``caller`` in ``row`` gets for its ``frames``; ``others``: row -> caller, with the same frames."""
    out = []
    for number in frames:
        said = {row: frame_of(caller, number)}
        said |= {other: frame_of(who, number) for other, who in (others or {}).items()}
        out.append(slots.tick(said)[row])
    return out


@functools.cache
def alone(variant: str, caller: int, row: int, frames: range, settings: SlotSettings | None = None) -> list:
    """Computed once; whoever takes it leaves it as it is."""
    with make_slots(variant) as slots:
        slots.join(row, settings or SlotSettings(seed=caller))
        return [*hear(slots, caller, row, frames), slots.save_row(row, "session")]


# ------------------------------------------------------------------------------------------------- Moshi's own loop
@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [SlotSettings(seed=5), SlotSettings(seed=6, temperature=0, text_temperature=0.9, text_top_k=7)], ids=str
)
def test_one_slot_is_moshis_own_loop(settings):
    frames = 24
    model, mimi = model_with("ttt_linear"), codec()
    options = {
        "temp": settings.temperature, "temp_text": settings.text_temperature, "top_k": settings.top_k,
        "top_k_text": settings.text_top_k,
    }  # fmt: skip
    generator = LMGen(model, use_sampling=True, **options)
    expected = []
    torch.manual_seed(settings.seed)
    with mimi.streaming(1), generator.streaming(1):
        generator.step(torch.zeros(1, 8, 1, dtype=torch.long))  # the input of a stream's first step is ignored
        for number in range(frames):
            codes = mimi.encode(frame_of(1, number).clamp(-1, 1)[None, None])
            tokens = generator.step(codes)
            expected.append(None if tokens is None else (tokens[0, :, 0], mimi.decode(tokens[:, 1:])[0, 0]))
    with make_slots("ttt_linear", rows=1) as slots:
        slots.join(0, settings)
        ours = hear(slots, 1, 0, range(frames))
    assert [out is None for out in ours] == [True] + [False] * (frames - 1)
    for out, theirs in zip(ours[1:], expected[1:], strict=True):
        assert torch.equal(out.tokens, theirs[0])
        assert torch.equal(out.pcm, theirs[1].clamp(-1, 1))
    assert len({tuple(out.tokens.tolist()) for out in ours[1:]}) > frames // 2


def test_outputs_have_the_shapes_of_the_contract():
    with make_slots("base") as slots:
        slots.join(0, SlotSettings())
        out = hear(slots, 1, 0, range(2))[1]
        assert (slots.count, slots.frame_size, slots.sample_rate, slots.frame_rate) == (3, 1920, 24000, 12.5)
        assert slots.tick({}) == {}
    queues = 1 + FEW_CODEBOOKS["dep_q"]
    assert (out.tokens.shape, out.tokens.dtype, out.tokens.device.type) == ((queues,), torch.int64, "cpu")
    assert (out.pcm.shape, out.pcm.dtype, out.pcm.device.type) == ((1920,), torch.float32, "cpu")
    assert out.pcm.abs().max() <= 1


def test_another_thread_can_own_the_slots():
    """Where no gradient is recorded is said thread by thread."""
    out = []

    def own() -> None:
        assert torch.is_grad_enabled()
        with make_slots("ttt_linear") as slots:
            slots.join(0, SlotSettings(seed=1))
            out.extend(hear(slots, 1, 0, range(3)))
            out.append(slots.save_row(0, "session"))

    thread = threading.Thread(target=own)
    thread.start()
    thread.join()
    assert_same(out, alone("ttt_linear", 1, 0, range(3)))
    assert not out[1].pcm.requires_grad


# --------------------------------------------------------------------------------------------------- faulty input
FAULTS = {
    "nan": lambda n: torch.full((1920,), math.nan),
    "infinity": lambda n: torch.full((1920,), math.inf if n % 2 else -math.inf),
    "1e30": lambda n: torch.full((1920,), 1e30 * (-1) ** n),
    "noise": lambda n: 1824 * torch.randn(1920, generator=torch.Generator().manual_seed(n)),
    "mixed": lambda n: torch.tensor([0.1, math.nan, -math.inf, 1e30]).repeat(480),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("variant", ["ttt_mlp", "ttt_ridge", "gating_mlp"])
def test_faulty_input_stays_in_its_row_and_ends_with_its_caller(variant, fault):
    with make_slots(variant) as slots:
        slots.join(0, SlotSettings(seed=1))
        slots.join(1, SlotSettings(seed=99))
        neighbor = []
        for number in range(5):
            out = slots.tick({0: frame_of(1, number), 1: FAULTS[fault](number)})
            neighbor.append(out[0])
            assert out[1] is None or bool(out[1].pcm.isfinite().all())
        slots.leave(1)
        slots.join(1, SlotSettings(seed=2))
        following = hear(slots, 2, 1, range(5))
        saved = [slots.save_row(row, "session") for row in (0, 1)]
    assert_same([*neighbor, saved[0]], alone(variant, 1, 0, range(5)))
    assert_same([*following, saved[1]], alone(variant, 2, 1, range(5)))


def _next_caller_of_a_poisoned_row(variant: str) -> list:
    """What a caller hears in a row whose caches were not finite: a reset masks them, and 0 times nan is nan."""
    with make_slots(variant) as slots:
        slots.join(1, SlotSettings(seed=9))
        hear(slots, 9, 1, range(3))
        for value in slots._streams.values.values():
            row = value.row(1)
            if row.is_floating_point():
                row.fill_(math.nan)
        slots.leave(1)
        slots.join(1, SlotSettings(seed=2))
        return [*hear(slots, 2, 1, range(4)), slots.save_row(1, "session")]


def test_a_row_is_clean_for_the_next_caller_even_of_nan():
    assert_same(_next_caller_of_a_poisoned_row("ttt_linear"), alone("ttt_linear", 2, 1, range(4)))


def test_mutation_caches_not_cleared_is_noticed(monkeypatch):
    expected = alone("ttt_linear", 2, 1, range(4))
    monkeypatch.setattr(StreamValue, "row_clear", lambda self, row: None)
    with pytest.raises(AssertionError):
        assert_same(_next_caller_of_a_poisoned_row("ttt_linear"), expected)


# -------------------------------------------------------------------------------------------- what a caller leaves
def fragments(tensors: dict[str, torch.Tensor]) -> set[bytes]:
    """Pieces of a caller that would give it away: every key and value, activation, fast weight row, token frame."""
    found = set()
    for name, tensor in tensors.items():
        if name == "generator":
            found.add(bytes(tensor.numpy().tobytes()[:64]))
        elif tensor.dim() and tensor.numel() and tensor.is_floating_point():
            for row in tensor.reshape(-1, tensor.shape[-1]):
                if row.numel() >= 2 and bool(row.count_nonzero() >= 2):
                    found.add(row.numpy().tobytes())
    return found


@pytest.mark.parametrize("variant", ["base", "ttt_mlp", "gating_mlp"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "joined over"])
def test_nothing_of_a_former_caller_is_in_a_saved_row(variant, left):
    with make_slots(variant) as slots:
        slots.join(1, SlotSettings(seed=1))
        hear(slots, 1, 1, range(11))
        former = slots.save_row(1, "session")
        if left:
            slots.leave(1)
        slots.join(1, SlotSettings(seed=2))
        hear(slots, 2, 1, range(2))
        files = {kind: slots.save_row(1, kind).to_bytes() for kind in ("memory", "session")}
    own = fragments(alone(variant, 2, 1, range(2))[-1].tensors)
    secrets = fragments(former.tensors) - own
    assert len(secrets) > 100
    there = former.to_bytes()
    assert sum(secret in there for secret in secrets) == len(secrets), "the search finds what is there"
    for kind, contents in files.items():
        assert not [secret for secret in secrets if secret in contents], kind


@torch.no_grad()
def test_nothing_of_a_former_stream_is_in_a_saved_stream(tmp_path):
    """A stream of all rows too: after a reset, which masks keys and tokens and erases none."""
    model = random_tiny_lm(**LM_OPTIONS)
    generator = LMGen(model, use_sampling=False, support_out_of_sync=True)
    codes = torch.randint(0, 32, (2, FEW_CODEBOOKS["dep_q"], 9), generator=torch.Generator().manual_seed(0))
    with generator.streaming(2):
        for t in range(7):
            generator.step(codes[..., t : t + 1])
        before = save_stream_state(tmp_path / "before", generator).read_bytes()
        secrets = set()
        for layer in model.transformer.layers:
            ring = layer.self_attn._streaming_state.kv_cache.cache[:, 1, :, :7]  # [2, H, n, Dh]
            secrets |= {row.numpy().tobytes() for row in ring.reshape(-1, ring.shape[-1])}
        tokens = generator._streaming_state.cache[1].clone()  # [Q, C]
        secrets |= {row.numpy().tobytes() for row in tokens}
        generator.reset_streaming(torch.tensor([False, True]))
        for t in range(7, 9):
            generator.step(codes[..., t : t + 1])
        after = save_stream_state(tmp_path / "after", generator).read_bytes()
        live = {row.numpy().tobytes() for row in generator._streaming_state.cache[0]}
    with generator.streaming(2):  # what the second stream of the row has by itself, such as the start token's keys
        for t in range(7, 9):
            generator.step(codes[..., t : t + 1])
        own = save_stream_state(tmp_path / "own", generator).read_bytes()
    assert len(secrets) > 100
    assert all(secret in before for secret in secrets)
    assert not [secret for secret in secrets - live if secret in after and secret not in own]


def test_leaving_erases_the_row():
    with make_slots("ttt_mlp") as slots:
        fresh = {name: value.row(1).clone() for name, value in slots._streams.values.items()}
        recent = [block.recent.x.clone() for block in slots._streams.blocks]
        slots.join(1, SlotSettings())
        hear(slots, 1, 1, range(9))
        slots.leave(1)
        for name, value in slots._streams.values.items():
            assert torch.equal(value.row(1), fresh[name]), name
        for block, zeros in zip(slots._streams.blocks, recent, strict=True):
            assert torch.equal(block.recent.x, zeros)


# ------------------------------------------------------------------------------------------------------------ memory
def test_restart_is_joining_again_with_the_memory():
    settings = SlotSettings(seed=3, volume=0.5)
    with make_slots("ttt_mlp") as slots:
        slots.join(0, settings)
        hear(slots, 1, 0, range(7))
        memory = slots.save_row(0, "memory")
        slots.restart(0)
        assert_same_state(slots.save_row(0, "memory"), _without_frames(memory))
        ours = [*hear(slots, 1, 0, range(7, 14)), slots.save_row(0, "session")]
    with make_slots("ttt_mlp") as slots:
        slots.join(0, settings, memory)
        assert_same(ours, [*hear(slots, 1, 0, range(7, 14)), slots.save_row(0, "session")])


def _without_frames(memory):
    memory.counts.frames = 0
    return memory


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "base"])
def test_forget_is_the_learned_start_and_the_conversation_goes_on(variant):
    with make_slots(variant) as slots:
        slots.join(2, SlotSettings())
        start = slots.save_row(2, "memory")
        assert_same_state(start, slots.learned_start())
        hear(slots, 1, 2, range(8))
        moved = slots.save_row(2, "memory")
        assert any(not torch.equal(moved.tensors[name], start.tensors[name]) for name in start.tensors)
        before = slots.save_row(2, "session")
        slots.forget(2)
        after = slots.save_row(2, "session")
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor, start.tensors.get(name, before.tensors[name])), name
    assert (after.frames, after.counts.tokens, after.counts.updates) == (8, 0, {})


def test_updates_and_volume_of_one_row():
    frames = range(12)
    with make_slots("ttt_mlp") as slots:
        slots.join(0, SlotSettings(seed=1))
        slots.join(1, SlotSettings(seed=1, updates=False))
        slots.join(2, SlotSettings(seed=1))
        slots.set_volume(2, 0.0)
        heard: dict[int, list] = {0: [], 1: [], 2: []}
        for number in frames:
            for row, out in slots.tick(dict.fromkeys(range(3), frame_of(1, number))).items():
                heard[row].append(out)
        first, second, third = (slots.save_row(row, "memory").tensors for row in range(3))
        start = slots.learned_start().tensors
        stats = [slots.stats(row)[0] for row in range(3)]
    assert_same(heard[0], alone("ttt_mlp", 1, 0, frames)[:-1])
    assert_same(heard[2], alone("base", 1, 2, frames)[:-1])  # at volume 0 the base model
    weights = [name for name in start if "weight" in name]
    assert weights
    assert all(torch.equal(second[name], start[name]) for name in weights)
    assert not any(torch.equal(each[name], start[name]) for each in (first, third) for name in weights)
    assert [each.updates for each in stats] == [4, 0, 4]  # 13 tokens in chunks of 3
    assert stats[1].moved == 0 < stats[0].moved


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "base"])
def test_stats_say_what_the_memory_does(variant):
    with make_slots(variant) as slots:
        slots.join(1, SlotSettings(seed=1))
        nothing = slots.stats(1)
        assert {(each.moved, each.inner_loss, each.updates, each.skipped) for each in nothing} == {(0, None, 0, 0)}
        hear(slots, 1, 1, range(1))
        assert all(each.inner_loss == each.start_loss for each in slots.stats(1)), "no chunk is finished"
        for number in range(12):
            slots.tick({1: frame_of(1, number % 4)})
        found = slots.stats(1)
    assert [each.site for each in found] == [str(site) for site in sorted(model_sites(variant))]
    for each in found:
        assert each.variant == variant
        assert (each.updates, each.skipped) == (4, 0)  # 14 tokens in chunks of 3
        assert each.moved > 0
        assert each.inner_loss != each.start_loss
        assert math.isfinite(each.inner_loss)


def model_sites(variant):
    from moshi_ttt.hosts.moshi.host import MOSHI_HOST

    return list(MOSHI_HOST.blocks(model_with(variant)))


class CountReads(TorchDispatchMode):
    """Counts the operations that hand a value of a tensor to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["base", "ttt_mlp", "ttt_ridge", "gating_mlp"])
def test_a_tick_reads_no_value_and_neither_do_switches(variant):
    with make_slots(variant) as slots, CountReads() as counter:
        slots.join(0, SlotSettings())
        for number in range(4):
            slots.tick({0: frame_of(1, number)})
        slots.set_updates(0, False)
        slots.forget(0)
        slots.leave(0)
        assert counter.reads == 0
        slots.join(0, SlotSettings())
        slots.save_row(0, "session")
        assert counter.reads > 0, "the counter counts"


# ---------------------------------------------------------------------------------------------------------- refusals
def test_closed_slots_leave_the_model_free():
    slots = make_slots("ttt_linear")
    with pytest.raises(HostError, match="streaming already"):
        make_slots("ttt_linear")
    slots.join(0, SlotSettings())
    hear(slots, 1, 0, range(2))
    slots.close()
    slots.close()
    for call in (lambda: slots.join(0, SlotSettings()), lambda: slots.stats(0), lambda: slots.leave(0)):
        with pytest.raises(HostError, match="closed"):
            call()
    with make_slots("ttt_linear") as again:
        again.warm_up(2)
        again.join(0, SlotSettings(seed=1))
        ours = hear(again, 1, 0, range(3))
        with pytest.raises(HostError, match=r"rows \[0\] are in use"):
            again.warm_up()
    assert_same(ours, alone("ttt_linear", 1, 0, range(3))[:-1])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"text_temperature": math.nan}, "text_temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"text_top_k": -1}, "text_top_k is -1"),
        ({"volume": math.inf}, "volume is inf"),
        ({"volume": -1.0}, "volume is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, match):
    with pytest.raises(HostError, match=match):
        SlotSettings(**settings)


def test_more_candidates_than_the_slots_have_noise_for_are_refused():
    with make_slots("base", largest_text_top_k=30) as slots:
        slots.join(0, SlotSettings(text_top_k=30, top_k=5000))  # of a vocabulary of 128, all
        with pytest.raises(HostError, match=r"text_top_k is 31, .* up to 30 .* largest_text_top_k=31"):
            slots.join(1, SlotSettings(text_top_k=31))
        with pytest.raises(HostError, match="Nobody is in row 1"):
            slots.tick({1: frame_of(1, 0)})


def test_rows_and_frames_are_checked_before_anything_happens():
    with make_slots("ttt_linear") as slots:
        slots.join(0, SlotSettings(seed=1))
        before = slots.save_row(0, "session")
        good = frame_of(1, 0)
        for frames, match in (
            ({0: good, 1: good}, "Nobody is in row 1"),
            ({0: good, 3: good}, "no row 3: these slots have rows 0 to 2"),
            ({0: good[:-1]}, r"frame of row 0 is \(1919,\).*give \[1920\] in a floating dtype, 80 ms at 24000 Hz"),
            ({0: good.long()}, "torch.int64"),
            ({0: good[None]}, r"\(1, 1920\)"),
        ):
            with pytest.raises(HostError, match=match):
                slots.tick(frames)
        for row in (-1, 3):
            with pytest.raises(HostError, match="no row"):
                slots.join(row, SlotSettings())
        for call in (slots.leave, slots.forget, slots.restart, slots.stats):
            with pytest.raises(HostError, match="Nobody is in row 2"):
                call(2)
        with pytest.raises(HostError, match="volume"):
            slots.set_volume(0, -2.0)
        assert_same_state(slots.save_row(0, "session"), before)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(HostError, match="0 rows"):
        make_slots("base", rows=0)
    with pytest.raises(HostError, match="codec has 128 codes"):
        Slots(random_tiny_lm(**FEW_CODEBOOKS), codec(), 2)
    speech_to_text = random_tiny_lm(n_q=8, dep_q=0, delays=[0] * 9, card=128)
    with pytest.raises(HostError, match=r"hears one voice and predicts the other.*1 voice and predicts 0"):
        Slots(speech_to_text, codec(), 2)
    with pytest.raises(HostError, match="conditions"):
        Slots(random_tiny_lm(cross_attention=True, card=128, **FEW_CODEBOOKS), codec(), 2)
    with pytest.raises(HostError, match="eval mode"):
        Slots(random_tiny_lm(card=128, **FEW_CODEBOOKS).train(), codec(), 2)


def test_a_volume_for_blocks_that_have_none_is_refused():
    with Slots(toy_lm(card=128, **FEW_CODEBOOKS), codec(), 2) as slots:
        slots.join(0, SlotSettings())
        for call in (lambda: slots.join(1, SlotSettings(volume=0.5)), lambda: slots.set_volume(0, 0.5)):
            with pytest.raises(ContextError, match=r"no effect on layers\.0\.sequence"):
                call()
