"""Training cost of in-place TTT beside the plain gated MLP, behind a correctness gate.

    python benchmarks/gating_mlp.py [--threads 2] [--json FILE]

Forward and backward (input and parameters) of one block at width 1024, hidden width 2816, 1,500 tokens in chunks of
256, float32, in a process that keeps the memory that it frees, as training does. The ratio is the median over
alternating pairs in this run. Memory is counted twice and compared with what one weight matrix per chunk would take:
what autograd keeps between forward and backward beyond the parameters, and the most that is allocated at any moment of
both (gradients included).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from bench.measure import allocated_peak
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from moshi_ttt.plugins.gating_mlp.naive import naive_in_place
from moshi_ttt.system.allocator import keep_freed_memory

DIM, HIDDEN, TOKENS, CHUNK = 1024, 2816, 1_500, 256
CONTEXT: dict[str, Any] = {"want_state": False}


class PlainMLP(nn.Module):
    """The host's gated MLP."""

    def __init__(self, dim: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_in = nn.Linear(dim, 2 * hidden, bias=False, dtype=dtype)
        self.linear_out = nn.Linear(hidden, dim, bias=False, dtype=dtype)
        self.activation = nn.functional.silu

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.linear_in(x).chunk(2, dim=-1)
        return self.activation(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_out(self.hidden(x))
        return out


def build(mlp: PlainMLP, dim: int, chunk: int, dtype: torch.dtype) -> GatingMLP:
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=dim, num_heads=1, device=torch.device("cpu"), dtype=dtype,
        format=SequenceFormat(), mlp=mlp,
    )  # fmt: skip
    block = GatingMLP(GatingMLPConfig(chunk=chunk, lr=0.1), info, FP32_STATE.roles(dtype))
    block.reset_parameters(torch.Generator().manual_seed(0))
    nn.init.normal_(block.conv, std=0.1)
    return block


def gate() -> float:
    """Largest float64 error of the block against the definition."""
    torch.manual_seed(0)
    mlp = PlainMLP(8, 12, torch.float64)
    block = build(mlp, 8, 5, torch.float64)
    x = torch.randn(1, 23, 8, dtype=torch.float64)
    with torch.no_grad():
        actual, _ = block(x, None, BlockContext(input_embeddings=x, **CONTEXT))
        rate = torch.full((23,), 0.1, dtype=torch.float64)
        expected, _ = naive_in_place(
            mlp.hidden(x)[0], x[0], mlp.linear_out.weight, block.conv[:, 0], block.projection, rate,
            chunk_size=5, left=ops.left_padding(5, "centered"),
        )  # fmt: skip
    return float((actual[0] - expected).abs().max())


def kept_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(storages.values())


def peak_bytes(forward: Callable[[], Tensor], leaves: Iterable[Tensor]) -> int:
    """The most that forward and backward have allocated at any moment, from the allocator's own events."""
    for leaf in leaves:
        leaf.grad = None
    return allocated_peak(lambda: forward().backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    worst = gate()
    print(f"gate: largest float64 error against the definition {worst:.1e}")
    if not worst < 1e-10:
        sys.exit("The gate is red: no time is printed.")
    torch.manual_seed(0)
    mlp = PlainMLP(DIM, HIDDEN, torch.float32)
    block = build(mlp, DIM, CHUNK, torch.float32)
    x = torch.randn(1, TOKENS, DIM, requires_grad=True)
    context = BlockContext(input_embeddings=torch.randn(1, TOKENS, DIM), **CONTEXT)

    def plain() -> Tensor:
        return mlp(x).square().mean()

    def in_place() -> Tensor:
        y: Tensor = block(x, None, context)[0]
        return y.square().mean()

    times: dict[str, list[float]] = {"plain": [], "in_place": []}
    for run in range(arguments.runs + 2):
        for name, forward in (("plain", plain), ("in_place", in_place)):
            start = time.perf_counter()
            forward().backward()
            if run >= 2:
                times[name].append(1_000 * (time.perf_counter() - start))
    parameters = [*mlp.parameters(), *block.parameters()]
    extra = kept_bytes(in_place, parameters) - kept_bytes(plain, parameters)
    peak = peak_bytes(in_place, [*parameters, x]) - peak_bytes(plain, [*parameters, x])
    weights = -(-TOKENS // CHUNK) * DIM * HIDDEN * 4
    figures = {
        "plain_ms": round(statistics.median(times["plain"]), 1),
        "in_place_ms": round(statistics.median(times["in_place"]), 1),
        "ratio": round(statistics.median(b / a for a, b in zip(times["plain"], times["in_place"], strict=True)), 3),
        "extra_kept_MiB": round(extra / 2**20, 1),
        "per_chunk_weights_MiB": round(weights / 2**20, 1),
        "extra_kept / per-chunk weights": round(extra / weights, 3),
        "extra_peak_MiB": round(peak / 2**20, 1),
        "extra_peak / per-chunk weights": round(peak / weights, 3),
    }
    print("  ".join(f"{key} {value}" for key, value in figures.items()))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as handle:
            json.dump({"threads": arguments.threads, "torch": torch.__version__, **figures}, handle, indent=2)


if __name__ == "__main__":
    main()
