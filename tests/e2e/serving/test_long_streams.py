"""An hour of conversation through the real tiny model: what the process holds does not grow."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch

from moshi_ttt.apps.talker import SHIPPED_MEMORY, load_talker
from moshi_ttt.hosts.moshi.slots import Slots, SlotSettings
from moshi_ttt.hosts.moshi.tiny import speech_files

FRAME, RATE = 1920, 24_000
GROWTH_MIB = 16.0
"""Between the first window and any later one. A tensor of a row's memory that was kept for each frame would be more."""


def held():
    """MiB of this process's own memory, file descriptors and threads.

    Without pages of files, which the system takes away and gives back as others need memory.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["RssAnon"].split()[0]) / 1024
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def windows(frames, every):
    """``held`` after each ``every`` frames: two rows hear speech, are looked at, saved, left and joined again."""
    talker = load_talker("quickstart", SHIPPED_MEMORY)
    speech = np.concatenate([sphn.read(str(path), sample_rate=RATE)[0][0] for path in speech_files()])
    pieces = torch.from_numpy(speech.astype(np.float32)[: len(speech) // FRAME * FRAME]).view(-1, FRAME)
    seen = []
    with Slots(talker.model, talker.mimi, 2) as slots:
        slots.join(0, SlotSettings())
        slots.join(1, SlotSettings(seed=1))
        for number in range(1, frames + 1):
            slots.tick({0: pieces[number % len(pieces)], 1: pieces[7 * number % len(pieces)]})
            if number % 50 == 0:
                slots.stats(0)
            if number % 300 == 0:
                state = slots.save_row(1, "session")
                slots.leave(1)
                slots.join(1, SlotSettings(seed=number), state if number % 600 else None)
            if number % every == 0:
                seen.append(held())
                print(number, *(f"{value:g}" for value in seen[-1]), flush=True)
    return seen


def check(seen):
    (first, *later) = seen
    for resident, files, threads in later:
        assert resident - first[0] < GROWTH_MIB, seen
        assert files <= first[1], seen
        assert threads <= first[2], seen


@pytest.mark.exhaustive  # ten seconds; that a step grows nothing is check_long_stream's, for every variant
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here")
def test_what_is_held_does_not_grow_in_half_a_minute():
    check(windows(360, 120))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here")
def test_what_is_held_does_not_grow_in_an_hour():
    check(windows(45_000, 1_000))
