"""How forms are timed: in turns, as ratios of one round, with a made-up clock."""

from __future__ import annotations

import pytest
import torch


class Clock:
    """A clock that only made-up calls move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float):
        given = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += given.pop(0) if len(given) > 1 else given[0]

        return call


@pytest.fixture
def bench(benchmark_module):
    return benchmark_module("bench.measure")


def test_ratios_are_between_calls_of_one_round(bench):
    clock = Clock()
    forms = {"fast": clock.taking("fast", 1.0), "slow": clock.taking("slow", 3.0)}
    comparison = bench.Comparison(name="both", forms=forms, reference="slow")
    found = bench.measure(comparison, rounds=4, seconds=0.5, warm_up=1, clock=clock)
    assert found.ratios == {"fast": bench.Spread(median=1 / 3, low=1 / 3, high=1 / 3)}
    assert found.milliseconds["slow"].median == 3_000.0
    assert found.named().keys() == {"both: fast / slow"}


def test_forms_take_turns_and_change_sides(bench):
    clock = Clock()
    forms = {name: clock.taking(name, 1.0) for name in "ab"}
    bench.measure(bench.Comparison(name="x", forms=forms, reference="a"), rounds=3, seconds=1, warm_up=0, clock=clock)
    assert "".join(clock.log[2:8]) == "baabba"


def test_a_quick_form_is_called_until_its_turn_is_long_enough(bench):
    clock = Clock()
    forms = {"quick": clock.taking("q", 0.25), "slow": clock.taking("s", 2.0)}
    comparison = bench.Comparison(name="x", forms=forms, reference="slow")
    found = bench.measure(comparison, rounds=1, seconds=1.0, warm_up=0, clock=clock)
    assert found.milliseconds["quick"].median == 250.0
    assert clock.log.count("q") == 1 + 4 + 1
    assert clock.log.count("s") == 1 + 1 + 1


def test_warm_up_calls_are_not_counted(bench):
    clock = Clock()
    forms = {"a": clock.taking("a", 100.0, 100.0, 1.0), "b": clock.taking("b", 1.0)}
    comparison = bench.Comparison(name="x", forms=forms, reference="b")
    found = bench.measure(comparison, rounds=2, seconds=1.0, warm_up=2, clock=clock)
    assert found.ratios["a"].high == 1.0


def test_a_spread_has_quartiles(bench):
    assert bench.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == bench.Spread(median=3.0, low=2.0, high=4.0)
    assert bench.Spread.of([2.0]) == bench.Spread(median=2.0, low=2.0, high=2.0)


def test_peak_memory_counts_what_lives_at_once(bench):
    def call() -> torch.Tensor:
        for _ in range(3):
            torch.ones(1024, 256)  # 1 MiB, freed at once
        kept = torch.ones(1024, 256)
        return torch.cat([kept, kept])  # 2 MiB beside it

    assert bench.allocated_peak(call) == 3 * 2**20
    assert bench.allocated_peak(lambda: None) == 0


@pytest.mark.parametrize(("error", "passed"), [(1e-12, True), (1e-10, False), (1.0, False), (float("nan"), False)])
def test_a_gate_passes_below_its_tolerance(bench, error, passed):
    assert bench.Gate(name="x", error=error, tolerance=1e-10).passed is passed
