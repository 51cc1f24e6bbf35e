"""Compares the Triton kernels of TTT-MLP with the chunk form in float64, and prints the errors as JSON.

A program of its own, with TRITON_INTERPRET=1 before Triton is imported: its own functions are interpreted too then.
Memory that a kernel is given to write to is full of NaN.
"""

from __future__ import annotations

import json

import torch

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, initial_state
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.triton.mlp_chunk import mlp_chunks
from moshi_ttt.plugins.hybrid.triton.train_settings import TrainSettings

ROWS, HEADS, CHUNK, WIDTH, HIDDEN = 2, 2, 16, 16, 32  # the least that a kernel's matrix products take
CASES = {
    "causal": (41, True, False, 2), "not causal": (32, False, False, 1), "less than a chunk": (7, True, False, 4),
    "an update that is skipped": (50, True, True, 4),
}  # fmt: skip
"""Tokens, causal, whether a row's first update is skipped, chunks that share kept weights."""
STATE = ("weight.0", "weight.1", "bias.0", "bias.1")
LEAVES = ("q", "k", "v", "lr", *STATE, "norm weight", "norm bias", "token scale")
NAMES = ("y", *STATE, *(f"gradient of {name}" for name in LEAVES))


def draw(length):
    """Everything that a call depends on: tokens, fast weights, norm, token scale; then cotangents of its results."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = [random(ROWS, length, HEADS, WIDTH) for _ in range(3)]
    tokens.append(random(ROWS, length, HEADS, scale=0.1))
    shapes = ((WIDTH, HIDDEN), (HIDDEN, WIDTH), (1, HIDDEN), (1, WIDTH))
    fast = [random(ROWS, HEADS, *shape, scale=0.3) for shape in shapes]
    norm = [1 + random(HEADS, WIDTH, scale=0.1), random(HEADS, WIDTH, scale=0.1)]
    cotangents = [random(ROWS, length, HEADS * WIDTH), *(random(ROWS, HEADS, *shape) for shape in shapes)]
    return [*tokens, *fast, *norm, random(CHUNK).abs()], cotangents


def differentiated(results, leaves, cotangents):
    loss = sum((result * each.to(result)).sum() for result, each in zip(results, cotangents, strict=True))
    return [result.detach() for result in results], torch.autograd.grad(loss, leaves)


def expected(given, cotangents, causal, skipped):
    q, k, v, lr, w1, w2, b1, b2, norm_w, norm_b, scale = leaves = [each.clone().requires_grad_() for each in given]
    state = initial_state((w1[0], w2[0]), (b1[0], b2[0]), CHUNK, ROWS)
    state |= dict(zip(STATE, (w1, w2, b1, b2), strict=True))  # each row starts from its own
    if skipped:
        state["spoiled"] = torch.tensor([0, 1])  # the first chunk of the second row is not applied
    tokens, layout = Tokens(q, k, v, lr), ChunkLayout(q.shape[1], CHUNK)
    norm = InnerNorm(norm_w, norm_b, 1e-6, True)  # by operations of one term each
    y, after = chunk_inner_loop(tokens, state, norm, scale, layout=layout, causal=causal)
    return differentiated([y, *(after[name] for name in STATE)], leaves, cotangents)


def found(given, cotangents, causal, skipped, every):
    q, k, v, lr, w1, w2, b1, b2, norm_w, norm_b, scale = leaves = [each.float().requires_grad_() for each in given]
    length = q.shape[1]
    ends = torch.arange(-(-length // CHUNK)) < length // CHUNK  # [N]: the last chunk may not end
    applied = ends.repeat(ROWS, 1)
    if skipped:
        applied[1, 0] = False
    settings = TrainSettings(chunk=CHUNK, eps=1e-6, causal=causal, every=every, slice_width=16, warps=4)
    updates = torch.where(applied, scale[-1], 0)  # [B, N]
    y, weights, biases = mlp_chunks(q, k, v, lr, (w1, w2), (b1, b2), norm_w, norm_b, scale, updates, settings)
    # [B, T, H, D] -> [B, T, H D]
    return differentiated([y.flatten(2), *weights, *biases], leaves, cotangents)


def main() -> None:
    torch.use_deterministic_algorithms(True)  # torch then fills memory that a kernel is to write with NaN
    assert torch.ones(1).new_empty(2, 3).isnan().all()
    errors = {}
    for name, (length, causal, skipped, every) in CASES.items():
        given, cotangents = draw(length)
        theirs, ours = expected(given, cotangents, causal, skipped), found(given, cotangents, causal, skipped, every)
        pairs = zip(NAMES, (*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True)
        errors[name] = {
            what: float((actual - reference).norm() / reference.norm().clamp(min=1e-6))
            for what, actual, reference in pairs
        }
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
