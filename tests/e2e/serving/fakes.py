"""Slots without a model: an output is a function of what its row has heard, so a mixed-up row shows."""

from __future__ import annotations

import threading
import time

import torch

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.row_state import Origin, RowState
from moshi_ttt.hosts.moshi.slots import SiteStats, SlotOutput

ORIGIN = Origin(model={"kind": "fake"}, codec=None, adapter=None, variants={})


class FakeSlots:
    """Echoes each frame at the row's volume; the text token is 4 plus the frames that the row has heard.

    Attributes:
        heard: row -> sum of the samples since it was joined: the "memory".
        calls: (method, row) of everything that was called.
    """

    sample_rate, frame_size, frame_rate = 24_000, 1920, 12.5

    def __init__(self, count=2, tick_sec=0.0):
        self.count, self.tick_sec = count, tick_sec
        self.settings, self.frames, self.heard = {}, {}, {}
        self.calls, self.threads, self.ticks = [], set(), []
        self.broken = None

    def _call(self, name, row):
        self.threads.add(threading.get_ident())
        self.calls.append((name, row))
        if name != "join" and row not in self.settings:
            raise HostError(f"Nobody is in row {row}.")

    def join(self, row, settings, state=None):
        self._call("join", row)
        if state is not None and state.origin != ORIGIN:
            raise HostError("This memory cannot be continued here.")
        self.settings[row], self.frames[row] = settings, 0
        self.heard[row] = 0.0 if state is None else float(state.tensors["heard"])

    def leave(self, row):
        self._call("leave", row)
        del self.settings[row], self.frames[row], self.heard[row]

    def tick(self, frames):
        if self.broken is not None:
            raise self.broken
        self.threads.add(threading.get_ident())
        time.sleep(self.tick_sec)
        self.ticks.append(sorted(frames))
        out = {}
        for row, frame in frames.items():
            assert row in self.settings
            assert frame.shape == (self.frame_size,)
            assert frame.dtype == torch.float32
            assert bool(torch.isfinite(frame).all())
            self.frames[row] += 1
            self.heard[row] += float(frame.double().sum())
            token = 4 + self.frames[row]
            out[row] = None if self.frames[row] < 3 else SlotOutput(torch.tensor([token, *[0] * 8]), frame.clone())
        return out

    def set_updates(self, row, enabled):
        self._call("set_updates", row)

    def set_volume(self, row, volume):
        self._call("set_volume", row)
        if not 0 <= volume <= 2:
            raise HostError(f"volume is {volume}.")

    def forget(self, row):
        self._call("forget", row)
        self.heard[row] = 0.0

    def restart(self, row):
        self._call("restart", row)
        self.frames[row] = 0

    def save_row(self, row, kind):
        self._call("save_row", row)
        return fake_state(self.heard[row], kind)

    def stats(self, row):
        self._call("stats", row)
        moved = abs(self.heard[row])
        return [
            SiteStats(
                site="layers.1.sequence", variant="fake", moved=moved, inner_loss=float("nan"), start_loss=None,
                updates=self.frames[row], skipped=0,
            )
        ]  # fmt: skip


def fake_state(heard=0.0, kind="memory", values=0):
    tensors = {"heard": torch.tensor(heard, dtype=torch.float64)}
    if values:
        tensors["weights"] = torch.randn(values, generator=torch.Generator().manual_seed(0))
    return RowState(kind=kind, origin=ORIGIN, tensors=tensors)
