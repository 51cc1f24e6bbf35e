"""The table of docs/gpu.md is what a training step of Moshi 7B launches, and with the kernels that is little more."""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest

from tests.programs import load_script

SLACK = 0.05
"""How far below the table a figure may be."""
MOST = 1.2
"""Times LoRA's launches, of a step with three TTT-MLP blocks by kernels."""
MOST_WITH_HEALTH = 1.21
"""The same where health is measured in the step."""


COSTS = load_script("step_costs")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without Triton here")
KERNELS = [run for run in COSTS.RUNS if "triton" in run[0]]
QUICK = "LoRA and three ttt_mlp, chunk 16, triton"


@cache
def cost(name):
    (run,) = (run for run in COSTS.RUNS if run[0] == name)
    return COSTS.step_cost(COSTS.settings_of(run[1]), rows=COSTS.ROWS, frames=COSTS.FRAMES, carried=run[2])


def written():
    rows = COSTS.TABLE.rows()
    return {name: [float(figure.replace(",", "")) for figure in figures] for name, figures in rows.items()}


def test_the_table_has_every_run():
    assert list(written()) == [name for name, *_ in COSTS.RUNS]


@needs_triton
@pytest.mark.exhaustive  # ten seconds of a model of 7B shapes; test_device_costs.py counts a block with the kernels
@pytest.mark.parametrize(
    "name", [pytest.param(run[0], marks=() if run[0] == QUICK else pytest.mark.slow) for run in KERNELS]
)
def test_blocks_by_kernels_add_at_most_a_fifth_of_the_launches_of_lora(name):
    alone, found = cost("LoRA"), cost(name)
    assert found.launches <= MOST * alone.launches
    assert found.launches > alone.launches + 3 * 200  # the kernels are counted, one launch each
    assert found.launches + found.health <= MOST_WITH_HEALTH * alone.launches
    assert written()[name][4] == pytest.approx(found.launches / alone.launches, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(run[0], marks=needs_triton) for run in COSTS.RUNS])
def test_a_step_costs_what_the_table_says(name):
    found = cost(name)
    figures = (found.forward, found.backward, found.update, found.launches, None, found.health, found.peak / 2**30)
    for what, most, figure in zip(COSTS.HEADINGS[1:], written()[name], figures, strict=True):
        if figure is not None:
            assert figure <= most + 0.005, f"{what}: {figure}, and docs/gpu.md allows {most}"
            assert figure >= (1 - SLACK) * most - 1, f"{what}: {figure}, far below {most}: write the table anew"


@pytest.mark.exhaustive  # seconds of 7B shapes
def test_what_is_counted_beside_the_passes_is_of_the_optimizer_and_the_losses():
    settings = COSTS.settings_of(None, model="builtin:tiny")
    found = COSTS.step_cost(settings, rows=2, frames=20, carried=False)
    assert found.health == 0  # no block to measure
    assert 20 < found.update < 100  # lists of tensors, not one launch a tensor
    assert found.launches == found.forward + found.backward + found.update
