"""Zero-shot metrics of speech: of two recordings, does the model find the right one likelier, without being trained to?

A recording is what Moshi says, the user is silent, and there is no text, as where a training has no transcript. What is
compared is the negative log-likelihood of its audio tokens, teacher-forced, where the model predicts any.

How scores are made comparable is a choice, and published figures differ in it:

- ``normalisation``: ``token``, the mean over predicted tokens, so that a longer recording does not lose by its length;
  or ``sum``, the log-likelihood itself, which favours the shorter.
- ``codebooks``: ``all`` that Moshi speaks; or ``semantic``, the first one. Published figures of token language models
  score semantic units only, so ``semantic`` is the nearer to them; acoustic codebooks are most of ``all``.

Shape legend: Q rows of codes (text, then audio), K codebooks Moshi speaks, T frames, N items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.host import HostModel
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.manifest import DataError, read_header
from moshi_ttt.evaluation.pairs import Pair, PairSet
from moshi_ttt.evaluation.statistics import LEVEL, Interval, bootstrap
from moshi_ttt.hosts.moshi.fit import layout_of
from moshi_ttt.hosts.moshi.losses import targets_of, token_losses

Normalisation = Literal["token", "sum"]
Codebooks = Literal["all", "semantic"]
CHANCE = 0.5


class ScoringError(MoshiTTTError, ValueError):
    """Recordings or models that cannot be compared."""


@dataclass(frozen=True)
class Score:
    """What a recording costs a model: ``nats`` in sum, over ``tokens`` predicted tokens."""

    nats: float
    tokens: int

    def by(self, normalisation: Normalisation) -> float:
        """Nats per token, or in sum. The lower, the likelier."""
        return self.nats if normalisation == "sum" else self.nats / self.tokens


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model, and whether its memory learns while it listens; without blocks ``updates`` means nothing.

    Attributes:
        present: makes the context in which ``model`` is what is scored, where an adapter has to be put into it.
            Variants that follow each other and have the same are scored together.
    """

    model: Any
    host: HostModel
    updates: bool = True
    present: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Outcome:
    """Scores of a pair's two recordings."""

    pair: Pair
    right: float
    wrong: float

    @property
    def value(self) -> float:
        """1 where the right recording has the lower score, 0 where the wrong one has, 0.5 for a tie."""
        return (self.right < self.wrong) + 0.5 * (self.right == self.wrong)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The share of items answered rightly, from 0 to 1, with its interval over items.

    Attributes:
        items, pairs: how many; an item's value is the mean over its pairs.
    """

    share: Interval
    items: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a scorer makes of pairs; ``groups`` in the order in which they first occur, none where no pair has one."""

    outcomes: tuple[Outcome, ...]
    overall: Accuracy
    groups: dict[str, Accuracy]


def encode(codec: SpeechCodec, path: Path) -> Tensor:
    """Codes ``[Q, T]`` (int64, CPU) of a mono recording as what Moshi says; the last frame is filled up with silence.

    Raises DataError: it cannot be read. ScoringError: it is not mono.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a recording.")
    header = read_header(path)
    if header.channels != 1:
        raise ScoringError(f"{path} has {header.channels} channels, and one is scored. Mix it down to mono.")
    audio = codec.encode_segment(codec.read_segment(path, 0, codec.frames_of(header.seconds)))
    return torch.cat([codec.encode_text(None, audio.shape[1])[None], audio])


@torch.no_grad()
def score_codes(
    model: Any,
    host: HostModel,
    codes: Tensor,
    *,
    updates: bool = True,
    codebooks: Codebooks = "all",
    name: str = "The recording",
) -> Score:
    """The score of one recording, ``codes [Q, T]``, from the learned initial state on.

    The zero token is never predicted, nor, in a codebook that is late by some frames, are as many frames at the end.
    Nothing is left behind: no state, no draw from a generator, no gradient.

    Raises ScoringError when nothing of the recording, called ``name``, is predicted.
    """
    batch = codes[None].to(model.device)
    with host.updates(model, updates), host.carry(model):
        out = model(batch)
    spoken = layout_of(model).codebooks if codebooks == "all" else 1  # Moshi's voice, not the user's
    mask = out.mask.clone()  # [1, K, T]
    mask[:, spoken:] = False
    if not mask.any():
        raise ScoringError(f"{name} has {codes.shape[1]} frames, and none is predicted. Give a longer recording.")
    losses = token_losses(out.logits, targets_of(model, batch)[1], mask)
    return Score(float(losses.double().sum()), int(mask.sum()))


def score(
    model: Any,
    host: HostModel,
    codec: SpeechCodec,
    path: Path,
    *,
    updates: bool = True,
    codebooks: Codebooks = "all",
) -> Score:
    """The score of a recording: ``score_codes`` of what ``encode`` makes of it, and raises as that does."""
    codes = encode(codec, path)
    return score_codes(model, host, codes, updates=updates, codebooks=codebooks, name=str(path))


def accuracy(outcomes: Sequence[Outcome], *, seed: int = 0) -> Accuracy:
    """The share of items where the right recording has the lower score; ties count half. Raises ScoringError for none.

    The interval is a percentile bootstrap over items, seeded: pairs of one item are not independent.
    """
    values = _by_item(outcomes)
    return Accuracy(share=bootstrap(values, _mean, seed=seed), items=len(values), pairs=len(outcomes))


def evaluate_pairs(pairs: Iterable[Pair], scorer: Callable[[Path], float], *, seed: int = 0) -> Evaluation:
    """What ``scorer`` makes of ``pairs``: asked once for each recording, it gives a score, the lower the likelier.

    Raises ScoringError: no pairs, or a score that is not a finite number.
    """
    scores: dict[Path, float] = {}
    outcomes = []
    groups: dict[str, list[Outcome]] = {}
    for pair in pairs:
        for path in (pair.right, pair.wrong):
            if path not in scores:
                scores[path] = _finite(scorer(path), path)
        outcome = Outcome(pair, scores[pair.right], scores[pair.wrong])
        outcomes.append(outcome)
        if pair.group:
            groups.setdefault(pair.group, []).append(outcome)
    return Evaluation(
        outcomes=tuple(outcomes), overall=accuracy(outcomes, seed=seed),
        groups={name: accuracy(found, seed=seed) for name, found in groups.items()},
    )  # fmt: skip


def difference(evaluation: Evaluation, base: Evaluation, *, seed: int = 0) -> Interval:
    """The accuracy of ``evaluation`` minus that of ``base``, both of the same pairs, resampled alike."""
    assert [outcome.pair for outcome in evaluation.outcomes] == [outcome.pair for outcome in base.outcomes]
    return bootstrap(_by_item(evaluation.outcomes) - _by_item(base.outcomes), _mean, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Every variant on the same pairs.

    Attributes:
        evaluations: by name of the variant, as given.
        differences: by name of each variant after the first, its accuracy minus the first one's.
    """

    pairs: PairSet
    normalisation: Normalisation
    codebooks: Codebooks
    seed: int
    evaluations: dict[str, Evaluation]
    differences: dict[str, Interval]

    def to_json(self, *, scores: bool = False) -> dict[str, Any]:
        """Values that ``json.dumps(..., allow_nan=False)`` takes; with ``scores`` those of every pair too."""
        return {
            "dataset": self.pairs.dataset,
            "source": str(self.pairs.source),
            "pairs": len(self.pairs.pairs),
            "left_out": list(self.pairs.problems),
            "normalisation": self.normalisation,
            "codebooks": self.codebooks,
            "seed": self.seed,
            "chance": CHANCE,
            "variants": {
                name: {
                    "overall": _accuracy_json(found.overall),
                    "groups": {group: _accuracy_json(each) for group, each in found.groups.items()},
                    **({"scores": [_outcome_json(outcome) for outcome in found.outcomes]} if scores else {}),
                }
                for name, found in self.evaluations.items()
            },
            "differences": {name: _interval_json(each) for name, each in self.differences.items()},
        }

    def to_markdown(self) -> str:
        """A section: what was scored and how, the table of variants, and one of groups where there are any."""
        names = list(self.evaluations)
        overall = self.evaluations[names[0]].overall
        left_out = f"; {len(self.pairs.problems)} more could not be used" if self.pairs.problems else ""
        scored = "all codebooks" if self.codebooks == "all" else "the first, semantic codebook"
        normalised = "mean per predicted token" if self.normalisation == "token" else "sum, not normalised by length"
        lines = [
            f"## Zero-shot: {self.pairs.dataset}", "",
            f"{overall.pairs} pairs of {overall.items} items{left_out}. Right is the lower negative log-likelihood "
            f"over {scored} ({normalised}), ties count half, chance is {CHANCE:.0%}; intervals of {LEVEL:.0%} "
            f"by bootstrap over items, seed {self.seed}.", "",
            f"| variant | accuracy, % | minus {names[0]}, points |", "| --- | ---: | ---: |",
        ]  # fmt: skip
        for name, found in self.evaluations.items():
            change = self.differences.get(name)
            lines.append(f"| {name} | {_percent(found.overall.share)} | {_percent(change, '+') if change else ''} |")
        if groups := self.evaluations[names[0]].groups:
            lines += ["", f"| group | items | {' | '.join(names)} |", "| --- | ---: |" + " ---: |" * len(names)]
            for group, first in groups.items():
                cells = " | ".join(_percent(self.evaluations[name].groups[group].share) for name in names)
                lines.append(f"| {group.replace('|', '/')} | {first.items} | {cells} |")
        return "\n".join(lines) + "\n"


def run(
    variants: Mapping[str, Variant],
    codec: SpeechCodec,
    pairs: PairSet,
    *,
    normalisation: Normalisation = "token",
    codebooks: Codebooks = "all",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Score every recording of ``pairs`` with every variant; the first is what the others are compared with.

    Args:
        codec: that of all the variants' models; each recording is encoded once.
        progress: called with how many recordings are done, and how many there are; each counts once for each adapter
            that is put in.

    Raises:
        ScoringError: no variants, variants of different base models, a codec that is not theirs, or a score that is no
            finite number.
        DataError: a recording that cannot be read.
    """
    _check(variants, codec, normalisation, codebooks)
    scores: dict[str, dict[Path, float]] = {name: {} for name in variants}
    paths = list(dict.fromkeys(path for pair in pairs.pairs for path in (pair.right, pair.wrong)))
    groups = [(present, list(each)) for present, each in groupby(variants, lambda name: variants[name].present)]
    encoded: dict[Path, Tensor] = {}
    done = 0
    for present, names in groups:
        with present():
            for path in paths:
                if path not in encoded:
                    encoded[path] = encode(codec, path)
                for name in names:
                    variant = variants[name]
                    found = score_codes(
                        variant.model, variant.host, encoded[path], updates=variant.updates, codebooks=codebooks,
                        name=str(path),
                    )  # fmt: skip
                    scores[name][path] = _finite(found.by(normalisation), path)
                done += 1
                if progress is not None:
                    progress(done, len(groups) * len(paths))
    evaluations = {
        name: evaluate_pairs(pairs.pairs, found.__getitem__, seed=seed) for name, found in scores.items()
    }  # fmt: skip
    first, *others = evaluations
    differences = {name: difference(evaluations[name], evaluations[first], seed=seed) for name in others}
    return Results(
        pairs=pairs, normalisation=normalisation, codebooks=codebooks, seed=seed, evaluations=evaluations,
        differences=differences,
    )  # fmt: skip


def _check(variants: Mapping[str, Variant], codec: SpeechCodec, normalisation: str, codebooks: str) -> None:
    for name, value, allowed in (
        ("normalisation", normalisation, get_args(Normalisation)),
        ("codebooks", codebooks, get_args(Codebooks)),
    ):
        if value not in allowed:
            raise ScoringError(f"{name} = {value!r}: allowed are {' and '.join(allowed)}.")
    if not variants:
        raise ScoringError("No variants to score with. Give at least one, such as the base model.")
    for name, variant in variants.items():
        if variant.model.num_codebooks != codec.rows:
            raise ScoringError(
                f"The variant {name!r} takes {variant.model.num_codebooks} rows of codes, and the codec makes "
                f"{codec.rows}. Give the codec that belongs to it."
            )
    models: dict[int, tuple[str, Variant]] = {}
    for name, variant in variants.items():
        models.setdefault(id(variant.model), (name, variant))
    (first, base), *others = [(name, variant.host.fingerprint(variant.model)) for name, variant in models.values()]
    for name, own in others:
        if different := sorted(key for key in base.keys() | own.keys() if base.get(key) != own.get(key)):
            raise ScoringError(
                f"The variants {first!r} and {name!r} are of different base models: they differ in "
                f"{', '.join(different)}. Compare a base model with adapters that were made for it."
            )


def _finite(value: float, path: Path) -> float:
    if not math.isfinite(value):
        raise ScoringError(f"{path} scores {value}, which is no finite number. Check the model with moshi-ttt doctor.")
    return value


def _by_item(outcomes: Sequence[Outcome]) -> Tensor:
    """``[N]`` float64: each item's mean over its pairs, in the order in which items first occur."""
    if not outcomes:
        raise ScoringError("No pairs to score. Give a data set with at least one.")
    items: dict[str, list[float]] = {}
    for outcome in outcomes:
        items.setdefault(outcome.pair.question, []).append(outcome.value)
    return torch.tensor([sum(values) / len(values) for values in items.values()], dtype=torch.float64)


def _mean(values: Tensor) -> Tensor:
    """``[S]`` of ``[S, N]``."""
    return values.mean(1)


def _percent(interval: Interval, sign: str = "") -> str:
    shown = [f"{100 * each:{sign}.1f}" for each in (interval.value, interval.low, interval.high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if math.isfinite(interval.low) else shown[0]


def _interval_json(interval: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}


def _accuracy_json(found: Accuracy) -> dict[str, Any]:
    return {"accuracy": _interval_json(found.share), "items": found.items, "pairs": found.pairs}


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    pair = outcome.pair
    return {"name": pair.name, "group": pair.group, "right": outcome.right, "wrong": outcome.wrong}
