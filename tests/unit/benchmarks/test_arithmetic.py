"""The counted work of the inner loop against torch's own count, and against a count of every product by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

LINEAR, MLP, DEEP = (8, 8), (8, 32, 8), (8, 32, 32, 8)


@pytest.fixture
def arithmetic(benchmark_module):
    return benchmark_module("arithmetic")


@pytest.mark.parametrize(("kind", "widths"), [("linear", LINEAR), ("mlp", MLP)])
@pytest.mark.parametrize(("batch", "heads", "length", "chunk"), [(2, 3, 12, 4), (1, 2, 20, 5), (1, 1, 4, 4)])
def test_training_is_what_torch_counts(benchmark_module, arithmetic, kind, widths, batch, heads, length, chunk):
    inner_loop = benchmark_module("inner_loop")
    problem = inner_loop.Problem(kind, batch, heads, length, chunk, 8, torch.float32)
    leaves = problem.leaves()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(problem.run(inner_loop.by_autograd).square().sum(), leaves)
    found = arithmetic.training_work(widths, batch=batch, heads=heads, length=length, chunk=chunk)
    assert found.operations == counter.get_total_flops()


def test_a_training_call_reads_and_writes_each_tensor_once_a_pass(benchmark_module, arithmetic):
    problem = benchmark_module("inner_loop").Problem("mlp", 2, 3, 12, 4, 8, torch.float32)
    q, _, _, rates = problem.tokens
    learned = sum(tensor.nbytes for tensor in (*problem.weights, *problem.biases))
    forward = [*problem.tokens, q]  # the output is like q
    backward = [*problem.tokens, q, *problem.tokens]  # the output's gradient, and then those of the tokens
    expected = sum(tensor.nbytes for tensor in (*forward, *backward)) + 3 * learned
    assert arithmetic.training_work(MLP, batch=2, heads=3, length=12, chunk=4).num_bytes == expected
    assert rates.nbytes == 4 * 2 * 12 * 3


def by_hand(widths: tuple[int, ...], chunk: int, tokens: int) -> tuple[int, int]:
    """Operations, and numbers read and written, of one row and head: token by token, product by product."""
    operations = moved = 0
    layers = list(pairwise(widths))
    for token in range(tokens):
        earlier = token % chunk
        for place, (fan_in, fan_out) in enumerate(layers):
            operations += 2 * fan_in * fan_out  # the key
            operations += 2 * fan_in * fan_out if place else 0  # its gradient
            operations += 2 * fan_in * fan_out  # the query
            operations += (earlier + 1) * 2 * fan_in + (earlier + 1) * 2 * fan_out  # with each key, times its gradient
            moved += fan_in * fan_out + fan_out + (fan_in + fan_out) + earlier * (fan_in + fan_out)
            if earlier == chunk - 1:  # the chunk ends
                operations += chunk * 2 * fan_in * fan_out
                moved += fan_in * fan_out + fan_out
    return operations, moved


@pytest.mark.parametrize("widths", [LINEAR, MLP, DEEP])
@pytest.mark.parametrize("tokens", [1, 3, 4, 11, 12])
def test_streaming_is_what_a_count_by_hand_gives(arithmetic, widths, tokens):
    operations, moved = by_hand(widths, 4, tokens)
    found = arithmetic.streaming_work(widths, batch=2, heads=3, chunk=4, tokens=tokens)
    assert (found.operations, found.num_bytes) == (2 * 3 * operations, 4 * 2 * 3 * moved)


def test_a_streamed_chunk_costs_what_the_forward_pass_does_with_half_of_the_pairs(arithmetic):
    made = {"batch": 1, "heads": 1, "chunk": 4}
    backward_twice = arithmetic.training_work(MLP, **made, length=8).operations
    last_update = 2 * 2 * 4 * (8 * 32 * 2)
    pairs = 2 * 4 * (2 * 40)  # of one key and query of every token
    streamed = arithmetic.streaming_work(MLP, **made, tokens=8).operations
    assert streamed == (backward_twice + last_update) // 3 - 2 * (4 - 1) * pairs // 2


def test_a_part_of_a_chunk_is_refused(arithmetic):
    with pytest.raises(ValueError, match="10 tokens are no whole chunks of 4"):
        arithmetic.training_work(LINEAR, batch=1, heads=1, length=10, chunk=4)


class MadeUpMachine:
    """Rates that are given."""

    def operations_per_second(self) -> float:
        return 100.0

    def bytes_per_second(self, size: int) -> float:
        return 10.0 if size > 50 else 1_000.0


def test_the_slower_of_products_and_memory_is_the_limit(arithmetic):
    least = arithmetic.Machine.least_seconds
    work = arithmetic.Work(operations=400, num_bytes=100)
    assert least(MadeUpMachine(), work, 100) == 10.0
    assert least(MadeUpMachine(), work, 10) == 4.0


def test_rates_are_of_the_shortest_call(arithmetic):
    machine = arithmetic.Machine(seconds=0.001)
    assert machine.operations_per_second() > 1e8
    assert machine.bytes_per_second(100) == machine.bytes_per_second(2**16) > 1e7
