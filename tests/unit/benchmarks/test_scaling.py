"""``benchmarks/scaling.py``: what it divides, what it refuses, and one run at the smallest sizes."""

from __future__ import annotations

import json

import pytest
import torch

from moshi_ttt.core.state import clone


@pytest.fixture
def scaling(benchmark_module):
    return benchmark_module("scaling")


def state(rows: int, numbers: int) -> dict[str, torch.Tensor]:
    return {"position": torch.zeros(rows, dtype=torch.int64), "weight.0": torch.zeros(rows, numbers)}


def test_the_median_of_each_size_is_divided_by_that_of_the_first(scaling):
    taken = {500: iter([9.0, 2e-6, 3e-6, 1e-6]), 5000: iter([1e-6, 9e-6, 3e-6])}
    sizes = {size: lambda each=each: (next(each), state(2, 6)) for size, each in taken.items()}
    first, second = scaling.measured("made up", "T", sizes, 3)
    assert first == {
        "what": "made up", "T": 500, "us a token and row": 2.0, "over the first": 1.0, "state KiB a row": 0.0,
    }  # fmt: skip
    assert (second["T"], second["us a token and row"], second["over the first"]) == (5000, 3.0, 1.5)


def test_rows_share_nothing_of_the_state(scaling):
    sizes = {rows: lambda rows=rows: (1e-6, state(rows, 254)) for rows in (1, 4)}
    assert [each["state KiB a row"] for each in scaling.measured("made up", "B", sizes, 1)] == [1.0, 1.0]


def test_a_state_that_grows_is_refused(scaling):
    sizes = {length: lambda length=length: (1e-6, state(1, length)) for length in (10, 20)}
    with pytest.raises(scaling.SizeError, match="made up: the state's bytes of a row differ"):
        scaling.measured("made up", "T", sizes, 1)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_gate_is_green_and_sees_a_state_that_is_not_carried(scaling, monkeypatch, kind):
    assert scaling.gate(kind, "torch") < scaling.TOLERANCE
    call, step = scaling.FORMS["torch"]

    def forgets(tokens, before, *given, **options):
        y, after = call(tokens, before, *given, **options)
        return y, {**after, "weight.0": before["weight.0"]}

    def wrong_step(token, now, *given):
        earlier = clone(now)
        y = step(token, now, *given)
        now["weight.0"].copy_(earlier["weight.0"])
        return y

    for broken in ((forgets, step), (call, wrong_step)):
        monkeypatch.setitem(scaling.FORMS, "torch", broken)
        assert scaling.gate(kind, "torch") > 1e-6


def test_every_way_runs_over_both_axes(scaling, tmp_path, capsys):
    given = (
        "--tokens 20 33 --rows 1 2 --tokens-of-rows 20 --heads 2 --width 8 --segment 16 --window 4 --longest-call 20 "
        f"--form torch --rounds 1 --cpu-seconds --threads {torch.get_num_threads()} --json {tmp_path / 'found.json'}"
    )
    scaling.main(given.split())
    found = json.loads((tmp_path / "found.json").read_text())
    names = [(row["what"], row.get("T", row.get("B"))) for row in found["rows"]]
    for kind in ("linear", "mlp"):
        # Calls over T end at the longest one.
        assert [size for what, size in names if what == f"{kind}, a call with gradients"] == [20, 1, 2]
        assert [size for what, size in names if what == f"{kind}, segments"] == [20, 33, 1, 2]
        assert [size for what, size in names if what == f"{kind}, steps"] == [20, 33, 1, 2]
    assert all(row["us a token and row"] > 0 for row in found["rows"])
    assert "gate linear" in capsys.readouterr().out


def test_no_time_is_printed_behind_a_red_gate(scaling, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "gate", lambda *_: 1.0)
    with pytest.raises(SystemExit, match="The gate is red"):
        scaling.main(["--threads", str(torch.get_num_threads())])
    assert "us a token" not in capsys.readouterr().out
