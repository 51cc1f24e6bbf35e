"""Learning rates: defaults that train new blocks, a warning where one cannot, and logs of the rate that was used."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from moshi_ttt import default_registry
from moshi_ttt.configs.fit import OptimConfig
from moshi_ttt.training import plan_tables, planning
from moshi_ttt.training import run as running
from moshi_ttt.training.optimizer import advance, make_schedule, rates, reach, too_low

from .conftest import LORA, records


def test_blocks_added_to_a_fine_tuning_config_have_a_rate_that_trains_them():
    # moshi-finetune's own rate: 2,000 steps of it move a weight by 0.002, and blocks start at a scale of 0.02.
    found = rates(OptimConfig(lr=2e-6))
    assert found == {"ttt": 3e-4, "gates": 3e-3, "lora": 2e-6, "base": 2e-6}
    assert reach(found["ttt"], 2000) > 0.02


def test_a_higher_rate_is_every_groups_and_a_groups_own_rate_is_its_own():
    assert set(rates(OptimConfig(lr=1e-2)).values()) == {1e-2}
    own = {"ttt": 1e-6, "gates": 0.0, "lora": 0.5}
    assert rates(OptimConfig(lr=1e-5, lr_groups=own)) == {**own, "base": 1e-5}


@pytest.mark.parametrize(("group", "rate", "steps", "low"), [
    ("ttt", 2e-6, 2000, True), ("ttt", 1e-4, 2000, False), ("ttt", 3e-4, 20, True), ("ttt", 0.0, 2000, False),
    ("gates", 1e-5, 2000, True), ("gates", 1e-3, 2000, False), ("lora", 1e-9, 10, False), ("base", 1e-9, 10, False),
])  # fmt: skip
def test_a_rate_that_cannot_train_is_told(group, rate, steps, low):
    problem = too_low(OptimConfig(lr=1e-9, lr_groups={group: rate}), group, steps)
    assert (problem is not None) is low
    if problem is not None:
        assert f"optim.lr_groups.{group} to" in problem
        needed = float(problem.split(f"optim.lr_groups.{group} to ")[1].split()[0])
        assert too_low(OptimConfig(lr_groups={group: needed}), group, steps) is None, "its own advice is enough"


@pytest.mark.exhaustive  # two runs; what the plan says of them is tested above
def test_adamw_moves_a_parameter_by_no_more_than_the_plan_says(train, settings, tmp_path):
    from .conftest import adapter

    train(max_steps=1, optim={"lr": 0.0, "lr_groups": {"ttt": 0.0, "gates": 0.0}}, run_dir=str(tmp_path / "before"))
    train(max_steps=8, optim={"lr": 1e-3, "weight_decay": 0.0}, run_dir=str(tmp_path / "after"))
    before, after = (
        adapter(tmp_path / name / "checkpoints" / f"checkpoint_{steps:06d}")
        for name, steps in (("before", 1), ("after", 8))
    )
    moved = max(float((after[name] - before[name]).abs().max()) for name in before if "gate" not in name)
    # AdamW's step exceeds the rate a little in its first steps, where its two means remember differently.
    assert 0.1 * reach(1e-3, 8) < moved < 2 * reach(1e-3, 8)


def test_the_plan_and_the_run_show_rates_and_warn(settings, capsys):
    low = settings(optim={"lr": 1e-5, "lr_groups": {"ttt": 2e-6}}, max_steps=2)
    planned = planning.plan(low, default_registry(), ranks=1)
    found = {group.name: (group.learning_rate, group.reach) for group in planned.groups}
    assert found["ttt"] == (2e-6, pytest.approx(2e-6))
    assert found["frozen"] == (None, None)
    Console(width=160).print(plan_tables.render(planned))
    shown = capsys.readouterr().out
    assert "Warning: the learning rate of ttt, 2e-06, moves a parameter by 2e-06 at most in 2 steps" in shown
    running.run(low, default_registry(), Console(width=500))
    assert "Warning: the learning rate of ttt, 2e-06" in capsys.readouterr().out
    fine = planning.plan(settings(optim={"lr": 1e-3}, max_steps=2000), default_registry(), ranks=1)
    assert fine.low_rates == ()


@pytest.mark.exhaustive  # the schedule itself is tested below
def test_logged_rates_are_those_of_the_step(train, tmp_path):
    train(max_steps=8, lora=LORA, optim={"lr": 1e-3, "pct_start": 0.25, "lr_groups": {"ttt": 2e-3}})
    logged = [record["learning_rates"] for record in records(tmp_path / "run")]
    # One cycle: from a 25th, along a cosine to the highest after 0.25 x 8 - 1 steps, down to a 10,000th of the start.
    assert logged[0]["lora"] == pytest.approx(1e-3 / 25)
    assert logged[0]["ttt"] == pytest.approx(2e-3 / 25)
    assert logged[1]["lora"] == pytest.approx(1e-3)
    middle = 1e-3 / 25 / 1e4 + (1e-3 - 1e-3 / 25 / 1e4) * (1 + math.cos(math.pi * 3 / 6)) / 2
    assert logged[4]["lora"] == pytest.approx(middle)
    assert logged[7]["lora"] == pytest.approx(1e-3 / 25 / 1e4)


def test_a_line_of_progress_says_how_far_and_how_fast(settings, capsys):
    running.run(settings(max_steps=3, log_freq=2, lora=LORA), default_registry(), Console(width=500))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2/3", "step 3/3"]
    for line in lines:
        for part in ("gradient norm ", "lr ttt ", " lora ", " s/step", " tokens/s", " left"):
            assert part in line, line
    assert lines[-1].endswith(" 0:00 left")


def test_the_cosine_schedule_rises_linearly_and_falls_to_a_tenth():
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 3.0}])
    schedule = make_schedule(optimizer, OptimConfig(schedule="cosine", pct_start=0.25), 20)
    found = []
    for _ in range(20):
        found.append(tuple(group["lr"] for group in optimizer.param_groups))
        advance(schedule, 1)
    for step, (first, second) in enumerate(found):
        share = min(1.0, (step + 1) / 6) * (0.55 + 0.45 * math.cos(math.pi * step / 20))
        assert first == pytest.approx(2 * share)
        assert second == pytest.approx(3 * share)
    assert found[-1][0] < 0.25
    again = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": 2.0}])
    resumed = make_schedule(again, OptimConfig(schedule="cosine", pct_start=0.25), 20)
    advance(resumed, 11)
    assert again.param_groups[0]["lr"] == found[11][0]
    assert again.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
