"""``moshi-ttt study``: every stage in order; what is done stays done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from moshi_ttt.apps.config_files import read_config
from moshi_ttt.apps.evaluate.subjects import Subject, load_subjects
from moshi_ttt.apps.output_folder import check_free, new_folder
from moshi_ttt.apps.study import cost
from moshi_ttt.apps.study.plan import Scale
from moshi_ttt.apps.study.plan import Subject as Trained
from moshi_ttt.apps.study.report import Report
from moshi_ttt.apps.study.results import read_group
from moshi_ttt.apps.study.stages import GROUPS, Study
from moshi_ttt.apps.threads import computing, largest
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.moshi.host import MoshiHostConfig

MADE_BY = "moshi-ttt study"


def make(
    out: Path, *, known: Sequence[Path], unseen: Sequence[Path], scale: Scale, subjects: Sequence[Trained],
    ablations: Sequence[Trained], at_once: int, say: Callable[[str], None], threads: int | None = None,
) -> Path:  # fmt: skip
    """Run whatever is not done yet in ``out``, and write ``out/report``; that folder. Raises a MoshiTTTError."""
    study = Study(
        out=out, known=tuple(known), unseen=tuple(unseen), scale=scale, subjects=tuple(subjects),
        ablations=tuple(ablations), at_once=at_once, say=say, threads=threads,
    )  # fmt: skip
    check_free(out / "report", made_by=MADE_BY, overwrite=True)
    study.encode()
    study.train_bases()
    study.tune()
    study.train_subjects()
    study.evaluate()
    study.train_ablations()
    study.evaluate_ablations()
    say("cost, report")
    seeds, groups = scale.seeds, [group for group in GROUPS if study.encoded(group).exists()]
    compared = _subjects(study)
    with computing(largest(compared[0].model), threads):
        costs = cost.measure(compared)
    report = Report(
        scale=scale,
        speech={
            group: [folder.name for folder in folders]
            for group, folders in zip(GROUPS, (known, unseen), strict=True)
            if folders
        },
        recall={group: read_group([out / f"seed_{seed}" / f"recall_{group}" for seed in seeds]) for group in groups},
        context={group: read_group([out / f"seed_{seed}" / f"context_{group}" for seed in seeds]) for group in groups},
        ablations=read_group([out / "ablations"]) if ablations else None,
        costs=costs,
        choices=json.loads((out / "choices.json").read_text(encoding="utf-8")),
        made_by=MADE_BY,
    )
    with new_folder(out / "report", made_by=MADE_BY, overwrite=True) as folder:
        report.write(folder)
    return out / "report"


def _subjects(study: Study) -> list[Subject]:
    """The base model of the first seed, and with each chosen adapter."""
    registry, seed = default_registry(), study.scale.seeds[0]
    folders = [(subject.name, study.run_dir(subject, seed, study.chosen(subject))) for subject in study.subjects]
    host = read_config(str(folders[0][1] / "args.yaml"), registry=registry).host
    assert isinstance(host, MoshiHostConfig), host
    adapters = [(name, study.checkpoint(folder, study.scale.steps)) for name, folder in folders]
    return load_subjects(host, adapters, registry, "cpu")
