"""The oracle itself, against the published reference vectors, read from the files as they are documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.fuzz.comparison import error
from tests.fuzz.definition import Hybrid, HybridOptions, InnerLoop, InPlace, InPlaceOptions, Token, named

GOLDENS = [
    path
    for path in sorted((Path(__file__).parents[1] / "goldens").glob("*.safetensors"))
    if not path.stem.startswith("ridge")  # those are the memory alone, and made by a definition of their own
]
BOUND = {"1": 1e-9, "2": 1e-8, "3": 1e-8}
"""By the number of fast layers: the design's. The published MLPs compute gelu's derivative from a rounded constant."""


def inner_loop(inputs: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    layers, eps = range(int(metadata["layers"])), float(metadata["norm_eps"])
    weights, biases = [inputs[f"weight.{i}"] for i in layers], [inputs[f"bias.{i}"] for i in layers]
    norm = (inputs["norm_weight"], inputs["norm_bias"], eps)
    chunk, y, fast = int(metadata["chunk_size"]), [], []
    for row in range(inputs["q"].shape[0]):
        loop = InnerLoop(weights, biases, norm, inputs["token_scale"], keep_graph=True)
        length = inputs["q"].shape[2]
        tokens = [Token(*(inputs[n][row, :, t] for n in ("q", "k", "v", "lr"))) for t in range(length)]
        if metadata["causal"] == "true":
            answers = [loop.hear(token) for token in tokens]
        else:
            answers = [y for start in range(0, length, chunk) for y in loop.hear_chunk(tokens[start : start + chunk])]
        y.append(torch.stack(answers, dim=1))  # [H, T, Dh]
        fast.append(loop.fast)
    outputs = {"y": torch.stack(y)}
    for i in layers:
        outputs[f"weight.{i}"] = torch.stack([row[2 * i] for row in fast])
        outputs[f"bias.{i}"] = torch.stack([row[2 * i + 1] for row in fast])
    return outputs


class GoldenHybrid(Hybrid):
    """The vectors hold the scale itself, not what was learned on top of 1 / (n + 1)."""

    def scale(self) -> Tensor:
        return self.parameters["token_scale"]


def hybrid(inputs: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    options = HybridOptions(
        heads=int(metadata["num_heads"]), chunk=int(metadata["chunk_size"]), base_lr=float(metadata["base_lr"]),
        causal=metadata["causal"] == "true", bidirectional=False, rope_theta=float(metadata["rope_theta"]),
        norm_eps=float(metadata["norm_eps"]), target_eps=float(metadata["target_eps"]),
        post_norm_eps=float(metadata["post_norm_eps"]),
    )  # fmt: skip
    parameters = {"fast_" + n if n.startswith(("weight.", "bias.")) else n: t for n, t in inputs.items()}
    layer = GoldenHybrid(options, {**parameters, "gate": inputs["alpha"]})
    outputs = {"y": torch.stack([layer.sequence(row)[0] for row in inputs["x"]])}
    tokens = [[layer.token(x, t % options.chunk, learns=True) for t, x in enumerate(row)] for row in inputs["x"]]
    for name in ("q", "k", "v"):
        outputs[name] = torch.stack([torch.stack([getattr(t, name) for t in row], dim=1) for row in tokens])
    return outputs


def in_place(inputs: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    options = InPlaceOptions(
        chunk=int(metadata["chunk_size"]), lr=float(metadata["learning_rate"]), target="input_embed",
        padding="centered", decay=0.0, clip=None,
    )  # fmt: skip
    parameters = {"projection" if name == "proj" else name: tensor for name, tensor in inputs.items()}
    layer = InPlace(options, parameters)
    rows = zip(inputs["x"], inputs["target"], strict=True)
    return {"y": torch.stack([layer.sequence(x, target)[0] for x, target in rows])}


def hybrid_options(inputs: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    options = HybridOptions(
        heads=int(metadata["num_heads"]), chunk=int(metadata["chunk_size"]), base_lr=float(metadata["base_lr"]),
        causal=metadata["causal"] == "true", bidirectional=False, rope_theta=10_000.0, norm_eps=1e-6, target_eps=1e-8,
        post_norm_eps=1e-6, conv_kernel=inputs["key_taps"].shape[1] if "key_taps" in inputs else None,
        value=metadata["value"], inner_norm=metadata["inner_norm"] == "true", inner_steps=int(metadata["inner_steps"]),
    )  # fmt: skip
    parameters = {"fast_" + n if n.startswith(("weight.", "bias.")) else n: t for n, t in inputs.items()}
    layer = Hybrid(options, {**parameters, "gate": inputs["alpha"]}, keep_graph=True)
    rows = [layer.sequence(x, e) for x, e in zip(inputs["x"], inputs.get("embeddings", inputs["x"]), strict=True)]
    ends = [named(row[1]) for row in rows]
    return {"y": torch.stack([row[0] for row in rows]), **{n: torch.stack([end[n] for end in ends]) for n in ends[0]}}


def in_place_options(inputs: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    options = InPlaceOptions(
        chunk=int(metadata["chunk_size"]), lr=float(metadata["learning_rate"]), target="input_embed",
        padding="centered", decay=1 - float(metadata["keep"]), clip=None, update=metadata["update"],
        keys=metadata["keys"], target_norm=metadata["target_norm"] == "true", success_gate="success_bias" in inputs,
        read_scale=float(metadata["read_scale"]),
    )  # fmt: skip
    renamed = {"proj": "projection"} | {f"success_{part}": f"success.{part}" for part in ("bias", "slope", "weights")}
    layer = InPlace(options, {renamed.get(name, name): tensor for name, tensor in inputs.items()})
    rows = [layer.sequence(x, target) for x, target in zip(inputs["x"], inputs["target"], strict=True)]
    return {"y": torch.stack([row[0] for row in rows]), "update": torch.stack([row[1] for row in rows])}


ORACLES = {
    "inner_loop": inner_loop, "hybrid": hybrid, "in_place": in_place, "hybrid_options": hybrid_options,
    "in_place_options": in_place_options,
}  # fmt: skip


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_published_vectors(path):
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    inputs = {n.removeprefix("in."): t.requires_grad_() for n, t in tensors.items() if n.startswith("in.")}
    cotangent = inputs.pop("cotangent").detach()
    bound = BOUND[metadata.get("layers", "1")]

    outputs = ORACLES[metadata["op"]](inputs, metadata)
    expected = {n.removeprefix("out."): t for n, t in tensors.items() if n.startswith("out.")}
    assert outputs.keys() == expected.keys()
    for name, tensor in outputs.items():
        assert error(tensor, expected[name]) < bound, name

    wanted = {n.removeprefix("grad."): t for n, t in tensors.items() if n.startswith("grad.")}
    assert len(wanted) > 3
    sources = [inputs[name] for name in wanted]
    gradients = torch.autograd.grad((outputs["y"] * cotangent).sum(), sources, materialize_grads=True)
    for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
        assert error(gradient, tensor) < bound, f"gradient of {name}"


def test_all_vectors_are_there():
    assert len(GOLDENS) == 24
