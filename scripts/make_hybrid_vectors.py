#!/usr/bin/env python3
"""Reference vectors of the hybrid layers with options, from the definition alone: nothing of the package is imported.

    python scripts/make_hybrid_vectors.py FOLDER

One stream after the other; each inner gradient is torch's gradient of one token's loss, and so are the gradients of the
outputs. docs/reference_vectors.md has the format.

Shape legend: T tokens, C tokens a chunk, H heads of width D, K taps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """``widths``: of the fast network's layers between its ends; ``taps`` and ``momentum`` None leave those out."""

    widths: tuple[int, ...] = ()
    chunk_size: int = 4
    causal: bool = True
    taps: int | None = None
    embedding: bool = False
    inner_norm: bool = True
    inner_steps: int = 1
    momentum: float | None = None
    base_lr: float = 0.8


CASES = {
    "hybrid_conv": Case(taps=3),
    "hybrid_value": Case(embedding=True, chunk_size=5),
    "hybrid_no_norm": Case(inner_norm=False, chunk_size=3),
    "hybrid_steps": Case(inner_steps=3, widths=(16,), base_lr=0.3),
    "hybrid_momentum": Case(momentum=0.7, widths=(16,), base_lr=0.3),
    "hybrid_options_linear": Case(
        taps=2, embedding=True, inner_norm=False, inner_steps=2, momentum=0.6, base_lr=0.5
    ),
    "hybrid_options_mlp_noncausal": Case(
        taps=3, embedding=True, inner_steps=2, momentum=0.4, widths=(8,), causal=False, base_lr=0.2
    ),
    "hybrid_options_multilayer3": Case(
        taps=2, embedding=True, inner_norm=False, inner_steps=2, momentum=0.5, widths=(6, 10), base_lr=0.2
    ),
}  # fmt: skip
BATCH, LENGTH, HEADS, HEAD = 2, 11, 2, 8
NORM_EPS, TARGET_EPS, POST_EPS, THETA = 1e-6, 1e-8, 1e-6, 10_000.0
Layers = list[Tensor]
"""Weight ``[H, in, out]`` and bias ``[H, 1, out]``, layer after layer."""


def drawn_inputs(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    def drawn(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    width = HEADS * HEAD
    inputs = {"x": drawn(BATCH, LENGTH, width)}
    if case.embedding:
        inputs["embeddings"] = drawn(BATCH, LENGTH, width, size=2.0)
    for name in ("wq", "wk", "wv", "wo"):
        inputs |= {f"{name}.weight": drawn(width, width, size=0.3), f"{name}.bias": drawn(width, size=0.1)}
    inputs |= {"lr_weight": drawn(HEADS, 1, width, size=0.2), "lr_bias": drawn(HEADS, 1)}
    if case.taps is not None:
        inputs |= {f"{name}_taps": drawn(width, case.taps, size=0.6) for name in ("query", "key")}
    if case.inner_norm:
        inputs |= {"norm_weight": 1 + drawn(HEADS, HEAD, size=0.1), "norm_bias": drawn(HEADS, HEAD, size=0.1)}
    if case.momentum is not None:
        inputs["momentum_logit"] = math.log(case.momentum / (1 - case.momentum)) + drawn(HEADS, size=0.2)
    inputs |= {"post_norm.weight": 1 + drawn(width, size=0.1), "post_norm.bias": drawn(width, size=0.1)}
    if case.causal:
        inputs["token_scale_offset"] = drawn(case.chunk_size, size=0.2).abs()
    inputs["alpha"] = drawn(width, size=0.5)
    for i, (fan_in, fan_out) in enumerate(pairwise([HEAD, *case.widths, HEAD])):
        inputs |= {f"weight.{i}": drawn(HEADS, fan_in, fan_out, size=0.3)}
        inputs |= {f"bias.{i}": drawn(HEADS, 1, fan_out, size=0.1)}
    return inputs


def normal(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    centered = z - z.mean(-1, keepdim=True)
    return weight * centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def network(z: Tensor, layers: Layers) -> Tensor:
    """f for ``z [H, 1, D]``."""
    for i in range(len(layers) // 2):
        if i:
            z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        z = z @ layers[2 * i] + layers[2 * i + 1]
    return z


def turned(z: Tensor, position: int) -> Tensor:
    """RoPE of ``z [H, D]``: each pair of neighbors as a complex number times one of length 1."""
    pairs = torch.view_as_complex(z.reshape(HEADS, -1, 2).contiguous())
    angle = position * THETA ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)


@dataclass
class Token:
    """Query, key and what f is to map the key to, each ``[H, 1, D]``, and the rate ``[H]``."""

    q: Tensor
    k: Tensor
    goal: Tensor
    rate: Tensor


def read(inputs: dict[str, Tensor], row: int, case: Case) -> list[Token]:
    """What a stream's tokens give to the inner loop."""
    x, width = inputs["x"][row], HEADS * HEAD
    projected = {name: x @ inputs[f"{name}.weight"].T + inputs[f"{name}.bias"] for name in ("wq", "wk")}
    source = x
    if case.embedding:
        source = inputs["embeddings"][row]
        source = source / source.square().mean(-1, keepdim=True).sqrt()
    values = source @ inputs["wv.weight"].T + inputs["wv.bias"]
    tokens = []
    for t in range(LENGTH):
        mixed = []
        for name, taps in (("wq", "query_taps"), ("wk", "key_taps")):
            z = projected[name][t]
            if case.taps is not None:
                z = torch.zeros(width, dtype=torch.float64)
                for lag in range(min(case.taps, t + 1)):
                    z = z + inputs[taps][:, lag] * projected[name][t - lag]
            z = z.view(HEADS, HEAD)
            mixed.append(turned(z / z.norm(dim=-1, keepdim=True), t % case.chunk_size))
        q, k = mixed
        v = values[t].view(HEADS, HEAD)
        goal = v
        if case.inner_norm:  # LN(f(k)) is to be v' - k, where v' = k + the standardized difference
            difference = v - k
            scaled = (difference - difference.mean(-1, keepdim=True)) / (difference.std(-1, keepdim=True) + TARGET_EPS)
            goal = inputs["norm_weight"] * scaled + inputs["norm_bias"]
        rate = torch.sigmoid((inputs["lr_weight"][:, 0] @ x[t]) + inputs["lr_bias"][:, 0]) * case.base_lr / HEAD
        tokens.append(Token(q[:, None], k[:, None], goal[:, None], rate))
    return tokens


class Memory:
    """One stream's fast weights, and their velocity."""

    def __init__(self, inputs: dict[str, Tensor], case: Case) -> None:
        self.inputs, self.case = inputs, case
        count = len(case.widths) + 1
        self.layers = [inputs[f"{part}.{i}"] for i in range(count) for part in ("weight", "bias")]
        self.velocity = [torch.zeros_like(part) for part in self.layers]

    def scale(self, position: int) -> Tensor:
        """``[]``: what a query at a position of its chunk multiplies the sum of gradients by."""
        if not self.case.causal:
            return torch.tensor(1 / self.case.chunk_size, dtype=torch.float64)
        return torch.clamp(1 / (position + 1) + self.inputs["token_scale_offset"][position], min=0)

    def out(self, z: Tensor, layers: Layers) -> Tensor:
        f = network(z, layers)
        if not self.case.inner_norm:
            return f
        return normal(f, self.inputs["norm_weight"][:, None], self.inputs["norm_bias"][:, None], NORM_EPS)

    def gradients(self, tokens: Sequence[Token]) -> list[Layers]:
        """Of each token's loss, rate / 2 |f(k) - goal|^2 (with the inner norm LN(f(k))), at the weights as they are."""
        found = []
        for token in tokens:
            error = (self.out(token.k, self.layers) - token.goal).square().sum((1, 2))
            found.append(list(torch.autograd.grad((token.rate * error / 2).sum(), self.layers, create_graph=True)))
        return found

    def stepped(self, gradients: Sequence[Layers], scale: Tensor) -> tuple[Layers, Layers]:
        """The weights and the velocity after a step."""
        velocity = [-scale * sum(parts) for parts in zip(*gradients, strict=True)]
        if self.case.momentum is not None:
            eta = torch.sigmoid(self.inputs["momentum_logit"])[:, None, None]
            velocity = [eta * old + new for old, new in zip(self.velocity, velocity, strict=True)]
        return [part + moved for part, moved in zip(self.layers, velocity, strict=True)], velocity

    def chunk(self, tokens: Sequence[Token]) -> list[Tensor]:
        """Answers ``[H, 1, D]`` to the queries of a chunk's tokens; a whole chunk then moves the weights."""
        gradients, answers = self.gradients(tokens), []
        for position, token in enumerate(tokens):
            seen = gradients[: position + 1] if self.case.causal else gradients
            answer = self.out(token.q, self.stepped(seen, self.scale(position))[0])
            answers.append(token.q + answer if self.case.inner_norm else answer)
        if len(tokens) == self.case.chunk_size:
            for step in range(self.case.inner_steps):
                gradients = self.gradients(tokens) if step else gradients
                self.layers, self.velocity = self.stepped(gradients, self.scale(self.case.chunk_size - 1))
        return answers


def stream(inputs: dict[str, Tensor], row: int, case: Case) -> tuple[Tensor, Layers]:
    """One stream's outputs ``[T, H D]``, and its fast weights after the last whole chunk."""
    tokens, memory = read(inputs, row, case), Memory(inputs, case)
    answers: list[Tensor] = []
    for start in range(0, LENGTH, case.chunk_size):
        answers += memory.chunk(tokens[start : start + case.chunk_size])
    z = normal(torch.stack(answers).flatten(1), inputs["post_norm.weight"], inputs["post_norm.bias"], POST_EPS)
    added = z @ inputs["wo.weight"].T + inputs["wo.bias"]
    return inputs["x"][row] + torch.tanh(inputs["alpha"]) * added, memory.layers


def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a case, and its metadata."""
    case, generator = CASES[name], torch.Generator().manual_seed(200 + list(CASES).index(name))
    inputs = drawn_inputs(case, generator)
    for tensor in inputs.values():
        tensor.requires_grad_()
    rows = [stream(inputs, row, case) for row in range(BATCH)]
    y = torch.stack([row[0] for row in rows])
    after = [torch.stack(parts) for parts in zip(*(row[1] for row in rows), strict=True)]
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    tensors = {f"in.{key}": tensor for key, tensor in inputs.items()}
    tensors |= {f"grad.{key}": gradient for key, gradient in zip(inputs, gradients, strict=True)}
    tensors |= {"in.cotangent": cotangent, "out.y": y}
    for i in range(len(after) // 2):
        tensors |= {f"out.weight.{i}": after[2 * i], f"out.bias.{i}": after[2 * i + 1]}
    metadata = {
        "op": "hybrid_options", "source": "definition", "chunk_size": str(case.chunk_size),
        "layers": str(len(case.widths) + 1), "causal": str(case.causal).lower(), "num_heads": str(HEADS),
        "base_lr": repr(case.base_lr), "value": "embedding" if case.embedding else "hidden",
        "inner_norm": str(case.inner_norm).lower(), "inner_steps": str(case.inner_steps), "activation": "gelu_tanh",
    }  # fmt: skip
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}, metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        tensors, metadata = vectors(name)
        save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
        print(folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
