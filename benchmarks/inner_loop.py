"""Speed of the inner loop, training and streaming, each behind a correctness gate.

    python benchmarks/inner_loop.py [--threads 2] [--json FILE]

Training: forward and backward of the chunked form, beside the same arithmetic token by token (what a scan over tokens
costs) in the same run. Streaming: one step, by tensor operations and compiled, beside one read of each row's fast
weights (a ``bmm`` with one row), the least a step can cost. Ratios are medians within this run; a red gate prints no
time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import clone, num_bytes
from moshi_ttt.plugins.hybrid import inner_loop
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.compiled import compiled_inner_loop
from moshi_ttt.plugins.hybrid.fast_network import FastNetwork, key_pass
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop

TRAINING = (
    ("linear", 1, 8, 1024, 16, 64),
    ("mlp", 1, 8, 1024, 16, 64),
    ("linear", 1, 32, 512, 16, 128),
    ("mlp", 1, 32, 512, 16, 128),
)
STREAMING = (("linear", 1, 32, 128), ("mlp", 1, 32, 128), ("linear", 8, 32, 128), ("mlp", 8, 32, 128))


def widths(kind: str, dim: int) -> tuple[int, ...]:
    return (dim, dim) if kind == "linear" else (dim, 4 * dim, dim)


class Problem:
    def __init__(self, kind: str, batch: int, heads: int, length: int, chunk: int, dim: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.chunk, self.length, self.batch = chunk, length, batch
        q, k = (torch.nn.functional.normalize(random(batch, length, heads, dim), dim=-1) for _ in range(2))
        self.tokens = Tokens(q, k, random(batch, length, heads, dim), random(batch, length, heads).abs() / dim)
        self.norm = InnerNorm(1 + 0.1 * random(heads, dim), 0.1 * random(heads, dim), 1e-6)
        self.scale = 1 / torch.arange(1, chunk + 1, dtype=dtype)
        self.weights = tuple(0.02 * random(heads, a, b) for a, b in pairwise(widths(kind, dim)))
        self.biases = tuple(torch.zeros(heads, 1, b, dtype=dtype) for b in widths(kind, dim)[1:])

    def leaves(self) -> list[Tensor]:
        return [t.requires_grad_() for t in (*self.tokens, *self.weights, *self.biases)]

    def run(self) -> Tensor:
        state = inner_loop.initial_state(self.weights, self.biases, self.chunk, self.batch)
        layout = ChunkLayout(self.length, self.chunk)
        return chunk_inner_loop(self.tokens, state, self.norm, self.scale, layout=layout)[0]

    def by_token(self) -> Tensor:
        """The same function with explicit weights for every token: what the dual form avoids."""
        q, k, v, lr = (part.transpose(1, 2) for part in self.tokens._replace(lr=self.tokens.lr[..., None]))
        fast, _ = inner_loop.unpack(inner_loop.initial_state(self.weights, self.biases, self.chunk, self.batch))
        outputs = []
        for start in range(0, self.length, self.chunk):
            total: list[Tensor] = []
            biases: list[Tensor] = []
            for n, t in enumerate(range(start, start + self.chunk)):
                memory = key_pass(k[:, :, t, None], v[:, :, t, None], lr[:, :, t, None], fast, self.norm)
                gradients = [a.mT @ g for a, g in zip(memory.inputs, memory.gradients, strict=True)]
                total = gradients if n == 0 else [a + b for a, b in zip(total, gradients, strict=True)]
                sums = memory.gradients
                biases = list(sums) if n == 0 else [a + b for a, b in zip(biases, sums, strict=True)]
                local = FastNetwork(
                    tuple(w - self.scale[n] * g for w, g in zip(fast.weights, total, strict=True)),
                    tuple(b - self.scale[n] * g for b, g in zip(fast.biases, biases, strict=True)),
                )
                x = q[:, :, t, None]
                for i, (weight, bias) in enumerate(zip(local.weights, local.biases, strict=True)):
                    x = (torch.nn.functional.gelu(x, approximate="tanh") if i else x) @ weight + bias
                outputs.append(q[:, :, t, None] + self.norm(x))
            fast = local
        return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)


def gate(kind: str) -> float:
    """Largest float64 error of the chunked, the by-token and the streamed form against the definition."""
    problem = Problem(kind, 2, 2, 24, 8, 8, torch.float64)
    q, k, v, lr = (part.transpose(1, 2) for part in problem.tokens)
    expected, _, _ = naive_inner_loop(
        q, k, v, lr, problem.scale, problem.norm.weight, problem.norm.bias, problem.weights, problem.biases,
        chunk_size=8, eps=1e-6, causal=True,
    )  # fmt: skip
    expected = expected.transpose(1, 2).flatten(2)
    state = clone(inner_loop.initial_state(problem.weights, problem.biases, 8, 2))
    streams = []
    for form in (recurrent_inner_loop, compiled_inner_loop):
        now = clone(state)
        tokens = [Tokens(*(part[:, t : t + 1].detach() for part in problem.tokens)) for t in range(24)]
        streams.append(torch.cat([form(token, now, problem.norm, problem.scale) for token in tokens], dim=1))
    forms = (problem.run(), problem.by_token(), *streams)
    return max(float((form - expected).detach().abs().max()) for form in forms)


def median_ms(function: Callable[[], object], seconds: float = 2.0, least: int = 5) -> float:
    return times_ms(function, seconds, least)[0]


def times_ms(function: Callable[[], object], seconds: float = 2.0, least: int = 5) -> tuple[float, float]:
    """Median and 99th percentile."""
    function()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
        if len(times) >= 400:
            break
    times.sort()
    return 1_000 * statistics.median(times), 1_000 * times[int(0.99 * (len(times) - 1))]


def train_row(kind: str, batch: int, heads: int, length: int, chunk: int, dim: int) -> dict[str, object]:
    problem = Problem(kind, batch, heads, length, chunk, dim, torch.float32)
    leaves = problem.leaves()

    def both(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function().square().mean(), leaves)

    chunked = median_ms(both(problem.run))
    short = Problem(kind, batch, heads, 4 * chunk, chunk, dim, torch.float32)
    leaves = short.leaves()
    scan = median_ms(both(short.by_token), least=2) * length / (4 * chunk)
    return {
        "shape": f"{kind} B{batch} H{heads} T{length} C{chunk} D{dim}",
        "chunked_ms": round(chunked, 1),
        "by_token_ms (from 4 chunks)": round(scan, 1),
        "by_token / chunked": round(scan / chunked, 1),
    }


def stream_row(kind: str, batch: int, heads: int, dim: int, chunk: int = 16) -> dict[str, object]:
    problem = Problem(kind, batch, heads, 1, chunk, dim, torch.float32)
    state = clone(inner_loop.initial_state(problem.weights, problem.biases, chunk, batch))
    fast, _ = inner_loop.unpack(state)
    rows = [torch.randn(batch * heads, 1, weight.shape[2]) for weight in fast.weights]

    def read() -> None:
        for x, weight in zip(rows, fast.weights, strict=True):
            torch.bmm(x, weight.flatten(0, 1))

    with torch.no_grad():
        step = median_ms(lambda: recurrent_inner_loop(problem.tokens, state, problem.norm, problem.scale))
        fast_step, slowest = times_ms(lambda: compiled_inner_loop(problem.tokens, state, problem.norm, problem.scale))
        once = median_ms(read)
    return {
        "shape": f"{kind} B{batch} H{heads} D{dim}",
        "state MiB": round(num_bytes(state) / 2**20, 1),
        "step_ms": round(step, 2),
        "compiled_ms": round(fast_step, 2),
        "compiled p99_ms": round(slowest, 2),
        "one_read_ms": round(once, 2),
        "step / one read": round(step / once, 1),
        "compiled / one read": round(fast_step / once, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for kind in ("linear", "mlp"):
        worst = gate(kind)
        print(f"gate {kind}: largest float64 error against the definition {worst:.1e}")
        if not worst < 1e-10:
            sys.exit("The gate is red: no time is printed.")
    rows = [train_row(*shape) for shape in TRAINING] + [stream_row(*shape) for shape in STREAMING]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as handle:
            json.dump({"threads": arguments.threads, "torch": torch.__version__, "rows": rows}, handle, indent=2)


if __name__ == "__main__":
    main()
