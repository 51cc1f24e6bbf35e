"""The whole study: every stage in order; what is done stays done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from moshi_ttt.configs.reading import read_config
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.registry import default_registry
from moshi_ttt.evaluation.models import ModelUnderTest, load_models
from moshi_ttt.hosts.moshi.host import MoshiHostConfig
from moshi_ttt.system.folder_lock import LOCK, hold
from moshi_ttt.system.output_folder import LITTER, OutputError, check_free, new_folder
from moshi_ttt.system.threads import computing, largest
from study import cost
from study.plan import Arm, Scale
from study.report import Report
from study.results import read_group
from study.stages import GROUPS, Study

MADE_BY = "moshi-ttt study"
"""What folders of a study say made them, those too that were made when the study was a command of that name."""
MARKER = "study.json"


def make(
    out: Path, *, known: Sequence[Path], unseen: Sequence[Path], scale: Scale, arms: Sequence[Arm],
    ablations: Sequence[Arm], at_once: int, say: Callable[[str], None], threads: int | None = None,
) -> Path:  # fmt: skip
    """Run whatever is not done yet in ``out``, and write ``out/report``; that folder. Raises a MoshiTTTError."""
    study = Study(
        out=out, known=tuple(known), unseen=tuple(unseen), scale=scale, arms=tuple(arms),
        ablations=tuple(ablations), at_once=at_once, say=say, threads=threads,
    )  # fmt: skip
    study.manifests()
    with hold(out):
        _claim(study)
        check_free(out / "report", made_by=MADE_BY, overwrite=True)
        return _make(study)


def _claim(study: Study) -> None:
    """Write into the folder of a study which study it is; ``study.json`` lets the same one go on there, and no other.

    Raises OutputError when the folder holds something, and that is not this study's.
    """
    known, unseen = ([folder.name for folder in folders] for folders in (study.known, study.unseen))
    scale = {name: value for name, value in asdict(study.scale).items() if name != "seeds"}  # others may be added
    claim = {"made_by": MADE_BY, "known": known, "unseen": unseen, "scale": scale}
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


def _make(study: Study) -> Path:
    out, scale = study.out, study.scale
    study.encode()
    study.train_bases()
    study.tune()
    study.train_arms()
    study.evaluate()
    study.train_ablations()
    study.evaluate_ablations()
    study.say("cost, report")
    seeds, groups = scale.seeds, [group for group in GROUPS if study.encoded(group).exists()]
    compared = _models(study)
    with computing(largest(compared[0].model), study.threads):
        costs = cost.measure(compared)
    report = Report(
        scale=scale,
        speech={
            group: [folder.name for folder in folders]
            for group, folders in zip(GROUPS, (study.known, study.unseen), strict=True)
            if folders
        },
        recall={group: read_group([out / f"seed_{seed}" / f"recall_{group}" for seed in seeds]) for group in groups},
        context={group: read_group([out / f"seed_{seed}" / f"context_{group}" for seed in seeds]) for group in groups},
        ablations=read_group([out / "ablations"]) if study.ablations else None,
        costs=costs,
        choices=json.loads((out / "choices.json").read_text(encoding="utf-8")),
        made_by=MADE_BY,
    )
    with new_folder(out / "report", made_by=MADE_BY, overwrite=True) as folder:
        report.write(folder)
    return out / "report"


def _models(study: Study) -> list[ModelUnderTest]:
    """The base model of the first seed, and with each chosen adapter."""
    registry, seed = default_registry(), study.scale.seeds[0]
    folders = [(arm.name, study.run_dir(arm, seed, study.chosen(arm))) for arm in study.arms]
    host = read_config(str(folders[0][1] / "args.yaml"), registry=registry).host
    assert isinstance(host, MoshiHostConfig), host
    adapters = [(name, study.checkpoint(folder, study.scale.steps)) for name, folder in folders]
    return load_models(host, adapters, registry, "cpu")
