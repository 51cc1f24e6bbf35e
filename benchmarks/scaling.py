"""Cost of the inner loop over the number of tokens and of streams, each behind a correctness gate.

    python benchmarks/scaling.py [--threads 2] [--cpu-seconds] [--form torch] [--json FILE]

Three ways to go through T tokens of B rows, for TTT-Linear and TTT-MLP: one call with its gradients, as training runs
(``--longest-call`` ends it where memory does); calls of ``--segment`` tokens each that carry the state and take no
gradients, as an evaluation in segments runs; and single streamed steps, of which the last ``--window`` before T are
timed. Every figure is the time of one token of one row. It is divided by that of the smallest size: 1 is a cost that
is linear in T, or in B. The sizes take turns, and the median of ``--rounds`` counts. The state's bytes of a row have to
be the same at every size.

``--cpu-seconds`` counts the processor's time instead of the clock's, for a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import inner_loop as loop
import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, clone, num_bytes
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.compiled import compiled_inner_loop
from moshi_ttt.plugins.hybrid.cpp.chunk import cpp_inner_loop
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, initial_state
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop

FORMS: dict[str, tuple[loop.Form, Callable[..., Tensor]]] = {
    "cpp": (cpp_inner_loop, compiled_inner_loop),
    "torch": (chunk_inner_loop, recurrent_inner_loop),
}
"""Of a call and of a step."""
CHUNK, TOLERANCE = 16, 1e-10
Timed = Callable[[], tuple[float, BlockState]]
"""Seconds of a token and row, and the state after the last token."""


class SizeError(Exception):
    """A state grew."""


def start(problem: loop.Problem) -> BlockState:
    return clone(initial_state(problem.weights, problem.biases, problem.chunk, problem.batch))


def cut(problem: loop.Problem, first: int, last: int) -> Tokens:
    """Tokens ``first`` to ``last - 1`` of all rows."""
    return Tokens(*(part[:, first:last].detach() for part in problem.tokens))


@torch.no_grad()
def in_segments(problem: loop.Problem, form: loop.Form, length: int, segment: int) -> tuple[list[Tensor], BlockState]:
    """``length`` tokens in calls of ``segment`` that carry the state; the outputs ``[B, segment, H D]`` of each."""
    state, outputs = start(problem), []
    for first in range(0, length, segment):
        last = min(first + segment, length)
        # Where segments are whole chunks, every one of them begins at a chunk's start.
        offset = state["position"] if segment % problem.chunk else None
        layout = ChunkLayout(last - first, problem.chunk, offset=offset)
        y, state = form(cut(problem, first, last), state, problem.norm, problem.scale, layout=layout)
        outputs.append(y)
    return outputs, state


@torch.no_grad()
def in_steps(
    problem: loop.Problem, step: Callable[..., Tensor], state: BlockState, tokens: Iterable[Tokens]
) -> list[Tensor]:
    """``tokens``, one after the other, in place; the output ``[B, 1, H D]`` of each."""
    return [step(token, state, problem.norm, problem.scale) for token in tokens]


def one_by_one(problem: loop.Problem, first: int, last: int) -> Iterator[Tokens]:
    return (cut(problem, t, t + 1) for t in range(first, last))


def gate(kind: str, form: str) -> float:
    """Largest float64 error of segments and of steps against one call; ``inner_loop.gate`` has that of the call."""
    length = 53  # an unfinished chunk of 5 tokens at the end
    problem = loop.Problem(kind, 2, 2, length, 8, 8, torch.float64)
    call, step = FORMS[form]
    (whole,), after = in_segments(problem, call, length, length)
    stepped = start(problem)
    found = [(torch.cat(in_steps(problem, step, stepped, one_by_one(problem, 0, length)), dim=1), stepped)]
    for segment in (16, 11):
        outputs, end = in_segments(problem, call, length, segment)
        found.append((torch.cat(outputs, dim=1), end))

    def used(state: BlockState, name: str) -> Tensor:
        """A part of the state, without the unfinished chunk's free slots: they hold what was there before."""
        return state[name][:, :, : length % 8] if name.startswith(("input", "gradient")) else state[name]

    errors = [float((y - whole).abs().max()) for y, _ in found]
    errors += [float((used(end, name) - used(after, name)).abs().max()) for _, end in found for name in after]
    return max(errors)


def call(clock: loop.Clock, problem: loop.Problem, form: loop.Form, length: int) -> tuple[float, BlockState]:
    """One call with gradients."""
    tokens = Tokens(*(part[:, :length].detach().requires_grad_() for part in problem.tokens))
    leaves = [*tokens, *(each.requires_grad_() for each in (*problem.weights, *problem.biases))]
    began = clock()
    state = initial_state(problem.weights, problem.biases, problem.chunk, problem.batch)
    y, after = form(tokens, state, problem.norm, problem.scale, layout=ChunkLayout(length, problem.chunk))
    torch.autograd.grad(y.square().mean(), leaves)
    return (clock() - began) / (length * problem.batch), {name: part.detach() for name, part in after.items()}


def segments(
    clock: loop.Clock, problem: loop.Problem, form: loop.Form, length: int, segment: int
) -> tuple[float, BlockState]:
    began = clock()
    _, state = in_segments(problem, form, length, segment)
    return (clock() - began) / (length * problem.batch), state


def steps(
    clock: loop.Clock, problem: loop.Problem, step: Callable[..., Tensor], length: int, window: int
) -> tuple[float, BlockState]:
    """The last ``window`` steps of a stream of ``length``; the ones before are not timed."""
    state, before = start(problem), max(0, length - window)
    in_steps(problem, step, state, one_by_one(problem, 0, before))
    tokens = list(one_by_one(problem, before, length))
    began = clock()
    in_steps(problem, step, state, tokens)
    return (clock() - began) / (len(tokens) * problem.batch), state


def measured(name: str, axis: str, sizes: Mapping[int, Timed], rounds: int) -> list[dict[str, object]]:
    """A row for each size. Raises SizeError where a state of one size has other bytes a row than that of another."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    held: dict[int, int] = {}
    for count in range(rounds + 1):
        for size, timed in sizes.items():
            if count == 0 and size != next(iter(sizes)):
                continue  # one size is enough to warm up: a library is loaded, and memory is fetched
            seconds, state = timed()
            held[size] = num_bytes(state) // state["position"].shape[0]
            if count:
                times[size].append(seconds)
    if len(set(held.values())) != 1:
        raise SizeError(f"{name}: the state's bytes of a row differ: {held}.")
    medians = {size: statistics.median(taken) for size, taken in times.items()}
    first = next(iter(medians.values()))
    return [
        {
            "what": name, axis: size, "us a token and row": round(1e6 * median, 2),
            "over the first": round(median / first, 3), "state KiB a row": round(held[size] / 1024, 1),
        }
        for size, median in medians.items()
    ]  # fmt: skip


def rows_of(kind: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Over T with one row, and over B with ``--tokens-of-rows`` tokens."""
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    form, step = FORMS[options.form]

    def made(batch: int, length: int) -> loop.Problem:
        return loop.Problem(kind, batch, options.heads, length, CHUNK, options.width, torch.float32)

    def ways(problem: loop.Problem, length: int) -> dict[str, Timed]:
        return {
            "a call with gradients": partial(call, clock, problem, form, length),
            "segments": partial(segments, clock, problem, form, length, options.segment),
            "steps": partial(steps, clock, problem, step, length, options.window),
        }

    longest = made(1, max(options.tokens))
    over_t = {length: ways(longest, length) for length in options.tokens}
    over_b = {batch: ways(made(batch, options.tokens_of_rows), options.tokens_of_rows) for batch in options.rows}
    found = []
    for axis, by_size in (("T", over_t), ("B", over_b)):
        for way in next(iter(by_size.values())):
            sizes = {size: timed[way] for size, timed in by_size.items()}
            if axis == "T" and way == "a call with gradients":
                sizes = {size: timed for size, timed in sizes.items() if size <= options.longest_call}
            found += measured(f"{kind}, {way}", axis, sizes, options.rounds) if sizes else []
    return found


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 1500, 5000, 15000, 45000], help="T")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], help="B")
    parser.add_argument("--tokens-of-rows", type=int, default=2000, help="T of the runs over B (default: 2000)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head (default: 64)")
    parser.add_argument("--segment", type=int, default=512, help="tokens of a call with carried state (default: 512)")
    parser.add_argument("--window", type=int, default=496, help="steps that are timed before T (default: 496)")
    parser.add_argument("--longest-call", type=int, default=45000, help="tokens of one call with gradients, at most")
    parser.add_argument("--form", choices=FORMS, default="cpp", help="what computes (default: cpp)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--cpu-seconds", action="store_true", help="the processor's time instead of the clock's")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments_of(given)
    torch.set_num_threads(options.threads)
    for kind in ("linear", "mlp"):
        worst = max(loop.gate(kind), gate(kind, options.form))
        print(f"gate {kind}: largest float64 error against the definition and against one call {worst:.1e}")
        if not worst < TOLERANCE:
            sys.exit("The gate is red: no time is printed.")
    rows = []
    try:
        for kind in ("linear", "mlp"):
            for row in rows_of(kind, options):
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    except SizeError as error:
        sys.exit(str(error))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as handle:
            found = {"threads": options.threads, "torch": torch.__version__, "form": options.form}
            json.dump({**found, "rows": rows}, handle, indent=2)


if __name__ == "__main__":
    main()
