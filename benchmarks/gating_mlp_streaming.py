"""Streaming cost of in-place TTT, behind a correctness gate.

    python benchmarks/gating_mlp_streaming.py [--rows 1 8] [--chunks 20] [--hour] [--backend auto] [--json FILE]

One block at width 1024, hidden width 2816, chunks of 256, float32. These calls take turns at every step: the plain MLP;
the plain MLP and one read of what a step reads of each row's state, as matrix products of one row; the step, by tensor
operations, then, in another round, as it is by default (``backend: auto``, which is named). The read is given twice: of
the accumulated update alone, and with the last finished chunk, which the state keeps factored.

``--hour`` streams 45,000 tokens (an hour at 12.5 a second) and compares the last thousand steps with the first, by
default or by the backend that ``--backend`` names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gating_mlp import CHUNK, DIM, HIDDEN, PlainMLP, build
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moshi_ttt.core.block import BlockContext
from moshi_ttt.plugins.common.backends import BackendName
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.naive import naive_in_place
from moshi_ttt.system.platforms import peak_memory

HOUR = 45_000


def stream(block: GatingMLP, x: Tensor) -> Tensor:
    """``x [B, T, d]`` token by token."""
    state = block.allocate_state(x.shape[0])
    return torch.cat([block.step(t, state, BlockContext(input_embeddings=t)) for t in x.split(1, 1)], dim=1)


def gate(backend: BackendName) -> float:
    """Largest float64 error of a stream by a backend against the definition."""
    torch.manual_seed(0)
    mlp = PlainMLP(8, 12, torch.float64)
    block = build(mlp, 8, 5, torch.float64)
    block.use_backend("step", backend)
    x, rate = torch.randn(2, 23, 8, dtype=torch.float64), torch.full((23,), 0.1, dtype=torch.float64)
    hidden, left = mlp.hidden(x), ops.left_padding(5, "centered")
    weights = mlp.linear_out.weight, block.conv[:, 0], block.projection
    expected = [
        naive_in_place(h, t, *weights, rate, chunk_size=5, left=left)[0] for h, t in zip(hidden, x, strict=True)
    ]
    return float((stream(block, x) - torch.stack(expected)).abs().max())


def full_size_gate(block: GatingMLP) -> float:
    """Largest float32 error of a stream against one call, at full size, over two chunks."""
    x = torch.randn(1, 2 * CHUNK + 9, DIM)
    whole, _ = block(x, None, BlockContext(input_embeddings=x))
    return float((stream(block, x) - whole).abs().max() / whole.abs().max().clamp(min=1))


def measured_bytes(allocate: Callable[[], object]) -> int:
    """Bytes that are allocated and still held after the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = allocate()
    events = profiler.profiler.kineto_results.events()
    del held
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def timed(calls: dict[str, Callable[[int], object]], steps: int, warm_up: int = 50) -> dict[str, list[float]]:
    """Milliseconds of each call, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for step in range(steps + warm_up):
        for name, call in calls.items():
            start = time.perf_counter()
            call(step)
            if step >= warm_up:
                times[name].append(1_000 * (time.perf_counter() - start))
    return times


def measure_steps(block: GatingMLP, mlp: PlainMLP, rows: int, chunks: int) -> dict[str, Any]:
    state = block.allocate_state(rows)
    inputs = torch.randn(64, rows, 1, DIM)
    contexts = [BlockContext(input_embeddings=x, exec_mask=torch.ones(rows, dtype=torch.bool)) for x in inputs]
    query, weights = torch.randn(rows, 1, HIDDEN), torch.randn(rows, 1, CHUNK)
    delta, keys, values = state["delta"][:, :-1], state["keys"][:, :CHUNK].mT, state["values"][:, :CHUNK]

    def with_update(step: int) -> None:
        mlp(inputs[step % 64])
        torch.bmm(query, delta)

    def with_state(step: int) -> None:
        with_update(step)
        torch.bmm(query, keys)
        torch.bmm(weights, values)

    calls: dict[str, Callable[[int], object]] = {
        "plain": lambda step: mlp(inputs[step % 64]),
        "plain + read of the update": with_update,
        "plain + read of the state": with_state,
        "step": lambda step: block.step(inputs[step % 64], state, contexts[step % 64]),
    }
    times = timed(calls, chunks * CHUNK)
    middle = {name: statistics.median(each) for name, each in times.items()}
    predicted = block.state_bytes()
    return {
        "rows": rows,
        **{f"{name} (ms)": round(value, 3) for name, value in middle.items()},
        **{f"step / {name}": round(middle["step"] / middle[name], 2) for name in middle if name != "step"},
        "p99 / median": round(statistics.quantiles(times["step"], n=100)[98] / middle["step"], 2),
        "state (MiB a row)": round(predicted / 2**20, 2),
        "measured / predicted": round(measured_bytes(lambda: block.allocate_state(rows)) / rows / predicted, 3),
    }


def measure_history(mlp: PlainMLP, rows: int, step_ms: float) -> list[dict[str, Any]]:
    """The plain MLP and an update of n tokens kept factored, beside the measured step."""
    found = []
    for tokens in (256, 512, 768, 1024, 2048, 4096):
        keys, values = torch.randn(rows, tokens, HIDDEN), torch.randn(rows, tokens, DIM)
        x, query = torch.randn(rows, 1, DIM), torch.randn(rows, 1, HIDDEN)

        def factored(step: int, x=x, query=query, keys=keys, values=values) -> Tensor:
            return mlp(x) + torch.bmm(torch.bmm(query, keys.mT), values)

        times = timed({"plain": lambda step, x=x: mlp(x), "factored": factored}, 60, 10)
        plain, each = statistics.median(times["plain"]), statistics.median(times["factored"])
        mebibytes = 4 * tokens * (HIDDEN + DIM) / 2**20
        found.append(
            {
                "rows": rows,
                "history": tokens,
                "factored / plain": round(each / plain, 2),
                "step / plain": round(step_ms / plain, 2),
                "factored (MiB a row)": round(mebibytes, 1),
            }
        )
    return found


def measure_hour(block: GatingMLP) -> dict[str, Any]:
    state = block.allocate_state(1)
    inputs = torch.randn(1_000, 1, 1, DIM)
    contexts = [BlockContext(input_embeddings=x) for x in inputs]
    times, resident = [], []
    for step in range(HOUR):
        start = time.perf_counter()
        y = block.step(inputs[step % 1_000], state, contexts[step % 1_000])
        times.append(1_000 * (time.perf_counter() - start))
        if step in (999, HOUR - 1):
            resident.append((peak_memory() or 0) / 2**20)
    finite = all(bool(t.isfinite().all()) for t in [y, *state.values()])
    return {
        "steps": HOUR,
        "first thousand (ms)": round(statistics.median(times[:1_000]), 3),
        "last thousand (ms)": round(statistics.median(times[-1_000:]), 3),
        "p99 / median": round(statistics.quantiles(times, n=100)[98] / statistics.median(times), 2),
        "peak resident after a thousand steps (MiB)": round(resident[0], 1),
        "peak resident at the end (MiB)": round(resident[1], 1),
        "all finite": finite,
        "updates skipped": int(state["skipped"].sum()),
        "norm of the update / norm of W_0": round(float(block.drift(state)[0]), 4),
    }


def show(figures: dict[str, Any]) -> None:
    print("  ".join(f"{name} {value}" for name, value in figures.items()), flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--hour", action="store_true", help="stream an hour instead")
    parser.add_argument("--backend", choices=("auto", "torch", "cpp"), default="auto", help="of the hour's steps")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    mlp = PlainMLP(DIM, HIDDEN, torch.float32)
    blocks: dict[str, GatingMLP] = {}
    for asked in (arguments.backend,) if arguments.hour else ("torch", "auto"):
        block = build(mlp, DIM, CHUNK, torch.float32)
        block.use_backend("step", asked)
        (taken,) = block.backends_in_use()["step"]
        name = f"the default, {taken}" if asked == "auto" else taken
        blocks[name] = block
        worst, large = gate(taken), full_size_gate(block)
        print(f"gate, {name}: largest error against the definition {worst:.1e} (float64), ", end="")
        print(f"against one call {large:.1e} (float32)")
        if not (worst < 1e-10 and large < 1e-5):
            sys.exit("The gate is red: no time is printed.")
    figures: list[dict[str, Any]] = []
    if arguments.hour:
        for name, block in blocks.items():
            figures.append({"of": name, **measure_hour(block)})
            show(figures[-1])
    else:
        for rows in arguments.rows:
            for name, block in blocks.items():
                figures.append({"of": name, **measure_steps(block, mlp, rows, arguments.chunks)})
                show(figures[-1])
            for line in measure_history(mlp, rows, figures[-1]["step (ms)"]):
                figures.append(line)
                show(line)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as handle:
            json.dump({"threads": arguments.threads, "torch": torch.__version__, "figures": figures}, handle, indent=2)


if __name__ == "__main__":
    main()
