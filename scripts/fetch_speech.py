"""Fetch real speech and lay it out as training data for Moshi: one command, a few minutes.

    python scripts/fetch_speech.py OUT [--corpus dialogue|prompts] [--limit-minutes M] [--from FOLDER_WITH_DEBS]

    dialogue   Czech, two speakers taking turns (Debian packages fillets-ng-data-cs and fillets-ng-data, GPL-2)
    prompts    English, one speaker (asterisk-core-sounds-en-wav and asterisk-core-sounds-en, CC-BY-SA-3.0)

The packages are downloaded and unpacked, never installed; the audio is copyleft, which is why it is not in this
repository. OUT must be new or empty, and is whole or absent afterwards:

    train.jsonl, valid.jsonl, test.jsonl    {"path": "stereo/NAME.wav", "duration": seconds} per document
    stereo/NAME.wav                         24 kHz, 16 bit; left: Moshi, the main speaker; right: the user
    stereo/NAME.json                        {"alignments": [[word, [start, end], "SPEAKER_MAIN"], ...]}
    ATTRIBUTION.md, summary.json            where it comes from and under which licence; how much there is

A document is a scene of the dialogue, or a minute or two of prompts. Times of words are estimates: the packages time
whole utterances, and within one each word gets a share by its letters.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sphn

from moshi_ttt.apps.audio import read_audio
from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.errors import MoshiTTTError

SAMPLE_RATE = 24_000
GAP = 0.3
"""Seconds of silence between two utterances."""
SHORTEST = 20.0
"""Seconds; a shorter document is joined to the next of its split."""
PROMPTS_SECONDS = 60.0
"""A document of prompts ends with the prompt that reaches this."""
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}
# A document's split depends on its name alone. There are only tens of documents, and of different lengths: this salt is
# one for which both corpora come out near 80/10/10 by minutes.
SALT = "57"

SPEECH_OF_QUICKSTART = Path(__file__).resolve().parents[1] / "hosts" / "moshi" / "bundle" / "speech"
GAME = Path("usr/share/games/fillets-ng")
VOICE = Path("usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


class FetchError(MoshiTTTError):
    """Speech that cannot be fetched, or packages that do not hold what they should."""


@dataclass(frozen=True)
class Utterance:
    """One recording. ``text`` and ``speaker`` are None where the package does not tell them."""

    path: Path
    seconds: float
    speaker: str | None
    text: str | None


@dataclass(frozen=True)
class Document:
    name: str
    split: str
    utterances: tuple[Utterance, ...]

    @property
    def seconds(self) -> float:
        return sum(u.seconds for u in self.utterances) + GAP * (len(self.utterances) - 1)

    def join(self, other: Document) -> Document:
        return Document(f"{self.name}_{other.name}", self.split, self.utterances + other.utterances)


Scenes = dict[str, list[Utterance]]
"""Utterances in order, by the name of their document."""


@dataclass(frozen=True)
class Corpus:
    packages: tuple[str, ...]
    licence: str
    origin: str
    read: Callable[[Path], Scenes]


# ------------------------------------------------------------------------------------------------------- the packages
def fetch(packages: Iterable[str], folder: Path, source: Path | None) -> dict[str, str]:
    """Unpack ``packages`` into ``folder``, from the .deb files in ``source`` or else downloaded; their versions."""
    missing = [tool for tool in ("dpkg", *([] if source else ["apt-get"])) if shutil.which(tool) is None]
    if missing:
        raise FetchError(
            f"{' and '.join(missing)} not found: the speech comes in Debian packages. Run this on Debian or Ubuntu, or "
            f"in a container of one. apt-get is not needed with --from FOLDER, where FOLDER holds the .deb files of "
            f"{', '.join(packages)}."
        )
    if source is None:
        source = folder / "debs"
        source.mkdir(parents=True)
        _call(
            ["apt-get", "download", *packages],
            source,
            "Check the network, and run `apt-get update` if it does not know the packages. Or download the .deb files "
            "of these packages elsewhere and name their folder with --from.",
        )
    found = find_packages(source, packages)
    for path in found.values():
        _call(["dpkg", "-x", str(path.resolve()), str(folder)], folder, "Download the package again.")
    return {name: path.name.split("_")[1].replace("%3a", ":") for name, path in found.items()}


def find_packages(folder: Path, packages: Iterable[str]) -> dict[str, Path]:
    """The .deb file of each package, named NAME_VERSION_ARCHITECTURE.deb as apt-get does."""
    found = {name: sorted(folder.glob(f"{name}_*_*.deb")) for name in packages}
    absent = [name for name, paths in found.items() if not paths]
    if absent:
        raise FetchError(
            f"{folder} has no .deb file of {', '.join(absent)}. Put one there, named NAME_VERSION_ARCHITECTURE.deb: "
            f"`apt-get download {' '.join(absent)}` in that folder does it."
        )
    several = [path.name for paths in found.values() if len(paths) > 1 for path in paths]
    if several:
        raise FetchError(f"{folder} has several versions of a package: {', '.join(several)}. Leave one of each.")
    return {name: paths[0] for name, paths in found.items()}


def _call(command: list[str], folder: Path, advice: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines()[-3:]
        raise FetchError(f"`{' '.join(command)}` failed with {result.returncode}: {' '.join(said)}. {advice}")


# --------------------------------------------------------------------------------------------------------- what is said
def read_dialogs(path: Path) -> dict[str, tuple[str, str | None]]:
    """name of the recording -> (font of the subtitle, text), in the order of a ``dialogs_cs.lua``.

    An entry is ``dialogId("name", "font_small", "English text")``, then ``dialogStr("Czech text")``, which may lack.
    """
    string = r'"((?:[^"\\]|\\.)*)"'
    lines: dict[str, tuple[str, str | None]] = {}
    name = None
    entry = rf"dialogId\(\s*{string}\s*,\s*{string}|dialogStr\(\s*{string}"
    for match in re.finditer(entry, path.read_text(encoding="utf-8")):
        if match[1] is not None:
            name = match[1]
            lines[name] = (match[2], None)
        elif name is not None:
            text = re.sub(r"\\(.)", r"\1", match[3])
            lines[name] = (lines[name][0], re.sub(r"%\d", "", text).strip() or None)
    return lines


def speaker_of(name: str, font: str | None) -> str | None:
    """``small``, ``big`` or None, a third one: by the font of the subtitle, else by the letter in the file's name."""
    if font is not None:
        return {"font_small": "small", "font_big": "big"}.get(font)
    match = re.search(r"(?:^|[-_])(m|v|small|big)(?:[-_]|$)", name)  # malá and velká: the small and the big fish
    return match and {"m": "small", "v": "big"}.get(match[1], match[1])


def read_dialogue(root: Path) -> Scenes:
    """Each ``sound/SCENE/cs`` with the texts of ``script/SCENE``. The folders beside ``cs`` hold effects and music."""
    sound, script = root / GAME / "sound", root / GAME / "script"
    scenes: Scenes = {}
    for folder in sorted(path for path in sound.rglob("cs") if path.is_dir()):
        scene = folder.parent.relative_to(sound)
        texts = script / scene
        if not texts.is_dir():  # the scenes in share/ have their scripts side by side in one folder
            texts = texts.parent
        lines: dict[str, tuple[str, str | None]] = {}
        for path in sorted(texts.glob("*dialogs_cs.lua")):
            lines |= read_dialogs(path)
        place = {name: index for index, name in enumerate(lines)}
        paths = sorted(folder.glob("*.ogg"), key=lambda path: (place.get(path.stem, len(place)), path.stem))
        made = []
        for path, seconds in zip(paths, durations(paths), strict=True):
            font, text = lines.get(path.stem, (None, None))
            made.append(Utterance(path, seconds, speaker_of(path.stem, font), text))
        if made:
            scenes["-".join(scene.parts)] = made
    return _found(scenes, sound)


def read_prompts(root: Path, held_out: frozenset[str] | None = None) -> Scenes:
    """The prompts in order of name, in documents named after their first one, without those of the quickstart.

    Recordings whose transcript is a remark alone, such as ``[descending tones]``, hold no speech and are left out.
    """
    voice = root / VOICE
    held_out = recordings_of_quickstart() if held_out is None else held_out
    texts = read_transcripts(root / TRANSCRIPTS)
    named = {path.relative_to(voice).with_suffix("").as_posix(): path for path in voice.rglob("*.wav")}
    names = sorted(name for name in named if name not in held_out and texts.get(name) != "")
    scenes: Scenes = {}
    current: list[Utterance] = []
    for name, seconds in zip(names, durations([named[name] for name in names]), strict=True):
        if not current:
            scenes[name.replace("/", "-")] = current
        current.append(Utterance(named[name], seconds, "voice", texts.get(name)))
        if sum(u.seconds + GAP for u in current) >= PROMPTS_SECONDS:
            current = []
    return _found(scenes, voice)


def read_transcripts(path: Path) -> dict[str, str]:
    """name -> what is said, without remarks in brackets; empty where nothing is said."""
    if not path.is_file():
        raise FetchError(f"The packages hold no {path.name}, the transcripts. Fetch them again, or another version.")
    texts = {}
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as handle:
        for line in handle:
            name, colon, text = line.partition(":")
            if colon and not line.startswith(";"):
                texts[name.strip()] = " ".join(re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text).split())
    return texts


def recordings_of_quickstart(folder: Path = SPEECH_OF_QUICKSTART) -> frozenset[str]:
    """Names of the prompts that the quickstart is measured on: no training data may hold them."""
    names = frozenset(path.stem for path in folder.glob("*.wav"))
    if not names:
        raise FetchError(f"{folder} has no recordings, so they cannot be held out. Run this in a whole checkout.")
    return names


def durations(paths: list[Path]) -> list[float]:
    found: list[float | None] = sphn.durations([str(path) for path in paths])
    bad = [str(path) for path, seconds in zip(paths, found, strict=True) if not seconds]
    if bad:
        raise FetchError(f"Not readable as audio, or empty: {', '.join(bad)}. Fetch the packages again.")
    return [seconds or 0.0 for seconds in found]


def _found(scenes: Scenes, place: Path) -> Scenes:
    if not scenes:
        raise FetchError(f"No recordings in {place}: these are not the packages, or not a version, that is known here.")
    if not any(utterance.text for utterances in scenes.values() for utterance in utterances):
        raise FetchError(f"No text for any recording in {place}: the package with the texts is another version.")
    return scenes


# ------------------------------------------------------------------------------------------------- documents and splits
def fraction(name: str) -> float:
    """A number in [0, 1) that depends on ``name`` alone."""
    return int.from_bytes(hashlib.sha256(f"{SALT}/{name}".encode()).digest()[:8], "big") / 2**64


def split_of(name: str) -> str:
    place, upper = fraction(name), 0.0
    for split, share in SPLITS.items():
        upper += share
        if place < upper:
            return split
    return split


def documents_of(scenes: Scenes) -> list[Document]:
    """One document per scene, short ones joined to the next (at the end: to the one before) of the same split."""
    made: list[Document] = []
    for split in SPLITS:
        done: list[Document] = []
        carried: Document | None = None
        for name in sorted(scenes):
            if split_of(name) == split:
                document = Document(name, split, tuple(scenes[name]))
                document = carried.join(document) if carried else document
                carried = document if document.seconds < SHORTEST else None
                if carried is None:
                    done.append(document)
        if carried:
            done = [*done[:-1], done[-1].join(carried)] if done else [carried]
        made += done
    return made


def first_minutes(documents: list[Document], minutes: float) -> list[Document]:
    """About ``minutes`` of all splits in proportion: in each, the first documents by hash until its share is full."""
    kept = []
    for split, share in SPLITS.items():
        left = 60 * minutes * share
        for document in sorted((d for d in documents if d.split == split), key=lambda d: fraction(d.name)):
            if left > 0:
                kept.append(document)
                left -= document.seconds
    return kept


def main_speaker(scenes: Scenes) -> str:
    """Who speaks longest in the whole corpus."""
    spoken: dict[str, float] = {}
    for utterance in (utterance for utterances in scenes.values() for utterance in utterances):
        if utterance.speaker:
            spoken[utterance.speaker] = spoken.get(utterance.speaker, 0.0) + utterance.seconds
    if not spoken:
        raise FetchError("No recording tells who speaks: the naming of this version of the packages is not known here.")
    return max(sorted(spoken), key=spoken.__getitem__)


# -------------------------------------------------------------------------------------------------- sound and alignment
Samples = npt.NDArray[np.float32]
Alignment = tuple[str, tuple[float, float], str]


def seconds_of(samples: int) -> float:
    return round(samples / SAMPLE_RATE, 4)  # monotone: what is in order and within bounds in samples stays so


def align(text: str, start: int, samples: int) -> list[Alignment]:
    """Words of ``text`` over ``samples`` from ``start`` on, each as long as its share of the letters and digits.

    A token of punctuation alone is not spoken, and is left out.
    """
    words = [(word, sum(c.isalnum() for c in word)) for word in text.split()]
    total, passed, made = sum(letters for _, letters in words), 0, []
    for word, letters in words:
        if letters:
            begin, end = (start + round(samples * place / total) for place in (passed, passed + letters))
            made.append((word, (seconds_of(begin), seconds_of(end)), "SPEAKER_MAIN"))
            passed += letters
    return made


def lay_out(document: Document, moshi: str) -> tuple[Samples, list[Alignment]]:
    """``[2, S]`` float32 at 24 kHz within [-1, 1], and the words of the speaker ``moshi``.

    That speaker is on the left, and so is whoever is neither of the two; the other speaker is on the right.
    """
    parts: list[Samples] = []
    alignments: list[Alignment] = []
    gap = np.zeros((2, round(GAP * SAMPLE_RATE)), np.float32)
    place = 0
    for utterance in document.utterances:
        samples = read_audio(utterance.path, SAMPLE_RATE).numpy()
        if parts:
            parts.append(gap)
            place += gap.shape[1]
        part = np.zeros((2, samples.size), np.float32)
        # A recording that is loud up to the limit can exceed it once it is resampled.
        part[0 if utterance.speaker in (moshi, None) else 1] = samples / max(1.0, np.abs(samples).max())
        parts.append(part)
        if utterance.speaker == moshi and utterance.text:
            alignments += align(utterance.text, place, samples.size)
        place += samples.size
    return np.concatenate(parts, axis=1), alignments


def write_stereo(path: Path, samples: Samples) -> None:
    """16-bit wav at 24 kHz of ``samples [2, S]`` within [-1, 1]."""
    assert np.abs(samples).max() <= 1.0
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(2)
        handle.setsampwidth(2)
        handle.setframerate(SAMPLE_RATE)
        handle.writeframes((samples.T * 32767).round().astype("<i2").tobytes())


# --------------------------------------------------------------------------------------------------------- what is left
def build(
    corpus: str, root: Path, versions: dict[str, str], out: Path, limit_minutes: float | None = None
) -> dict[str, Any]:
    """Lay out the packages unpacked in ``root`` as ``out``; what went into ``summary.json``."""
    scenes = CORPORA[corpus].read(root)
    moshi = main_speaker(scenes)
    documents = documents_of(scenes)
    if limit_minutes is not None:
        documents = first_minutes(documents, limit_minutes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        (folder / "stereo").mkdir()
        splits = {split: _write_split(folder, split, documents, moshi) for split in SPLITS}
        summary = {
            "corpus": corpus,
            "packages": versions,
            "sample_rate": SAMPLE_RATE,
            "main_speaker": moshi,
            "minutes": round(sum(split["minutes"] for split in splits.values()), 2),
            "splits": splits,
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (folder / "ATTRIBUTION.md").write_text(attribution(CORPORA[corpus], root, versions), encoding="utf-8")
    return summary


def _write_split(folder: Path, split: str, documents: list[Document], moshi: str) -> dict[str, float]:
    lines, words, samples = [], 0, 0
    chosen = sorted((document for document in documents if document.split == split), key=lambda d: d.name)
    for document in chosen:
        stereo, alignments = lay_out(document, moshi)
        path = f"stereo/{document.name}.wav"
        write_stereo(folder / path, stereo)
        text = json.dumps({"alignments": alignments}, ensure_ascii=False)
        (folder / path).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        lines.append(json.dumps({"path": path, "duration": seconds_of(stereo.shape[1])}, ensure_ascii=False) + "\n")
        words += len(alignments)
        samples += stereo.shape[1]
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    utterances = [utterance for document in chosen for utterance in document.utterances]
    return {
        "documents": len(chosen),
        "minutes": round(samples / SAMPLE_RATE / 60, 2),
        "words": words,
        "utterances": len(utterances),
        "utterances_main": sum(u.speaker == moshi for u in utterances),
        "utterances_main_without_text": sum(u.speaker == moshi and not u.text for u in utterances),
        "utterances_user": sum(u.speaker not in (moshi, None) for u in utterances),
        "utterances_others": sum(u.speaker is None for u in utterances),
    }


def attribution(corpus: Corpus, root: Path, versions: dict[str, str]) -> str:
    parts = [
        "# Where this speech comes from\n",
        f"- Work: {corpus.origin}\n- Licence: {corpus.licence}; it covers these recordings and what is made of them",
        "- Taken from the Debian packages " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "- Changed: resampled to 24 kHz, louder than full scale made softer, joined with silence between, the speakers "
        "on channels of their own; times of words estimated\n",
    ]
    for name in versions:
        path = root / "usr/share/doc" / name / "copyright"
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace").rstrip()
            parts.append(f"## Copyright file of {name}\n\n~~~text\n{text}\n~~~\n")
    return "\n".join(parts)


CORPORA = {
    "dialogue": Corpus(
        ("fillets-ng-data-cs", "fillets-ng-data"),
        "GNU General Public License, version 2 (GPL-2)",
        "Fish Fillets - Next Generation, Czech dialogue, ALTAR interactive and others, http://fillets.sourceforge.net",
        read_dialogue,
    ),
    "prompts": Corpus(
        ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en"),
        "Creative Commons Attribution-ShareAlike 3.0 Unported (CC-BY-SA-3.0)",
        "Asterisk core sounds, English, voice: Allison Smith, http://www.theivrvoice.com; funded by Digium, Inc.",
        read_prompts,
    ),
}


def require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise FetchError(f"{out} {what}. Name a folder that is new or empty, or remove this one first.")


def positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to, new or empty")
    parser.add_argument("--corpus", choices=sorted(CORPORA), default="dialogue")
    parser.add_argument("--limit-minutes", type=positive, metavar="M", help="about so much of it, for a quick trial")
    parser.add_argument("--from", type=Path, dest="source", metavar="FOLDER", help="use the .deb files in this folder")
    given = parser.parse_args(arguments)
    try:
        require_new(given.out)
        with tempfile.TemporaryDirectory(prefix="speech-") as temporary:
            versions = fetch(CORPORA[given.corpus].packages, Path(temporary), given.source)
            summary = build(given.corpus, Path(temporary), versions, given.out, given.limit_minutes)
    except MoshiTTTError as error:
        sys.exit(f"error: {error}")
    for split, counts in summary["splits"].items():
        share = counts["minutes"] / summary["minutes"]
        print(f"{split}: {counts['documents']} documents, {counts['minutes']:.1f} min ({share:.0%}), ", end="")
        print(f"{counts['utterances']} utterances, {counts['words']} words")
    print(f"{summary['minutes']:.1f} min of speech in {given.out}. Its licence is in {given.out / 'ATTRIBUTION.md'}.")


if __name__ == "__main__":
    main()
