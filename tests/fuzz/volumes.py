"""The volume against the definition: ``base + volume * (y - base)``, y the definition's own, in calls and in streams.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock
from tests.fuzz.cases import Configuration, Layer, shape_of
from tests.fuzz.comparison import check, differences, error
from tests.fuzz.configurations import BOUND, updates, variables_of
from tests.fuzz.definition import hidden_activation
from tests.fuzz.strategies import BOOLS, SEEDS, layers


@dataclass(frozen=True, kw_only=True)
class AtVolumes:
    """A layer whose rows are heard each at its own volume.

    Attributes:
        volumes: of each row in one call; in a stream, token t of row b has the volume of row b + t.
        number: whether rows that have one volume are given it as a number.
    """

    layer: Layer
    learns: tuple[bool, ...]
    volumes: tuple[float, ...]
    length: int
    number: bool = False
    seed: int = 0

    @property
    def configuration(self) -> Configuration:
        return Configuration(layer=self.layer, learns=self.learns, length=self.length, changed=1, seed=self.seed)

    @property
    def scale(self) -> float:
        return float(self.layer.options.get("output_scale", 1.0))


@st.composite
def heard_at_volumes(draw: DrawFn) -> AtVolumes:
    layer = draw(layers())
    if draw(BOOLS):
        layer = replace(layer, options={**layer.options, "output_scale": draw(st.sampled_from([0.5, 0.0, 2.0]))})
    batch = draw(st.integers(1, 3))
    volumes = st.sampled_from([0.5, 0.0, 1.0, 0.3, 2.0])
    return AtVolumes(
        layer=layer,
        learns=draw(st.just((True,) * batch) | st.tuples(*[BOOLS] * batch)),
        volumes=draw(st.tuples(*[volumes] * batch)),
        length=draw(st.integers(1, min(2 * layer.option["chunk"] + 2, 14))),
        number=draw(BOOLS),
        seed=draw(SEEDS),
    )


def check_volumes(case: AtVolumes) -> None:
    """Raises AssertionError with all that is not as the definition says."""
    block = case.layer.block()
    results, expected = _by_package(case, block), _by_definition(case)

    def moved() -> dict[str, float]:
        nearby = _by_definition(case, ulps=1)
        return {name: error(nearby[name], tensor) for name, tensor in expected.items()}

    check(differences(results, expected, BOUND, moved) + _not_the_base(case, block, results["y"]))


def _by_package(case: AtVolumes, block: SequenceBlock) -> dict[str, Tensor]:
    inputs = case.configuration.inputs()
    x, embeddings = inputs["x"].requires_grad_(), inputs["embeddings"].requires_grad_()
    on, volumes = updates(case.learns), torch.tensor(case.volumes, dtype=torch.float64)
    same = case.number and len(set(case.volumes)) == 1
    context = BlockContext(input_embeddings=embeddings, updates=on, volume=case.volumes[0] if same else volumes)
    y, after = block(x, None, context)
    variables = {"x": x, **dict(block.named_parameters())}
    if block.info.mlp is not None:
        variables |= {name: getattr(block.info.mlp, name).weight for name in ("linear_in", "linear_out")}
    results = {"y": y, **_gradients(y, inputs["cotangent"], variables)}
    if case.layer.causal:
        state = block.allocate_state(len(x))
        steps = zip(x.split(1, 1), embeddings.split(1, 1), strict=True)
        results["streamed"] = torch.cat(
            [
                block.step(
                    token.detach(),
                    state,
                    BlockContext(input_embeddings=embedding.detach(), updates=on, volume=volumes.roll(-t)),
                )
                for t, (token, embedding) in enumerate(steps)
            ],
            dim=1,
        ).detach()
        for name, tensor in block(x, None, replace(context, volume=1.0))[1].items():
            assert torch.equal(after[name], tensor), f"state {name!r} depends on the volume"
    return results


def _by_definition(case: AtVolumes, ulps: int = 0) -> dict[str, Tensor]:
    """The same. With ``ulps`` every input is moved by so many, up or down."""
    layer, inputs = case.layer, case.configuration.inputs()
    values = variables_of(layer, inputs, ulps)
    parameters = {name: value for name, value in values.items() if name not in ("x", "embeddings")}
    x, volumes = values["x"], case.scale * torch.tensor(case.volumes, dtype=torch.float64)
    base = x
    if layer.in_place:  # W_0 h of every token
        linear_in, linear_out = parameters["linear_in"], parameters["linear_out"]
        base = torch.stack([torch.stack([linear_out @ hidden_activation(linear_in, t) for t in row]) for row in x])

    def sequence(row: int, volume: Tensor) -> Tensor:
        definition = layer.definition(parameters)
        both = bool(layer.option.get("bidirectional"))
        if both:  # each of the two passes adds at the volume
            plain = definition.output
            definition.output = lambda x, answer, gate: x + volume * (plain(x, answer, gate) - x)
        y, _ = definition.sequence(x[row], values["embeddings"][row], case.learns[row])
        return y if both else base[row] + volume[..., None] * (y - base[row])

    y = torch.stack([sequence(row, volume) for row, volume in enumerate(volumes)])
    variables = {name: value for name, value in values.items() if name != "embeddings"}
    results = {"y": y, **_gradients(y, inputs["cotangent"], variables)}
    if layer.causal:
        turned = torch.stack([volumes.roll(-t) for t in range(case.length)], dim=1)  # [B, T]
        results["streamed"] = torch.stack([sequence(row, volume) for row, volume in enumerate(turned)]).detach()
    return results


def _gradients(y: Tensor, cotangent: Tensor, variables: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad((y * cotangent).sum(), list(variables.values()), allow_unused=True)
    pairs = zip(variables.items(), found, strict=True)
    return {
        f"gradient of {name}": (torch.zeros_like(t) if g is None else g).reshape(shape_of(t)) for (name, t), g in pairs
    }


@torch.no_grad()
def _not_the_base(case: AtVolumes, block: SequenceBlock, y: Tensor) -> list[str]:
    """Rows at volume 0 whose bits are not those of the base model."""
    x, mlp = case.configuration.inputs()["x"], block.info.mlp
    if mlp is not None:
        gate, up = mlp.linear_in(x).chunk(2, dim=-1)
        x = mlp.linear_out(mlp.activation(gate) * up)
    silent = [row for row, volume in enumerate(case.volumes) if volume * case.scale == 0]
    return [f"row {row} is at volume 0 and is not the base model" for row in silent if not torch.equal(y[row], x[row])]
