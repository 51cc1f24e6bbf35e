"""Compatibility: the voices of a Moshi's codes, what it predicts, and the codec and tokenizer that fit it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.upstream import FRAME_RATE


@dataclass(frozen=True, kw_only=True)
class SpeechLayout:
    """The audio rows of a language model: Moshi's voice first, then the user's where there are two.

    Attributes:
        voices: 1 or 2.
        codebooks: of one voice.
        predicted: voices whose codes the model predicts: 0 (speech to text), 1, or both.
    """

    voices: int
    codebooks: int
    predicted: int


def speech_layout(n_q: int, dep_q: int, delays: Sequence[int]) -> SpeechLayout:
    """The layout of a model that reads ``n_q`` codebooks and predicts the first ``dep_q``.

    Where it predicts all of them or none, the delays tell one voice from two: each voice starts with a codebook that is
    earlier than the others, as in 0, 1, .., 1, 0, 1, .., 1.

    Args:
        delays: of the audio rows alone, in frames.

    Raises HostError for any other layout.
    """
    if 0 < dep_q < n_q == 2 * dep_q:
        return SpeechLayout(voices=2, codebooks=dep_q, predicted=1)
    starts = [row for row in range(n_q) if row == 0 or delays[row] < delays[row - 1]]
    voices = [list(delays[start:stop]) for start, stop in zip(starts, [*starts[1:], n_q], strict=True)]
    if dep_q not in (0, n_q) or len(voices) not in (1, 2) or voices[0] != voices[-1]:
        raise HostError(
            f"This model predicts {dep_q} of the {n_q} codebooks of its input, with delays {list(delays)}. Supported "
            "are one voice or two with as many codebooks and the same delays each, of which all, the first, or none "
            "are predicted."
        )
    return SpeechLayout(
        voices=len(voices), codebooks=n_q // len(voices), predicted=len(voices) if dep_q else 0
    )  # fmt: skip


def layout_of(model: Any) -> SpeechLayout:
    """The layout of a language model, which may be on the meta device. Raises HostError."""
    return speech_layout(model.n_q, model.dep_q, model.delays[model.audio_offset :])


def require_fit(model: Any, mimi: Any, tokenizer: Any) -> SpeechLayout:
    """The layout of ``model``; HostError, with all that is wrong, unless the codec and the tokenizer belong to it.

    A tokenizer fits when it has as many pieces as the model's text table has rows: with more, some token has no
    embedding; with fewer, it is not the tokenizer that the model was trained with, and its tokens mean other words.

    Args:
        model: a language model, which may be on the meta device.
        mimi: its codec, set to the codebooks of one voice (see ``MoshiBundle.load_mimi``).
        tokenizer: a ``SentencePieceProcessor``.
    """
    layout = layout_of(model)
    if problems := [*_codec_problems(model, layout, mimi), *_tokenizer_problems(model, tokenizer)]:
        raise HostError("\n".join(problems))
    return layout


def require_codec(model: Any, mimi: Any) -> SpeechLayout:
    """The layout of ``model``; HostError unless the codec belongs to it: see ``require_fit``."""
    layout = layout_of(model)
    if problems := list(_codec_problems(model, layout, mimi)):
        raise HostError("\n".join(problems))
    return layout


def _codec_problems(model: Any, layout: SpeechLayout, mimi: Any) -> Iterator[str]:
    remedy = "Give the codec that the model was trained with (host.mimi_weights, moshi_paths.mimi_path)."
    if mimi.num_codebooks != layout.codebooks:
        yield f"The codec has {mimi.num_codebooks} codebooks, and a voice of the model {layout.codebooks}. {remedy}"
    if mimi.cardinality != model.card:
        yield f"The codec has {mimi.cardinality} codes in a codebook, and the model {model.card}. {remedy}"
    if mimi.frame_rate != FRAME_RATE:
        yield f"The codec makes {mimi.frame_rate:g} frames a second, and Moshi takes {FRAME_RATE:g}. {remedy}"


def _tokenizer_problems(model: Any, tokenizer: Any) -> Iterator[str]:
    pieces = int(tokenizer.get_piece_size())
    if pieces == model.text_card:
        return
    why = "some of its tokens have no embedding" if pieces > model.text_card else "its tokens mean other words"
    yield (
        f"The tokenizer has {pieces:,} pieces, and the model's text table is for {model.text_card:,}: {why}. Give the "
        "tokenizer that the model was trained with (host.tokenizer, moshi_paths.tokenizer_path)."
    )


def require_unconditioned(model: Any, name: str) -> None:
    """Raise HostError for a model, called ``name``, that requires conditions, such as Hibiki."""
    if model.fuser is None and model.condition_provider is None:
        return
    conditions = [] if model.condition_provider is None else list(model.condition_provider.conditioners)
    listed = f" ({', '.join(conditions)})" if conditions else ""
    raise HostError(
        f"{name} needs conditions{listed}, and training and evaluating with conditions are not supported. Give a model "
        "without conditions."
    )


def require_audio(model: Any, name: str, what: str) -> None:
    """Raise HostError for a model, called ``name``, that predicts no audio, where ``what`` needs the audio loss."""
    if model.depformer is None:
        raise HostError(
            f"{name} predicts text alone (it has no depformer), and {what} needs a model that predicts audio. "
            "`moshi-ttt evaluate long-context` measures the text loss."
        )


def require_trainable(model: Any, name: str) -> None:
    """Raise HostError for a model, called ``name``, that training does not support."""
    require_unconditioned(model, name)
    require_audio(model, name, "training")


def require_talking(model: Any, name: str) -> None:
    """Raise HostError for a model that does not hear one voice and predict the other, which ``name`` needs."""
    require_unconditioned(model, "This model")
    layout = layout_of(model)
    if (layout.voices, layout.predicted) != (2, 1):
        raise HostError(
            f"{name} need a model that hears one voice and predicts the other, such as Moshi; this one has "
            f"{layout.voices} voice{'s' if layout.voices > 1 else ''} and predicts {layout.predicted}."
        )
