"""Speed of the inner loop, training and streaming, each behind a correctness gate.

    python benchmarks/inner_loop.py [--threads 2] [--cpu-seconds] [--json FILE]

Training: forward and backward of the chunked form, by operations that torch differentiates (``autograd``), with the
backward pass written out (``torch``), and in C++ (``cpp``, also with groups of 8 chunks), alternately in one run;
beside them the same arithmetic token by token (what a scan over tokens costs). Streaming: one step, by tensor
operations and compiled, and one read of each row's fast weights (a ``bmm`` with one row), the least a step can cost,
alternately. Ratios are medians within this run; a red gate prints no time. *Kept* is what a form keeps for its backward
pass beyond its tokens. *Share of the limit* is the time that the counted operations and bytes take at the rates of this
machine's fastest matrix product and of its memory (``arithmetic``), over the measured time. ``--cpu-seconds`` counts
the processor's time instead of the clock's, for a machine that does other work: give it with one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from arithmetic import Machine, Work, streaming_work, training_work
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, clone, num_bytes
from moshi_ttt.plugins.hybrid import chunk, inner_loop
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.compiled import compiled_inner_loop
from moshi_ttt.plugins.hybrid.cpp.chunk import cpp_inner_loop
from moshi_ttt.plugins.hybrid.fast_network import FastNetwork, key_pass
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop

Form = Callable[..., tuple[Tensor, BlockState]]
Clock = Callable[[], float]

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

    def run(self, form: Form, together: int | None = None) -> Tensor:
        state = inner_loop.initial_state(self.weights, self.biases, self.chunk, self.batch)
        layout = ChunkLayout(self.length, self.chunk)
        return form(self.tokens, state, self.norm, self.scale, layout=layout, checkpoint_chunks=together)[0]

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


def by_autograd(*given: Any, **options: Any) -> tuple[Tensor, BlockState]:
    """The chunk form by operations that torch differentiates."""
    with patch.object(chunk, "is_written_out", lambda *_: False):
        return chunk_inner_loop(*given, **options)


TRAIN_FORMS: dict[str, tuple[Form, int | None]] = {
    "autograd": (by_autograd, None),
    "torch": (chunk_inner_loop, None),
    "cpp": (cpp_inner_loop, None),
    "cpp, groups of 8": (cpp_inner_loop, 8),
}


def gate(kind: str) -> float:
    """Largest float64 error of every form against the definition, and of the gradients against torch's."""
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
    forms = (*(problem.run(*form) for form in TRAIN_FORMS.values()), problem.by_token(), *streams)
    worst = max(float((form - expected).detach().abs().max()) for form in forms)
    leaves = problem.leaves()
    found = [torch.autograd.grad(problem.run(*form).square().sum(), leaves) for form in TRAIN_FORMS.values()]
    pairs = [(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True)]
    return max(worst, *(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs))


def times_ms(
    functions: Mapping[str, Callable[[], object]], clock: Clock, seconds: float = 2.0, least: int = 5
) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile of each, called alternately, for ``seconds`` each on average."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    total, count = 0.0, 0
    while count < least or (total < seconds * len(functions) and count < 400):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
            total += times[name][-1]
        count += 1
    ordered = {name: sorted(each) for name, each in times.items()}
    return {name: (1_000 * each[count // 2], 1_000 * each[int(0.99 * (count - 1))]) for name, each in ordered.items()}


def kept_mib(problem: Problem, form: Form, together: int | None) -> float:
    """MiB that a call keeps for its backward pass, beyond its tokens."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = problem.run(form, together)
    assert y.requires_grad  # while it lives, no storage is freed and used again
    for part in problem.tokens:
        storages.pop(part.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / 2**20


def share(machine: Machine, work: Work, size: int, milliseconds: float) -> float:
    """Of the limit: 1 is as fast as ``machine`` can be, going through ``size`` bytes."""
    return round(1_000 * machine.least_seconds(work, size) / milliseconds, 2)


def train_row(
    machine: Machine, kind: str, batch: int, heads: int, length: int, chunk: int, dim: int
) -> dict[str, object]:
    problem = Problem(kind, batch, heads, length, chunk, dim, torch.float32)
    short = Problem(kind, batch, heads, 4 * chunk, chunk, dim, torch.float32)

    def both(of: Problem, function: Callable[[], Tensor]) -> Callable[[], object]:
        leaves = of.leaves()
        return lambda: torch.autograd.grad(function().square().mean(), leaves)

    forms = {name: both(problem, partial(problem.run, *form)) for name, form in TRAIN_FORMS.items()}
    found = {name: median for name, (median, _) in times_ms(forms, machine.clock).items()}
    work = training_work(widths(kind, dim), batch=batch, heads=heads, length=length, chunk=chunk)
    scan = times_ms({"scan": both(short, short.by_token)}, machine.clock, least=2)["scan"][0] * length / (4 * chunk)
    return {
        "shape": f"{kind} B{batch} H{heads} T{length} C{chunk} D{dim}",
        **{f"{name} ms": round(median, 1) for name, median in found.items()},
        **{f"autograd / {name}": round(found["autograd"] / found[name], 2) for name in list(found)[1:]},
        **{f"{name} share of the limit": share(machine, work, work.num_bytes, found[name]) for name in found},
        **{f"{name} kept MiB": round(kept_mib(problem, *form)) for name, form in TRAIN_FORMS.items()},
        "by_token / torch (from 4 chunks)": round(scan / found["torch"], 1),
    }


def stream_row(machine: Machine, kind: str, batch: int, heads: int, dim: int, chunk: int = 16) -> dict[str, object]:
    problem = Problem(kind, batch, heads, 1, chunk, dim, torch.float32)
    state = clone(inner_loop.initial_state(problem.weights, problem.biases, chunk, batch))
    fast, _ = inner_loop.unpack(state)
    rows = [torch.randn(batch * heads, 1, weight.shape[2]) for weight in fast.weights]

    def read() -> None:
        for x, weight in zip(rows, fast.weights, strict=True):
            torch.bmm(x, weight.flatten(0, 1))

    given = (problem.tokens, state, problem.norm, problem.scale)
    with torch.no_grad():
        step = times_ms({"step": lambda: recurrent_inner_loop(*given)}, machine.clock)["step"][0]
        found = times_ms({"compiled": lambda: compiled_inner_loop(*given), "read": read}, machine.clock, least=200)
    (fast_step, slowest), once = found["compiled"], found["read"][0]
    # The median step ends no chunk: the least work is the mean over the tokens of a chunk but its last.
    before = chunk - 1
    work = streaming_work(widths(kind, dim), batch=batch, heads=heads, chunk=chunk, tokens=before)
    mean = Work(work.operations // before, work.num_bytes // before)
    return {
        "shape": f"{kind} B{batch} H{heads} D{dim}",
        "state MiB": round(num_bytes(state) / 2**20, 1),
        "step_ms": round(step, 2),
        "compiled_ms": round(fast_step, 2),
        "compiled p99_ms": round(slowest, 2),
        "one_read_ms": round(once, 2),
        "step / one read": round(step / once, 1),
        "compiled / one read": round(fast_step / once, 1),
        "p99 / median": round(slowest / fast_step, 2),
        "step share of the limit": share(machine, mean, num_bytes(state), step),
        "compiled share of the limit": share(machine, mean, num_bytes(state), fast_step),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--cpu-seconds", action="store_true", help="the processor's time instead of the clock's")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    torch.set_num_threads(arguments.threads)
    for kind in ("linear", "mlp"):
        worst = gate(kind)
        print(f"gate {kind}: largest float64 error against the definition {worst:.1e}")
        if not worst < 1e-10:
            sys.exit("The gate is red: no time is printed.")
    machine = Machine(clock)
    limit = round(machine.operations_per_second() / 1e9, 1)
    rates = {f"{mib} MiB": round(machine.bytes_per_second(mib * 2**20) / 1e9, 1) for mib in (1, 16, 256)}
    print(f"limits: products {limit} GFLOP/s, memory in GB/s: {rates}", flush=True)
    rows = []
    for row in (partial(train_row, machine, *shape) for shape in TRAINING):
        rows.append(row())
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    for row in (partial(stream_row, machine, *shape) for shape in STREAMING):
        rows.append(row())
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as handle:
            found = {"threads": arguments.threads, "torch": torch.__version__, "GFLOP/s": limit, "GB/s": rates}
            json.dump({**found, "rows": rows}, handle, indent=2)


if __name__ == "__main__":
    main()
