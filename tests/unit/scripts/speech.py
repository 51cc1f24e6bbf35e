"""The scripts that fetch speech, and tiny packages for them: no network, and no apt-get nor dpkg of the machine."""

from __future__ import annotations

import gzip
import json
import wave
from pathlib import Path

import numpy as np

from tests.programs import load_script

speech_packages = load_script("speech_packages")
speech_layout = load_script("speech_layout")
fetch_speech = load_script("fetch_speech")

Utterance, FetchError, CORPORA = speech_packages.Utterance, speech_packages.FetchError, speech_packages.CORPORA
CZECH, ENGLISH = CORPORA["dialogue"]["cs"], CORPORA["prompts"]["en"]
VERSIONS = {"fillets-ng-data-cs": "1.0", "fillets-ng-data": "1.0"}
VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}

HARBOUR = """-- a comment
dialogId("har-m-ahoj", "font_small", "Hello, you.")
dialogStr("Ahoj, ty tam.")

dialogId("har-v-no", "font_big", "Well -- \\"hello\\".")
dialogStr(
"No -- \\"nazdar\\" ...")

dialogId("har-x-krab", "font_crab", "I am a crab.")
dialogStr("Jsem krab.")

dialogId("har-v-ticho", "font_big", "Never translated.")
"""


def write_wav(path: Path, seconds: float, level: float, rate: int = 22_050) -> None:
    """A square wave: as loud as ``level`` throughout. The reader goes by the contents, not by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    signs = np.where(np.arange(round(seconds * rate)) // 40 % 2, 1, -1)
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(1)
        handle.setsampwidth(2)
        handle.setframerate(rate)
        handle.writeframes((32767 * level * signs).astype("<i2").tobytes())


def read_stereo(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as handle:
        assert (handle.getnchannels(), handle.getsampwidth(), handle.getframerate()) == (2, 2, 24_000)
        return np.frombuffer(handle.readframes(handle.getnframes()), "<i2").reshape(-1, 2).T / 32767


def loud(channel: np.ndarray, start: float, end: float) -> bool:
    """Whether there is sound from ``start`` to ``end`` seconds, a little inside the edges."""
    return bool(np.abs(channel[round((start + 0.01) * 24_000) : round((end - 0.01) * 24_000)]).mean() > 0.05)


def make_dialogue(root: Path, language: str) -> None:
    """Two scenes, as unpacked: ``harbour``, longer than 20 s, and ``share/jokes``, shorter."""
    game = root / speech_packages.GAME
    for name, seconds in {"har-v-no": 10, "har-m-ahoj": 5, "har-x-krab": 4, "har-v-ticho": 3, "m-navic": 2}.items():
        write_wav(game / f"sound/harbour/{language}" / f"{name}.ogg", seconds, 1.0)
    write_wav(game / "sound/harbour/en/splash.ogg", 60, 0.5)
    write_wav(game / f"sound/share/jokes/{language}/ob-v-ha.ogg", 2, 0.5)
    for path, text in {
        f"harbour/dialogs_{language}.lua": HARBOUR,
        f"share/jokes_dialogs_{language}.lua": 'dialogId("ob-v-ha", "font_big", "Ha")\ndialogStr("Ha %1 ha!")\n',
    }.items():
        (game / "script" / path).parent.mkdir(parents=True, exist_ok=True)
        (game / "script" / path).write_text(text, encoding="utf-8")
    licence = root / "usr/share/doc/fillets-ng-data/copyright"
    licence.parent.mkdir(parents=True, exist_ok=True)
    licence.write_text("Copyleft, by somebody.\n")


def make_prompts(root: Path, language: str, seconds: dict[str, float], transcripts: str) -> None:
    for name, length in seconds.items():
        write_wav(root / speech_packages.SOUNDS / VOICES[language] / f"{name}.wav", length, 0.5, rate=8_000)
    path = transcripts_of(root, language)
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(transcripts.encode()))


def transcripts_of(root: Path, language: str) -> Path:
    return root / speech_packages.DOCUMENTATION / f"asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"


def add_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
    (folder / name).chmod(0o755)


def manifests(out: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "valid", "test")
    }
