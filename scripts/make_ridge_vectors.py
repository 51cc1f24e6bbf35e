#!/usr/bin/env python3
"""Reference vectors of the ridge memory, from its definition alone: nothing of the package is imported.

    python scripts/make_ridge_vectors.py FOLDER

Each token reads the solution of the normal equations over the tokens of all earlier chunks, which are summed anew for
each chunk; gradients are torch's automatic ones. docs/reference_vectors.md has the format.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CASES = {
    "ridge": {"chunk_size": 4, "keep": 1.0, "novelty": False},
    "ridge_decay": {"chunk_size": 5, "keep": 0.95, "novelty": False},
    "ridge_novelty": {"chunk_size": 3, "keep": 0.98, "novelty": True},
}
BATCH, LENGTH, HEADS, KEY, VALUE = 2, 18, 2, 6, 4


def solution(k: Tensor, v: Tensor, weight: Tensor, regularization: Tensor, keep: float) -> Tensor:
    """``[m, d]``: of the weighted tokens ``k [n, m]``, ``v [n, d]``, ``weight [n]``, the last of which is the newest.

    Each token multiplies what was known before it by ``keep``, and gives one coordinate, in turn, the prior back that
    all of them lost: regularization (1 - keep) m.
    """
    count, width = k.shape
    age = keep ** torch.arange(count - 1, -1, -1, dtype=k.dtype)
    prior = torch.full((width,), keep**count, dtype=k.dtype)
    for n in range(count):
        given = torch.nn.functional.one_hot(torch.tensor(n % width), width).to(k.dtype)
        prior = prior + given * (1 - keep) * width * age[n]
    information = regularization * torch.diag(prior) + (k.T * (weight * age)) @ k
    return torch.linalg.solve(information, (k.T * (weight * age)) @ v)


def stream(inputs: dict[str, Tensor], row: int, head: int, chunk_size: int, keep: float) -> tuple[Tensor, Tensor]:
    """What one head of one stream reads, ``[T, d]``, and its solution after the last whole chunk."""
    q, k, v, strength = (inputs[name][row, :, head] for name in ("q", "k", "v", "strength"))
    weights: list[Tensor] = []
    found, read = torch.zeros(KEY, VALUE, dtype=q.dtype), []
    for t in range(LENGTH + 1):
        if t % chunk_size == 0 and t > 0:
            found = solution(k[:t], v[:t], torch.stack(weights), inputs["regularization"][head], keep)
        if t == LENGTH:
            break
        read.append(q[t] @ found)
        weight = strength[t]
        if "novelty_offset" in inputs:
            said = k[t] @ found
            cosine = said @ v[t] / torch.sqrt((said @ said) * (v[t] @ v[t]) + 1e-6)
            weight = weight * torch.sigmoid(inputs["novelty_offset"][head] - inputs["novelty_slope"][head] * cosine)
        weights.append(weight)
    return torch.stack(read), found


def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a case, and its metadata."""
    case, generator = CASES[name], torch.Generator().manual_seed(list(CASES).index(name))
    chunk_size, keep = int(case["chunk_size"]), float(case["keep"])

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(drawn(BATCH, LENGTH, HEADS, KEY) + 0.5, dim=-1) for _ in range(2))
    inputs = {
        "q": q, "k": k, "v": drawn(BATCH, LENGTH, HEADS, VALUE), "strength": drawn(BATCH, LENGTH, HEADS).sigmoid(),
        "regularization": torch.tensor([0.05, 0.7], dtype=torch.float64),
    }  # fmt: skip
    if case["novelty"]:
        inputs |= {"novelty_offset": 1 + drawn(HEADS), "novelty_slope": 3 + drawn(HEADS)}
    for tensor in inputs.values():
        tensor.requires_grad_()
    parts = [[stream(inputs, row, head, chunk_size, keep) for head in range(HEADS)] for row in range(BATCH)]
    y = torch.stack([torch.stack([read for read, _ in row], dim=1) for row in parts])  # [B, T, H, d]
    after = torch.stack([torch.stack([found for _, found in row]) for row in parts])  # [B, H, m, d]
    cotangent = drawn(*y.shape)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    tensors = {f"in.{key}": tensor for key, tensor in inputs.items()}
    tensors |= {f"grad.{key}": gradient for key, gradient in zip(inputs, gradients, strict=True)}
    tensors |= {"in.cotangent": cotangent, "out.y": y, "out.solution": after}
    metadata = {"op": "ridge", "source": "definition", "chunk_size": str(chunk_size), "keep": repr(keep)}
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
