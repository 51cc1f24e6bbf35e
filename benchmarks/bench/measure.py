"""Measuring forms of one computation against each other: processor time, taking turns, and peak memory.

What is counted is the time that this process computes, not the clock's, so that other work on the machine changes it
little. A ratio is between two calls of one round, which follow each other.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One check of correctness, which has to pass before anything is timed.

    Attributes:
        name: what is compared.
        error: the largest error found.
        tolerance: errors have to be below it.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """False for an error that is not a number, too."""
        return self.error < self.tolerance


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Forms of one computation, or one form at several sizes.

    Attributes:
        name: of the comparison, such as ``inner loop, training: mlp``.
        forms: label -> what is timed.
        reference: the label of the form that the others are divided by.
        axis: the sizes that labels stand for, where they are sizes; for the plot.
    """

    name: str
    forms: Mapping[str, Call]
    reference: str
    axis: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.reference in self.forms, self.name
        assert len(self.forms) > 1, self.name


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median=median, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A comparison that was measured.

    Attributes:
        ratios: label -> its time over the reference's, by round; the reference is not among them.
        milliseconds: label -> processor time of a call.
        peak_bytes: label -> the most that a call allocates at any moment.
    """

    comparison: Comparison
    ratios: Mapping[str, Spread]
    milliseconds: Mapping[str, Spread]
    peak_bytes: Mapping[str, int]

    def named(self) -> dict[str, Spread]:
        """The ratios by the names under which a baseline has them."""
        reference = self.comparison.reference
        return {f"{self.comparison.name}: {label} / {reference}": spread for label, spread in self.ratios.items()}


def measure(
    comparison: Comparison,
    *,
    rounds: int,
    seconds: float = 0.02,
    warm_up: int = 2,
    clock: Clock = time.process_time,
) -> Measured:
    """Time every form ``rounds`` times, taking turns.

    Args:
        rounds: how often each form has its turn.
        seconds: the least processor time of a turn; a quick form is called as often as that takes.
        warm_up: calls of each form before anything is counted.
        clock: counts seconds.
    """
    repeats = {label: _repeats(call, seconds, warm_up, clock) for label, call in comparison.forms.items()}
    times: dict[str, list[float]] = {label: [] for label in comparison.forms}
    order = list(comparison.forms.items())
    for number in range(rounds):
        for label, call in order if number % 2 else reversed(order):  # what warms a cache for whom changes sides
            began = clock()
            for _ in range(repeats[label]):
                call()
            times[label].append((clock() - began) / repeats[label])
    beside = times[comparison.reference]
    return Measured(
        comparison=comparison,
        ratios={
            label: Spread.of([mine / other for mine, other in zip(taken, beside, strict=True)])
            for label, taken in times.items()
            if label != comparison.reference
        },
        milliseconds={label: Spread.of([1_000 * each for each in taken]) for label, taken in times.items()},
        peak_bytes={label: allocated_peak(call) for label, call in comparison.forms.items()},
    )


def _repeats(call: Call, seconds: float, warm_up: int, clock: Clock) -> int:
    for _ in range(warm_up):
        call()
    began = clock()
    call()
    return max(1, math.ceil(seconds / max(clock() - began, 1e-6)))


def allocated_peak(call: Call) -> int:
    """The most bytes that a call has allocated at any moment beyond what was there, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = call()
    del held
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)
