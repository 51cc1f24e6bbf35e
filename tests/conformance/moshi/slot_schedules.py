"""Random schedules of callers in slots, and what each caller heard, to compare with the same caller alone.

A schedule is a list of ticks: what callers do before it, and who has a frame in it. A caller alone does the same in the
same rows, with the other rows idle, and has no tick where it has no frame.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import Slots, SlotSettings
from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS, random_tiny_lm
from moshi_ttt.hosts.moshi.upstream import StreamingMultiheadAttention

VARIANTS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "ttt_linear": {"variant": "ttt_linear", "layers": "all", "chunk": 3, "base_lr": 0.1},
    "ttt_mlp": {"variant": "ttt_mlp", "layers": "last:2", "chunk": 3, "base_lr": 0.1},
    "ttt_multilayer": {"variant": "ttt_multilayer", "layers": "last:1", "chunk": 3, "base_lr": 0.1},
    "ttt_ridge": {"variant": "ttt_ridge", "layers": "last:2", "chunk": 3},
    "gating_mlp": {"variant": "gating_mlp", "layers": "0,2", "chunk": 3, "lr": 0.1, "clip": 0.5, "decay": 0.2},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ttt_mlp, momentum": {**VARIANTS["ttt_mlp"], "momentum": 0.5, "inner_steps": 2, "conv_kernel": 2},
    "ttt_ridge, decay": {**VARIANTS["ttt_ridge"], "decay": 0.1, "variance_gate": True},
    "gating_mlp, ridge": {**VARIANTS["gating_mlp"], "update": "ridge", "success_gate": True},
}
"""Options that keep more in the state."""
ROWS = 3
LM_CONTEXT, CODEC_CONTEXT = 8, 6
"""Of attention, in tokens: so short that the rings wrap within a schedule."""
LM_OPTIONS: dict[str, Any] = {**FEW_CODEBOOKS, "delays": [0, 0, 2, 0, 2], "context": LM_CONTEXT}
"""Delays of a frame longer than Moshi's, so that a row's first frame brings no tokens."""


@cache
def codec():
    mimi = resolve_repo("builtin:tiny").load_mimi()
    mimi.set_num_codebooks(FEW_CODEBOOKS["dep_q"])
    for module in mimi.modules():
        if isinstance(module, StreamingMultiheadAttention):
            module.context = CODEC_CONTEXT
    return mimi


@cache
def model_with(variant: str):
    """A small random Moshi with blocks whose parameters are disturbed, so that every term counts."""
    model = random_tiny_lm(card=codec().cardinality, **LM_OPTIONS)
    if (entry := (VARIANTS | OPTIONS)[variant]) is not None:
        host = {"name": "moshi", "hf_repo": "builtin:tiny"}
        injection = inject(model, parse_config({"host": host, "ttt": [entry]}, registry=default_registry()))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return model


def make_slots(variant: str, rows: int = ROWS, **options: Any) -> Slots:
    return Slots(model_with(variant), codec(), rows, **options)


def frame_of(caller: int, number: int) -> Tensor:
    """What ``caller`` says in its frame ``number``: noise, sometimes too loud."""
    generator = torch.Generator().manual_seed(1000 * caller + number)
    loudness = (0.02, 0.1, 0.5, 3.0)[number % 4]
    return loudness * torch.randn(codec().frame_size, generator=generator)


# ---------------------------------------------------------------------------------------------------------- schedules
@dataclass(frozen=True)
class Event:
    """What ``caller`` does: the name of a method of ``Play``, and its arguments."""

    caller: int
    name: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Tick:
    events: list[Event]
    speaking: list[int]


def draw_schedule(seed: int, ticks: int = 16, rows: int = ROWS, *, blocks: bool = True) -> list[Tick]:
    """Joins, leaves, gaps, resets, saves, restores, moves, and switched updates and volumes."""
    draw = random.Random(seed)
    where: dict[int, int] = {}  # caller -> row
    pockets: dict[int, int] = {}  # caller -> how many states it has saved
    away: list[int] = []
    schedule: list[Tick] = []
    newest = 100 * seed
    for _ in range(ticks):
        events: list[Event] = []
        for caller in list(where):
            events += _events(draw, caller, where, pockets, away, rows, blocks)
        for row in sorted(set(range(rows)) - set(where.values())):
            if draw.random() < 0.5:
                returning = bool(away) and draw.random() < 0.6
                caller = away.pop(draw.randrange(len(away))) if returning else (newest := newest + 1)
                state = draw.randrange(pockets[caller]) if pockets.get(caller) and draw.random() < 0.9 else None
                events.append(Event(caller, "join", (row, _settings(draw, caller, blocks), state)))
                where[caller] = row
        schedule.append(Tick(events, [caller for caller in where if draw.random() < 0.75]))
    schedule.append(Tick([Event(caller, "save", ("session",)) for caller in where], []))
    return schedule


def _events(draw, caller, where, pockets, away, rows, blocks) -> list[Event]:
    events = []
    if draw.random() < 0.12:
        events.append(Event(caller, "save", (draw.choice(["memory", "session"]),)))
        pockets[caller] = pockets.get(caller, 0) + 1
    free = sorted(set(range(rows)) - set(where.values()))
    choice = draw.random()
    if choice < 0.12:
        events.append(Event(caller, "leave"))
        del where[caller]
        away.append(caller)
    elif choice < 0.2 and free:
        row = draw.choice(free)
        events.append(Event(caller, "move", (row,)))
        where[caller] = row
        pockets[caller] = pockets.get(caller, 0) + 1
    elif choice < 0.24:
        events.append(Event(caller, "restart"))
    elif choice < 0.28:
        events.append(Event(caller, "forget"))
    elif choice < 0.4:
        events.append(Event(caller, "set_updates", (draw.random() < 0.5,)))
    elif choice < 0.5 and blocks:
        events.append(Event(caller, "set_volume", (draw.choice([0.0, 0.5, 1.0, 2.0]),)))
    return events


def _settings(draw, caller: int, blocks: bool) -> SlotSettings:
    return SlotSettings(
        seed=caller,
        temperature=draw.choice([0.0, 0.8, 1.2]),
        text_temperature=draw.choice([0.0, 0.7]),
        top_k=draw.choice([10, 250]),
        text_top_k=draw.choice([5, 25]),
        updates=draw.random() < 0.8,
        volume=draw.choice([1.0, 1.0, 0.5]) if blocks else 1.0,
    )


# --------------------------------------------------------------------------------------------------------- performance
@dataclass
class Play:
    """Callers in ``slots``. ``heard`` is, by caller, everything that it got: outputs and saved states, in order."""

    slots: Slots
    heard: dict[int, list[Any]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    settings: dict[int, SlotSettings] = field(default_factory=dict)
    pockets: dict[int, list[bytes]] = field(default_factory=dict)
    said: dict[int, int] = field(default_factory=dict)

    def tick(self, tick: Tick, only: int | None = None) -> None:
        for event in tick.events:
            if only in (None, event.caller):
                getattr(self, event.name)(event.caller, *event.arguments)
        speaking = [caller for caller in tick.speaking if only in (None, caller)]
        frames = {}
        for caller in speaking:
            self.said[caller] = self.said.get(caller, 0) + 1
            frames[self.rows[caller]] = frame_of(caller, self.said[caller])
        out = self.slots.tick(frames)
        assert list(out) == list(frames)
        for caller in speaking:
            self.heard.setdefault(caller, []).append(out[self.rows[caller]])

    def join(self, caller: int, row: int, settings: SlotSettings, state: int | None = None) -> None:
        saved = None if state is None else RowState.from_bytes(self.pockets[caller][state])
        self.slots.join(row, settings, saved)
        self.rows[caller], self.settings[caller] = row, settings

    def leave(self, caller: int) -> None:
        self.slots.leave(self.rows.pop(caller))

    def save(self, caller: int, kind: str) -> None:
        state = self.slots.save_row(self.rows[caller], kind)
        self.pockets.setdefault(caller, []).append(state.to_bytes())
        self.heard.setdefault(caller, []).append(state)

    def move(self, caller: int, row: int) -> None:
        self.save(caller, "session")
        settings = self.settings[caller]
        self.leave(caller)
        self.join(caller, row, settings, len(self.pockets[caller]) - 1)

    def restart(self, caller: int) -> None:
        self.slots.restart(self.rows[caller])

    def forget(self, caller: int) -> None:
        self.slots.forget(self.rows[caller])

    def set_updates(self, caller: int, enabled: bool) -> None:
        self.slots.set_updates(self.rows[caller], enabled)

    def set_volume(self, caller: int, volume: float) -> None:
        self.slots.set_volume(self.rows[caller], volume)


def perform(slots: Slots, schedule: Iterable[Tick], only: int | None = None) -> dict[int, list[Any]]:
    """What every caller heard, or the one caller that ``only`` is, with nobody else in the slots."""
    with slots:
        play = Play(slots)
        for tick in schedule:
            play.tick(tick, only)
        return play.heard


def callers(schedule: Iterable[Tick]) -> list[int]:
    return sorted({event.caller for tick in schedule for event in tick.events if event.name == "join"})


# ---------------------------------------------------------------------------------------------------------- comparison
def assert_same(ours: list[Any], theirs: list[Any], what: str = "") -> None:
    """Bit for bit: tokens, samples and states."""
    assert len(ours) == len(theirs), what
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        where = f"{what}, entry {number}"
        assert type(a) is type(b), where
        if isinstance(a, RowState):
            assert_same_state(a, b, where)
        elif a is not None:
            assert torch.equal(a.tokens, b.tokens), f"{where}: tokens"
            assert torch.equal(a.pcm, b.pcm), f"{where}: samples"


def assert_same_state(a: RowState, b: RowState, what: str = "") -> None:
    assert (a.kind, a.origin, a.counts, a.seed) == (b.kind, b.origin, b.counts, b.seed), what
    assert a.tensors.keys() == b.tensors.keys(), what
    for name in a.tensors:
        mine, other = live(a, name), live(b, name)
        assert mine.shape == other.shape, f"{what}: {name}"
        assert torch.equal(mine, other), f"{what}: {name}"


def live(state: RowState, name: str) -> Tensor:
    """A tensor of ``state``, of a full ring without the slots that the next step overwrites before it reads.

    A masked step leaves there what a row alone does not have.
    """
    tensor = state.tensors[name]
    if not name.endswith("kv_cache.cache"):
        return tensor
    capacity, step = (CODEC_CONTEXT, 2) if name.startswith("mimi/") else (LM_CONTEXT, 1)
    if tensor.shape[2] < capacity:
        return tensor
    end = int(state.tensors[name.removesuffix("cache") + "end_offset"])
    kept = torch.ones(capacity, dtype=torch.bool)
    kept[(end + torch.arange(step)) % capacity] = False
    return tensor[:, :, kept]
