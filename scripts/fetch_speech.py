"""Fetch real speech and lay it out as training data for Moshi: one command, a few minutes.

    python scripts/fetch_speech.py OUT [--corpus dialogue|prompts] [--language LANGUAGE]
                                       [--limit-minutes M] [--from FOLDER_WITH_DEBS]

    dialogue   two speakers taking turns: cs (Czech, the default), nl (Dutch)
               Debian packages fillets-ng-data-LANGUAGE and fillets-ng-data; GPL-2
    prompts    one speaker: en (English, the default), es, fr (CC-BY-SA-3.0), it, ru (CC-BY-3.0)
               asterisk-core-sounds-LANGUAGE-wav and asterisk-core-sounds-LANGUAGE

The packages are downloaded and unpacked, never installed; most of the audio is copyleft, which is why it is not in this
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
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from speech_layout import (
    SAMPLE_RATE,
    SPLITS,
    Document,
    documents_of,
    first_minutes,
    lay_out,
    main_speaker,
    seconds_of,
    write_stereo,
)
from speech_packages import CORPORA, DOCUMENTATION, Corpus, FetchError, corpus_of, fetch

from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.errors import MoshiTTTError


def build(
    corpus: Corpus, root: Path, versions: dict[str, str], out: Path, limit_minutes: float | None = None
) -> dict[str, Any]:
    """Lay out the packages unpacked in ``root`` as ``out``; what went into ``summary.json``."""
    scenes = corpus.read(root)
    moshi = main_speaker(scenes)
    documents = documents_of(scenes, corpus.salt)
    if limit_minutes is not None:
        documents = first_minutes(documents, limit_minutes, corpus.salt)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        (folder / "stereo").mkdir()
        splits = {split: _write_split(folder, split, documents, moshi) for split in SPLITS}
        summary = {
            "corpus": corpus.name,
            "packages": versions,
            "sample_rate": SAMPLE_RATE,
            "main_speaker": moshi,
            "minutes": round(sum(split["minutes"] for split in splits.values()), 2),
            "splits": splits,
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (folder / "ATTRIBUTION.md").write_text(attribution(corpus, root, versions), encoding="utf-8")
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
        f"- Work: {corpus.origin}\n- Licence: {corpus.licence}",
        "- Taken from the Debian packages " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "- Changed: resampled to 24 kHz, louder than full scale made softer, joined with silence between, the speakers "
        "on channels of their own; times of words estimated\n",
    ]
    for name in versions:
        path = root / DOCUMENTATION / name / "copyright"
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace").rstrip()
            parts.append(f"## Copyright file of {name}\n\n~~~text\n{text}\n~~~\n")
    return "\n".join(parts)


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
    parser.add_argument("--language", help="one that the corpus has; by default cs for dialogue, en for prompts")
    parser.add_argument("--limit-minutes", type=positive, metavar="M", help="about so much of it, for a quick trial")
    parser.add_argument("--from", type=Path, dest="source", metavar="FOLDER", help="use the .deb files in this folder")
    given = parser.parse_args(arguments)
    try:
        corpus = corpus_of(given.corpus, given.language)
        require_new(given.out)
        with tempfile.TemporaryDirectory(prefix="speech-") as temporary:
            versions = fetch(corpus.packages, Path(temporary), given.source)
            summary = build(corpus, Path(temporary), versions, given.out, given.limit_minutes)
    except MoshiTTTError as error:
        sys.exit(f"error: {error}")
    for split, counts in summary["splits"].items():
        share = counts["minutes"] / summary["minutes"]
        print(f"{split}: {counts['documents']} documents, {counts['minutes']:.1f} min ({share:.0%}), ", end="")
        print(f"{counts['utterances']} utterances, {counts['words']} words")
    print(f"{summary['minutes']:.1f} min of speech in {given.out}. Its licence is in {given.out / 'ATTRIBUTION.md'}.")


if __name__ == "__main__":
    main()
