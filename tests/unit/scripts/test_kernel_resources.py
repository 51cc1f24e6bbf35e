"""The record of what the Triton kernels take of a GPU, and what ``auto`` makes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import product

import pytest
import torch

from moshi_ttt.plugins.hybrid.triton import backend, resources, step
from moshi_ttt.plugins.hybrid.triton.compilations import CONTINUED, KERNELS, MODULES, SHAPES, STEP_SHAPES
from moshi_ttt.plugins.hybrid.triton.resources import (
    Resources,
    recorded,
    step_row,
    step_too_large,
    training_row,
    training_too_large,
)
from tests.programs import load_script
from tests.project import ROOT

SCRIPT = ROOT / "scripts" / "kernel_resources.py"


def compiled(only):
    """What the script says of rows that it compiles again; its own process, for others may interpret the kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--only", only]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def same_triton():
    if importlib.util.find_spec("triton") is None:
        return False
    from importlib.metadata import version

    return version("triton") == json.loads(resources.RECORD.read_text(encoding="utf-8"))["triton"]


needs_triton = pytest.mark.skipif(not same_triton(), reason="the record is of another version of Triton")


@needs_triton
@pytest.mark.parametrize(
    ("only", "rows"),
    [
        ("sm_90 linear_weights C16 D64 tf32x3 S16", 1),
        ("sm_90 step of 2 layers: queries C32 D128", 1),
    ],  # the largest of a step
)
def test_a_kernel_compiled_again_takes_what_is_recorded(only, rows):
    code, said = compiled(only)
    assert code == 0, said
    assert f"{rows} rows are as recorded" in said


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", ["sm_80 linear", "sm_80 step", "sm_90 ", "sm_100 "])
def test_every_kernel_compiled_again_takes_what_is_recorded(rows):
    code, said = compiled(rows)
    assert code == 0, said


@pytest.fixture
def script():
    return load_script("kernel_resources")


def test_the_table_of_the_docs_is_the_record(script):
    assert script.table() == script.TABLE.read()
    assert "| yes |" in script.table()


def test_what_differs_from_the_record_is_said(script):
    found = {"registers": 1, "spilled": 0, "shared": 0, "warps": 8}
    assert script.differences({"a": found}, {"a": found}) == []
    assert script.differences({"a": found}, {"a": {**found, "spilled": 4}}) != []
    assert script.differences({"a": found}, {}) == [f"a: {found}, recorded: None"]


@pytest.mark.parametrize("given", [["--products", "bf16"], ["--products", "bf16", "--missing", "--write"]], ids=str)
def test_other_products_are_compiled_and_not_recorded(given, script, capsys):
    with pytest.raises(SystemExit):
        script.main(given)
    assert "--products bf16 is not recorded: give --missing, and do not give --write" in capsys.readouterr().err
    assert set(resources.compilations("bf16")).isdisjoint(name for name in recorded() if " step of " not in name)


def test_the_record_has_what_is_compiled_but_for_chains_that_auto_does_not_take():
    rows = set(resources.compilations())
    assert set(recorded()) <= rows
    # Of a chain on sm_80 three kernels took minutes to compile, and another one spills too much. Of those that spill
    # too much in a call from the beginning, calls that continue are not recorded.
    missing = {tuple(name.split()[i] for i in (0, 1, 2, 3)) for name in rows - set(recorded())}
    chains = {(arch, kernel[:3], width) for arch, kernel, _, width in missing}
    assert chains <= {("sm_80", "mlp", "D64"), *((f"sm_{arch}", "mlp", "D128") for arch in resources.LARGEST_SPILL)}
    assert "is not recorded" in training_too_large("mlp", 16, 128, "tf32x3", (8, 0))


def test_what_auto_may_take_is_among_what_is_compiled():
    assert SHAPES.keys() == KERNELS.keys() == backend.BY_AUTO.keys()
    for kind, chunks in backend.BY_AUTO.items():
        assert set(SHAPES[kind]) == set(product(chunks, backend.AUTO_HEAD_WIDTHS))
    assert set(STEP_SHAPES) == set(product((1, 2, 3), step.AUTO_CHUNKS, step.AUTO_HEAD_WIDTHS))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without Triton here")
def test_kernels_that_are_other_code_in_calls_that_continue_are_those_that_take_the_flag():
    modules = {name: importlib.import_module(f"moshi_ttt.plugins.hybrid.triton.{name}") for name in MODULES}
    kernels = {kernel: getattr(modules[name], kernel) for name, found in MODULES.items() for kernel in found}
    assert {name for name, kernel in kernels.items() if "GIVEN" in kernel.arg_names} == CONTINUED


@pytest.mark.parametrize("arch", resources.LARGEST_SPILL)
def test_auto_may_take_every_step_that_is_recorded(arch):
    """No spills on sm_90 and sm_100, at most 256 bytes on sm_80."""
    assert [step_too_large(*shape, (arch // 10, 0)) for shape in STEP_SHAPES] == [None] * len(STEP_SHAPES)


def test_auto_may_take_calls_of_ttt_linear_at_chunk_16_and_of_ttt_mlp_at_heads_of_64():
    for capability in ((8, 0), (9, 0)):
        for width in (64, 128):
            assert training_too_large("linear", 16, width, "tf32x3", capability) is None
    for capability in ((9, 0), (10, 0)):
        assert training_too_large("mlp", 16, 64, "tf32x3", capability) is None


def test_the_rule_for_spills_and_shared_memory(monkeypatch):
    def record(spilled, shared, continued=0):
        rows = {}
        for arch, kernel in product((80, 90), KERNELS["linear"]):
            row = Resources(registers=255, spilled=spilled, shared=shared, warps=8)
            rows[training_row(arch, kernel, 16, 64, "tf32x3")] = row
            if kernel in CONTINUED:
                row = Resources(registers=255, spilled=continued, shared=shared, warps=8)
                rows[training_row(arch, kernel, 16, 64, "tf32x3", continued=True)] = row
        monkeypatch.setattr(resources, "recorded", lambda: rows)
        return rows

    record(256, 1000)
    assert training_too_large("linear", 16, 64, "tf32x3", (8, 6)) is None
    reason = training_too_large("linear", 16, 64, "tf32x3", (9, 0))
    assert "spills 256 bytes a thread on sm_90, and auto takes kernels that spill at most 0" in reason
    record(0, 166_913)
    reason = training_too_large("linear", 16, 64, "tf32x3", (8, 0))
    assert "needs 166913 bytes of shared memory, and sm_80 has 166912" in reason
    assert training_too_large("linear", 16, 64, "tf32x3", (9, 0)) is None
    reason = training_too_large("linear", 32, 64, "tf32x3", (9, 0))
    assert "at chunk 32, head width 64, tf32x3 on sm_90 is not recorded" in reason
    reason = training_too_large("linear", 16, 64, "tf32x3", (12, 0))
    assert "compiled for sm_80, sm_90, sm_100, and this GPU is sm_120" in reason
    rows = record(0, 0, continued=8)  # a call may continue
    assert "linear_states spills 8 bytes" in training_too_large("linear", 16, 64, "tf32x3", (9, 0))
    del rows[training_row(90, "linear_states", 16, 64, "tf32x3", continued=True)]
    assert "what linear_states takes" in training_too_large("linear", 16, 64, "tf32x3", (9, 0))


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        (Resources(255, 8, 1024, 4), "queries spills 8 bytes a thread on sm_90, and auto takes .* at most 0"),
        (Resources(255, 0, 300_000, 4), "queries needs 300000 bytes of shared memory, and sm_90 has 232448"),
        (None, "what queries takes at chunk 32, head width 128 on sm_90 is not recorded"),
    ],
    ids=str,
)
def test_a_step_that_takes_too_much_is_passed_by(taken, said, monkeypatch):
    name = step_row(90, 2, "queries", 32, 128)
    rows = {key: value for key, value in recorded().items() if key != name}
    monkeypatch.setattr(resources, "recorded", lambda: rows if taken is None else rows | {name: taken})
    assert re.search(said, step_too_large(2, 32, 128, (9, 0)))
    assert "sm_80, sm_90, sm_100, and this GPU is sm_120" in step_too_large(2, 32, 128, (12, 0))


# ---- what else auto asks for


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of compute capability 9.0, as far as the backend looks."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend, "version", lambda name: "3.5.1")
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/usr/bin/{name}")
    return torch.device("cuda", 0)


def test_what_is_missing_on_a_machine_is_said(gpu, monkeypatch):
    assert backend.not_here(gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 7.5, and the kernels need 8.0" in backend.not_here(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert "needs a C compiler" in backend.not_here(gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.not_here(gpu) == "PyTorch finds no CUDA device"
    monkeypatch.setattr(backend, "version", lambda name: "2.3.1")
    assert "Triton is 2.3.1, and the kernels need 3.2 or newer" in backend.not_here(gpu)
    assert "its device is cpu" in backend.not_here(torch.device("cpu"))
    assert "its device is xpu" in backend.not_here(torch.device("xpu"))


def test_tensors_without_values_are_served_where_triton_is_installed_and_never_by_auto(monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(backend, "version", lambda name: "3.5.1")
    assert backend.not_here(meta) is None
    assert backend.products_of(meta, "highest") == "tf32x3"
    assert "ask for it by name" in backend.not_by_auto(meta, (128, 128), 16, "tf32x3")
    monkeypatch.setattr(backend, "version", lambda name: "2.3.1")
    assert "Triton is 2.3.1" in backend.not_here(meta)


def test_products_follow_the_policy(gpu):
    assert backend.products_of(gpu, "highest") == "tf32x3"
    assert backend.products_of(gpu, "high") == "tf32"
    assert backend.products_of(torch.device("cpu"), "highest") == "ieee"
    for precision in ("highest", "high"):
        assert backend.products_of(gpu, precision, torch.bfloat16) == "bf16"
        assert backend.products_of(torch.device("cpu"), precision, torch.bfloat16) == "bf16_interpreted"


def test_auto_takes_no_products_of_bfloat16_that_are_not_recorded(gpu):
    reason = backend.not_by_auto(gpu, (128, 128), 16, "bf16")
    assert reason == "what linear_states takes at chunk 16, head width 128, bf16 on sm_90 is not recorded"


@pytest.mark.parametrize(
    ("widths", "chunk", "said"),
    [
        ((64, 64), 16, None),
        ((128, 512, 128), 64, None),
        ((64, 64, 64, 64), 16, "3 layers; there are kernels for one and for two"),
        ((48, 48), 16, "heads have width 48"),
        ((64, 64), 24, "chunk: 24; the kernels take 16, 32, 64"),
        ((16, 24, 16), 16, "hidden width is 24"),
    ],
)
def test_shapes(widths, chunk, said):
    reason = backend.not_these_shapes(widths, chunk)
    assert reason is None if said is None else said in reason


@pytest.mark.parametrize(
    ("widths", "chunk", "said"),
    [
        ((128, 128), 16, None),
        ((128, 128), 64, "chunk 64 at head width 128 was not measured"),
        ((32, 32), 16, "chunk 16 at head width 32 was not measured"),
        ((64, 128, 64), 16, "a hidden width of 128 was not measured"),
    ],
)
def test_what_auto_takes(gpu, widths, chunk, said):
    reason = backend.not_by_auto(gpu, widths, chunk, "tf32x3")
    assert reason is None if said is None else said in reason


def test_auto_takes_nothing_that_is_interpreted(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "for tests" in backend.not_by_auto(gpu, (128, 128), 16, "tf32x3")
