"""The layer ttt_ridge, one token at a time: what was heard is kept as it was said, and solved for anew at each chunk.

As ``plugins/ttt_ridge/README.md`` describes it; nothing of the package is used. float64.

Shape legend: T tokens, D width, H heads, m key width, d value width, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULTS = {
    "chunk": 16, "heads": None, "key_width": None, "value_width": None, "features": "identity", "conv_kernel": 4,
    "value": "embedding", "regularization": 0.05, "decay": 0.0, "novelty": False, "success_gate": True,
    "variance_gate": False, "readout_scale": 8.0,
}  # fmt: skip
"""As documented, written down again: a default that changed would show."""


@dataclass(frozen=True, kw_only=True)
class RidgeOptions:
    """The options that the layer's formulas need."""

    heads: int
    chunk: int
    features: str
    value: str
    decay: float
    readout_scale: float


@dataclass
class Heard:
    """A token that is remembered: ``k [H, m]``, ``v [H, d]``, ``weight [H]``."""

    k: Tensor
    v: Tensor
    weight: Tensor


class Ridge:
    """``parameters`` by the names of the README's table; those of a gate that is left out are not there."""

    def __init__(self, options: RidgeOptions, parameters: Mapping[str, Tensor]) -> None:
        self.options, self.parameters = options, parameters

    def sequence(self, x: Tensor, embeddings: Tensor, learns: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """``x`` and ``embeddings [T, D]`` to the outputs ``[T, D]``, and the solution that is read next."""
        stream = RidgeStream(self)
        y = [stream.hear(token, embedding, learns) for token, embedding in zip(x, embeddings, strict=True)]
        return torch.stack(y), stream.memory()


class RidgeStream:
    """One stream: the tokens that it has heard, and what it reads until its chunk ends."""

    def __init__(self, layer: Ridge) -> None:
        self.layer = layer
        p, heads = layer.parameters, layer.options.heads
        self.key, self.value = p["wqk.weight"].shape[0] // heads, p["value_weight"].shape[0] // heads
        self.projected = [torch.zeros(heads * self.key, dtype=torch.float64) for _ in range(p["conv_q"].shape[1])]
        self.heard: list[Heard] = []
        self.position = 0
        self.answers = [torch.zeros(heads, self.value, dtype=torch.float64)]
        self.scores = [torch.zeros(heads, dtype=torch.float64) for _ in range(4)]
        self.solution, self.covariance = self._solved()

    def hear(self, x: Tensor, embedding: Tensor | None, learns: bool = True, spoiled: bool = False) -> Tensor:
        """``x`` and ``embedding [D]``. A spoiled token counts as zero for those after it, and is not written."""
        p, options = self.layer.parameters, self.layer.options
        normal = x / (x.square().mean() + 1e-6).sqrt()
        source = x if options.value == "hidden" else embedding
        assert source is not None
        v = (p["value_weight"] @ (source / (source.square().mean() + 1e-6).sqrt())).reshape(options.heads, -1)
        z = p["wqk.weight"] @ normal + p["wqk.bias"]
        strength = torch.sigmoid(p["write.weight"] @ normal + p["write.bias"])
        if spoiled:
            z, v, strength = torch.zeros_like(z), torch.zeros_like(v), torch.ones_like(strength)
        self.projected = [z, *self.projected[:-1]]
        q, k = (self._key(p[name]) for name in ("conv_q", "conv_k"))
        read = torch.stack([q[h] @ self.solution[h] for h in range(options.heads)])
        gate = self._gate(q, read, v)
        if learns and not spoiled:
            self.heard.append(Heard(k, v, strength * self._novelty(k, v)))
        self.answers.append(read)
        self.position += 1
        if self.position % options.chunk == 0:
            self.solution, self.covariance = self._solved()
        added = p["wo.weight"] @ (options.readout_scale * gate[:, None] * read).reshape(-1) + p["wo.bias"]
        return x + torch.tanh(p["gate"]) * added

    def memory(self) -> dict[str, Tensor]:
        """``solution [H, m, d]``, of the chunks that have ended."""
        return {"solution": self.solution}

    def _key(self, taps: Tensor) -> Tensor:
        """``[H, m]``: the filtered projections, their features, of norm 1."""
        z = sum(taps[:, lag] * projected for lag, projected in enumerate(self.projected))
        assert isinstance(z, Tensor)
        if self.layer.options.features == "relu2":
            z = torch.where(z > 0, z * z, 0)
        z = z.reshape(self.layer.options.heads, -1)
        return torch.stack([part / part.square().sum().sqrt() if part.any() else 0 * part for part in z])

    def _gate(self, q: Tensor, read: Tensor, v: Tensor) -> Tensor:
        """``[H]``: by how well the last answers met what came, and by how near the queries are to what was heard."""
        p = self.layer.parameters
        self.scores = [_cosine(self.answers[-1], v), *self.scores[:3]]
        gate = torch.ones(q.shape[0], dtype=torch.float64)
        if "success_offset" in p:
            mean = sum(p["success_taps"][:, lag] * score for lag, score in enumerate(self.scores))
            gate = gate * torch.sigmoid(p["success_offset"] + p["success_slope"] * mean)
        if "variance_offset" in p:
            variance = torch.stack([q[h] @ self.covariance[h] @ q[h] for h in range(q.shape[0])])
            gate = gate * torch.sigmoid(p["variance_offset"] - p["variance_slope"] * torch.log(variance + 1e-4))
        return gate

    def _novelty(self, k: Tensor, v: Tensor) -> Tensor | float:
        p = self.layer.parameters
        if "novelty_offset" not in p:
            return 1.0
        said = torch.stack([k[h] @ self.solution[h] for h in range(k.shape[0])])
        return torch.sigmoid(p["novelty_offset"] - p["novelty_slope"] * _cosine(said, v))

    def _solved(self) -> tuple[Tensor, Tensor]:
        """The ridge solution ``[H, m, d]`` and the covariance over the prior's ``[H, m, m]`` of all that was heard."""
        options = self.layer.options
        prior = torch.exp(self.layer.parameters["log_regularization"])
        keep = (1 - options.decay) ** (1 / options.chunk)
        solutions, covariances = [], []
        for head in range(options.heads):
            information = prior[head] * torch.eye(self.key, dtype=torch.float64)
            products = torch.zeros(self.key, self.value, dtype=torch.float64)
            for index, token in enumerate(self.heard):
                information, products = keep * information, keep * products
                one = torch.zeros(self.key, dtype=torch.float64)
                one[index % self.key] = (1 - keep) * self.key
                information = information + prior[head] * torch.diag(one)
                information = information + token.weight[head] * torch.outer(token.k[head], token.k[head])
                products = products + token.weight[head] * torch.outer(token.k[head], token.v[head])
            inverse = torch.linalg.inv(information)
            solutions.append(inverse @ products)
            covariances.append(prior[head] * inverse)
        return torch.stack(solutions), torch.stack(covariances)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """``[H]``, of ``a`` and ``b [H, d]``; zero where either is."""
    return (a * b).sum(-1) / torch.sqrt(a.square().sum(-1) * b.square().sum(-1) + 1e-6)
