"""Which jobs the stages run: what is judged, what is measured for longer, what an arm on a LoRA starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moshi_ttt.hosts.moshi.tiny import bundle_folder, random_tiny_lm, tiny_config
from study import plan
from study.jobs import Job
from study.plan import Arm
from study.stages import HOUR, TEST, VALIDATION, Study

ARMS = (
    Arm(name="a", changes=("ttt=a",), kind="sequence"),
    Arm(name="b", changes=("ttt=b",), kind="feed_forward"),
    Arm(name=plan.LORA, changes=("ttt=[]",)),
    Arm(name="a on LoRA", changes=("ttt=a",), kind="sequence", beside_lora=True, on_lora=True),
    Arm(name="open", changes=("ttt=c",), kind="sequence", judged=False),
)
CHOICES = {
    "seed": 0,
    "arms": {"sequence": "a", "sequence + LoRA": "a on LoRA"},
    "volumes": {"a": 0.5, "b": 1.0, "a on LoRA": 0.7},
}


@pytest.fixture
def study(tmp_path) -> Study:
    made = Study(
        out=tmp_path, known=(Path("known"),), unseen_valid=(), unseen=(), scale=plan.SMOKE, arms=ARMS, at_once=1,
        say=print,
    )  # fmt: skip
    for group in (*TEST, *VALIDATION):
        made.encoded(group).mkdir(parents=True)
    return made


@pytest.fixture
def ran(monkeypatch) -> list[Job]:
    """The jobs that were given to run, in order; none of them runs."""
    jobs: list[Job] = []
    monkeypatch.setattr(Study, "_run", lambda self, given: jobs.extend(given))
    return jobs


def tasks(jobs: list[Job]) -> list[dict[str, Any]]:
    return [json.loads(job.arguments[0]) for job in jobs if job.name.startswith("measure")]


def test_open_questions_are_not_trained_with_every_seed(study, ran):
    study.train_arms()
    assert not [job for job in ran if "open" in job.name]
    names = [job.name for job in ran if "seed 0" in job.name]
    assert names[-1] == "train a on LoRA, seed 0", "the LoRA is finished before what is trained on it starts"
    assert len(ran) == 2 * 4


def test_an_arm_on_a_lora_starts_from_the_finished_lora(study):
    arguments = study.arm_job(ARMS[3], 0).arguments
    lora = study.checkpoint(study.run_dir(ARMS[2], 0), plan.SMOKE.steps) / "consolidated" / "config.json"
    base = study.checkpoint(study.base(0), plan.SMOKE.base_steps) / "consolidated"
    assert f"moshi_paths.config_path={lora}" in arguments
    assert f"moshi_paths.moshi_path={base / 'consolidated.safetensors'}" in arguments
    assert f"moshi_paths.config_path={base / 'config.json'}" in study.arm_job(ARMS[0], 0).arguments


def test_the_shipped_model_starts_from_its_own_weights(study):
    shipped = replace(study, scale=replace(study.scale, shipped=True))
    assert shipped.first_weights(0) == bundle_folder() / "model.safetensors"
    config = json.loads(shipped.base_config().read_text())
    assert config == {**tiny_config(), "context": plan.SMOKE.context}
    assert load_file(shipped.first_weights(0)).keys() == random_tiny_lm(**{
        name: value for name, value in config.items() if name != "model_type" and not name.endswith("_name")
    }).state_dict().keys()  # fmt: skip
    smaller = json.loads(study.base_config().read_text())
    assert (smaller["dim"], smaller["n_q"]) == (plan.MODEL["dim"], plan.MODEL["n_q"])
    assert study.first_weights(0) == study.out / "seed_0" / "random.safetensors"


def test_arms_of_the_shipped_model_are_of_the_plan_and_have_what_they_stand_on():
    assert {arm.name for arm in plan.OF_SHIPPED} >= {plan.LORA, "ridge layer, wide keys"}
    assert all(arm in plan.ARMS and arm.judged for arm in plan.OF_SHIPPED)
    assert {arm.kind for arm in plan.OF_SHIPPED} == {None, "sequence", "feed_forward"}
    assert len([arm for arm in plan.OF_SHIPPED if arm.kind is not None]) == 3


def test_validation_is_of_the_first_seed_at_every_volume(study, ran):
    study.validate()
    assert ran[0].name == "train open, seed 0"
    given = tasks(ran)
    assert {task["name"] for task in given} == {"base", *(arm.name for arm in ARMS)}
    assert {Path(task["data"]).name for task in given} == set(VALIDATION)
    assert not [task for task in given if "seed_1" in task["out"]]
    volumes = [[on, volume] for on, volume in (("updates on", each) for each in plan.SMOKE.volumes)]
    controls = [["updates off", 1.0], ["memory of another", 1.0]]
    for task in given:
        alone = task["name"] in ("base", plan.LORA)
        assert task["settings"] == ([["updates on", 1.0]] if alone else [*volumes, *controls])


def test_the_test_leaves_out_what_is_not_judged_and_ends_with_the_longest(study, ran):
    study.test(CHOICES)
    given = tasks(ran)
    assert {task["name"] for task in given} == {"base", "a", "b", plan.LORA, "a on LoRA"}
    own = {(task["name"], Path(task["out"]).parent.name): task for task in given if "seed_0" in task["out"]}
    assert own["b", "test"]["settings"] == [
        ["updates on", 1.0], ["updates off", 1.0], ["memory of another", 1.0],
    ]  # fmt: skip
    assert ["memory reset", 0.5] in own["a", "test"]["settings"]
    assert ["updates on", 1.0] in own["a", "test"]["settings"]
    assert own["a", "test"]["kinds"] == ["once", "recall", "held"]
    assert own["b", "test"]["kinds"] == ["once", "recall"]
    assert own["a", HOUR]["longer"] == [0.5, 1.0]
    assert own["a on LoRA", HOUR]["longer"] == [0.7]
    assert ("b", HOUR) not in own
    assert (plan.LORA, HOUR) in own
    lasting = [job for job in ran if job.name.startswith("lasting")]
    assert {job.name for job in lasting} == {  # of the first seed alone
        "lasting a, test, seed 0",
        "lasting a, test_unseen, seed 0",
    }
    first = min(ran.index(job) for job in lasting)
    assert not [job for job in ran[first:] if job.name.startswith("measure") and HOUR not in job.name]


def test_of_the_shipped_model_nothing_is_measured_for_longer(study, ran):
    replace(study, scale=replace(study.scale, shipped=True)).test(CHOICES)
    given = tasks(ran)
    own = {task["name"]: task for task in given if "seed_0" in task["out"] and Path(task["out"]).parent.name == "test"}
    assert own["a"]["kinds"] == ["once", "recall"]
    assert ["updates on", plan.SMOKE.volumes[0]] in own["a"]["settings"]
    assert not [job for job in ran if job.name.startswith("lasting") or HOUR in job.name]


def test_a_long_stream_is_of_all_recordings_that_nothing_was_trained_on(study):
    task = json.loads(study.measuring(0, None, HOUR, [], ("hour",)).arguments[0])
    assert [Path(each).name for each in task["data"].split(",")] == [*TEST, *VALIDATION]
