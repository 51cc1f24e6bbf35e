"""The comparison with a stored baseline, on made-up results."""

from __future__ import annotations

import json

import pytest

NAME = "inner loop, training: written out / autograd"


@pytest.fixture
def check(benchmark_module):
    return benchmark_module("bench.check")


@pytest.fixture
def spread(benchmark_module):
    made = benchmark_module("bench.measure").Spread
    return lambda median: made(median=median, low=0.9 * median, high=1.1 * median)


@pytest.fixture
def setting(check):
    return check.Setting(size="small", threads=1, machine="Some CPU", torch="2.9.1")


@pytest.mark.parametrize("now", [0.5, 0.99, 1.0, 1.19, 1.2])
def test_a_ratio_up_to_20_percent_larger_is_no_problem(check, spread, now):
    assert check.problems({NAME: spread(now)}, {NAME: spread(1.0)}) == []


@pytest.mark.parametrize("now", [1.21, 3.0, float("nan"), float("inf")])
def test_a_ratio_more_than_20_percent_larger_is_a_problem(check, spread, now):
    (problem,) = check.problems({NAME: spread(now)}, {NAME: spread(1.0)})
    assert problem.startswith(f"{NAME}: {now:.3f}")
    assert "the baseline is 1.000" in problem
    assert "+20% is allowed" in problem
    assert "Look for the change that made it slower, or its reference faster; if it is intended" in problem
    assert problem.endswith("make a new baseline: make bench-baseline")


def test_the_message_has_the_change(check, spread):
    (problem,) = check.problems({NAME: spread(0.9)}, {NAME: spread(0.6)})
    assert ": +50%, and +20% is allowed" in problem


def test_a_ratio_without_a_baseline_is_a_problem(check, spread):
    (problem,) = check.problems({NAME: spread(1.0)}, {})
    assert problem == f"{NAME} has no baseline. Measure one on a quiet machine: make bench-baseline"


def test_a_ratio_that_was_not_measured_is_a_problem_of_a_complete_run(check, spread):
    (problem,) = check.problems({}, {NAME: spread(1.0)})
    assert problem.startswith(f"{NAME} is in the baseline and was not measured.")
    assert check.problems({}, {NAME: spread(1.0)}, complete=False) == []


def test_a_ratio_that_is_much_smaller_is_told_and_is_no_problem(check, spread):
    now, then = {NAME: spread(0.7)}, {NAME: spread(1.0)}
    assert check.problems(now, then) == []
    (line,) = check.faster(now, then)
    assert ": -30%. Make a new baseline" in line
    assert check.faster({NAME: spread(0.81)}, then) == []


def test_a_baseline_is_read_as_it_was_written(check, spread, setting, tmp_path):
    path = tmp_path / "baseline.json"
    check.write_baseline(path, setting, {NAME: spread(1.25)})
    found, ratios = check.read_baseline(path)
    assert found == setting
    assert ratios == {NAME: spread(1.25)}
    assert json.loads(path.read_text())["made_by"] == "make bench-baseline"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"size": "small"}', '{"ratios": {"a": {"median": 1}}}', "{"])
def test_what_is_no_baseline_is_refused(check, tmp_path, content):
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(check.BaselineError, match="is no baseline"):
        check.read_baseline(path)


def test_a_missing_baseline_says_how_to_make_one(check, tmp_path):
    with pytest.raises(check.BaselineError, match=r"There is no baseline at .*: make bench-baseline"):
        check.read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize(("change", "name"), [({"size": "smoke"}, "--size"), ({"threads": 2}, "--threads")])
def test_another_setting_is_refused(check, setting, change, name):
    other = check.Setting(**{**vars(setting), **change})
    with pytest.raises(check.BaselineError, match=name):
        check.refuse_other_setting(other, setting)


def test_another_machine_and_torch_are_allowed(check, setting):
    check.refuse_other_setting(check.Setting(**{**vars(setting), "machine": "Other", "torch": "2.6.0"}), setting)
