"""Does hearing the future help a layer that learns at test time? One direction against two, in a denoiser.

    python benchmarks/bidirectional.py [--seeds 0 1 2] [--steps 300]

The host has no cause to be causal: it hears a made-up recording whole. It is trained first and frozen; then TTT-MLP in
every layer is trained on top: causal, hearing its own chunk whole, and in both directions (the same weights run over
the reversed sequence, with a gate of their own). What is reported is the held-out error over the base model's.

Gate: with the blocks removed the base model's error is what it was, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.hosts.audio.losses import denoising_loss

CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "hears its chunk whole": {"causal": False},
    "bidirectional": {"bidirectional": True},
}
HELD_OUT = 10_000_000
"""The first seed of held-out recordings, beyond every seed of training."""


def train(model: Any, parameters: Iterable[nn.Parameter], steps: int, first_seed: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        denoising_loss(model, batch=8, frames=128, seed=first_seed + step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def held_out(model: Any) -> float:
    return sum(float(denoising_loss(model, batch=16, frames=128, seed=HELD_OUT + n)) for n in range(8)) / 8


def errors(seed: int, steps: int) -> dict[str, float]:
    """Held-out error of each case over the base model's; of the blocks with their updates off too."""
    registry = default_registry()
    host = registry.host("audio")
    config: dict[str, Any] = {"host": {"name": "audio", "seed": seed}, "seed": seed}
    found = {}
    model: Any = host.load(parse_config({**config, "ttt": []}, registry=registry).host)
    train(model, model.parameters(), steps, first_seed=seed * 1_000_000)
    base = held_out(model)
    for name, options in CASES.items():
        entry = {"variant": "ttt_mlp", "layers": "all", "chunk": 16, "gate": {"init": 0.1}, **options}
        injection = inject(model, parse_config({**config, "ttt": [entry]}, registry=registry), registry=registry)
        injection.freeze_base()
        train(model, injection.parameters(), steps, first_seed=seed * 1_000_000 + 500_000)
        found[name] = held_out(model) / base
        with host.updates(model, False):
            found[f"{name}, updates off"] = held_out(model) / base
        injection.remove()
        if held_out(model) != base:
            sys.exit("gate: removing the blocks did not bring back the base model.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    by_seed = [errors(seed, arguments.steps) for seed in arguments.seeds]
    print("| held-out error over the base model's | mean | seeds |\n| --- | ---: | --- |")
    for name in by_seed[0]:
        values = [found[name] for found in by_seed]
        print(f"| {name} | {sum(values) / len(values):.4f} | {', '.join(f'{value:.4f}' for value in values)} |")


if __name__ == "__main__":
    main()
