"""What a frame costs: a ratio within one process, and the memory that ``explain`` predicts."""

from __future__ import annotations

from study.cost import measure
from tests.unit.evaluation.conftest import model_with


def test_cost_is_against_the_base_model_and_changes_nothing():
    base, linear = model_with(None), model_with("ttt_linear", name="ttt")
    before = {name: tensor.clone() for name, tensor in linear.model.state_dict().items()}
    costs = measure([base, linear], rounds=2, frames=4)
    assert costs["base"].step_ratio == 1.0
    assert costs["base"].state_bytes == 0
    assert costs["ttt"].step_ratio > 0
    (block,) = linear.injection.blocks.values()
    assert costs["ttt"].state_bytes == block.state_bytes()
    assert not linear.model.is_streaming
    assert all((tensor == before[name]).all() for name, tensor in linear.model.state_dict().items())
