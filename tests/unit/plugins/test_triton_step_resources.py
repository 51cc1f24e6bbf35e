"""The record of what the kernels of a streamed step take of a GPU, and what ``auto`` makes of it."""

from __future__ import annotations

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import product

import pytest

from moshi_ttt.plugins.hybrid.triton import step_resources
from moshi_ttt.plugins.hybrid.triton.resources import LARGEST_SPILL, Resources
from tests.project import ROOT

_spec = spec_from_file_location("step_resources_script", ROOT / "scripts" / "step_resources.py")
script = module_from_spec(_spec)
_spec.loader.exec_module(script)
BLOCKS = list(product((1, 2, 3), (16, 32), (64, 128)))
"""Layers, chunk, head width."""
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")


def test_every_launch_is_recorded_and_no_other():
    assert set(step_resources.recorded()) == set(script.rows())


@pytest.mark.parametrize("arch", LARGEST_SPILL)
def test_auto_may_take_all_that_is_recorded(arch):
    """No spills on sm_90 and sm_100, at most 256 bytes on sm_80."""
    assert [step_resources.too_large(*block, (arch // 10, 0)) for block in BLOCKS] == [None] * len(BLOCKS)


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        (Resources(255, 8, 1024, 4), "queries spills 8 bytes a thread on sm_90, and auto takes .* at most 0"),
        (Resources(255, 0, 300_000, 4), "queries needs 300000 bytes of shared memory, and sm_90 has 232448"),
        (None, "what queries takes at chunk 32 and head width 128 on sm_90 is not recorded"),
    ],
    ids=str,
)
def test_what_takes_too_much_is_passed_by(taken, said, monkeypatch):
    name = step_resources.row_name(90, 2, "queries", 32, 128)
    rows = {key: value for key, value in step_resources.recorded().items() if key != name}
    monkeypatch.setattr(step_resources, "recorded", lambda: rows if taken is None else rows | {name: taken})
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(step_resources.too_large(2, 32, 128, (9, 0)))


def test_an_architecture_that_nothing_was_compiled_for_is_passed_by():
    assert "sm_80, sm_90, sm_100, and this GPU is sm_120" in step_resources.too_large(2, 32, 128, (12, 0))


def compiled_again(text: str) -> dict[str, dict[str, int]]:
    import triton

    record = json.loads(step_resources.RECORD.read_text(encoding="utf-8"))
    if record["triton"] != triton.__version__:
        pytest.skip(f"the record is of Triton {record['triton']}, and this is {triton.__version__}")
    return {
        name: {"found": script.compiled(*row), "recorded": record["kernels"][name]}
        for name, row in script.rows().items()
        if text in name
    }


@needs_triton
def test_what_is_recorded_is_what_the_compiler_says():
    found = compiled_again("sm_90 step of 2 layers: queries C32 D128")
    assert len(found) == 1
    assert all(row["found"] == row["recorded"] for row in found.values()), found


@needs_triton
@pytest.mark.exhaustive  # the one row above is of the largest kernel
@pytest.mark.parametrize("arch", LARGEST_SPILL)
def test_the_whole_record_is_what_the_compiler_says(arch):
    found = compiled_again(f"sm_{arch} ")
    assert len(found) == len(script.rows()) // len(LARGEST_SPILL)
    assert all(row["found"] == row["recorded"] for row in found.values()), found
