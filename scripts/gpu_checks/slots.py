"""Sections about slots, the rows that callers of a server have: bit-equal to a caller alone, and the time of a tick.

Shape legend: B rows, S samples a frame.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from moshi.utils.compile import no_cuda_graph
from torch import Tensor

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import SlotOutput, Slots, SlotSettings
from moshi_ttt.hosts.moshi.upstream import loaders

from .cases import VARIANTS, tiny_model
from .report import Report, error
from .speed import BIG, fill

CASES = [
    ("ttt_mlp", torch.float32), ("ttt_mlp", torch.bfloat16), ("ttt_linear", torch.float32),
    ("ttt_ridge decaying", torch.float32), ("gating_mlp clipped", torch.float32),
]  # fmt: skip
FRAMES = 24
SAVED, BACK = 9, 13
"""The frame before which a caller is saved and hangs up, and the tick at which it comes back."""

Heard = list["SlotOutput | None"]


def alone_and_together(report: Report) -> None:
    """Callers in one batch against each of them alone, and with captured graphs against without, bit for bit."""
    mimi = resolve_repo("builtin:tiny").load_mimi(report.device)
    for name, dtype in CASES[:1] if report.small else CASES:
        if report.out_of_time(f"{name} and what follows"):
            return
        model, _ = tiny_model(VARIANTS[name], report.device, dtype, card=mimi.cardinality)
        label = f"{name} {str(dtype)[6:]}"
        together = _talk(model, mimi, (0, 1, 2), graphs=True)
        for caller in (0, 1, 2):
            alone = _talk(model, mimi, (caller,), graphs=True)
            _compare(report, f"{label}: caller {caller} among others and alone", together[caller], alone[caller])
        plain = _talk(model, mimi, (0, 1, 2), graphs=False)
        for caller in (0, 1, 2):
            _compare(report, f"{label}: caller {caller} with and without graphs", together[caller], plain[caller])


def _talk(model: Any, mimi: Any, callers: tuple[int, ...], *, graphs: bool) -> dict[int, tuple[Heard, RowState]]:
    """What each caller hears, and its session at the end.

    Caller 0 talks all the time. Caller 1 joins late and misses every fourth tick. Caller 2 is saved, hangs up, and
    comes back; its updates are then disabled, and its volume is 0.5. While it is away somebody else, who shouts, has
    its row, where it is not the only one.
    """
    heard: dict[int, Heard] = {caller: [] for caller in callers}
    shouting = len(callers) > 1
    with nullcontext() if graphs else no_cuda_graph(), Slots(model, mimi, 3) as slots:
        slots.warm_up()
        kept: RowState | None = None
        for tick in range(FRAMES):
            if tick == SAVED and 2 in callers:
                kept = slots.save_row(2, "session")
                slots.leave(2)
            if tick == SAVED + 1 and shouting:
                slots.join(2, SlotSettings(seed=99, volume=1.5))
            if tick == BACK and shouting:
                slots.leave(2)
            for caller, joins in ((0, 0), (1, 3), (2, 0), (2, BACK)):
                if caller in callers and tick == joins:
                    again = joins == BACK
                    settings = SlotSettings(seed=caller, updates=not again, volume=0.5 if again else 1.0)
                    slots.join(caller, settings, kept if again else None)
            speaking = [c for c in callers if c == 0 or (c == 1 and tick >= 3 and tick % 4) or _third(c, tick)]
            said = {caller: _frame(caller, tick, slots.frame_size) for caller in speaking}
            if shouting and SAVED < tick < BACK:
                said[2] = 1e4 * _frame(99, tick, slots.frame_size)
            out = slots.tick(said)
            for caller in speaking:
                heard[caller].append(out[caller])
        return {caller: (heard[caller], slots.save_row(caller, "session")) for caller in callers}


def _third(caller: int, tick: int) -> bool:
    return caller == 2 and not SAVED <= tick < BACK


def _frame(caller: int, number: int, samples: int) -> Tensor:
    """``[S]``: noise of this caller and frame."""
    generator = torch.Generator().manual_seed(1000 * caller + number)
    return (0.02, 0.1, 0.5)[number % 3] * torch.randn(samples, generator=generator)


def _compare(report: Report, label: str, one: tuple[Heard, RowState], other: tuple[Heard, RowState]) -> None:
    silent = [[out is None for out in heard] for heard, _ in (one, other)]
    pairs = [(a, b) for a, b in zip(one[0], other[0], strict=True) if a is not None and b is not None]
    different = float(sum(int((a.tokens != b.tokens).sum()) for a, b in pairs) + (silent[0] != silent[1]))
    report.check(f"{label}: tokens", different if pairs else 1.0, 0.0)
    report.check(f"{label}: audio", max((error(a.pcm, b.pcm) for a, b in pairs), default=1.0), 0.0, "bit for bit")
    states = [state.tensors for _, state in (one, other)]
    worst = max(error(states[0][key], tensor) for key, tensor in states[1].items() if tensor.numel())
    report.check(f"{label}: state", worst, 0.0, "bit for bit")


def speed_of_slots(report: Report) -> None:
    """A tick of 1, 8 and 24 callers at 7B width (random weights), and what is done between ticks."""
    layers, chunk = ("1,2,3", 8) if report.small else ("29,30,31", 32)
    host = {"name": "moshi", "hf_repo": "builtin:tiny" if report.small else BIG, "dtype": "bfloat16"}
    model = MOSHI_HOST.skeleton(MOSHI_HOST.config_class.model_validate(host))
    model.to_empty(device=report.device)
    fill(model, report.device)
    model.eval()
    if report.small:
        mimi = resolve_repo("builtin:tiny").load_mimi(report.device)
    else:
        mimi = loaders.get_mimi(None, device=report.device)  # the real codec's size, with random weights
        _fill_codebooks(mimi)
    cases: dict[str, list[Mapping[str, Any]]] = {
        "base": [], "3 TTT-MLP": [{"variant": "ttt_mlp", "layers": layers, "chunk": chunk}],
    }  # fmt: skip
    for label, entries in cases.items():
        injection = None
        if entries:
            injection = inject(model, parse_config({"host": host, "ttt": entries}, registry=default_registry()))
            injection.initialize()
        for rows in (1, 3) if report.small else (1, 8, 24):
            try:
                _time_ticks(report, f"slots {label} B{rows}", model, mimi, rows)
            except torch.OutOfMemoryError:
                report.figure(f"slots {label} B{rows}", result="out of memory")
            report.free()
        if injection is not None:
            injection.remove()


def _fill_codebooks(mimi: Any) -> None:
    """Entries for the codebooks of a codec without weights: they are buffers, and start as zeros."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("cluster_usage"):
            buffer.fill_(1.0)


def _time_ticks(report: Report, label: str, model: Any, mimi: Any, rows: int) -> None:
    count = 4 if report.small else 96
    times: list[float] = []
    with Slots(model, mimi, rows) as slots:
        slots.warm_up()
        for row in range(rows):
            slots.join(row, SlotSettings(seed=row))
        frames = {row: _frame(row, 0, slots.frame_size) for row in range(rows)}
        for _ in range(4):
            slots.tick(frames)
        for _ in range(count):
            times.append(_milliseconds(report, lambda: slots.tick(frames)))
        saved = slots.save_row(0, "memory")
        between = {
            "stats ms": _milliseconds(report, lambda: slots.stats(0)),
            "save memory ms": _milliseconds(report, lambda: slots.save_row(0, "memory")),
            "join ms": _milliseconds(report, lambda: slots.join(0, SlotSettings(seed=1), saved)),
        }
    times.sort()
    report.figure(
        label, **{"tick p50 ms": statistics.median(times), "tick p95 ms": times[int(0.95 * (count - 1))],
                  "times real time": 80 / times[int(0.95 * (count - 1))], **between},
    )  # fmt: skip


def _milliseconds(report: Report, call: Any) -> float:
    report.synchronize()
    began = time.perf_counter()
    call()
    report.synchronize()
    return 1e3 * (time.perf_counter() - began)
