"""Whether a saved memory is worth something the next day: recordings that a stream heard, in a new process.

    for voice in it ru; do
      python scripts/fetch_speech.py voices/prompts-$voice --corpus prompts --language $voice
    done
    python benchmarks/restored_memory.py voices/prompts-it voices/prompts-ru --out restored

The tiny Moshi with the memory that ships with it, on voices and languages that nothing was trained on. On the first day
a stream of ``Slots`` hears the first ``--seconds`` of a recording, as Moshi's own voice while the user is silent (what
the memory was trained for), and its memory is saved to a file. The next day, in another process, a stream that begins
with that file hears the recording. Reported, in nats per audio token with 95 % intervals over recordings: how much
lower its loss is than that of a stream that begins at the learned start, and the same for one that begins with another
recording's memory. Attention restarts, so all of the gain is the memory's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.apps.talker import SHIPPED_MEMORY, Talker, load_talker
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.documents import Document, read_documents
from moshi_ttt.evaluation.reciting import recite
from moshi_ttt.evaluation.statistics import as_json, bootstrap, mean_of_rows
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import Slots
from moshi_ttt.system.output_folder import check_free, new_folder
from moshi_ttt.system.report.figures import BLUE, GREY, legend_outside, name_rows, panels, rule, save
from moshi_ttt.system.report.tables import image, table, version_text
from moshi_ttt.system.report.writer import numbers, versions, write_report

MADE_BY = "benchmarks/restored_memory.py"
CODES, FRESH, RESTORED = "codes.pt", "fresh.pt", "restored.pt"
ROWS = 8
"""Streams side by side."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", nargs="+", help="folders that scripts/fetch_speech.py made, or of recordings")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must be new, or empty")
    parser.add_argument("--seconds", type=float, default=7.68, help="of each recording (default: 7.68)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if this program made it")
    parser.add_argument("--day", choices=["first", "next"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.day:
        (first_day if given.day == "first" else next_day)(given.out, given.speech, given.seconds)
        return
    check_free(given.out, made_by=MADE_BY, overwrite=given.overwrite)
    with new_folder(given.out, made_by=MADE_BY, overwrite=given.overwrite) as folder:
        for day in ("first", "next"):
            own = ["--out", str(folder), "--seconds", str(given.seconds), "--day", day]
            subprocess.run([sys.executable, __file__, *given.speech, *own], check=True)
        report(folder, given.seconds)
    print((given.out / "report.md").read_text(encoding="utf-8"))


def first_day(folder: Path, speech: Sequence[str], seconds: float) -> None:
    """Every recording to a stream that has heard nothing; its losses, and the memory that it leaves, to files."""
    talker = load_talker("quickstart", SHIPPED_MEMORY)
    frames = round(seconds * float(talker.mimi.frame_rate))
    documents = [document for place in speech for document in recordings_of(place, talker, frames)]
    if len(documents) < 2 * ROWS:
        raise ConfigError(f"{len(documents)} recordings of {seconds} s: give {2 * ROWS} or more.")
    codes = torch.stack([document.codes for document in documents])
    torch.save({"names": [document.name for document in documents], "codes": codes}, folder / CODES)
    losses = []
    for rows in batches(len(codes)):
        with Slots(talker.model, talker.mimi, len(rows)) as slots:
            losses.append(recite(slots, codes[rows], [None] * len(rows)).audio)
            for place, row in enumerate(rows):
                slots.save_row(place, "memory").save(memory_of(folder, row))
    torch.save(torch.cat(losses), folder / FRESH)


def next_day(folder: Path, speech: Sequence[str], seconds: float) -> None:
    """Every recording to a stream with its own memory, and to one with the memory of the recording before it."""
    talker = load_talker("quickstart", SHIPPED_MEMORY)
    codes = torch.load(folder / CODES)["codes"]
    found: dict[str, list[Tensor]] = {"own": [], "other": []}
    for rows in batches(len(codes)):
        for name, owners in (("own", rows), ("other", [row - 1 for row in rows])):
            memories = [RowState.load(memory_of(folder, owner % len(codes))) for owner in owners]
            with Slots(talker.model, talker.mimi, len(rows)) as slots:
                found[name].append(recite(slots, codes[rows], memories).audio)
    torch.save({name: torch.cat(losses) for name, losses in found.items()}, folder / RESTORED)


def recordings_of(place: str, talker: Talker, frames: int) -> list[Document]:
    """The recordings of a folder that are long enough, their first frames; of all splits where it has splits."""
    manifests = sorted(str(path) for path in Path(place).glob("*.jsonl"))
    found = read_documents(
        ",".join(manifests) or place, talker.codec, layout="files", transcripts="optional", limit=frames
    )  # fmt: skip
    return [document for document in found if document.frames == frames]


def batches(count: int) -> list[list[int]]:
    return [rows.tolist() for rows in torch.arange(count).tensor_split(-(-count // ROWS))]


def memory_of(folder: Path, row: int) -> Path:
    return folder / f"memory_{row:03d}.safetensors"


def report(folder: Path, seconds: float) -> None:
    names = torch.load(folder / CODES)["names"]
    fresh, restored = torch.load(folder / FRESH), torch.load(folder / RESTORED)
    gains = {name: (fresh - losses).nanmean(1) for name, losses in restored.items()}
    intervals = {name: bootstrap(values, mean_of_rows) for name, values in gains.items()}
    labels = {"own": "restored: the recording's own memory", "other": "restored: another recording's memory"}
    rows = [(labels[name], str(intervals[name]), f"{int((gains[name] > 0).sum())} of {len(names)}") for name in labels]
    plot(folder / "restored.png", names, gains, labels)
    values: dict[str, Any] = {
        "made_by": MADE_BY, "versions": versions(), "seconds": seconds, "recordings": names,
        "fresh_loss": numbers(fresh.nanmean(1)),
        **{f"{name}_gain": {**as_json(intervals[name]), "values": numbers(gains[name])} for name in gains},
    }  # fmt: skip
    lines = [
        "# A memory restored the next day", "",
        f"- {len(names)} recordings of {seconds:g} s, loss of a stream without a memory {float(fresh.nanmean()):.3f}",
        f"- {version_text()}", "",
        *table(("", "lower loss than without a memory, nats/token", "above 0"), rows), "",
        *image("Gain of each recording", "restored.png"),
        "Intervals: 95 %, percentile bootstrap over recordings.",
    ]  # fmt: skip
    write_report(folder, values, lines)
    for path in (*folder.glob("memory_*"), *(folder / name for name in (CODES, FRESH, RESTORED))):
        path.unlink()


def plot(path: Path, names: Sequence[str], gains: dict[str, Tensor], labels: dict[str, str]) -> None:
    """A point for each recording, sorted by the gain of its own memory."""
    figure, (axes,) = panels(width=9.5, height=2 + 0.16 * len(names))
    order = gains["own"].argsort(descending=True)
    for (name, values), color, marker in zip(gains.items(), (BLUE, GREY), ("o", "x"), strict=True):
        axes.plot(values[order], range(len(names)), marker, color=color, markersize=4, label=labels[name])
    rule(axes, x=0)
    name_rows(axes, [Path(names[row]).stem for row in order.tolist()])
    axes.set_xlabel("lower loss than a stream without a memory (nats/token)")
    legend_outside(figure)
    save(figure, path, grid="x")


if __name__ == "__main__":
    main()
