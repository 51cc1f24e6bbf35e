"""The study from recordings to report, very small; going on after an interruption; what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import read_settings
from moshi_ttt.data.audio import read_audio
from moshi_ttt.hosts.moshi.tiny import speech_files
from moshi_ttt.system.output_folder import OutputError
from moshi_ttt.training.model import skeleton
from study import plan
from study.command import make
from study.jobs import StudyError
from study.stages import Study
from tests.unit.data.conftest import FRAME, RATE, words_every, write_audio, write_manifest, write_transcript

FRAMES = {"train": 130, "valid": 60, "test": 110}
ARMS = tuple(arm for arm in plan.ARMS if arm.name in (plan.LORA, "ridge layer on LoRA", "in place, ridge"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Folders for known voices and for unseen ones, two recordings in each split."""
    folder = tmp_path_factory.mktemp("speech")
    losses_of = torch.cat([read_audio(path, RATE) for path in speech_files()]).numpy()
    start = 0
    for voices in ("known", "unseen_valid", "unseen"):
        for split, frames in FRAMES.items():
            entries = []
            for number in range(2):
                samples = np.stack([losses_of[start:][: frames * FRAME], losses_of[start + 999 :][: frames * FRAME]])
                start += 10_000
                path = folder / voices / f"{voices}_{split}{number}.wav"
                path.parent.mkdir(exist_ok=True)
                write_audio(path, samples)
                write_transcript(path.with_suffix(".json"), words_every(0.5, frames * FRAME / RATE))
                entries.append({"path": path.name, "duration": frames * FRAME / RATE})
            write_manifest(folder / voices / f"{split}.jsonl", entries)
    return folder


def study(speech: Path, out: Path, **changes: Any) -> tuple[Path, list[str]]:
    said: list[str] = []
    options: dict[str, Any] = {
        "known": [speech / "known"], "unseen_valid": [speech / "unseen_valid"], "unseen": [speech / "unseen"],
        "arms": ARMS, "scale": replace(plan.SMOKE, seeds=(0, 1)), "at_once": 2, "say": said.append,
    }  # fmt: skip
    return make(out, **{**options, **changes}), said


@pytest.mark.exhaustive
def test_a_study_goes_on_where_it_was_and_reports(speech, tmp_path):
    out = tmp_path / "study"
    with pytest.raises(StudyError, match="no volume was chosen yet"):
        study(speech, out, stages=("train", "test"))
    assert not (out / "seed_0" / "measured").exists(), "no recording is evaluated before a choice"
    report, said = study(speech, out)
    assert not [line for line in said if line.startswith("train")], "everything was trained"
    measured = [line for line in said if line.startswith("measure")]
    assert len([line for line in measured if ", valid, seed 0" in line]) == 1 + len(ARMS)
    assert not [line for line in measured if ", valid" in line and "seed 1" in line]
    text = (report / "report.md").read_text()
    for expected in (
        "Known voices: known.", "Unseen, test: unseen.", "# Known voices (2 recordings)", "# Unseen voices",
        "## Chosen on the validation recordings", "in place, ridge", "## Clips held at once", "# One stream",
    ):  # fmt: skip
        assert expected in text
    for name in ("answer.png", "curves.png", "volumes.png"):
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((report / "metrics.json").read_text())
    assert numbers["seeds"] == [0, 1]
    assert {row["group"] for row in numbers["figures"]} == {"valid", "valid_unseen", "test", "test_unseen"}
    test = [row for row in numbers["figures"] if row["group"] == "test"]
    assert {row["condition"] for row in test} == {"updates on", "updates off", "memory reset", "memory of another"}
    assert all(len(row["by_seed"]) == 2 and len(row["by_recording"]) == 2 for row in test)
    kinds = {arm.name: arm.kind for arm in ARMS}
    for label, arm in numbers["choices"]["arms"].items():
        assert label.startswith(kinds[arm])
    assert len(numbers["one_stream"]) > len(numbers["choices"]["arms"])

    again, said = study(speech, out)
    assert said == ["cost, report"], "everything was there"
    later = json.loads((again / "metrics.json").read_text())
    assert later["figures"] == numbers["figures"]

    (tmp_path / "kept").mkdir()
    shutil.copy(out / "results" / "seed_0.json", tmp_path / "kept")
    _, said = study(speech, tmp_path / "other", results=tmp_path / "kept", scale=replace(plan.SMOKE, seeds=(0, 1)))
    assert not [line for line in said if "seed 0" in line or ", valid" in line], "the first seed is not run again"
    assert json.loads((tmp_path / "other" / "choices.json").read_text()) == numbers["choices"]


def test_recordings_that_are_not_there_raise_before_anything_runs(tmp_path):
    with pytest.raises(StudyError, match=r"There is no .*train\.jsonl, .*valid\.jsonl.*fetch_speech"):
        study(tmp_path / "nowhere", tmp_path / "study")
    assert not (tmp_path / "study" / "logs").exists()


@pytest.mark.parametrize("name", ["report/mine.txt", "base.json", "encoded/train/index.json", "study.json"])
def test_a_folder_of_someone_else_is_not_a_study(speech, tmp_path, name):
    mine = tmp_path / "study" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    with pytest.raises(OutputError, match="not empty and was not made by `moshi-ttt study`"):
        study(speech, tmp_path / "study")
    assert [path for path in (tmp_path / "study").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "{}"


def test_another_study_does_not_go_on_in_the_same_folder(speech, tmp_path, monkeypatch):
    def nothing(study: Study) -> None:
        raise StudyError("interrupted")

    monkeypatch.setattr(Study, "encode", nothing)
    for _ in range(2):
        with pytest.raises(StudyError, match="interrupted"):  # the same one goes on
            study(speech, tmp_path / "study")
    for changes, named in (
        ({"scale": replace(plan.SMOKE, context=99)}, "scale"),
        ({"unseen": []}, r"unseen \['unseen'\] and not \[\]"),
    ):
        with pytest.raises(OutputError, match=rf"holds another study.*{named}"):
            study(speech, tmp_path / "study", **changes)


# ---- the plan


def parameters(arm: plan.Arm, out: Path) -> int:
    registry = default_registry()
    base = Study(
        out=out, known=(), unseen_valid=(), unseen=(), scale=plan.FULL, arms=(), at_once=1, say=print
    ).base_config()  # fmt: skip
    model = f"moshi_paths.config_path={base}"
    changes = ["data.train_data=x", "run_dir=x", model, "do_eval=false", *arm.changes]
    groups = skeleton(read_settings("train-cpu", changes, registry), registry).groups()
    return sum(parameter.numel() for members in groups.values() for parameter in members.values())


def test_no_arm_has_many_more_parameters_than_the_lora(tmp_path):
    counts = {arm.name: parameters(arm, tmp_path) for arm in plan.ARMS}
    assert min(counts.values()) > 0
    assert max(counts.values()) <= 1.08 * counts[plan.LORA], counts


def test_names_give_folders_of_their_own():
    folders = [arm.folder for arm in plan.ARMS]
    assert len(folders) == len(set(folders))


def test_each_kind_has_an_arm_alone_and_one_beside_lora():
    assert {(arm.kind, arm.beside_lora) for arm in plan.ARMS} == {
        ("sequence", False), ("sequence", True), ("feed_forward", False), ("feed_forward", True), (None, False),
    }  # fmt: skip
