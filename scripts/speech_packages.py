"""What the Debian packages of ``fetch_speech.py`` hold: where each recording is, how long, who speaks, what is said."""

from __future__ import annotations

import functools
import gzip
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import sphn

from moshi_ttt.core.errors import MoshiTTTError

PROMPTS_SECONDS = 60.0
"""A document of prompts ends with the prompt that reaches this."""
GAP = 0.3
"""Seconds of silence between two utterances."""
SPEECH_OF_QUICKSTART = Path(__file__).resolve().parents[1] / "hosts" / "moshi" / "bundle" / "speech"
GAME = Path("usr/share/games/fillets-ng")
SOUNDS = Path("usr/share/asterisk/sounds")
DOCUMENTATION = Path("usr/share/doc")
# In English each of these has a remark for a transcript. Elsewhere some have none, or one without brackets.
NO_SPEECH = re.compile(r"silence/\d+|beep|beeperr|confbridge-join|confbridge-leave")
# Audio files without a single sample. What cannot be read is refused, so these are named one by one.
EMPTY = ("elevator1/nl/zd1-m-cesta.ogg", "gems/nl/zav-v-sto.ogg", "ru_RU_f_IvrvoiceRU/is.wav")


class FetchError(MoshiTTTError):
    """Speech that cannot be fetched, or packages that do not hold what they should."""


@dataclass(frozen=True)
class Utterance:
    """One recording. ``text`` and ``speaker`` are None where the package does not tell them."""

    path: Path
    seconds: float
    speaker: str | None
    text: str | None


Scenes = dict[str, list[Utterance]]
"""Utterances in order, by the name of their document."""


@dataclass(frozen=True)
class Corpus:
    """One corpus in one language. ``salt`` decides the split of a document, with its name."""

    name: str
    packages: tuple[str, ...]
    licence: str
    origin: str
    read: Callable[[Path], Scenes]
    salt: str


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
    """name of the recording -> (font of the subtitle, text), in the order of a ``dialogs_cs.lua`` or ``_nl``.

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


def read_dialogue(root: Path, language: str) -> Scenes:
    """Each ``sound/SCENE/LANGUAGE`` with the texts of ``script/SCENE``. Folders beside it hold effects and music."""
    sound, script = root / GAME / "sound", root / GAME / "script"
    scenes: Scenes = {}
    for folder in sorted(path for path in sound.rglob(language) if path.is_dir()):
        scene = folder.parent.relative_to(sound)
        texts = script / scene
        if not texts.is_dir():  # the scenes in share/ have their scripts side by side in one folder
            texts = texts.parent
        lines: dict[str, tuple[str, str | None]] = {}
        for path in sorted(texts.glob(f"*dialogs_{language}.lua")):
            lines |= read_dialogs(path)
        place = {name: index for index, name in enumerate(lines)}
        paths = sorted(not_empty(folder.glob("*.ogg")), key=lambda p: (place.get(p.stem, len(place)), p.stem))
        made = []
        for path, seconds in zip(paths, durations(paths), strict=True):
            font, text = lines.get(path.stem, (None, None))
            made.append(Utterance(path, seconds, speaker_of(path.stem, font), text))
        if made:
            scenes["-".join(scene.parts)] = made
    return _found(scenes, sound)


def read_prompts(root: Path, language: str, voice: str) -> Scenes:
    """The prompts in order of name, in documents named after their first one.

    Recordings whose transcript is a remark alone, such as ``[descending tones]``, hold no speech and are left out. So
    are, in English, those of the quickstart.
    """
    folder = root / SOUNDS / voice
    held_out = recordings_of_quickstart() if language == "en" else frozenset()
    documentation = root / DOCUMENTATION / f"asterisk-core-sounds-{language}"
    given = read_transcripts(documentation / f"core-sounds-{language}.txt.gz")
    named = {path.relative_to(folder).with_suffix("").as_posix(): path for path in not_empty(folder.rglob("*.wav"))}
    texts = {name: given.get(name.lower()) for name in named}
    names = sorted(n for n in named if n not in held_out and texts[n] != "" and not NO_SPEECH.fullmatch(n))
    scenes: Scenes = {}
    current: list[Utterance] = []
    for name, seconds in zip(names, durations([named[name] for name in names]), strict=True):
        if not current:
            scenes[name.replace("/", "-")] = current
        current.append(Utterance(named[name], seconds, "voice", texts[name]))
        if sum(u.seconds + GAP for u in current) >= PROMPTS_SECONDS:
            current = []
    return _found(scenes, folder)


def read_transcripts(path: Path) -> dict[str, str | None]:
    """name in lower case -> what is said, without remarks in brackets: empty if that is all, None if nothing is told.

    Case is ignored because transcripts and files differ in it. Of two lines for a name the first holds: the second
    ``digits/0`` of the Spanish ones is really another number.
    """
    if not path.is_file():
        raise FetchError(f"The packages hold no {path.name}, the transcripts. Fetch them again, or another version.")
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8-sig").split("\n")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise FetchError(f"{path.name} is not gzip of UTF-8 text: {error}. Fetch the packages again.") from None
    texts: dict[str, str | None] = {}
    for line in lines:
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            said = " ".join(re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text).split())
            texts.setdefault(name.strip().lower(), said if text.strip() else None)
    return texts


def recordings_of_quickstart(folder: Path = SPEECH_OF_QUICKSTART) -> frozenset[str]:
    """Names of the prompts that the quickstart is measured on: no training data may hold them."""
    names = frozenset(path.stem for path in folder.glob("*.wav"))
    if not names:
        raise FetchError(f"{folder} has no recordings, so they cannot be held out. Run this in a whole checkout.")
    return names


def not_empty(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if not path.as_posix().endswith(EMPTY)]


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


# ---------------------------------------------------------------------------------------------------------- the corpora
GPL_2 = "GNU General Public License, version 2 (GPL-2); it covers these recordings and what is made of them"
CC_BY_SA_3 = (
    "Creative Commons Attribution-ShareAlike 3.0 Unported (CC-BY-SA-3.0); it covers these recordings and what is made "
    "of them"
)
CC_BY_3 = (
    "Creative Commons Attribution 3.0 Unported (CC-BY-3.0); name the makers wherever these recordings, or what is made "
    "of them, are passed on"
)


def _dialogue(language: str, title: str, *, salt: str) -> Corpus:
    return Corpus(
        "dialogue",
        (f"fillets-ng-data-{language}", "fillets-ng-data"),
        GPL_2,
        f"Fish Fillets - Next Generation, {title} dialogue, ALTAR interactive and others, "
        "http://fillets.sourceforge.net",
        functools.partial(read_dialogue, language=language),
        salt,
    )


def _prompts(language: str, voice: str, origin: str, licence: str, *, salt: str) -> Corpus:
    return Corpus(
        "prompts",
        (f"asterisk-core-sounds-{language}-wav", f"asterisk-core-sounds-{language}"),
        licence,
        f"Asterisk core sounds, {origin}",
        functools.partial(read_prompts, language=language, voice=voice),
        salt,
    )


ALLISON = "voice: Allison Smith, http://www.theivrvoice.com; funded by Digium, Inc."
JUNE = (
    "voice: June Wallack, http://www.junewallack.com; translated by Clod Patry, Kristopher Lalletti and June Wallack; "
    "funded by Digium, Inc., Unlimitel and BGM Informatique"
)
CARLO = "voice: Carlo Flora, http://www.carloflora.com; translated by Silvia Petrin"
MAXIM = "provided by Maxim Topal, http://www.ivrvoice.ru"

# There are only tens of documents to a corpus, and of different lengths: each salt is one for which the splits come out
# near 80/10/10 by minutes. Another one would move recordings from training to test for those who fetched them before.
CORPORA = {
    "dialogue": {"cs": _dialogue("cs", "Czech", salt="57"), "nl": _dialogue("nl", "Dutch", salt="57")},
    "prompts": {
        "en": _prompts("en", "en_US_f_Allison", f"English, {ALLISON}", CC_BY_SA_3, salt="57"),
        "es": _prompts("es", "es_MX_f_Allison", f"Spanish, {ALLISON}", CC_BY_SA_3, salt="98"),
        "fr": _prompts("fr", "fr_CA_f_June", f"French, {JUNE}", CC_BY_SA_3, salt="4"),
        "it": _prompts("it", "it_IT_m_Carlo", f"Italian, {CARLO}", CC_BY_3, salt="102"),
        "ru": _prompts("ru", "ru_RU_f_IvrvoiceRU", f"Russian, {MAXIM}", CC_BY_3, salt="141"),
    },
}
"""By name and language; the first language of a corpus is its default."""


def corpus_of(name: str, language: str | None = None) -> Corpus:
    languages = CORPORA[name]
    if language is None:
        return next(iter(languages.values()))
    if language not in languages:
        known = "; ".join(f"{corpus}: {', '.join(CORPORA[corpus])}" for corpus in CORPORA)
        raise FetchError(
            f"{name} has no language {language!r}. Choose one of {', '.join(languages)} with --language, or another "
            f"--corpus ({known})."
        )
    return languages[language]
