"""The fast network of the inner loop, its gradients at a chunk's keys, and the update at the chunk's end.

``chunk`` and ``recurrent`` compute with these; ``inner_loop`` says what.

Shape legend: B streams, H heads, C tokens a chunk, D head width, L layers. Everything has the dtype of the fast
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.state import row_mask
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.hybrid.objective import Objective


@dataclass
class FastNetwork:
    """Weights ``[B, H, in, out]`` and biases ``[B, H, 1, out]`` of each layer.

    Attributes:
        velocity: of each weight and then of each bias, where the updates have momentum; empty where they do not.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...] = ()


@dataclass
class ChunkMemory:
    """A chunk's keys as the updates need them, per layer: inputs ``a [B, H, C, in]``, gradients ``g [B, H, C, out]``.

    Gradients include the learning rate. Slots that hold no token have g = 0, so they change nothing.

    Attributes:
        tokens: the values ``[B, H, C, D]`` and the rates ``[B, H, C, 1]``, where a chunk takes several steps and their
            gradients are computed again; empty where it takes one.
    """

    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...] = ()


@dataclass
class UpdateRule:
    """How a finished chunk updates the fast weights: ``steps`` gradient steps, with or without momentum.

    Each step takes the gradients of all of the chunk's tokens at the weights that the step before left (the first at
    those the chunk started from). With ``momentum`` eta, ``[H or 1, 1, 1]``, a step is S <- eta S - scale * sum of
    gradients, W <- W + S (Behrouz et al. 2024, arXiv:2501.00663, by chunk); without, W <- W - scale * sum. Query n of
    the chunk sees the first step over the keys up to its own: W + eta S - scale[n] * sum.

    A step that no token has a gradient for (updates are disabled) changes neither W nor S, and query n sees W.
    """

    momentum: Tensor | None = None
    steps: int = 1

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """The tensors that a gradient may be taken of."""
        return () if self.momentum is None else (self.momentum,)


def forward(x: Tensor, fast: FastNetwork) -> Tensor:
    """f(x; W) for ``x [B, H, C, D]``."""
    for i, (weight, bias) in enumerate(zip(fast.weights, fast.biases, strict=True)):
        x = (F.gelu(x, approximate="tanh") if i else x) @ weight + bias
    return x


def key_pass(k: Tensor, v: Tensor, lr: Tensor, fast: FastNetwork, norm: Objective) -> ChunkMemory:
    """Forward the keys ``k [B, H, C, D]`` and take the gradient of each token's loss at the weights ``fast``.

    ``v`` is like ``k``; ``lr [B, H, C, 1]`` weighs each token's loss.
    """
    inputs, outputs = [k], [k @ fast.weights[0] + fast.biases[0]]
    for weight, bias in zip(fast.weights[1:], fast.biases[1:], strict=True):
        inputs.append(F.gelu(outputs[-1], approximate="tanh"))
        outputs.append(inputs[-1] @ weight + bias)
    gradient = norm.loss_gradient(outputs[-1], norm.target(v, k)) * lr
    gradients = [gradient]
    for weight, output in zip(fast.weights[:0:-1], outputs[-2::-1], strict=True):
        gradient = torch.ops.aten.gelu_backward(gradient @ weight.mT, output, approximate="tanh")
        gradients.insert(0, gradient)
    return ChunkMemory(tuple(inputs), tuple(gradients))


def chunk_gradients(
    k: Tensor, v: Tensor, lr: Tensor, fast: FastNetwork, norm: Objective, token_scale: Tensor
) -> tuple[ChunkMemory, Tensor | None]:
    """``key_pass``, and ``[B, C]`` bool, which tokens may update the fast weights; None: all of them.

    Where the loss's gradient has no bound, gradient descent diverges on too large values or by too large a rate, until
    nothing is finite. A token whose share of an update reaches ``largest_weight`` is left out, and so are the tokens of
    a row whose weights have reached it.

    Args:
        token_scale: ``[C]`` of a whole chunk.
    """
    memory = key_pass(k, v, lr, fast, norm)
    if norm.bounded:
        return memory, None
    bounded = _bounded(memory, fast, token_scale)
    mask = bounded[:, None, :, None]  # [B, C] -> [B, 1, C, 1], for [B, H, C, in] and [B, H, C, out]
    inputs, gradients = (tuple(torch.where(mask, t, 0) for t in part) for part in (memory.inputs, memory.gradients))
    return ChunkMemory(inputs, gradients), bounded


def largest_weight(dtype: torch.dtype, layers: int) -> float:
    """What fast weights stay below where nothing else bounds them: products of ``layers`` of them are then finite."""
    return float(largest_factor(dtype) ** (1 / layers))


@torch.no_grad()
def _bounded(memory: ChunkMemory, fast: FastNetwork, token_scale: Tensor) -> Tensor:
    """``[B, C]`` bool: tokens whose share of any update is below ``largest_weight``, in rows whose weights are."""
    limit = largest_weight(memory.inputs[0].dtype, len(fast.weights))
    # Query n subtracts scale[n] times a sum of n + 1 gradients: so many times the largest of them at most.
    reach = (token_scale * torch.arange(1, token_scale.shape[0] + 1, device=token_scale.device)).max()
    bounded = torch.ones_like(memory.inputs[0][:, 0, :, 0], dtype=torch.bool)  # [B, C]
    for a, g in zip(memory.inputs, memory.gradients, strict=True):
        share = reach * _largest(a, -1).clamp(min=1) * _largest(g, -1)  # [B, H, C]
        bounded = bounded & (share < limit).all(1)
    for tensor in (*fast.weights, *fast.biases):
        bounded = bounded & (_largest(tensor, (1, 2, 3)) < limit)[:, None]  # [B] -> [B, 1]
    return bounded


def _all_bounded(memory: ChunkMemory, fast: FastNetwork, scale: Tensor) -> Tensor:
    """``[B]`` bool: rows all of whose tokens are ``_bounded``, for an update of the chunk scaled by ``scale []``."""
    return _bounded(memory, fast, scale[None] * memory.inputs[0].shape[2]).all(1)


def _largest(tensor: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(tensor, torch.inf, dim=dim)
    return found


def query_pass(
    q: Tensor,
    fast: FastNetwork,
    memory: ChunkMemory,
    norm: Objective,
    scale: Tensor,
    mask: Tensor | None,
    momentum: Tensor | None = None,
) -> Tensor:
    """The output of the queries ``q [B, H, Q, D]``: with the inner LayerNorm ``q + LN(f(q; W_n))``, else ``f(q; W_n)``.

    Args:
        scale: token scale of each query, ``[Q, 1]`` or ``[B, 1, Q, 1]``.
        mask: bool, true where query n may use key t, broadcast to ``[B, H, Q, C]``; None: every query uses every key.
        momentum: as in ``UpdateRule``. A query sees the velocity once one of its keys has a gradient.
    """
    x = q
    last = len(fast.weights) - 1
    carried = None if momentum is None else torch.where(_has_gradient(memory, mask), momentum, 0)  # [B, H or 1, Q, 1]
    for i, (weight, bias) in enumerate(zip(fast.weights, fast.biases, strict=True)):
        affinity = x @ memory.inputs[i].mT + 1  # [B, H, Q, C]
        if mask is not None:
            affinity = affinity.masked_fill(~mask, 0)  # [B, H, Q, C]
        output = x @ weight + bias - scale * (affinity @ memory.gradients[i])
        if carried is not None:
            output = output + carried * (x @ fast.velocity[i] + fast.velocity[last + 1 + i])
        x = output if i == last else F.gelu(output, approximate="tanh")
    return norm.output(q, x)


def _has_gradient(memory: ChunkMemory, mask: Tensor | None) -> Tensor:
    """``[B, 1, Q or 1, 1]`` bool: whether a query has a key with a gradient."""
    has_gradient = (memory.gradients[-1] != 0).any(-1).any(1)[:, None, None]  # [B, 1, 1, C]
    return (has_gradient if mask is None else has_gradient & mask).any(-1, keepdim=True)


def applied_scale(scale: Tensor, rows: Tensor) -> Tensor:
    """``[B, 1, 1, 1]``: ``scale`` where ``rows [B]``, and elsewhere zero, which changes no bit of finite weights."""
    return torch.where(rows[:, None, None, None], scale, 0)


def after_chunk(
    fast: FastNetwork, memory: ChunkMemory, norm: Objective, scale: Tensor, rows: Tensor, rule: UpdateRule
) -> FastNetwork:
    """The weights after a whole chunk, in rows where ``rows [B]`` is true; those of others stay.

    Args:
        memory: the chunk's keys, with gradients at the weights ``fast``.
        scale: ``[]``, the token scale of the chunk's last token.
    """
    for step in range(rule.steps):
        if step:
            memory = _again(memory, fast, norm)
            rows = rows if norm.bounded else rows & _all_bounded(memory, fast, scale)
        fast = _after_step(fast, memory, scale, rows, rule.momentum)
    return fast


def _after_step(
    fast: FastNetwork, memory: ChunkMemory, scale: Tensor, rows: Tensor, momentum: Tensor | None
) -> FastNetwork:
    applied, weights, biases = applied_scale(scale, rows), [], []
    if momentum is not None:
        rows = _moving(memory, rows)
        velocity = _velocity_after(fast, memory, applied, rows, momentum)
        now = (*fast.weights, *fast.biases)
        moved = [tensor + torch.where(row_mask(rows, s), s, 0) for tensor, s in zip(now, velocity, strict=True)]
        layers = len(fast.weights)
        return FastNetwork(tuple(moved[:layers]), tuple(moved[layers:]), velocity)
    for weight, bias, a, g in zip(fast.weights, fast.biases, memory.inputs, memory.gradients, strict=True):
        scaled = applied * g
        weights.append(weight - a.mT @ scaled)
        biases.append(bias - scaled.sum(-2, keepdim=True))
    return FastNetwork(tuple(weights), tuple(biases))


def _velocity_after(
    fast: FastNetwork, memory: ChunkMemory, applied: Tensor, rows: Tensor, momentum: Tensor
) -> tuple[Tensor, ...]:
    """S after a step, of each weight and then each bias; unchanged where not ``rows [B]``."""
    layers = len(fast.weights)
    weights, biases = [], []
    for i, (a, g) in enumerate(zip(memory.inputs, memory.gradients, strict=True)):
        scaled = applied * g
        weights.append(momentum * fast.velocity[i] - a.mT @ scaled)
        biases.append(momentum * fast.velocity[layers + i] - scaled.sum(-2, keepdim=True))
    after = zip(weights + biases, fast.velocity, strict=True)
    return tuple(torch.where(row_mask(rows, s), s, before) for s, before in after)


def descend_(
    fast: FastNetwork, memory: ChunkMemory, norm: Objective, scale: Tensor, rows: Tensor, rule: UpdateRule
) -> None:
    """``after_chunk`` in place. A row that is not among ``rows [B]`` keeps its bits, by adding exact zeros.

    The same operations run whether or not a chunk is finished, so that a captured graph needs no branch. Inputs of such
    a row may be anything; its gradients are finite.
    """
    for step in range(rule.steps):
        if step:
            memory = _again(_only(memory, rows), fast, norm)
            rows = rows if norm.bounded else rows & _all_bounded(memory, fast, scale)
        _step_(fast, memory, applied_scale(-scale, rows), rows, rule.momentum)


def _step_(fast: FastNetwork, memory: ChunkMemory, factor: Tensor, rows: Tensor, momentum: Tensor | None) -> None:
    layers = len(fast.weights)
    weights, biases, moving = fast.weights, fast.biases, rows
    if momentum is not None:
        moving = _moving(memory, rows)
        factors = torch.where(moving[:, None, None, None], momentum, 1)  # [B, H or 1, 1, 1]
        for velocity in fast.velocity:
            velocity.mul_(factors)
        weights, biases = fast.velocity[:layers], fast.velocity[layers:]
    for weight, bias, a, g in zip(weights, biases, memory.inputs, memory.gradients, strict=True):
        scaled = g * factor
        finished = torch.where(row_mask(rows, a), a, 0)
        # [B, H, any, any] -> [B H, any, any]
        weight.flatten(0, 1).baddbmm_(finished.flatten(0, 1).mT, scaled.flatten(0, 1))
        bias.add_(scaled.sum(-2, keepdim=True))
    if momentum is not None:
        for tensor, velocity in zip((*fast.weights, *fast.biases), fast.velocity, strict=True):
            tensor.add_(torch.where(row_mask(moving, velocity), velocity, 0))


def _moving(memory: ChunkMemory, rows: Tensor) -> Tensor:
    """``[B]``: those of ``rows`` where some token has a gradient. Momentum alone is no reason to move."""
    return rows & (memory.gradients[-1] != 0).flatten(1).any(1)


def _again(memory: ChunkMemory, fast: FastNetwork, norm: Objective) -> ChunkMemory:
    """The same tokens' inputs and gradients at other weights."""
    values, rates = memory.tokens
    again = key_pass(memory.inputs[0], values, rates, fast, norm)
    return ChunkMemory(again.inputs, again.gradients, memory.tokens)


def _only(memory: ChunkMemory, rows: Tensor) -> ChunkMemory:
    """Keys, values and rates of ``rows [B]``, and zeros elsewhere: nothing that a row does not hold is multiplied."""
    keys, *tokens = (torch.where(row_mask(rows, part), part, 0) for part in (memory.inputs[0], *memory.tokens))
    return ChunkMemory((keys, *memory.inputs[1:]), memory.gradients, tuple(tokens))
