"""``moshi-ttt verify`` is red where a file of reference vectors is not what it was, or not all that it should be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moshi_ttt import default_registry
from moshi_ttt.apps.verify import CHECKSUMS, FileReport, verify_file
from tests.project import ROOT

GOLDENS = ROOT / "tests" / "goldens"
FILES = sorted(GOLDENS.glob("*.safetensors"))
ONE_OF_EACH = [GOLDENS / f"{name}.safetensors" for name in ("mlp_causal", "hybrid_mlp_noncausal", "in_place_proj")]
LARGE = ONE_OF_EACH + [
    GOLDENS / f"{name}.safetensors" for name in ("hybrid_options_multilayer3", "in_place_shipped", "ridge_novelty")
]
"""One of each operation, with most of the keys that files of it have."""
EACH = [pytest.param(path, marks=() if path in LARGE else pytest.mark.exhaustive) for path in FILES]
OTHER_METADATA = {
    "op": "another", "chunk_size": "5", "layers": "1", "causal": None, "norm_eps": "2e-6", "activation": "relu",
    "num_heads": "1", "base_lr": "0.11", "rope_theta": "10001", "target_eps": "2e-8", "post_norm_eps": "2e-6",
    "learning_rate": "0.31", "conv_kernel_size": "3", "keep": "0.9", "update": None, "keys": None,
    "target_norm": None, "read_scale": "2.1", "value": None, "inner_norm": None, "inner_steps": "3",
}  # fmt: skip
"""Another legal value of each; None is the other of two, or another of three."""
ANOTHER = {
    "true": "false", "false": "true", "raw": "unit", "unit": "raw", "hidden": "embedding", "embedding": "hidden",
    "hebbian": "gradient", "gradient": "hebbian", "ridge": "gradient",
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata()  # noqa: SIM118


def verified(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> FileReport:
    save_file(tensors, path, metadata=metadata)
    return verify_file(path, default_registry())


@pytest.mark.first_by_default
@pytest.mark.parametrize("path", EACH, ids=lambda path: path.stem)
def test_every_key_that_is_dropped_or_added_is_named(path, tmp_path):
    tensors, metadata = read(path)
    for name in tensors:
        report = verified({key: t for key, t in tensors.items() if key != name}, metadata, tmp_path / "a.safetensors")
        assert not report.passed
        assert any(f"tensor {name!r} is missing" == problem for problem in report.problems), report.problems
    for name in metadata.keys() - {"op"}:
        report = verified(tensors, {k: v for k, v in metadata.items() if k != name}, tmp_path / "a.safetensors")
        assert report.problems == (f"metadata {name!r} is missing",)
    added = verified({**tensors, "in.more": torch.zeros(1, dtype=torch.float64)}, metadata, tmp_path / "a.safetensors")
    assert added.problems == ("tensor 'in.more' is unknown",)
    assert verified(tensors, {**metadata, "more": "1"}, tmp_path / "a.safetensors").problems == (
        "metadata 'more' is unknown",
    )


@pytest.mark.first_by_default
@pytest.mark.parametrize("path", EACH, ids=lambda path: path.stem)
def test_metadata_that_are_changed_or_make_no_sense_are_noticed(path, tmp_path):
    tensors, metadata = read(path)
    for name in metadata.keys() - {"source"}:
        other = OTHER_METADATA[name] or ANOTHER[metadata[name]]
        if other == metadata[name]:
            other = "2"
        assert not verified(tensors, {**metadata, name: other}, tmp_path / "a.safetensors").passed, (name, other)
        if name in ("op", "activation"):
            continue
        for nonsense in ("", "-1", "0", "many", "nan", "1e999"):
            report = verified(tensors, {**metadata, name: nonsense}, tmp_path / "a.safetensors")
            assert report.problems == (
                f"metadata {name!r} is {nonsense!r}, and must be {report.problems[0].partition(' must be ')[2]}",
            )


@pytest.mark.first_by_default
@pytest.mark.parametrize("path", ONE_OF_EACH, ids=lambda path: path.stem)
def test_a_value_off_by_a_millionth_is_noticed(path, tmp_path):
    # Not among them: a target in the last chunk of in-place TTT, which no output of the file depends on.
    tensors, metadata = read(path)
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[0] += 1e-6
        report = verified({**tensors, name: changed}, metadata, tmp_path / "a.safetensors")
        assert not report.problems
        assert not report.passed, name


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[..., :-1].contiguous(), "has shape"), (lambda t: t.float(), "must be float64 and finite"),
        (lambda t: t * torch.inf, "must be float64 and finite"), (lambda t: t[None], "has shape"),
    ],
    ids=["shorter", "float32", "infinite", "another dimension"],
)  # fmt: skip
@pytest.mark.parametrize("path", ONE_OF_EACH, ids=lambda path: path.stem)
def test_a_tensor_of_another_shape_or_dtype_is_named(path, tmp_path, change: Callable, problem):
    tensors, metadata = read(path)
    for name in ("out.y", "grad.x" if "grad.x" in tensors else "grad.q", "in.cotangent"):
        report = verified({**tensors, name: change(tensors[name])}, metadata, tmp_path / "a.safetensors")
        assert any(name in each and problem in each for each in report.problems), report.problems


def test_any_change_at_all_is_noticed_where_a_checksum_lies_beside_the_file(tmp_path):
    shutil.copy(GOLDENS / CHECKSUMS, tmp_path)
    path = GOLDENS / "in_place_proj.safetensors"
    assert verify_file(Path(shutil.copy(path, tmp_path)), default_registry()).passed
    tensors, metadata = read(path)
    (problem,) = verified(tensors, {**metadata, "source": "somewhere"}, tmp_path / path.name).problems
    assert "checksum" in problem
    tensors["in.target"].view(-1)[-1] += 1e-6  # reaches no output
    assert not verified(tensors, metadata, tmp_path / path.name).passed


def test_every_shipped_file_has_its_checksum():
    listed = {line.split("  ")[1] for line in (GOLDENS / CHECKSUMS).read_text().splitlines()}
    assert listed == {path.name for path in FILES}
    assert all(not verify_file(path, default_registry()).problems for path in FILES[:1])


def test_a_gradient_that_is_zero_by_structure_is_zero(tmp_path):
    # One chunk: nothing that in-place TTT adds is read in it, so the filter and the projection have no gradient.
    tensors, metadata = read(GOLDENS / "in_place_proj.safetensors")
    inputs = {name[3:]: t for name, t in tensors.items() if name.startswith("in.")}
    inputs["x"], inputs["target"], inputs["cotangent"] = (inputs[n][:, :4] for n in ("x", "target", "cotangent"))
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if name != "cotangent"}
    gate, up = (leaves["x"] @ leaves["linear_in"].T).chunk(2, dim=-1)
    y = (torch.nn.functional.silu(gate) * up) @ leaves["linear_out"].T
    (y * inputs["cotangent"]).sum().backward()
    found = {f"in.{name}": t.contiguous() for name, t in inputs.items()} | {"out.y": y.detach()}
    for name, leaf in leaves.items():
        found[f"grad.{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    assert not found["grad.conv"].any()
    assert verified(found, metadata, tmp_path / "a.safetensors").passed
    found["grad.conv"] = found["grad.conv"] + 1e-6
    assert not verified(found, metadata, tmp_path / "a.safetensors").passed
