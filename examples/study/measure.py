"""Measure one model on one group of recordings. ``stages`` starts ``run_measure.py``, a process for each ``Task``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from moshi_ttt.configs.reading import read_config
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.registry import default_registry
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.evaluation.documents import Document, read_documents
from moshi_ttt.evaluation.models import Condition, ModelUnderTest, load_models
from moshi_ttt.hosts.moshi.compatibility import require_audio
from moshi_ttt.hosts.moshi.host import MoshiHostConfig
from moshi_ttt.system.report.writer import to_json, versions
from study import measures
from study.jobs import StudyError
from study.measures import plain

BATCH = 16
"""Recordings in a batch."""
HOURS = 8
"""Orders of the recordings in which the long stream is made."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure.

    Attributes:
        config: of a training run, for the base model.
        data: the encoded recordings.
        name: of the model.
        adapter: its checkpoint; None for the base model.
        settings: pairs of a condition and a volume, for ``once`` and ``recall``.
        kinds: of ``once``, ``recall``, ``held`` and ``hour``.
        longer: volumes at which ``held`` and ``hour`` are measured.
        frames, clips, least, buckets, held, hour: see ``plan.Scale``; ``frames`` is its clip.
        out: the file to write.
    """

    config: str
    data: str
    name: str
    adapter: str | None
    settings: Sequence[tuple[str, float]]
    kinds: Sequence[str]
    longer: Sequence[float]
    frames: int
    clips: int
    least: int
    buckets: Sequence[int]
    held: Sequence[int]
    hour: Sequence[int]
    out: str

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))


def measure(task: Task, tested: ModelUnderTest, documents: Sequence[Document]) -> dict[str, Any]:
    """Everything that ``task`` names, of a loaded model and recordings; see ``measures``."""
    found: dict[str, Any] = {}
    settings = [(cast("Condition", condition), float(volume)) for condition, volume in task.settings]
    if "once" in task.kinds:
        found |= _once(task, tested, documents, settings)
    if "recall" in task.kinds:
        found["presented"] = [document.name for document in documents if document.frames >= task.frames]
        found["recall"] = [
            {"condition": condition, "volume": volume, "losses": plain(measures.recall(
                tested, documents, condition=condition, volume=volume, frames=task.frames, clips=task.clips,
                batch_size=2 * BATCH,
            ))}
            for condition, volume in settings if condition in tested.conditions
        ]  # fmt: skip
    volumes = task.longer if tested.injection is not None else (1.0,)
    if "held" in task.kinds:
        found["held"] = []
        for volume in volumes:
            first, again = measures.held(
                tested, documents, volume=volume, frames=task.frames, clips=task.clips, counts=task.held
            )
            found["held"].append(
                {"volume": volume, "counts": list(task.held), "first": plain(first), "again": plain(again)}
            )
    if "hour" in task.kinds:
        frames, part = task.hour
        found["hour"] = [
            {"volume": volume, "parts": plain(measures.hour(
                tested, documents, volume=volume, rows=HOURS, frames=frames, part=part, segment=2 * task.frames,
            ))}
            for volume in volumes
        ]  # fmt: skip
    return found


def _once(
    task: Task, tested: ModelUnderTest, documents: Sequence[Document], settings: Sequence[tuple[Condition, float]]
) -> dict[str, Any]:
    """Speech played once: recordings up to the last bucket, and joined ones in the last bucket."""
    recordings = [
        replace(document, codes=document.codes[:, : task.buckets[-1]])
        for document in documents if document.frames >= task.buckets[0] + task.least
    ]  # fmt: skip
    joined = measures.joined(documents, task.buckets[-1] + 5 * task.least)
    if len(joined) < 2:
        raise StudyError(
            f"The recordings in {task.data} make {len(joined)} of {task.buckets[-1] + 5 * task.least} frames or more, "
            "and two are needed for the last bucket. Give more speech."
        )
    rows = []
    for condition, volume in (each for each in settings if each[0] in tested.conditions):
        alone, together = (
            measures.once(
                tested, each, condition=condition, volume=volume, segment=2 * task.frames, buckets=task.buckets,
                least=task.least, batch_size=size,
            )
            for each, size in ((recordings, 2 * BATCH), (joined, BATCH // 2))
        )  # fmt: skip
        rows.append({"condition": condition, "volume": volume, "buckets": plain(alone), "last": plain(together[:, -1])})
    return {
        "played_once": [document.name for document in recordings],
        "joined": [document.name for document in joined],
        "once": rows,
    }


def _require(model: Any, name: str) -> None:
    require_audio(model, name, "the study")


def run(task: Task) -> None:
    """Load, measure, and write ``task.out``."""
    began = time.process_time()
    registry = default_registry()
    host = read_config(task.config, registry=registry).host
    assert isinstance(host, MoshiHostConfig), host
    codec = SpeechCodec.load(host, "cpu", require=_require)
    documents = read_documents(task.data, codec, layout="files", transcripts="optional", limit=None)
    adapters = [] if task.adapter is None else [(task.name, Path(task.adapter))]
    tested = load_models(host, adapters, registry, "cpu")[-1]
    found = measure(task, tested, documents)
    about = {"name": task.name, "parameters": int(tested.facts["parameters"]), "versions": versions()}
    seconds = {"processor_seconds": round(time.process_time() - began, 1)}
    Path(task.out).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(task.out)) as temporary:
        temporary.write_text(to_json({**about, **seconds, **found}) + "\n", encoding="utf-8")
