"""Slots that remember what each of their streams heard and gave, and the same stream alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moshi_ttt.hosts.moshi.slots import SlotOutput, SlotSettings


@dataclass
class Recording:
    """One stream: from a join to the next join, or to its end."""

    row: int
    settings: SlotSettings
    state: object
    frames: list = field(default_factory=list)
    outputs: list = field(default_factory=list)


class RecordingSlots:
    def __init__(self, slots):
        self.slots, self.streams, self.current = slots, [], {}

    def __getattr__(self, name):
        return getattr(self.slots, name)

    def join(self, row, settings, state=None):
        self.slots.join(row, settings, state)
        self.current[row] = Recording(row, settings, state)
        self.streams.append(self.current[row])

    def tick(self, frames):
        outputs = self.slots.tick(frames)
        for row, frame in frames.items():
            self.current[row].frames.append(frame.clone())
            if outputs[row] is not None:
                self.current[row].outputs.append(outputs[row])
        return outputs

    def of_seed(self, seed):
        (found,) = [stream for stream in self.streams if stream.settings.seed == seed]
        return found


def alone(slots, stream: Recording, row=0) -> list[SlotOutput]:
    """What the stream's frames give in the same number of slots, with nobody else there."""
    slots.join(row, stream.settings, stream.state)
    outputs = [output for frame in stream.frames if (output := slots.tick({row: frame})[row]) is not None]
    slots.leave(row)
    return outputs


def equal(one: list[SlotOutput], other: list[SlotOutput]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.pcm, b.pcm) for a, b in zip(one, other, strict=True)
    )
