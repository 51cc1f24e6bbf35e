"""Random configurations and schedules against the definition. ``make fuzz`` draws ten times as many, at random."""

from __future__ import annotations

from hypothesis import example, given, note, settings

from tests.fuzz.cases import Configuration, Layer
from tests.fuzz.rerun import command, run
from tests.fuzz.strategies import (
    cancelling_configurations,
    cancelling_schedules,
    configurations,
    host_schedules,
    schedules,
    spoiled_tokens,
)

DRAWN = settings().max_examples
"""By the profile, see ``conftest.py``."""
FIXED_GATE = Layer(options={"variant": "ttt_linear", "chunk": 1, "gate": {"alpha": "fixed", "init": 0.05}}, width=2)


@example(case=Configuration(layer=FIXED_GATE, learns=(True,), length=1, changed=1))  # was rounded to float32: 1.5e-8
@given(case=configurations())
def test_configurations(case):
    note(command(case))
    run(case)


@settings(max_examples=DRAWN * 2 // 5)
@given(case=schedules())
def test_schedules(case):
    note(command(case))
    run(case)


@settings(max_examples=DRAWN // 5)
@given(case=host_schedules())
def test_host_schedules(case):
    note(command(case))
    run(case)


@settings(max_examples=DRAWN // 5)
@given(case=spoiled_tokens())
def test_spoiled_tokens(case):
    note(command(case))
    run(case)


@settings(max_examples=DRAWN // 5)
@given(case=cancelling_configurations())
def test_cancelling_updates(case):
    note(command(case))
    run(case)


@settings(max_examples=DRAWN // 5)
@given(case=cancelling_schedules())
def test_cancelling_updates_in_a_stream(case):
    note(command(case))
    run(case)
