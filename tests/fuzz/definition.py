"""The oracle: what the layers compute, from their published definitions, so simple that reading it checks it.

Sources: TTT (Sun et al., arXiv:2407.04620) for the inner loop; Dalal et al. (arXiv:2504.05298) for the layer around it;
in-place TTT as ``plugins/gating_mlp/README.md`` states it. Nothing here is imported from the package, and nothing was
taken from its code: float64, one stream, one token at a time, each inner gradient by ``torch.autograd``. No dual form,
no masks, no batches. Parameters have the names that ``docs/reference_vectors.md`` gives them.

Shape legend: T tokens of one stream, D width, H heads of width Dh, C tokens a chunk, K taps, h hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def gelu(z: Tensor) -> Tensor:
    """Hendrycks and Gimpel (arXiv:1606.08415), the tanh form."""
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over the last dimension; Ba et al. (arXiv:1607.06450), the variance divided by n."""
    deviation = z - z.mean(-1, keepdim=True)
    return weight * deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def rotate(z: Tensor, position: int, theta: float) -> Tensor:
    """``z [H, Dh]``: RoPE (Su et al., arXiv:2104.09864, equation 34). Pair i is numbers 2i and 2i + 1."""
    width, turned = z.shape[-1], []
    for pair in range(width // 2):
        angle = position * theta ** (-2 * pair / width)
        a, b = z[:, 2 * pair], z[:, 2 * pair + 1]
        turned += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(turned, dim=-1)


# ---- the inner loop of the hybrid variants


@dataclass(frozen=True)
class Token:
    """What one token gives to the inner loop: query, key and value ``[H, Dh]``, and the rate ``[H]`` of its key."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor


class InnerLoop:
    """One stream's fast weights: an MLP per head that learns to map k to v - k, or without a norm k to v.

    Args:
        weights, biases: of each layer, ``[H, in, out]`` and ``[H, 1, out]``.
        norm: weight and bias ``[H, Dh]`` of the LayerNorm at the network's end, and its eps; None: no LayerNorm.
        scale: ``[C]``, what a query at each position of a chunk multiplies the sum of gradients by.
        keep_graph: whether anything will be differentiated through the loop.
        steps: gradient steps on a finished chunk.
        momentum: eta ``[H, 1, 1]``; None: none.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        norm: tuple[Tensor, Tensor, float] | None,
        scale: Tensor,
        keep_graph: bool,
        steps: int = 1,
        momentum: Tensor | None = None,
    ) -> None:
        self.norm, self.scale, self.keep_graph = norm, scale, keep_graph
        self.steps, self.momentum = steps, momentum
        self.tokens: list[Token] = []
        self.gradients: list[list[Tensor]] = []
        """Of the unfinished chunk's tokens."""
        self.velocity = [torch.zeros_like(t) for layer in zip(weights, biases, strict=True) for t in layer]
        """S, of weight and bias, layer after layer."""
        self.fast = self._variables([tensor for layer in zip(weights, biases, strict=True) for tensor in layer])
        """Weight and bias, layer after layer, at the first token of the chunk."""

    @property
    def position(self) -> int:
        """Tokens in the unfinished chunk."""
        return len(self.gradients)

    def hear(self, token: Token) -> Tensor:
        """The causal form: a query sees the keys up to its own. ``[H, Dh]``."""
        self.tokens.append(token)
        self.gradients.append(self._gradient(token))
        fast, _ = self._after(self.gradients, self.position - 1)
        y = self._answer(token.q, fast)
        if self.position == len(self.scale):
            self._finish_chunk(self.tokens, self.gradients)
            self.tokens, self.gradients = [], []
        return y

    def hear_chunk(self, tokens: Sequence[Token]) -> list[Tensor]:
        """The form that is not causal: every query of a chunk, or of what there is of the last, sees all its keys."""
        gradients = [self._gradient(token) for token in tokens]
        after = [self._after(gradients, position) for position in range(len(tokens))]
        answers = [self._answer(token.q, fast) for token, (fast, _) in zip(tokens, after, strict=True)]
        if len(tokens) == len(self.scale):
            self._finish_chunk(tokens, gradients)
        return answers

    def _finish_chunk(self, tokens: Sequence[Token], gradients: Sequence[Sequence[Tensor]]) -> None:
        """Each step has the gradients of all the chunk's tokens at the weights that the step before left."""
        for step in range(self.steps):
            if step:
                gradients = [self._gradient(token) for token in tokens]
            fast, self.velocity = self._after(gradients, len(self.scale) - 1)
            self.fast = self._variables(fast)

    def _gradient(self, token: Token) -> list[Tensor]:
        """Of rate / 2 ||LN(f(k)) - (v - k)||^2, summed over heads, each of which has weights of its own.

        Without a norm, of rate / 2 ||f(k) - v||^2.
        """
        with torch.enable_grad():
            target = token.v if self.norm is None else token.v - token.k
            difference = self._network(token.k, self.fast) - target
            loss = (token.rate * difference.square().sum(-1) / 2).sum()
            return list(torch.autograd.grad(loss, self.fast, create_graph=self.keep_graph))

    def _after(self, gradients: Sequence[Sequence[Tensor]], position: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights after a step, and S: with momentum S <- eta S - scale * sum, W <- W + S.

        Where no token has a gradient there is no step.
        """
        step = [-self.scale[position] * sum(parts) for parts in zip(*gradients, strict=True)]
        if self.momentum is None:
            return [start + part for start, part in zip(self.fast, step, strict=True)], self.velocity
        if all(bool((part == 0).all()) for parts in gradients for part in parts):
            return list(self.fast), self.velocity
        velocity = [self.momentum * s + part for s, part in zip(self.velocity, step, strict=True)]
        return [start + s for start, s in zip(self.fast, velocity, strict=True)], velocity

    def _answer(self, q: Tensor, fast: Sequence[Tensor]) -> Tensor:
        return self._network(q, fast) if self.norm is None else q + self._network(q, fast)

    def _network(self, z: Tensor, fast: Sequence[Tensor]) -> Tensor:
        """LN(f(z)) for ``z [H, Dh]``, or f(z)."""
        layers = len(fast) // 2
        z = z[:, None, :]  # [H, 1, Dh]: one row vector per head
        for layer in range(layers):
            z = z @ fast[2 * layer] + fast[2 * layer + 1]
            z = gelu(z) if layer < layers - 1 else z
        if self.norm is None:
            return z[:, 0, :]
        weight, bias, eps = self.norm
        return layer_norm(z[:, 0, :], weight, bias, eps)

    def _variables(self, fast: Sequence[Tensor]) -> list[Tensor]:
        """What the inner gradient is taken of: variables of their own, in the outer graph or cut from it.

        Of their own because a token may depend on the same parameters by another way (the second of two passes).
        """
        return [tensor.clone() if self.keep_graph else tensor.detach().requires_grad_() for tensor in fast]


# ---- the layer around it


@dataclass(frozen=True, kw_only=True)
class HybridOptions:
    """The options that the layer's formulas need, as the variants' configs document them."""

    heads: int
    chunk: int
    base_lr: float
    causal: bool
    bidirectional: bool
    rope_theta: float
    norm_eps: float
    target_eps: float
    post_norm_eps: float
    conv_kernel: int | None = None
    value: str = "hidden"
    inner_norm: bool = True
    inner_steps: int = 1
    momentum: float | None = None


class Hybrid:
    """The layer of ttt_linear, ttt_mlp and ttt_multilayer, which differ in the number of fast layers alone.

    ``parameters``: wq wk wv wo (``.weight [D, D]``, ``.bias [D]``), post_norm (both ``[D]``), lr_weight ``[H, 1, D]``,
    lr_bias ``[H, 1]``, norm_weight and norm_bias ``[H, Dh]``, fast_weight.i ``[H, in, out]``, fast_bias.i
    ``[H, 1, out]``, token_scale_offset ``[C]`` where causal, gate and, where bidirectional, gate_reversed: ``[D]`` or
    ``[1]``. By options: no norm_weight and norm_bias; query_taps and key_taps ``[D, K]``, lag 0 first; momentum_logit
    ``[H]``, of a learned momentum.
    """

    def __init__(self, options: HybridOptions, parameters: Mapping[str, Tensor], *, keep_graph: bool = True) -> None:
        self.options, self.parameters, self.keep_graph = options, parameters, keep_graph

    def scale(self) -> Tensor:
        """``[C]``: max(0, 1 / (n + 1) + learned_n) where causal, 1 / C where not."""
        chunk = self.options.chunk
        if not self.options.causal:
            return torch.full((chunk,), 1 / chunk, dtype=torch.float64)
        steps = torch.tensor([1 / (n + 1) for n in range(chunk)], dtype=torch.float64)
        return torch.clamp(steps + self.parameters["token_scale_offset"], min=0)

    def inner_loop(self) -> InnerLoop:
        p = self.parameters
        layers = range(sum(name.startswith("fast_weight.") for name in p))
        weights, biases = [p[f"fast_weight.{i}"] for i in layers], [p[f"fast_bias.{i}"] for i in layers]
        norm = (p["norm_weight"], p["norm_bias"], self.options.norm_eps) if self.options.inner_norm else None
        return InnerLoop(
            weights, biases, norm, self.scale(), self.keep_graph, self.options.inner_steps, self.momentum()
        )  # fmt: skip

    def momentum(self) -> Tensor | None:
        """``[H, 1, 1]``: eta, learned or fixed."""
        if "momentum_logit" in self.parameters:
            return torch.sigmoid(self.parameters["momentum_logit"])[:, None, None]
        if not self.options.momentum:
            return None
        return torch.full((self.options.heads, 1, 1), self.options.momentum, dtype=torch.float64)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[D]`` of ``x [D]`` before anything else. A token that is not finite counts as zero."""
        p = self.parameters
        zq, zk = (p[f"{name}.weight"] @ x + p[f"{name}.bias"] for name in ("wq", "wk"))
        return (zq, zk) if x.isfinite().all() else (torch.zeros_like(zq), torch.zeros_like(zk))

    def mixed(self, heard: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Query and key of the last of ``heard``: sums over the last K of them, one tap for each channel and lag."""
        q, k = heard[-1]
        if self.options.conv_kernel is None:
            return q, k
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        for lag in range(min(self.options.conv_kernel, len(heard))):
            zq, zk = heard[-1 - lag]
            q = q + self.parameters["query_taps"][:, lag] * zq
            k = k + self.parameters["key_taps"][:, lag] * zk
        return q, k

    def token(
        self,
        x: Tensor,
        position: int,
        learns: bool,
        embedding: Tensor | None = None,
        earlier: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Token:
        """``x [D]``, at a position of its chunk. A token with updates off has rate zero.

        ``earlier``: what ``projected`` gave for the tokens before, the last one last.
        """
        p, options = self.parameters, self.options
        q, k = self.mixed([*earlier, self.projected(x)])
        source = x
        if options.value == "embedding":
            assert embedding is not None
            source = embedding / embedding.square().mean().sqrt()
        v = p["wv.weight"] @ source + p["wv.bias"]
        q, k, v = (z.reshape(options.heads, -1) for z in (q, k, v))
        q, k = (z / z.square().sum(-1, keepdim=True).sqrt() for z in (q, k))
        q, k = (rotate(z, position, options.rope_theta) for z in (q, k))
        target = v
        if options.inner_norm:
            difference = v - k
            deviation = difference - difference.mean(-1, keepdim=True)
            std = (deviation.square().sum(-1, keepdim=True) / (deviation.shape[-1] - 1)).sqrt()
            target = p["norm_weight"] * deviation / (std + options.target_eps) + p["norm_bias"] + k
        factor = torch.sigmoid((p["lr_weight"] * x).sum(-1) + p["lr_bias"])[:, 0]  # [H]
        rate = options.base_lr * factor / q.shape[-1]
        return Token(q, k, target, rate if learns else torch.zeros_like(rate))

    def output(self, x: Tensor, answer: Tensor, gate: str) -> Tensor:
        """``x [D]`` and the inner loop's answer ``[H, Dh]``."""
        p = self.parameters
        z = layer_norm(answer.reshape(-1), p["post_norm.weight"], p["post_norm.bias"], self.options.post_norm_eps)
        return x + torch.tanh(p[gate]) * (p["wo.weight"] @ z + p["wo.bias"])

    def sequence(self, x: Tensor, embeddings: Tensor | None = None, learns: bool = True) -> tuple[Tensor, list[Tensor]]:
        """``x [T, D]`` to the outputs ``[T, D]``, and the fast weights that the next chunk would start from."""
        beside: list[Tensor | None] = [None] * len(x) if embeddings is None else list(embeddings)
        if self.options.causal:
            stream = HybridStream(self)
            y = torch.stack([stream.hear(token, e, learns) for token, e in zip(x, beside, strict=True)])
            return y, stream.loop.fast
        y, fast = self._in_one_direction(list(x), beside, learns, "gate")
        if self.options.bidirectional:
            y, fast = self._in_one_direction(y[::-1], beside[::-1], learns, "gate_reversed")
            y = y[::-1]
        return torch.stack(y), fast

    def _in_one_direction(
        self, x: list[Tensor], embeddings: list[Tensor | None], learns: bool, gate: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        loop, y = self.inner_loop(), []
        heard = [self.projected(token) for token in x]
        for start in range(0, len(x), self.options.chunk):
            part = x[start : start + self.options.chunk]
            tokens = [
                self.token(token, position, learns, embeddings[start + position], heard[: start + position])
                for position, token in enumerate(part)
            ]
            answers = loop.hear_chunk(tokens)
            y += [self.output(token, answer, gate) for token, answer in zip(part, answers, strict=True)]
        return y, loop.fast


class HybridStream:
    """One stream of a causal hybrid layer."""

    def __init__(self, layer: Hybrid) -> None:
        self.layer, self.loop = layer, layer.inner_loop()
        self.heard: list[tuple[Tensor, Tensor]] = []
        """Projected queries and keys of all tokens so far."""

    def hear(self, x: Tensor, embedding: Tensor | None, learns: bool = True, spoiled: bool = False) -> Tensor:
        """``spoiled``: later tokens hear the token as zero."""
        answer = self.loop.hear(self.layer.token(x, self.loop.position, learns, embedding, self.heard))
        now = self.layer.projected(torch.full_like(x, torch.nan) if spoiled else x)
        self.heard = [*self.heard, now][-(self.layer.options.conv_kernel or 1) :]
        return self.layer.output(x, answer, "gate")

    def memory(self) -> dict[str, Tensor]:
        """``weight.i [H, in, out]`` and ``bias.i [H, 1, out]`` at the unfinished chunk's start."""
        return named(self.loop.fast)


# ---- in-place TTT


def hidden_activation(linear_in: Tensor, x: Tensor) -> Tensor:
    """``[h]`` from ``x [D]``: silu(gate) * up, as in the hosts' gated MLP (Shazeer, arXiv:2002.05202)."""
    gate, up = (linear_in @ x).chunk(2)
    return gate * torch.sigmoid(gate) * up


@dataclass(frozen=True, kw_only=True)
class InPlaceOptions:
    """The options of gating_mlp that its formulas need, as its config documents them."""

    chunk: int
    lr: float
    target: str
    padding: str
    decay: float
    clip: float | None
    update: str = "hebbian"
    keys: str = "raw"
    target_norm: bool = False
    read_scale: float = 1.0
    success_gate: bool = False


class InPlace:
    """The layer gating_mlp: a gated MLP whose down projection learns.

    ``parameters``: linear_in ``[2 h, D]`` (gate, then up) and linear_out ``[D, h]`` of the host; conv ``[D, 1, K]``,
    projection ``[D, D]`` (absent: the identity), lr_weight ``[D]`` and lr_bias ``[1]`` where the rate is learned,
    w_down_change ``[D, h]`` where the down projection is trained, log_ridge ``[1]`` with update: ridge, success.bias,
    success.slope ``[1]`` and success.weights ``[1, taps]`` with the success gate.
    """

    def __init__(self, options: InPlaceOptions, parameters: Mapping[str, Tensor]) -> None:
        self.options, self.parameters = options, parameters

    def sequence(self, x: Tensor, embeddings: Tensor, learns: bool = True) -> tuple[Tensor, Tensor]:
        """``x`` and ``embeddings [T, D]`` to the outputs ``[T, D]``, and the accumulated update ``[D, h]``."""
        stream = InPlaceStream(self)
        y = [stream.hear(token, embedding, learns) for token, embedding in zip(x, embeddings, strict=True)]
        return torch.stack(y), stream.update


class InPlaceStream:
    """One stream of gating_mlp: apply, then, at a chunk's end, update."""

    def __init__(self, layer: InPlace) -> None:
        self.layer = layer
        self.fast = torch.zeros_like(layer.parameters["linear_out"])
        """D ``[D, h]``: before the projection."""
        self.keys: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.answers: list[Tensor] = []
        self.rates: list[Tensor] = []
        self.learns: list[bool] = []
        self.scores: list[Tensor] = []
        """Of all tokens so far, with the success gate."""
        self.last_answer = torch.zeros_like(self.fast[:, 0])

    @property
    def update(self) -> Tensor:
        """``[D, h]``: what is added to the down projection."""
        return self.layer.options.read_scale * self._projected(self.fast)

    def hear(self, x: Tensor, embedding: Tensor | None, learns: bool = True) -> Tensor:
        """``x`` and ``embedding [D]``. A token with updates off has rate zero, and is seen by the filter."""
        p, options = self.layer.parameters, self.layer.options
        hidden = hidden_activation(p["linear_in"], x)
        w_0 = p["linear_out"] + p["w_down_change"] if "w_down_change" in p else p["linear_out"]
        key = unit(hidden) if options.keys == "unit" else hidden
        target = embedding if options.target == "input_embed" else x
        assert target is not None
        if options.target_norm:
            target = unit(target) * math.sqrt(len(target))
        answer = self.fast @ key
        y = w_0 @ hidden + options.read_scale * self._gate(target) * self._projected(answer)
        self.last_answer = answer
        rate = torch.tensor(options.lr, dtype=torch.float64)
        if "lr_weight" in p:
            most = 2 if options.update == "hebbian" else 1
            rate = rate * most * torch.sigmoid(p["lr_weight"] @ x + p["lr_bias"])
        self.keys.append(key)
        self.targets.append(target)
        self.answers.append(answer)
        self.rates.append(rate.reshape(()) if learns else torch.zeros((), dtype=torch.float64))
        self.learns.append(learns)
        if len(self.keys) == options.chunk:
            self._finish_chunk()
        return y

    def memory(self) -> dict[str, Tensor]:
        return named(self.update)

    def _finish_chunk(self) -> None:
        options = self.layer.options
        step = torch.zeros_like(self.fast)
        for key, write in zip(self.keys, self._writes(), strict=True):
            step = step + torch.outer(write, key)
        norm = self._projected(step).square().sum().sqrt()
        if options.clip is not None and norm > options.clip:
            step = step * (options.clip / norm)
        if any(self.learns):  # else nothing decays either
            self.fast = (1 - options.decay) * self.fast + step
        self.keys, self.targets, self.answers, self.rates, self.learns = [], [], [], [], []

    def _writes(self) -> list[Tensor]:
        """What the chunk writes at each of its keys: column c of the update is the sum over tokens of write key[c]."""
        options = self.layer.options
        values = [self._filtered(position) for position in range(len(self.keys))]
        if options.update == "hebbian":
            return [rate * value for rate, value in zip(self.rates, values, strict=True)]
        errors = [value - answer for value, answer in zip(values, self.answers, strict=True)]
        if options.update == "gradient":
            return [rate * error for rate, error in zip(self.rates, errors, strict=True)]
        # A token without strength writes nothing, which is what 1 / b says in the limit.
        heard = [i for i, rate in enumerate(self.rates) if float(rate.detach()) > 0]
        writes = [torch.zeros_like(error) for error in errors]
        if heard:
            ridge = self.layer.parameters["log_ridge"].exp().clamp(1e-2, 1e3)
            keys, rates = torch.stack([self.keys[i] for i in heard]), torch.stack([self.rates[i] for i in heard])
            found = torch.linalg.inv(keys @ keys.T + torch.diag(ridge / rates)) @ torch.stack(
                [errors[i] for i in heard]
            )
            for i, write in zip(heard, found, strict=True):
                writes[i] = write
        return writes

    def _projected(self, columns: Tensor) -> Tensor:
        """P^T of ``[D]`` or ``[D, h]``."""
        p = self.layer.parameters
        return p["projection"].T @ columns if "projection" in p else columns

    def _gate(self, target: Tensor) -> Tensor | float:
        """How well the last answers met the targets that came after them."""
        if not self.layer.options.success_gate:
            return 1.0
        p = self.layer.parameters
        self.scores.append((unit(self.last_answer) * unit(target)).sum())
        weights = p["success.weights"][0]
        recent = self.scores[::-1][: len(weights)]
        total = sum(weight * score for weight, score in zip(weights, recent, strict=False))
        return torch.sigmoid(p["success.bias"] + p["success.slope"] * total)

    def _filtered(self, position: int) -> Tensor:
        """The depthwise convolution at a position of the chunk, zero beyond the chunk's edges."""
        taps = self.layer.parameters["conv"]
        kernel = taps.shape[-1]
        left = kernel - 1 if self.layer.options.padding == "causal" else (kernel - 1) // 2
        value = torch.zeros_like(self.targets[position])
        for tap in range(kernel):
            source = position + tap - left
            if 0 <= source < len(self.targets):
                value = value + taps[:, 0, tap] * self.targets[source]
        return value


def unit(x: Tensor) -> Tensor:
    """``x [D]`` over its norm; zero where x is."""
    return x / x.square().sum().sqrt() if bool(x.any()) else x


def named(fast: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
    """Fast weights by name: ``weight.i`` and ``bias.i``, or the ``update`` of gating_mlp."""
    if isinstance(fast, Tensor):
        return {"update": fast}
    names = [f"{part}.{i}" for i in range(len(fast) // 2) for part in ("weight", "bias")]
    return dict(zip(names, fast, strict=True))
