"""The files of ``moshi-ttt generate``: of each answer its wav, its JSON and its plot, and a report of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moshi_ttt.apps.generate.memory_figures import MEMORY_HEADER, memory_rows, memory_series, plot_memory
from moshi_ttt.configs.speakers import MAIN_SPEAKER
from moshi_ttt.data.audio import write_wav
from moshi_ttt.data.spoken import SpokenText
from moshi_ttt.serving.offline import Answer
from moshi_ttt.system.report.tables import image, table, version_text
from moshi_ttt.system.report.writer import to_json, versions, write_report

SOUND, WORDS, PICTURE = "{}.wav", "{}.json", "{}.memory.png"


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """How answers are written.

    Attributes:
        made_by: the command.
        sample_rate, frame_rate: of the wav, and frames a second.
        stereo: the user on the left and Moshi on the right, instead of Moshi alone.
        facts: what is the same for all answers: the model, the adapter, the options.
    """

    made_by: str
    sample_rate: int
    frame_rate: float
    stereo: bool
    facts: Mapping[str, Any]

    def write(self, folder: Path, name: str, answer: Answer, spoken: SpokenText, **own: Any) -> dict[str, Any]:
        """The files of one answer; returns what its JSON says. ``own``: what it says of this answer alone."""
        sound = torch.stack([answer.user, answer.moshi]) if self.stereo else answer.moshi
        write_wav(folder / SOUND.format(name), sound, self.sample_rate)
        memory = memory_series(answer.stats, self.frame_rate)
        values: dict[str, Any] = {
            "made_by": self.made_by,
            **own,
            "seconds": answer.frames / self.frame_rate,
            "frames": answer.frames,
            "channels": ["user", "moshi"] if self.stereo else ["moshi"],
            "text": spoken.text,
            "alignments": [[word.text, [word.start, word.end], MAIN_SPEAKER] for word in spoken.words],
            **({"memory_over_time": memory} if memory else {}),
            **self.facts,
        }
        (folder / WORDS.format(name)).write_text(to_json(values) + "\n", encoding="utf-8")
        if memory:
            plot_memory(folder / PICTURE.format(name), memory, title=name)
        return values


def remove_answer(folder: Path, name: str) -> None:
    """Remove what there is of an answer that could not be written whole."""
    for pattern in (SOUND, WORDS, PICTURE):
        (folder / pattern.format(name)).unlink(missing_ok=True)


def write_all(
    folder: Path,
    form: AnswerFormat,
    answers: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    seconds: float,
) -> None:
    """report.md and metrics.json: an answer a row, and why others are missing. ``seconds``: how long all took."""
    kept = ("input", "seed", "seconds", "frames", "text")
    values = {
        "made_by": form.made_by, "versions": versions(), **form.facts, "seconds_taken": seconds,
        "answers": {name: {key: found[key] for key in kept} for name, found in answers.items()}, "failed": dict(failed),
    }  # fmt: skip
    spoken = sum(found["seconds"] for found in answers.values())
    rows = [
        (name, found["input"], str(found["seed"]), f"{found['seconds']:.1f}", str(len(found["alignments"])))
        for name, found in answers.items()
    ]
    lines = [
        "# Answers", "", *(f"- {name.replace('_', ' ')}: {value}" for name, value in form.facts.items()),
        f"- {spoken:.1f} s of speech in {seconds:.1f} s: {seconds / spoken:.2f} of real time",
        f"- {version_text()}", "",
        *table(("", "recording", "seed", "seconds", "words"), rows, "llrrr"), "",
    ]  # fmt: skip
    if failed:
        lines += ["## Not answered", "", *(f"- {name}: {why}" for name, why in failed.items()), ""]
    write_report(folder, values, [*lines, *_memory_lines(answers)])


def _memory_lines(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row for each block of each answer, and the plots; nothing where no figures were asked for."""
    figures = {name: found["memory_over_time"] for name, found in answers.items() if "memory_over_time" in found}
    if not figures:
        return []
    rows = [(name, *cells) for name, series in figures.items() for cells in memory_rows(series)]
    lines = ["## The memory", "", *table(("", *MEMORY_HEADER), rows, "ll" + "r" * (len(MEMORY_HEADER) - 1)), ""]
    for name in figures:
        lines += image(name, PICTURE.format(name))
    return lines
