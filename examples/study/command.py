"""The whole study, or some of its stages; what is done stays done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from moshi_ttt.configs.reading import read_config
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.registry import default_registry
from moshi_ttt.evaluation.models import ModelUnderTest, load_models
from moshi_ttt.hosts.moshi.host import MoshiHostConfig
from moshi_ttt.system.folder_lock import LOCK, hold
from moshi_ttt.system.output_folder import LITTER, OutputError, check_free, new_folder
from moshi_ttt.system.report.writer import to_json
from moshi_ttt.system.threads import computing, largest
from study import cost
from study.choice import CHOICES, read_choices, record
from study.jobs import StudyError
from study.plan import Arm, Scale
from study.report import Report
from study.results import StudyResults, candidates, gather, read_json, write_seed
from study.stages import Study

MADE_BY = "moshi-ttt study"
"""What folders of a study say made them, those too that were made when the study was a command of that name."""
MARKER = "study.json"
STAGES = ("train", "validate", "test", "report")
COSTS = "costs.json"
TRAINED = ("shipped", "context", "clip", "batch", "base_steps", "steps")
"""What trained models depend on, of ``Scale``."""


def make(
    out: Path, *, known: Sequence[Path], unseen_valid: Sequence[Path], unseen: Sequence[Path], scale: Scale,
    arms: Sequence[Arm], at_once: int, say: Callable[[str], None], threads: int | None = None,
    results: Path | None = None, stages: Sequence[str] = STAGES,
) -> Path:  # fmt: skip
    """Run whatever is not done yet in ``out``, and write ``out/report``; that folder. Raises a MoshiTTTError.

    Args:
        results: where the results of seeds are, a file each; ``out/results`` if left out. A seed whose file is there is
            not run again.
        stages: some of ``STAGES``.
    """
    study = Study(
        out=out, known=tuple(known), unseen_valid=tuple(unseen_valid), unseen=tuple(unseen), scale=scale,
        arms=tuple(arms), at_once=at_once, say=say, threads=threads,
    )  # fmt: skip
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise StudyError(f"There is no stage {unknown[0]!r}. Stages: {', '.join(STAGES)}.")
    study.manifests()
    with hold(out):
        _claim(study)
        check_free(out / "report", made_by=MADE_BY, overwrite=True)
        return _make(study, results or out / "results", stages)


def _claim(study: Study) -> None:
    """Write into the folder of a study which study it is; ``study.json`` lets the same one go on there, and no other.

    Raises OutputError when the folder holds something, and that is not this study's.
    """
    folders = {"known": study.known, "unseen_valid": study.unseen_valid, "unseen": study.unseen}
    claim = {
        "made_by": MADE_BY,
        **{name: [folder.name for folder in each] for name, each in folders.items()},
        "scale": {name: value for name, value in asdict(study.scale).items() if name in TRAINED},
    }
    path = study.out / MARKER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("made_by") != MADE_BY:
        if any(other.name not in {LOCK, *LITTER} for other in study.out.iterdir()):
            raise OutputError(
                f"{study.out} is not empty and was not made by `{MADE_BY}` (it has no {MARKER} of its). Choose another "
                "folder with --out, or empty it yourself."
            )
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(claim, indent=1) + "\n", encoding="utf-8")
    elif different := [f"{key} {found.get(key)} and not {claim[key]}" for key in claim if found.get(key) != claim[key]]:
        raise OutputError(
            f"{study.out} holds another study: of {'; of '.join(different)}. What is there would be taken for this "
            "one's. Choose another folder with --out."
        )


def _make(study: Study, results: Path, stages: Sequence[str]) -> Path:
    """The stages in their order."""
    path = study.out / CHOICES
    finished = _finished(results)
    if finished and not path.exists():  # other seeds use the choices of the first
        with atomic_file(path) as temporary:
            found = read_json(next(iter(finished.values())))["choices"]
            temporary.write_text(to_json(found) + "\n", encoding="utf-8")
    left = replace(study, scale=replace(study.scale, seeds=tuple(s for s in study.scale.seeds if s not in finished)))
    if "train" in stages and left.scale.seeds:
        left.encode()
        left.train_bases()
        left.train_arms()
    if "validate" in stages and not finished:
        study.validate()
        choose(study, path)
    if "test" in stages and left.scale.seeds:
        choices = read_choices(path)
        left.test(choices)
        for seed in left.scale.seeds:
            write_seed(results, gather(left, seed, choices))
    if "report" in stages:
        _report(study, results)
    return study.out / "report"


def choose(study: Study, path: Path) -> None:
    """Record what the rule chooses by the validation recordings of the first seed, where nothing is recorded yet."""
    seed, judged = study.scale.seeds[0], {arm.name for arm in study.judged}
    found = candidates(StudyResults([gather(study, seed)]))
    record(path, {name: tried for name, tried in found.items() if name in judged}, study.judged, seed)


def _finished(results: Path) -> dict[int, Path]:
    """The file of each seed that has results, by seed."""
    files = results.glob("seed_*.json")
    return dict(sorted((int(file.stem.removeprefix("seed_")), file) for file in files))


def _report(study: Study, results: Path) -> None:
    """Write ``OUT/report``, of all seeds that are finished. Raises StudyError where none is."""
    finished = _finished(results)
    if not finished:
        raise StudyError(f"No seed has results in {results}. Run the stages 'train', 'validate' and 'test' first.")
    study.say("cost, report")
    folders = {"known voices": study.known, "unseen, validation": study.unseen_valid, "unseen, test": study.unseen}
    report = Report(
        results=StudyResults.read(finished.values()),
        speech={name: [folder.name for folder in each] for name, each in folders.items() if each},
        costs=_costs(study),
        made_by=MADE_BY,
    )
    with new_folder(study.out / "report", made_by=MADE_BY, overwrite=True) as folder:
        report.write(folder)


def _costs(study: Study) -> dict[str, cost.Cost]:
    """What a streamed frame costs with each arm that was trained on the base model itself, measured once.

    Nothing where no seed was trained here.
    """
    path = study.out / COSTS
    if not path.exists():
        seeds = [seed for seed in study.scale.seeds if all(study.arm_job(arm, seed).done for arm in study.judged)]
        if not seeds:
            return {}
        compared = _models(study, seeds[0])
        with computing(largest(compared[0].model), study.threads):
            measured = cost.measure(compared)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({name: asdict(each) for name, each in measured.items()}), encoding="utf-8")
    return {name: cost.Cost(**each) for name, each in read_json(path).items()}


def _models(study: Study, seed: int) -> list[ModelUnderTest]:
    """The base model of a seed, and with each adapter."""
    registry = default_registry()
    folders = [(arm.name, study.run_dir(arm, seed)) for arm in study.judged if not arm.on_lora]
    host = read_config(str(folders[0][1] / "args.yaml"), registry=registry).host
    assert isinstance(host, MoshiHostConfig), host
    adapters = [(name, study.checkpoint(folder, study.scale.steps)) for name, folder in folders]
    return load_models(host, adapters, registry, "cpu")
