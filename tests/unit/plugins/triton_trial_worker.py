"""Tries kernels in Triton's interpreter, and prints by how much they differ from float64 as JSON.

    TRITON_INTERPRET=1 python -m tests.unit.plugins.triton_trial_worker VARIANT OPERATION [wrong]

``wrong``: with a mistake in a kernel's result.
"""

from __future__ import annotations

import json
import sys

import torch

from moshi_ttt.core.testing import Shape
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.hybrid.backends import HybridUse
from moshi_ttt.plugins.hybrid.triton import train_layer, trial
from moshi_ttt.plugins.hybrid.triton.step_operations import operations

OPTIONS = {"ttt_linear": {}, "ttt_mlp": {"expansion": 1}, "ttt_multilayer": {"depth": 3, "expansion": 1}}


def use_of(variant: str) -> HybridUse:
    """Heads of 16 and chunks of 16, the least that the kernels take."""
    case = default_cases(variant, [{"chunk": 16, **OPTIONS[variant]}], shapes=(Shape(dim=32, heads=2, batch=2),))[0]
    block = case.block()
    return HybridUse(
        block.config, block.widths(block.config, 16), torch.device("cpu"), torch.float32, layer=type(block)
    )


def break_training() -> None:
    made = train_layer.chunks_of

    def mutated(*given):
        chunks = made(*given)
        backward = chunks.backward

        def wrong(*arguments):
            found = backward(*arguments)
            for part in found[0]:
                part.mul_(1.01)
            return found

        object.__setattr__(chunks, "backward", wrong)
        return chunks

    train_layer.chunks_of = mutated


def main() -> None:
    variant, operation, *wrong = sys.argv[1:]
    if wrong:
        break_training()
    operations()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad():
        found = trial.differences(use_of(variant), operation)
    print(json.dumps({**found, "same generator": bool(torch.equal(before, torch.get_rng_state()))}))


if __name__ == "__main__":
    main()
