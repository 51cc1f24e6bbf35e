"""One call of a layer against the definition: outputs, fast weights, every gradient, and causality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.state import BlockState
from tests.fuzz.cases import Configuration, Layer, shape_of
from tests.fuzz.comparison import check, differences, error
from tests.fuzz.definition import named

BOUND = 1e-10
"""float64, of outputs, fast weights and gradients: the design's bound between forms."""

CANCELLING_BOUND = 1e-6
"""The same where the updates of a chunk cancel: a norm whose parts add to r times it has a relative error of r^2 ulps
(``gating_mlp.ops.squared_norm``), which is 4e-7 for r = 60,000, about the most that is drawn."""


def check_configuration(case: Configuration) -> None:
    """Raises AssertionError with all that is not as the definition says."""
    block = case.layer.block()
    results = by_package(case, block)
    expected = by_definition(case)
    bound = BOUND if case.alternating is None else CANCELLING_BOUND
    check(differences(results, expected, bound, lambda: _movement(case, expected)) + _causality(case, block, results))


def by_package(case: Configuration, block: SequenceBlock) -> dict[str, Tensor]:
    """Outputs, fast weights after the call, and gradients, by name."""
    inputs = case.inputs()
    x, embeddings = inputs["x"].requires_grad_(), inputs["embeddings"].requires_grad_()
    y, after = block(x, None, BlockContext(input_embeddings=embeddings, updates=updates(case.learns)))
    variables = {"x": x, "embeddings": embeddings, **dict(block.named_parameters())}
    if block.info.mlp is not None:
        variables |= {name: getattr(block.info.mlp, name).weight for name in ("linear_in", "linear_out")}
    results = {"y": y, **_gradients(y, inputs["cotangent"], variables)}
    if case.layer.causal:
        results |= {f"{name} after": tensor for name, tensor in memory(block, after).items()}
    return results


def variables_of(layer: Layer, inputs: dict[str, Tensor], ulps: int) -> dict[str, Tensor]:
    """What a definition is a function of, requiring gradients; each value moved by ``ulps``, up or down."""
    values = {**layer.parameters(), **layer.host_parameters(), **{n: inputs[n] for n in ("x", "embeddings")}}
    if ulps:
        generator = torch.Generator().manual_seed(ulps)
        for name, value in values.items():
            sign = torch.randint(0, 2, value.shape, generator=generator).double() * 2 - 1
            values[name] = value + value * sign * ulps * torch.finfo(torch.float64).eps
    return {name: value.requires_grad_() for name, value in values.items()}


def by_definition(case: Configuration, ulps: int = 0) -> dict[str, Tensor]:
    """The same, row after row. With ``ulps`` every input is moved by so many, up or down."""
    layer, inputs = case.layer, case.inputs()
    values = variables_of(layer, inputs, ulps)
    definition = layer.definition({n: t for n, t in values.items() if n not in ("x", "embeddings")})
    rows = [
        definition.sequence(values["x"][row], values["embeddings"][row], learns)
        for row, learns in enumerate(case.learns)
    ]
    y = torch.stack([row[0] for row in rows])
    results = {"y": y, **_gradients(y, inputs["cotangent"], values)}
    if layer.causal:
        ends = [row[1] if isinstance(row[1], dict) else named(row[1]) for row in rows]
        results |= {f"{name} after": torch.stack([end[name] for end in ends]) for name in ends[0]}
    return results


def memory(block: SequenceBlock, state: BlockState) -> dict[str, Tensor]:
    """What a state's fast weights are, by the names that the definition gives them, ``[B, ...]``."""
    if hasattr(block, "accumulated_update"):
        return {"update": block.accumulated_update(state)}
    return {name: tensor for name, tensor in state.items() if name.startswith(("weight.", "bias.", "solution"))}


def updates(learns: tuple[bool, ...] | bool) -> bool | Tensor:
    """As a context takes it: one answer where all rows have the same."""
    if isinstance(learns, bool):
        return learns
    return learns[0] if len(set(learns)) == 1 else torch.tensor(learns)


def _gradients(y: Tensor, cotangent: Tensor, variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of sum(y * cotangent); zero where y does not depend on a variable."""
    found = torch.autograd.grad((y * cotangent).sum(), list(variables.values()), allow_unused=True)
    pairs = zip(variables.items(), found, strict=True)
    return {
        f"gradient of {name}": (torch.zeros_like(t) if g is None else g).reshape(shape_of(t)) for (name, t), g in pairs
    }


def _movement(case: Configuration, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """How far an ulp in every input moves each result."""
    moved = by_definition(case, ulps=1)
    return {name: error(moved[name], tensor) for name, tensor in expected.items()}


@torch.no_grad()
def _causality(case: Configuration, block: SequenceBlock, results: Mapping[str, Tensor]) -> list[str]:
    if not case.layer.causal or case.length == 1:
        return []
    inputs, t = case.inputs(), case.changed
    x, embeddings = inputs["x"], inputs["embeddings"]
    x[:, t], embeddings[:, t] = inputs["other_x"][:, t], inputs["other_embeddings"][:, t]
    y, _ = block(x, None, BlockContext(input_embeddings=embeddings, updates=updates(case.learns)))
    same = torch.equal(y[:, :t], results["y"][:, :t])
    return [] if same else [f"changing token {t} changed an output before it"]
