"""In-place TTT: what updates that correct cost beside the published one, streamed and trained, behind a gate.

    python benchmarks/in_place_updates.py [--rows 1 8] [--chunks 40] [--threads 1]

One block at width 1024, hidden width 2816, float32. ``hebbian``, ``gradient`` and ``ridge`` (the last two with unit
keys and the success gate, as shipped) take turns at every step: by tensor operations, and compiled for the CPU. The
gate compares each stream with one call of the same block; ``moshi-ttt verify`` compares that with the definition.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from gating_mlp import DIM, HIDDEN, PlainMLP
from gating_mlp_streaming import show, stream, timed
from torch import nn

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig

CHUNK, TOKENS = 16, 256
SHIPPED: dict[str, Any] = {
    "lr": 1.0, "learned_lr": True, "keys": "unit", "target_norm": True, "read_scale": 8.0, "success_gate": True,
}  # fmt: skip
UPDATES: dict[str, dict[str, Any]] = {
    "hebbian": {"lr": 0.1},
    "gradient": {"update": "gradient", **SHIPPED, "lr": 0.05},
    "ridge": {"update": "ridge", **SHIPPED},
}


def build(mlp: PlainMLP, options: dict[str, Any], *, compiled: bool = False) -> GatingMLP:
    dtype = mlp.linear_out.weight.dtype
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=mlp.linear_out.out_features, num_heads=1, device=torch.device("cpu"),
        dtype=dtype, format=SequenceFormat(), mlp=mlp,
    )  # fmt: skip
    block = GatingMLP(GatingMLPConfig(chunk=CHUNK, **options), info, FP32_STATE.roles(dtype))
    block.reset_parameters(torch.Generator().manual_seed(0))
    nn.init.normal_(block.conv, std=0.1)
    block.use_backend("step", "cpp" if compiled else "torch")
    return block


def gate(options: dict[str, Any], *, compiled: bool) -> float:
    """Largest float64 error of a stream against one call."""
    torch.manual_seed(0)
    block, x = build(PlainMLP(8, 12, torch.float64), options, compiled=compiled), torch.randn(2, 53, 8).double()
    with torch.no_grad():
        whole, _ = block(x, None, BlockContext(input_embeddings=x))
        return float((stream(block, x) - whole).abs().max())


def measure_steps(mlp: PlainMLP, rows: int, chunks: int, *, compiled: bool) -> dict[str, Any]:
    inputs = torch.randn(64, rows, 1, DIM)
    contexts = [BlockContext(input_embeddings=x) for x in inputs]
    blocks = {name: build(mlp, options, compiled=compiled) for name, options in UPDATES.items()}
    states = {name: block.allocate_state(rows) for name, block in blocks.items()}

    def step(name: str) -> Callable[[int], object]:
        return lambda number: blocks[name].step(inputs[number % 64], states[name], contexts[number % 64])

    calls: dict[str, Callable[[int], object]] = {"plain MLP": lambda number: mlp(inputs[number % 64])}
    times = timed(calls | {name: step(name) for name in UPDATES}, chunks * CHUNK, warm_up=4 * CHUNK)
    middle = {name: statistics.median(each) for name, each in times.items()}
    found: dict[str, Any] = {"step": "compiled" if compiled else "tensor operations", "rows": rows}
    found |= {f"{name} (ms)": round(value, 3) for name, value in middle.items()}
    for name in UPDATES:
        found[f"{name} / plain"] = round(middle[name] / middle["plain MLP"], 2)
        found[f"{name} p99 / median"] = round(statistics.quantiles(times[name], n=100)[98] / middle[name], 2)
    return found


def measure_training(mlp: PlainMLP, rows: int) -> dict[str, Any]:
    x = torch.randn(rows, TOKENS, DIM)
    blocks = {name: build(mlp, options) for name, options in UPDATES.items()}

    def train(name: str) -> Callable[[int], object]:
        def call(_: int) -> None:
            y, _state = blocks[name](x, None, BlockContext(input_embeddings=x, want_state=False))
            y.square().mean().backward()

        return call

    times = timed({"plain MLP": lambda _: mlp(x).square().mean().backward()} | {n: train(n) for n in UPDATES}, 6, 2)
    middle = {name: statistics.median(each) for name, each in times.items()}
    found: dict[str, Any] = {"training": f"{TOKENS} tokens", "rows": rows}
    found |= {f"{name} (ms)": round(value, 1) for name, value in middle.items()}
    return found | {f"{name} / plain": round(middle[name] / middle["plain MLP"], 2) for name in UPDATES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunks", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, chosen in UPDATES.items():
        for compiled in (False, True):
            if not (error := gate(chosen, compiled=compiled)) < 1e-10:
                print(f"{name}, {'compiled' if compiled else 'tensor operations'}: the stream is off by {error:.2g}")
                return 1
    mlp = PlainMLP(DIM, HIDDEN, torch.float32)
    for rows in options.rows:
        with torch.no_grad():
            for compiled in (False, True):
                show(measure_steps(mlp, rows, options.chunks, compiled=compiled))
        show(measure_training(mlp, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
