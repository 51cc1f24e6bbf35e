"""What wider keys cost a streamed step of ttt_ridge: processor time, cases taking turns. Behind the gate of ridge.py.

    python benchmarks/ridge_widths.py [--dim 128] [--steps 400] [--backend torch] [--json FILE]

One head, one stream, one thread, float32; by tensor operations, or by ``--backend cpp`` in C++. What is counted is the
thread's own time, not the clock's, and the median of the steps: a busy machine changes it little, though what others do
to the caches remains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ridge import STEPS, block_of, gate

from moshi_ttt.core.block import BlockContext

CASES: dict[str, dict[str, Any]] = {
    "keys of 128": {},
    "relu2, 256": {"features": "relu2", "key_width": 256},
    "relu2, 256, novelty": {"features": "relu2", "key_width": 256, "novelty": True},
    "relu2, 512": {"features": "relu2", "key_width": 512},
    "relu2, 2048": {"features": "relu2", "key_width": 2048},
}


@torch.no_grad()
def measure(dim: int, steps: int, backend: str, warm: int = 32) -> list[dict[str, Any]]:
    base = {"variant": "ttt_ridge", "chunk": 16, "heads": 1, "backend": backend}
    blocks = {name: block_of({**base, **options}, dim, 1, "cpu", torch.float32) for name, options in CASES.items()}
    states = {name: block.allocate_state(1) for name, block in blocks.items()}
    inputs = torch.randn(64, 1, 1, dim, generator=torch.Generator().manual_seed(0))
    contexts = [BlockContext(input_embeddings=x) for x in inputs]
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for step in range(steps + warm):
        for name, block in blocks.items():
            began = time.thread_time()
            block.step(inputs[step % 64], states[name], contexts[step % 64])
            times[name].append(1_000 * (time.thread_time() - began))
    medians = {name: statistics.median(each[warm:]) for name, each in times.items()}
    first = next(iter(medians.values()))
    return [
        {"case": name, "state, bytes": blocks[name].state_bytes(), "step, ms": round(middle, 3),
         "to the first": round(middle / first, 2)}
        for name, middle in medians.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128, help="width of the host")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--backend", choices=STEPS, default="torch", help="of the streamed step")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if (error := gate((options.backend,))) > 1e-10:
        sys.exit(f"Block and definition differ by {error:.2g} in float64: nothing is timed.")
    found = measure(options.dim, options.steps, options.backend)
    for row in found:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
