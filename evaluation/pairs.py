"""Pairs of recordings, one right and one wrong, from the layouts in which zero-shot benchmarks of speech are published.

Supported, by name:

- ``swuggy``, ``sblimp``: the evaluation set of the Zero Resource Speech Challenge 2021, unpacked: ``lexical/dev`` and
  ``syntactic/dev``, each with wav files and a ``gold.csv``. The gold files of the test sets are not published.
- ``storycloze``, ``topic-storycloze``: the spoken StoryCloze benchmark of Hassid et al. 2023 (arXiv 2305.13009), one
  archive each, unpacked: ``ID_correct.wav`` and ``ID_incorrect.wav`` in one folder, each of them the whole story.
- ``csv``: any pairs of one's own, a file with the columns ``right,wrong[,group]``.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moshi_ttt.core.errors import MoshiTTTError, nearest
from moshi_ttt.core.paths import user_path
from moshi_ttt.data.manifest import read_header
from moshi_ttt.data.problems import LISTED, DataError

RIGHT, WRONG, STORY = "_correct.wav", "_incorrect.wav", "_mutual.wav"
BANDS = ((1, "never heard"), (5, "1 to 4"), (20, "5 to 19"), (100, "20 to 99"))
"""Groups of sWUGGY by how often the word is in LibriSpeech: below this number, and else 100 or more."""


class PairsError(MoshiTTTError, ValueError):
    """Pairs of recordings that cannot be read."""


@dataclass(frozen=True)
class Pair:
    """Two recordings, one of which a model of the language should find likelier.

    Attributes:
        name: of its own in the data set.
        group: the kind of pair that the data set puts it into; empty where there are no kinds.
        item: what is asked. Pairs of one item, such as a sentence in several voices, count as one. Empty: the name.
    """

    name: str
    group: str
    right: Path
    wrong: Path
    item: str = ""

    @property
    def question(self) -> str:
        """The item, and the name where none is given."""
        return self.item or self.name


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """The pairs of a data set that can be used, at least one, and what is wrong with the others.

    Attributes:
        dataset: its name, one of ``DATASETS``.
        source: the folder or file.
        problems: a sentence for each pair that is left out.
    """

    dataset: str
    source: Path
    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]


Candidate = Pair | str
"""A pair that its data set lists, or what is wrong with it."""


def read_pairs(dataset: str, source: Path, *, max_bad_share: float = 0.01) -> PairSet:
    """The pairs of the data set named ``dataset`` in ``source``, in the order in which it lists them.

    Of the recordings only headers are read: each must exist, be mono, and not be empty.

    Args:
        source: the folder that the data set was unpacked into; for ``csv`` the file.
        max_bad_share: the largest share of pairs, from 0 to below 1, that may be unusable; they are left out.

    Raises PairsError: no such data set, another layout, no pairs, or too many that cannot be used.
    """
    if dataset not in DATASETS:
        raise PairsError(f"There is no data set {dataset!r}. {nearest(dataset, DATASETS)}")
    if not 0.0 <= max_bad_share < 1.0:
        raise PairsError(f"max_bad_share = {max_bad_share}: allowed are shares from 0 to below 1, such as 0.01.")
    source = user_path(source)
    pairs: list[Pair] = []
    problems: list[str] = []
    known: dict[Path, str] = {}
    for candidate in DATASETS[dataset](source):
        if isinstance(candidate, str):
            problems.append(candidate)
            continue
        for path in (candidate.right, candidate.wrong):
            if path not in known:
                known[path] = _problem_of(path)
        wrongs = dict.fromkeys(known[path] for path in (candidate.right, candidate.wrong) if known[path])
        if wrongs:
            problems.append(f"{candidate.name}: {' '.join(wrongs)}")
        else:
            pairs.append(candidate)
    _check_share(dataset, source, len(pairs), problems, max_bad_share)
    return PairSet(dataset=dataset, source=source, pairs=tuple(pairs), problems=tuple(problems))


def _problem_of(path: Path) -> str:
    """A sentence, empty when the recording can be used."""
    if not path.is_file():
        return f"{path} does not exist."
    try:
        channels = read_header(path).channels
    except DataError as error:
        return str(error)
    return "" if channels == 1 else f"{path} has {channels} channels; mix it down to mono."


def _check_share(dataset: str, source: Path, usable: int, problems: list[str], max_bad_share: float) -> None:
    bad, total = len(problems), usable + len(problems)
    if total == 0:
        raise PairsError(f"{source} lists no pairs of {dataset}. Unpack the data set again, or give another place.")
    if usable and bad / total <= max_bad_share:
        return
    listed = [f"  {problem}" for problem in problems[:LISTED]]
    if bad > LISTED:
        listed.append(f"  and {bad - LISTED} more")
    advice = "Fix or remove them, or raise max_bad_share." if usable else "No pair is left: fix them."
    raise PairsError(
        f"{dataset} in {source}: {bad} of {total} pairs ({bad / total:.1%}) cannot be used, and max_bad_share allows "
        f"{max_bad_share:.1%}:\n" + "\n".join(listed) + f"\n{advice}"
    )


def _swuggy(folder: Path) -> Iterator[Candidate]:
    """Words beside non-words, by id and voice, grouped by the word's frequency."""
    place, rows = _gold(folder, "lexical", "swuggy", {"id", "filename", "voice", "frequency", "correct"})
    return _by_item(place, rows, ("id",), lambda right: _band(right["frequency"]))


def _sblimp(folder: Path) -> Iterator[Candidate]:
    """Grammatical sentences beside ungrammatical ones, by type, subtype, id and voice, grouped by type."""
    columns = {"id", "filename", "voice", "type", "subtype", "correct"}
    place, rows = _gold(folder, "syntactic", "sblimp", columns)
    return _by_item(place, rows, ("type", "subtype", "id"), lambda right: right["type"])


def _gold(folder: Path, part: str, dataset: str, columns: set[str]) -> tuple[Path, list[dict[str, str]]]:
    """``part/dev`` in ``folder``, and the lines of its gold.csv."""
    place = folder / part / "dev"
    gold = place / "gold.csv"
    if not gold.is_file():
        raise PairsError(
            f"{folder} does not have the layout of {dataset}: looked for {part}/dev/gold.csv and {part}/dev/*.wav. "
            "Give the folder that the evaluation set of the ZeroSpeech 2021 challenge was unpacked into."
        )
    found, rows = _table(gold)
    if missing := sorted(columns - set(found)):
        raise PairsError(
            f"{gold} is no gold file of {dataset}: it lacks the columns {', '.join(missing)}, and has "
            f"{', '.join(found) or 'none'}. Take it from the evaluation set of the ZeroSpeech 2021 challenge."
        )
    return place, rows


def _by_item(
    place: Path, rows: Iterable[Mapping[str, str]], keys: tuple[str, ...], group: Callable[[Mapping[str, str]], str]
) -> Iterator[Candidate]:
    """Every right recording beside every wrong one of the same item and voice, as the challenge's own scoring does."""
    sides: dict[tuple[str, ...], dict[str, list[Mapping[str, str]]]] = {}
    for row in rows:
        if row["correct"] not in ("0", "1"):
            yield f"{row['filename']}: correct is {row['correct']!r}, and can be 0 or 1."
            continue
        key = (*(row[name] for name in keys), row["voice"])
        sides.setdefault(key, {"1": [], "0": []})[row["correct"]].append(row)
    for key, side in sides.items():
        item, name = "/".join(key[:-1]), "/".join(key)
        if not side["1"] or not side["0"]:
            missing = "1" if not side["1"] else "0"
            yield f"{name}: no partner; gold.csv has no line with this id and voice and correct = {missing}."
        for number, (right, wrong) in enumerate([(r, w) for r in side["1"] for w in side["0"]]):
            own = f"{name}#{number + 1}" if number else name
            yield Pair(own, group(right), _wav(place, right["filename"]), _wav(place, wrong["filename"]), item)


def _wav(place: Path, name: str) -> Path:
    """gold.csv names files without their suffix."""
    return place / (name if name.endswith(".wav") else f"{name}.wav")


def _band(frequency: str) -> str:
    try:
        number = float(frequency)
    except ValueError:
        return "frequency unknown"
    return next((name for bound, name in BANDS if number < bound), "100 or more")


def _story_cloze(dataset: str, own: str, other: str) -> Callable[[Path], Iterator[Candidate]]:
    """The reader of one of the two archives; ``own`` and ``other`` are what their folders are usually called."""

    def read(folder: Path) -> Iterator[Candidate]:
        if folder.name == other:
            raise PairsError(f"{folder} is by its name not {dataset}: that is {own}. Rename it if its name is wrong.")
        place = next((each for each in (folder, folder / own) if _names(each, RIGHT) | _names(each, WRONG)), None)
        if place is None:
            raise PairsError(
                f"{folder} does not have the layout of {dataset}: looked for ID{RIGHT} and ID{WRONG}, in it and in "
                f"{own}/. Give the folder that the benchmark's archive was unpacked into; for recordings of other "
                "names, write a csv."
            )
        if _names(place, STORY):
            raise PairsError(
                f"{place} holds stories (ID{STORY}) apart from their endings, and endings alone would be scored. "
                "Join each story with its endings, or take the archive in which they are joined."
            )
        for name in sorted(_names(place, RIGHT) | _names(place, WRONG)):
            yield Pair(name, "", place / (name + RIGHT), place / (name + WRONG))

    return read


def _names(folder: Path, ending: str) -> set[str]:
    return {path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")}


def _csv(path: Path) -> Iterator[Candidate]:
    """Lines with paths from the file's own folder."""
    if not path.is_file():
        raise PairsError(f"{path} is no file. Give a csv file with the columns right,wrong[,group].")
    found, rows = _table(path)
    if not {"right", "wrong"} <= set(found) <= {"right", "wrong", "group"}:
        raise PairsError(
            f"{path} has the columns {', '.join(found) or 'none'}; wanted are right, wrong and, if you like, group. "
            "The first line names them."
        )
    for line, row in enumerate(rows, start=2):
        name = f"line {line}"
        if not row["right"] or not row["wrong"]:
            yield f"{name}: no partner; right is {row['right']!r} and wrong is {row['wrong']!r}."
        elif row["right"] == row["wrong"]:
            yield f"{name}: right and wrong are the same file, {row['right']}."
        else:
            yield Pair(name, row.get("group", ""), path.parent / row["right"], path.parent / row["wrong"])


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a csv file, and its lines by column, without blanks around values; a missing value is empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [{name: (row[name] or "").strip() for name in columns} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PairsError(f"{path} cannot be read ({error}). Give a csv file in UTF-8.") from None
    return columns, rows


DATASETS: Mapping[str, Callable[[Path], Iterator[Candidate]]] = {
    "swuggy": _swuggy,
    "sblimp": _sblimp,
    "storycloze": _story_cloze("storycloze", "sSC", "tSC"),
    "topic-storycloze": _story_cloze("topic-storycloze", "tSC", "sSC"),
    "csv": _csv,
}
"""What reads which data set."""
