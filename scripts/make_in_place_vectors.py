#!/usr/bin/env python3
"""Reference vectors of in-place TTT with its options, from the definition alone: nothing of the package is imported.

    python scripts/make_in_place_vectors.py FOLDER

One stream after the other, one token after the other. A gradient step is torch's gradient of the chunk's loss; a ridge
step solves the normal equations over the hidden width. Gradients are torch's automatic ones. docs/reference_vectors.md
has the format.

Shape legend: T tokens, C tokens a chunk, d width, h hidden width, K taps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer's options; ``next_frame``: the filter is one at the next token, ``silent``: the projection is zero."""

    update: str
    keys: str = "raw"
    target_norm: bool = False
    chunk_size: int = 4
    kernel: int = 3
    rate: float = 0.3
    learned_rate: bool = False
    keep: float = 1.0
    read_scale: float = 1.0
    success_gate: bool = False
    next_frame: bool = False
    silent: bool = False
    width: int = 4
    hidden: int = 6


CASES = {
    "in_place_gradient": Case(update="gradient", keys="unit", target_norm=True, keep=0.9, learned_rate=True),
    "in_place_ridge": Case(update="ridge", chunk_size=5, width=6, hidden=12, kernel=4),
    "in_place_ridge_unit": Case(
        update="ridge", keys="unit", target_norm=True, rate=0.9, learned_rate=True, keep=0.95, kernel=5
    ),
    "in_place_gate": Case(update="hebbian", keys="unit", success_gate=True, chunk_size=3, read_scale=2.0),
    "in_place_start": Case(
        update="gradient", keys="unit", target_norm=True, next_frame=True, silent=True, read_scale=2.0, kernel=5
    ),
    "in_place_shipped": Case(
        update="ridge", keys="unit", target_norm=True, rate=1.0, learned_rate=True, next_frame=True, read_scale=8.0,
        success_gate=True, kernel=5,
    ),
}  # fmt: skip
BATCH, LENGTH, GATE_TAPS = 2, 14, 4


def drawn_inputs(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    def drawn(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    d, h = case.width, case.hidden
    conv, proj = drawn(d, 1, case.kernel, size=0.5), drawn(d, d, size=0.5)
    if case.next_frame:
        conv = torch.zeros_like(conv)
        conv[:, :, (case.kernel - 1) // 2 + 1] = 1
    if case.silent:
        proj = torch.zeros_like(proj)
    inputs = {
        "x": drawn(BATCH, LENGTH, d), "target": drawn(BATCH, LENGTH, d), "linear_in": drawn(2 * h, d, size=0.7),
        "linear_out": drawn(d, h, size=0.4), "conv": conv, "proj": proj,
    }  # fmt: skip
    if case.learned_rate:
        inputs |= {"lr_weight": drawn(d, size=0.5), "lr_bias": drawn(1)}
    if case.update == "ridge":
        inputs["log_ridge"] = drawn(1, size=0.5) - 1
    if case.success_gate:
        inputs |= {"success_bias": drawn(1) - 1, "success_slope": drawn(1) + 3}
        inputs["success_weights"] = 0.25 + drawn(1, GATE_TAPS, size=0.1)
    return inputs


def stream(inputs: dict[str, Tensor], row: int, case: Case) -> tuple[Tensor, Tensor]:
    """One stream's outputs ``[T, d]``, and what it has added to the down projection, ``[d, h]``."""
    fast = torch.zeros(case.width, case.hidden, dtype=torch.float64)
    outputs: list[Tensor] = []
    chunk: list[tuple[Tensor, Tensor, Tensor]] = []
    before, scores = torch.zeros(case.width, dtype=torch.float64), []
    for x, given in zip(inputs["x"][row], inputs["target"][row], strict=True):
        gate, up = (inputs["linear_in"] @ x).chunk(2)
        hidden = gate / (1 + torch.exp(-gate)) * up
        key = hidden / hidden.square().sum().sqrt() if case.keys == "unit" else hidden
        target = given / given.square().mean().sqrt() if case.target_norm else given
        answer = fast @ key
        trust = torch.ones((), dtype=torch.float64)
        if case.success_gate:
            known = bool(before.any())
            cosine = before @ target / (before.norm() * target.norm()) if known else 0 * before.sum()
            scores = [cosine, *scores][:GATE_TAPS]
            mean = sum((w * s for w, s in zip(inputs["success_weights"][0], scores, strict=False)), 0 * cosine)
            trust = torch.sigmoid(inputs["success_bias"] + inputs["success_slope"] * mean)
        before = answer
        outputs.append(inputs["linear_out"] @ hidden + case.read_scale * trust * (inputs["proj"].T @ answer))
        chunk.append((key, target, strength(inputs, x, case)))
        if len(chunk) == case.chunk_size:
            fast = case.keep * fast + step(inputs, chunk, fast, case)
            chunk = []
    return torch.stack(outputs), case.read_scale * inputs["proj"].T @ fast


def strength(inputs: dict[str, Tensor], x: Tensor, case: Case) -> Tensor:
    """b ``[]`` of a token ``x [d]``."""
    if not case.learned_rate:
        return torch.tensor(case.rate, dtype=torch.float64)
    most = 2 * case.rate if case.update == "hebbian" else case.rate
    return (most * torch.sigmoid(inputs["lr_weight"] @ x + inputs["lr_bias"]))[0]


def step(inputs: dict[str, Tensor], chunk: list[tuple[Tensor, Tensor, Tensor]], fast: Tensor, case: Case) -> Tensor:
    """``[d, h]``: what a whole chunk of (key, target, strength) adds to ``fast [d, h]``."""
    keys, targets, rates = (torch.stack(parts) for parts in zip(*chunk, strict=True))
    back, taps = (case.kernel - 1) // 2, inputs["conv"][:, 0]
    wanted = []
    for position in range(len(chunk)):
        reached = [(tap, position + tap - back) for tap in range(case.kernel)]
        wanted.append(sum(taps[:, tap] * targets[at] for tap, at in reached if 0 <= at < len(chunk)))
    values = torch.stack([value for value in wanted if isinstance(value, Tensor)])
    if case.update == "hebbian":
        return torch.einsum("c,cd,ch->dh", rates, values, keys)
    if case.update == "gradient":
        start = fast if fast.requires_grad else fast.clone().requires_grad_()
        loss = (rates * (values - keys @ start.T).square().sum(-1)).sum() / 2
        return -torch.autograd.grad(loss, start, create_graph=True)[0]
    # X that minimises sum b |v - (D + X) k|^2 + l |X|^2: X (sum b k k^T + l I) = sum b (v - D k) k^T
    weighted = rates[:, None] * keys
    system = weighted.T @ keys + inputs["log_ridge"].exp() * torch.eye(case.hidden, dtype=torch.float64)
    return torch.linalg.solve(system, weighted.T @ (values - keys @ fast.T)).T


def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a case, and its metadata."""
    case, generator = CASES[name], torch.Generator().manual_seed(100 + list(CASES).index(name))
    inputs = drawn_inputs(case, generator)
    for tensor in inputs.values():
        tensor.requires_grad_()
    rows = [stream(inputs, row, case) for row in range(BATCH)]
    y, update = (torch.stack(parts) for parts in zip(*rows, strict=True))
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    tensors = {f"in.{key}": tensor for key, tensor in inputs.items()}
    tensors |= {f"grad.{key}": gradient for key, gradient in zip(inputs, gradients, strict=True)}
    tensors |= {"in.cotangent": cotangent, "out.y": y, "out.update": update}
    metadata = {
        "op": "in_place_options", "source": "definition", "chunk_size": str(case.chunk_size), "update": case.update,
        "keys": case.keys, "target_norm": str(case.target_norm).lower(), "learning_rate": repr(case.rate),
        "keep": repr(case.keep), "read_scale": repr(case.read_scale), "conv_kernel_size": str(case.kernel),
        "activation": "silu",
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
