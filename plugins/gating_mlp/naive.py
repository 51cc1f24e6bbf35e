"""The naive form of in-place TTT, from its definition: one chunk after the other, the fast weight written out. Slow.

Shape legend: T tokens, d width, h hidden width, K taps. One stream at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filtered(target: Tensor, conv: Tensor, left: int) -> Tensor:
    """Depthwise filter over one chunk: ``target [c, d]`` and ``conv [d, K]``, zero beyond the chunk's edges.

    Tap k weighs the token at distance ``k - left``.
    """
    rows = []
    for c in range(target.shape[0]):
        total = torch.zeros_like(target[0])
        for k in range(conv.shape[1]):
            source = c + k - left
            if 0 <= source < target.shape[0]:
                total = total + conv[:, k] * target[source]
        rows.append(total)
    return torch.stack(rows)


def naive_in_place(
    hidden: Tensor, target: Tensor, w_down: Tensor, conv: Tensor, projection: Tensor | None, lr: Tensor, *,
    chunk_size: int, left: int, decay: float = 0.0, clip: float | None = None, update: str = "hebbian",
    ridge: float | Tensor = 0.0, updated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply, then update, chunk by chunk. With a correcting update, errors are before the projection.

    Args:
        hidden: ``[T, h]``, the gated hidden activation; with unit keys of norm one (W_0 then does not see it as it is).
        target: ``[T, d]``.
        w_down: ``[d, h]``, the learned down projection W_0.
        conv: ``[d, K]``; projection: ``[d, d]`` or None for the identity.
        lr: ``[T]`` per token.
        update: ``hebbian``, ``gradient`` or ``ridge``, with l in ``ridge``.
        updated: ``[T]`` bool, tokens whose updates are enabled (others have an lr of zero); a chunk without any changes
            nothing. None: all.

    Returns:
        ``y [T, d]`` and the accumulated update ``[d, h]`` after the last full chunk.
    """
    fast = torch.zeros_like(w_down)  # before the projection
    outputs = []
    for start in range(0, hidden.shape[0], chunk_size):
        keys, wanted = hidden[start : start + chunk_size], target[start : start + chunk_size]
        projected = fast if projection is None else projection.T @ fast
        outputs.append(keys @ (w_down + projected).T)
        enabled = updated is None or bool(updated[start : start + chunk_size].any())
        if keys.shape[0] == chunk_size and enabled:
            values, rate = filtered(wanted, conv, left), lr[start : start + chunk_size]
            step = torch.zeros_like(fast)
            for key, write in zip(keys, writes(update, keys, values, keys @ fast.T, rate, ridge), strict=True):
                step = step + torch.outer(write, key)
            if clip is not None:
                norm = (step if projection is None else projection.T @ step).norm()
                step = step * torch.clamp(clip / norm, max=1.0)
            fast = (1 - decay) * fast + step
    return torch.cat(outputs), fast if projection is None else projection.T @ fast  # [T, d], and [d, h]


def writes(update: str, keys: Tensor, values: Tensor, answers: Tensor, rate: Tensor, ridge: float | Tensor) -> Tensor:
    """``[c, d]``, what a chunk writes at each of its ``keys [c, h]``; ``values``, ``answers [c, d]``, ``rate [c]``."""
    if update == "hebbian":
        return rate[:, None] * values
    if update == "gradient":
        return rate[:, None] * (values - answers)
    # (K K^T + l diag(1 / b))^-1 E = diag(b) (K K^T diag(b) + l I)^-1 E, which has a meaning where b is zero
    system = keys @ keys.T * rate + ridge * torch.eye(len(keys)).to(keys)
    found: Tensor = rate[:, None] * torch.linalg.solve(system, values - answers)
    return found
