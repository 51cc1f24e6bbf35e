"""``benchmarks/run.py`` on made-up suites: a red gate, the check, and a baseline that is written."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from tests.project import ROOT


@pytest.fixture
def bench(benchmark_module):
    return benchmark_module("bench.measure")


@pytest.fixture
def program(benchmark_module, monkeypatch, bench):
    """``run.py`` with one suite, whose form takes ``program.times[0]`` of its reference at the first measurement."""
    run = benchmark_module("run")
    run.times, run.error = [1.0], 0.0

    @contextmanager
    def opened(size):
        gates = [bench.Gate(name="made up", error=run.error, tolerance=1e-10)]
        forms = {"mine": lambda: None, "theirs": lambda: None}
        yield gates, lambda: [bench.Comparison(name="both", forms=forms, reference="theirs")]

    def measure(comparison, *, rounds):
        ratio = run.times.pop(0) if len(run.times) > 1 else run.times[0]
        spread = bench.Spread(median=ratio, low=ratio, high=ratio)
        return bench.Measured(
            comparison=comparison, ratios={"mine": spread}, milliseconds=dict.fromkeys(comparison.forms, spread),
            peak_bytes=dict.fromkeys(comparison.forms, 2**20),
        )  # fmt: skip

    monkeypatch.setattr(run, "SUITES", {"made-up": opened})
    monkeypatch.setattr(run, "measure", measure)
    return run


def test_a_red_gate_ends_with_exit_code_1_and_no_time(program, capsys, tmp_path):
    program.error = 1e-3
    assert program.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "gate: made up: 1.0e-03, allowed below 1e-10" in said
    assert "The gate is red, and no time is printed: made up." in said
    assert "mine" not in said
    assert not (tmp_path / "out").exists()


def test_a_red_gate_writes_no_baseline(program, tmp_path):
    program.error = float("nan")
    assert program.main(["--write-baseline", "--baseline", str(tmp_path / "b.json")]) == 1
    assert not (tmp_path / "b.json").exists()


def test_a_run_is_checked_against_its_own_baseline(program, tmp_path, capsys):
    baseline = ["--baseline", str(tmp_path / "b.json")]
    assert program.main(["--write-baseline", *baseline]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["ratios"]["both: mine / theirs"]["median"] == 1.0
    assert program.main(["--check", *baseline]) == 0
    assert "1 ratios are at most 20% larger" in capsys.readouterr().out
    program.times = [1.3]
    assert program.main(["--check", *baseline]) == 1
    said = capsys.readouterr().out
    assert "both: mine / theirs: 1.300 (1.300 to 1.300), and the baseline is 1.000: +30%" in said
    assert "1 ratio(s) differ from the baseline." in said


def test_a_ratio_that_is_too_large_once_is_measured_again(program, tmp_path, capsys):
    baseline = ["--baseline", str(tmp_path / "b.json")]
    program.main(["--write-baseline", *baseline])
    program.times = [1.3, 1.1]
    assert program.main(["--check", *baseline]) == 0
    assert "measured once more" in capsys.readouterr().out


def test_without_a_baseline_the_check_is_refused(program, tmp_path, capsys):
    assert program.main(["--check", "--baseline", str(tmp_path / "none.json")]) == 2
    assert "There is no baseline" in capsys.readouterr().out


def test_a_run_of_other_threads_is_refused(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program.torch, "set_num_threads", lambda threads: None)
    baseline = ["--baseline", str(tmp_path / "b.json")]
    program.main(["--write-baseline", *baseline])
    assert program.main(["--check", "--threads", "2", *baseline]) == 2
    assert "Run with --threads 1" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--only", "nothing"], ["--check", "--write-baseline"], ["--size", "huge"]])
def test_what_means_nothing_is_refused(program, given):
    with pytest.raises(SystemExit) as ended:
        program.main(given)
    assert ended.value.code == 2


def test_a_part_is_no_baseline(program):
    with pytest.raises(SystemExit):
        program.main(["--only", "made-up", "--write-baseline"])


def test_a_folder_with_a_report_and_figures_is_written(program, tmp_path):
    out = tmp_path / "out"
    assert program.main(["--out", str(out)]) == 0
    report = (out / "report.md").read_text()
    assert "| both | mine | 1.000 | 1.000 (1.000 to 1.000) | 1.00 |" in report
    assert (out / "ratios.png").stat().st_size > 1_000
    (comparison,) = json.loads((out / "metrics.json").read_text())["comparisons"]
    assert comparison["ratios"] == {"mine": {"median": 1.0, "low": 1.0, "high": 1.0}}
    assert program.main(["--out", str(out)]) == 2, "an earlier result is not replaced without --overwrite"


def test_the_stored_baseline_is_of_the_sizes_that_make_bench_runs(benchmark_module):
    path = ROOT / "benchmarks" / "baseline.json"
    if not path.is_file():
        pytest.skip("no baseline is stored; make bench-baseline measures one")
    setting, ratios = benchmark_module("bench.check").read_baseline(path)
    assert (setting.size, setting.threads) == ("small", 1)
    assert len(ratios) > 40
    assert all(0 < each.low <= each.median <= each.high for each in ratios.values())
