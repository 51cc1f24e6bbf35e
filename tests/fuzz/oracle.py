"""What every variant must compute, from its definition: float64, one stream, one head, one token at a time.

Written from the definitions alone, and shares no code with the package, so that both can be wrong only apart. Inner
gradients are taken by automatic differentiation of the inner loss, and can be differentiated again.

- The inner loop: Sun et al. 2024 (arXiv:2407.04620); the layer around it: Dalal et al. 2025 (arXiv:2504.05298).
- In-place TTT: the down projection of a gated MLP, updated once a chunk.

A token that is not finite takes no part: its output means nothing, no other token sees it, and the update of its chunk
is left out.

Shape legend: T tokens, D width, d width of a head, h hidden width of the gated MLP, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
"""By the names that the block gives them."""
Layers = list[tuple[Tensor, Tensor]]
"""Weight ``[in, out]`` and bias ``[out]`` of each layer of one head's fast network."""


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over all of ``x [d]``, by the biased variance."""
    centred = x - x.sum() / len(x)
    return centred / torch.sqrt((centred * centred).sum() / len(x) + eps) * weight + bias


def network(x: Tensor, layers: Layers) -> Tensor:
    for number, (weight, bias) in enumerate(layers):
        x = (gelu(x) if number else x) @ weight + bias
    return x


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """The pairs (0, 1), (2, 3), ... of ``x [d]`` turned by position * theta^(-2 i / d)."""
    turned = []
    for pair in range(len(x) // 2):
        angle = position * theta ** (-2 * pair / len(x))
        first, second = x[2 * pair], x[2 * pair + 1]
        turned += [
            first * math.cos(angle) - second * math.sin(angle), first * math.sin(angle) + second * math.cos(angle)
        ]  # fmt: skip
    return torch.stack(turned)


@dataclass
class HybridOptions:
    """The numbers that are not learned."""

    heads: int
    chunk: int
    base_lr: float
    causal: bool
    rope_theta: float
    norm_eps: float
    target_eps: float
    post_norm_eps: float


@dataclass
class HeadToken:
    """A token as one head sees it: query, key, target ``[d]`` and its learning rate."""

    query: Tensor
    key: Tensor
    target: Tensor
    rate: Tensor


class Hybrid:
    """One pass over one stream: TTT-Linear, TTT-MLP or deeper, by the number of fast layers."""

    def __init__(self, parameters: Parameters, options: HybridOptions, gate: str = "gate") -> None:
        self.parameters, self.options, self.gate = parameters, options, gate
        self.layers = len([name for name in parameters if name.startswith("fast_weight.")])
        self.fast = [self._initial(head) for head in range(options.heads)]
        self.seen: list[list[HeadToken] | None] = []
        """The unfinished chunk: what each head saw of each token; None for a token that is not finite."""

    def _initial(self, head: int) -> Layers:
        given = self.parameters
        return [(given[f"fast_weight.{i}"][head], given[f"fast_bias.{i}"][head, 0]) for i in range(self.layers)]

    def memory(self) -> dict[str, Tensor]:
        """The fast weights after the last finished chunk, by the names of a block's state, heads first."""
        found = {}
        for i in range(self.layers):
            found[f"weight.{i}"] = torch.stack([layers[i][0] for layers in self.fast])
            found[f"bias.{i}"] = torch.stack([layers[i][1][None] for layers in self.fast])
        return found

    def token(self, x: Tensor, embedding: Tensor, updates: bool = True) -> Tensor:
        """The output ``[D]`` of the next token ``x [D]``, which may depend on it and on earlier tokens alone."""
        assert self.options.causal
        self._hear(x, updates)
        y = self._output(x, len(self.seen) - 1)
        self._end_chunk()
        return y

    def sequence(self, x: Tensor) -> Tensor:
        """All outputs ``[T, D]`` of ``x [T, D]``; where it is not causal, a token sees all of its chunk."""
        size, outputs = self.options.chunk, []
        for start in range(0, len(x), size):
            tokens = x[start : start + size]
            for token in tokens:
                self._hear(token, True)
            outputs += [self._output(token, place) for place, token in enumerate(tokens)]
            self._end_chunk()
        return torch.stack(outputs)

    def _hear(self, x: Tensor, updates: bool) -> None:
        place = len(self.seen)
        finite = bool(x.isfinite().all()) and float(x.abs().max()) < 1e70
        self.seen.append(
            [self._head(x, head, place, updates) for head in range(self.options.heads)] if finite else None
        )

    def _head(self, x: Tensor, head: int, place: int, updates: bool) -> HeadToken:
        given, options = self.parameters, self.options
        width = len(x) // options.heads
        own = slice(head * width, (head + 1) * width)

        def projected(name: str) -> Tensor:
            return given[f"{name}.weight"][own] @ x + given[f"{name}.bias"][own]

        q, k, v = projected("wq"), projected("wk"), projected("wv")
        q, k = (rotate(each / torch.sqrt((each * each).sum()), place, options.rope_theta) for each in (q, k))
        difference = v - k
        centred = difference - difference.sum() / width
        deviation = torch.sqrt((centred * centred).sum() / (width - 1))
        target = given["norm_weight"][head] * centred / (deviation + options.target_eps) + given["norm_bias"][head]
        rate = options.base_lr * torch.sigmoid(given["lr_weight"][head, 0] @ x + given["lr_bias"][head, 0]) / width
        return HeadToken(q, k, target, rate if updates else 0 * rate)

    def _norm(self, z: Tensor, head: int) -> Tensor:
        given = self.parameters
        return layer_norm(z, given["norm_weight"][head], given["norm_bias"][head], self.options.norm_eps)

    def _gradient(self, token: HeadToken, head: int) -> list[Tensor]:
        """Of the token's loss at the chunk's first weights, for each weight and bias in turn."""
        # Names of their own for this token, so that the gradient is taken at these and nowhere else.
        layers = [(weight + 0, bias + 0) for weight, bias in self.fast[head]]
        error = self._norm(network(token.key, layers), head) - token.target
        loss = token.rate * 0.5 * (error * error).sum()
        return list(torch.autograd.grad(loss, [part for layer in layers for part in layer], create_graph=True))

    def _scale(self, place: int) -> Tensor:
        if not self.options.causal:
            return torch.tensor(1 / self.options.chunk, dtype=torch.float64)
        return torch.clamp(1 / (place + 1) + self.parameters["token_scale_offset"][place], min=0)

    def _moved(self, head: int, places: Sequence[int], scale: Tensor) -> Layers:
        """The chunk's first weights less ``scale`` times the gradients of the tokens at these places."""
        flat = [part for layer in self.fast[head] for part in layer]
        for place in places:
            token = self.seen[place]
            if token is not None:
                flat = [
                    part - scale * gradient
                    for part, gradient in zip(flat, self._gradient(token[head], head), strict=True)
                ]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _output(self, x: Tensor, place: int) -> Tensor:
        token = self.seen[place]
        if token is None:
            return x * math.nan
        places = range(place + 1) if self.options.causal else range(len(self.seen))
        parts = []
        for head, own in enumerate(token):
            layers = self._moved(head, places, self._scale(place))
            parts.append(own.query + self._norm(network(own.query, layers), head))
        given = self.parameters
        y = layer_norm(torch.cat(parts), given["post_norm.weight"], given["post_norm.bias"], self.options.post_norm_eps)
        return x + torch.tanh(given[self.gate]) * (given["wo.weight"] @ y + given["wo.bias"])

    def _end_chunk(self) -> None:
        if len(self.seen) < self.options.chunk:
            return
        if None not in self.seen:
            places, scale = range(len(self.seen)), self._scale(self.options.chunk - 1)
            self.fast = [self._moved(head, places, scale) for head in range(self.options.heads)]
        self.seen = []


def bidirectional(parameters: Parameters, options: HybridOptions, x: Tensor) -> Tensor:
    """``[T, D]``: forward over ``x [T, D]``, then over the reversed result, each with its own gate."""
    y = Hybrid(parameters, options).sequence(x)
    return Hybrid(parameters, options, "gate_reversed").sequence(y.flip(0)).flip(0)


@dataclass
class InPlaceOptions:
    """The numbers that are not learned; ``left`` is how many taps look back."""

    chunk: int
    lr: float
    left: int
    embeddings: bool
    decay: float
    clip: float | None


@dataclass
class InPlace:
    """In-place TTT over one stream: ``linear_in [2 h, D]`` (gate, then up) and ``linear_out [D, h]`` are the host's."""

    parameters: Parameters
    options: InPlaceOptions
    linear_in: Tensor
    linear_out: Tensor
    accumulated: Tensor = field(init=False)
    seen: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accumulated = torch.zeros_like(self.linear_out)

    def memory(self) -> dict[str, Tensor]:
        """What the finished chunks have added to the host's down projection, ``[D, h]``."""
        return {"accumulated": self.accumulated}

    def token(self, x: Tensor, embedding: Tensor, updates: bool = True) -> Tensor:
        """The MLP's output ``[D]`` for the next token ``x [D]``, without the residual."""
        gate, up = self.linear_in[: len(self.linear_in) // 2] @ x, self.linear_in[len(self.linear_in) // 2 :] @ x
        hidden = gate * torch.sigmoid(gate) * up
        target = embedding if self.options.embeddings else x
        rate = torch.tensor(self.options.lr, dtype=torch.float64)
        if "lr_weight" in self.parameters:
            rate = rate * 2 * torch.sigmoid(self.parameters["lr_weight"] @ x + self.parameters["lr_bias"][0])
        finite = bool(hidden.isfinite().all() and target.isfinite().all()) and float(hidden.abs().max()) < 1e70
        self.seen.append((hidden, target, rate if updates else 0 * rate) if finite else None)
        weight = self.linear_out
        if "w_down_change" in self.parameters:
            weight = weight + self.parameters["w_down_change"]
        y = (weight + self.accumulated) @ hidden
        if len(self.seen) == self.options.chunk:
            self._end_chunk()
        return y

    def sequence(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """All outputs ``[T, D]``."""
        return torch.stack([self.token(token, embedding) for token, embedding in zip(x, embeddings, strict=True)])

    def _end_chunk(self) -> None:
        update = torch.zeros_like(self.accumulated)
        if None not in self.seen:
            for place, (hidden, _, rate) in enumerate(self.seen):
                update = update + rate * torch.outer(self._value(place), hidden)
            norm = torch.sqrt((update * update).sum())
            if self.options.clip is not None and float(norm) > self.options.clip:
                update = update * self.options.clip / norm
        self.accumulated = (1 - self.options.decay) * self.accumulated + update
        self.seen = []

    def _value(self, place: int) -> Tensor:
        """``[D]``: the chunk's own targets through the filter at this place, then projected."""
        taps = self.parameters["conv"][:, 0]  # [D, K]
        total = torch.zeros(len(taps), dtype=torch.float64)
        for tap in range(taps.shape[1]):
            source = place + tap - self.options.left
            if 0 <= source < len(self.seen):
                total = total + taps[:, tap] * self.seen[source][1]
        return total @ self.parameters["projection"]
