"""Calls of the inner loop with random tensors, for tests of its forms: their results and every gradient."""

from __future__ import annotations

from itertools import pairwise

import torch

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.plugins.hybrid import chunk
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, initial_state
from moshi_ttt.plugins.hybrid.objective import InnerNorm

ROWS, HEADS, CHUNK = 3, 2, 4


def results(
    widths, length, *, form=None, begun=False, causal=True, together=None, size=CHUNK, dtype=torch.float64,
    only=None, gap=0.0,
):  # fmt: skip
    """The output and the state of a call, and gradients of all it depends on, for random cotangents of all of it.

    With ``begun`` the rows continue chunks, the first row one with a token that is not finite. ``only``: the name of
    the one result that is differentiated, ``y`` or one of the state's. ``gap``: what slots of the state without a token
    hold.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        numbers = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return numbers.to(dtype).requires_grad_()

    width = widths[0]
    tokens = Tokens(*(random(ROWS, length, HEADS, width) for _ in range(3)), random(ROWS, length, HEADS, scale=0.3))
    norm = InnerNorm(random(HEADS, width), random(HEADS, width), 1e-6)
    scale = random(size)
    weights = tuple(random(HEADS, a, b, scale=0.8 / a**0.5) for a, b in pairwise(widths))
    biases = tuple(random(HEADS, 1, b, scale=0.3) for b in widths[1:])
    leaves = [*tokens, *norm.learned, scale, *weights, *biases]
    state = initial_state(weights, biases, size, ROWS)
    offset = None
    if begun:
        offset = torch.tensor([size - 1, 0, size // 2])
        held = (torch.arange(size) < offset[:, None])[:, None, :, None]  # [B, 1, C, 1]
        for i, (a, b) in enumerate(pairwise(widths)):
            for name, wide in ((f"input.{i}", a), (f"gradient.{i}", b)):
                leaves.append(random(ROWS, HEADS, size, wide, scale=0.3))
                state[name] = torch.where(held, leaves[-1], gap)
        state["position"] = offset
        state["spoiled"] = torch.tensor([1, 0, 0])  # the first row's first chunk is not applied
    layout = ChunkLayout(length, size, offset=offset)
    y, after = (form or chunk.chunk_inner_loop)(
        tokens, state, norm, scale, layout=layout, causal=causal, checkpoint_chunks=together
    )  # fmt: skip
    found = {"y": y, **{name: after[name] for name in sorted(after) if after[name].is_floating_point()}}
    loss = sum(
        (tensor * random(*tensor.shape).detach()).sum() for name, tensor in found.items() if only in (None, name)
    )
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return [tensor.detach() for tensor in found.values()], zeros


def by_torch(monkeypatch, *given, **options):
    """``results`` by operations that torch differentiates."""
    with monkeypatch.context() as patch:
        patch.setattr(chunk, "is_written_out", lambda *_: False)
        return results(*given, **options)
