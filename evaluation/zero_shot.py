"""Zero-shot metrics of speech: of two recordings, does the model give the right one the higher likelihood?

A recording is what Moshi says, the user is silent, and there is no text, as where a training has no transcript. What is
compared is the negative log-likelihood of its audio tokens, teacher-forced, where the model predicts any.

How scores are made comparable is a choice, and published figures differ in it:

- ``normalization``: ``token``, the mean over predicted tokens, so that a longer recording does not lose by its length;
  or ``sum``, the log-likelihood itself, which favors the shorter.
- ``codebooks``: ``all`` that Moshi speaks; or ``semantic``, the first one. Published figures of token language models
  score semantic units only, so ``semantic`` is the nearer to them; acoustic codebooks are most of ``all``.

Shape legend: Q rows of codes (text, then audio), K codebooks Moshi speaks, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moshi_ttt.core.deprecation import moved_names, renamed_arguments, renamed_attributes
from moshi_ttt.core.host import HostModel
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.manifest import read_header
from moshi_ttt.data.problems import DataError
from moshi_ttt.evaluation.models import ModelUnderTest
from moshi_ttt.evaluation.pair_accuracy import Evaluation, ScoringError, difference, evaluate_pairs, finite_score
from moshi_ttt.evaluation.pairs import PairSet
from moshi_ttt.evaluation.statistics import Interval
from moshi_ttt.hosts.moshi.compatibility import layout_of
from moshi_ttt.hosts.moshi.losses import targets_of, token_losses

Normalization = Literal["token", "sum"]
Codebooks = Literal["all", "semantic"]
__getattr__ = moved_names(__name__, None, {"Normalisation": f"{__name__}:Normalization"})


@dataclass(frozen=True)
class Score:
    """The loss of a recording: ``nats`` in sum, over ``tokens`` predicted tokens."""

    nats: float
    tokens: int

    @renamed_arguments(normalisation="normalization")
    def by(self, normalization: Normalization) -> float:
        """Nats per token, or in sum. The lower, the likelier."""
        return self.nats if normalization == "sum" else self.nats / self.tokens


@dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """A model, and whether its test-time updates are enabled; without blocks ``updates`` means nothing.

    Attributes:
        present: makes the context in which ``model`` is what is scored, where an adapter has to be put into it.
            Models that follow each other and have the same are scored together.
    """

    model: Any
    host: HostModel
    updates: bool = True
    present: Callable[[], AbstractContextManager[object]] = nullcontext


def with_and_without_updates(models: Iterable[ModelUnderTest], host: HostModel) -> dict[str, ScoredModel]:
    """Each model by its name; one with blocks twice, with test-time updates and without."""
    found = {}
    for tested in models:
        named = {"updates on": True, "updates off": False} if tested.injection is not None else {"": True}
        for condition, updates in named.items():
            label = f"{tested.name}, {condition}" if condition else tested.name
            found[label] = ScoredModel(model=tested.model, host=host, updates=updates, present=tested.present)
    return found


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
    batch = codes[None].to(model.device)  # [1, Q, T]
    with host.updates(model, updates), host.carry(model):
        out = model(batch)
    spoken = layout_of(model).codebooks if codebooks == "all" else 1  # Moshi's voice, not the user's
    mask = out.mask.clone()  # [1, K, T]
    mask[:, spoken:] = False  # the first codebooks alone
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


@renamed_attributes(normalisation="normalization")
@dataclass(frozen=True, kw_only=True)
class ZeroShotResults:
    """The results of all models on the same pairs.

    Attributes:
        evaluations: by name of the model, as given.
        differences: by name of each model after the first, its accuracy minus the first one's.
    """

    pairs: PairSet
    normalization: Normalization
    codebooks: Codebooks
    seed: int
    evaluations: dict[str, Evaluation]
    differences: dict[str, Interval]


@renamed_arguments(normalisation="normalization")
def run(
    variants: Mapping[str, ScoredModel],
    codec: SpeechCodec,
    pairs: PairSet,
    *,
    normalization: Normalization = "token",
    codebooks: Codebooks = "all",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ZeroShotResults:
    """Score every recording of ``pairs`` with every model; the first is what the others are compared with.

    Args:
        codec: that of all the models; each recording is encoded once.
        progress: called with how many recordings are done, and how many there are; each counts once for each adapter
            that is put in.

    Raises:
        ScoringError: no models, models of different base models, a codec that is not theirs, or a score that is no
            finite number.
        DataError: a recording that cannot be read.
    """
    _check(variants, codec, normalization, codebooks)
    scores = _scores(variants, codec, pairs, normalization, codebooks, progress)
    evaluations = {
        name: evaluate_pairs(pairs.pairs, found.__getitem__, seed=seed) for name, found in scores.items()
    }  # fmt: skip
    first, *others = evaluations
    differences = {name: difference(evaluations[name], evaluations[first], seed=seed) for name in others}
    return ZeroShotResults(
        pairs=pairs, normalization=normalization, codebooks=codebooks, seed=seed, evaluations=evaluations,
        differences=differences,
    )  # fmt: skip


def _scores(
    variants: Mapping[str, ScoredModel],
    codec: SpeechCodec,
    pairs: PairSet,
    normalization: Normalization,
    codebooks: Codebooks,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[Path, float]]:
    """The score of every recording by every model. Models that have the same ``present`` are scored together."""
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
                    scores[name][path] = finite_score(found.by(normalization), path)
                done += 1
                if progress is not None:
                    progress(done, len(groups) * len(paths))
    return scores


def _check(variants: Mapping[str, ScoredModel], codec: SpeechCodec, normalization: str, codebooks: str) -> None:
    for name, value, allowed in (
        ("normalization", normalization, get_args(Normalization)),
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
    models: dict[int, tuple[str, ScoredModel]] = {}
    for name, variant in variants.items():
        models.setdefault(id(variant.model), (name, variant))
    (first, base), *others = [(name, variant.host.fingerprint(variant.model)) for name, variant in models.values()]
    for name, own in others:
        if different := sorted(key for key in base.keys() | own.keys() if base.get(key) != own.get(key)):
            raise ScoringError(
                f"The variants {first!r} and {name!r} are of different base models: they differ in "
                f"{', '.join(different)}. Compare a base model with adapters that were made for it."
            )
