"""Which tile training kernels run with: candidates, measuring within bounds, and the file that keeps a choice."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.testing import Shape
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.common import backends
from moshi_ttt.plugins.hybrid.triton import resources, train
from moshi_ttt.plugins.hybrid.triton.resources import Resources, training_too_large
from moshi_ttt.plugins.hybrid.triton.train_settings import Tile, tile_of, tiles_of
from moshi_ttt.plugins.hybrid.triton.tuning import MOST_SECONDS, TunedCalls, candidates, chosen_tile
from tests.project import ROOT

CALLS = TunedCalls(
    gpu="a GPU", triton="3.5.1", sources="abc", chunk=16, widths=(64, 64), heads=32, rows=4, products="tf32x3"
)
TILES = tiles_of(16)
SECONDS = dict(zip(TILES, (3.0, 1.0, 2.0), strict=True))
"""Of a call with each tile: the second one is the fastest."""


@pytest.fixture(autouse=True)
def said(caplog):
    """What is logged, in this test alone."""
    backends.log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="moshi_ttt.backends")
    return caplog


def unmeasured(tile):
    raise AssertionError(f"{tile} was measured")


def test_the_fastest_is_chosen_and_kept(tmp_path):
    measured = []
    found = chosen_tile(CALLS, TILES, lambda tile: measured.append(tile) or SECONDS[tile], folder=tmp_path)
    assert (found, measured) == (TILES[1], list(TILES))
    assert chosen_tile(CALLS, TILES, unmeasured, folder=tmp_path) == TILES[1]
    (file,) = tmp_path.iterdir()  # no scratch file is left
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["tile"] == asdict(TILES[1])
    assert [each["seconds"] for each in kept["measured"]] == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "change",
    [{"gpu": "another"}, {"triton": "4.0"}, {"sources": "abd"}, {"chunk": 32}, {"rows": 8}, {"products": "tf32"}],
    ids=str,
)
def test_a_choice_is_of_its_own_gpu_triton_kernels_and_shape(change, tmp_path):
    chosen_tile(CALLS, TILES, SECONDS.get, folder=tmp_path)
    slowest_first = {tile: -seconds for tile, seconds in SECONDS.items()}
    assert chosen_tile(replace(CALLS, **change), TILES, slowest_first.get, folder=tmp_path) == TILES[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_no_candidate_is_begun_when_time_is_up(tmp_path, said):
    times = (step * (MOST_SECONDS + 1) for step in count())
    found = chosen_tile(CALLS, TILES, SECONDS.get, folder=tmp_path, clock=lambda: next(times))
    assert found == TILES[0]  # measured first, whatever it takes
    assert "1 of 3 tiles measured; time is up" in said.text


def test_one_candidate_is_not_measured_and_that_is_said(tmp_path, said):
    assert chosen_tile(CALLS, TILES[:1], unmeasured, folder=tmp_path) == TILES[0]
    assert list(tmp_path.iterdir()) == []
    assert "linear, chunk 16, heads of 64, tf32x3: tune has nothing to measure" in said.text


def test_a_candidate_that_fails_is_left_out_with_the_reason(tmp_path, said):
    def measure(tile):
        if tile == TILES[1]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return SECONDS[tile]

    assert chosen_tile(CALLS, TILES, measure, folder=tmp_path) == TILES[2]
    assert f"{TILES[1]} is left out: OutOfMemoryError: CUDA out of memory" in said.text


def test_that_the_first_candidate_fails_is_not_hidden(tmp_path):
    def fails(tile):
        raise RuntimeError("no kernel runs here")

    with pytest.raises(RuntimeError, match="no kernel runs here"):
        chosen_tile(CALLS, TILES, fails, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        (json.dumps({"calls": {**asdict(CALLS), "gpu": "b"}, "tile": asdict(TILES[0])}), "it is of other calls"),
        (json.dumps({"calls": asdict(CALLS), "tile": {"slice_width": 8, "warps": 1}}), "ValueError"),
        (json.dumps({"calls": asdict(CALLS), "tile": {"width": 8}}), "TypeError"),
    ],
    ids=lambda text: text[:8],
)
def test_a_file_that_does_not_serve_is_ignored_with_a_reason_and_written_anew(text, why, tmp_path, said):
    file = CALLS.file(tmp_path)
    file.write_text(text, encoding="utf-8")
    assert chosen_tile(CALLS, TILES, SECONDS.get, folder=tmp_path) == TILES[1]
    assert f"{file} is ignored and written anew" in said.text
    assert why in said.text
    assert chosen_tile(CALLS, TILES, unmeasured, folder=tmp_path) == TILES[1]


def test_a_folder_that_cannot_be_written_is_said(tmp_path, said):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert chosen_tile(CALLS, TILES, SECONDS.get, folder=tmp_path / "file") == TILES[1]
    assert "cannot be kept" in said.text


def choose_often(path, seconds):
    folder = Path(path)
    for _ in range(100):
        CALLS.file(folder).unlink(missing_ok=True)
        assert chosen_tile(CALLS, TILES, dict(zip(TILES, seconds, strict=True)).get, folder=folder) in TILES


@pytest.mark.exhaustive  # three processes; what one writes is tested above
def test_processes_that_choose_at_once_leave_a_whole_file(tmp_path, said):
    program = "from tests.unit.plugins.test_triton_tuning import choose_often; choose_often({!r}, {})"
    processes = [
        subprocess.Popen([sys.executable, "-c", program.format(str(tmp_path), seconds)], cwd=ROOT)
        for seconds in ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0))
    ]
    assert [process.wait() for process in processes] == [0, 0]
    chosen = chosen_tile(CALLS, TILES, SECONDS.get, folder=tmp_path)
    assert chosen in TILES
    assert "ignored" not in said.text
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


def test_candidates_are_recorded_to_fit(monkeypatch):
    for chunk, width, number in ((16, 64, 3), (16, 128, 2), (32, 64, 1)):
        found = candidates(replace(CALLS, chunk=chunk, widths=(width, width)), (9, 0))
        assert found[0] == tile_of(chunk)
        assert len(found) == number
        assert all(training_too_large("linear", chunk, width, "tf32x3", (9, 0), tile) is None for tile in found)
    assert candidates(replace(CALLS, products="bf16"), (9, 0)) == (tile_of(16),)  # not recorded
    assert candidates(replace(CALLS, widths=(64, 128, 64)), (9, 0)) == (tile_of(16),)  # the same
    assert candidates(CALLS, (12, 0)) == (tile_of(16),)
    assert len(candidates(replace(CALLS, widths=(64, 256, 64)), (9, 0))) == 2
    assert len(candidates(replace(CALLS, widths=(128, 512, 128)), (9, 0))) == 1
    assert Tile(16, 8) in candidates(CALLS, (9, 0))
    spilling = {
        name: Resources(255, 8, 0, 8) if " S16 W8" in name else row for name, row in resources.recorded().items()
    }
    monkeypatch.setattr(resources, "recorded", lambda: spilling)
    assert Tile(16, 8) not in candidates(CALLS, (9, 0))


@pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")
def test_nothing_is_measured_without_a_gpu_and_adapters_do_not_keep_the_option(monkeypatch):
    monkeypatch.setattr(train, "tile_on", unmeasured)
    options = {"chunk": 16, "backend": {"train": "triton", "tune": True}}
    case = default_cases("ttt_linear", [options], shapes=(Shape(dim=32, heads=2, batch=2),))[1]
    block = case.block(device="meta")
    block(torch.zeros(2, 16, 32, device="meta"))  # tensors without values
    assert isinstance(block._train_run(torch.device("meta")), train.TritonTrain)
    assert case.config.backends().tune
    assert "backend" not in case.config.learned_options()


def test_tuning_is_refused_with_another_backend():
    with pytest.raises(ConfigError, match="tune: true is for Triton kernels, and train is 'torch'; set train: triton"):
        default_cases("ttt_linear", [{"backend": {"train": "torch", "tune": True}}])


def test_on_a_gpu_the_tile_that_is_found_is_used(monkeypatch):
    found = []
    monkeypatch.setattr(train, "tile_on", lambda *given: found.append(given) or Tile(16, 4))
    run, case = train.TritonTrain("tf32x3", tunes=True), default_cases("ttt_linear", [{"chunk": 16}])[1]
    block, x = case.block(), case.inputs(20)
    settings = run._numbers(block, False, x).settings
    assert (settings.slice_width, settings.warps) == (16, 4)
    width = case.shape.dim // case.shape.heads
    assert found == [(x.device, 16, (width, width), case.shape.heads, len(x), "tf32x3")]
    with FakeTensorMode() as mode:  # values are missing, and so is the time that a kernel would take
        run._numbers(block, False, mode.from_tensor(x))
    assert len(found) == 1
    assert train.TritonTrain("tf32x3")._numbers(block, False, x).settings.warps == 8


@pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")
@pytest.mark.exhaustive  # an interpreter, for seconds
def test_every_candidate_gives_the_same_within_rounding():
    program = """
import json, torch
from dataclasses import replace
from moshi_ttt.plugins.hybrid.triton import tuning
from moshi_ttt.plugins.hybrid.triton.train_settings import tiles_of
tuning.CHUNKS = 2
worst = {}
for widths in ((32, 32), (32, 64, 32)):
    calls = tuning.TunedCalls(gpu="", triton="", sources="", chunk=16, widths=widths, heads=1, rows=2, products="ieee")
    run = tuning.drawn_call(calls, torch.device("cpu"))
    first, *others = [run(tile) for tile in tiles_of(16)]
    worst[len(widths)] = [
        max(float((a - b).norm() / b.norm().clamp(min=1e-4)) for a, b in zip(each, first, strict=True))
        for each in others
    ]
print(json.dumps(worst))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    worst = json.loads(result.stdout.splitlines()[-1])
    assert all(len(each) == 2 for each in worst.values())
    assert max(max(each) for each in worst.values()) <= 1e-5, worst
