"""Moshi's text tokens, as they come, to words and the times at which they are said: ``data.text`` the other way."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from moshi_ttt.data.text import Word

BEGINS_WORD = "▁"
"""What a SentencePiece piece starts with where a word begins."""


class SpokenText:
    """The text of one stream: a token for each frame, most of them padding.

    Args:
        tokenizer: a ``SentencePieceProcessor``.
        silent: tokens that say nothing: padding, and the end of padding.
        frame_rate: frames a second.
    """

    def __init__(self, tokenizer: Any, *, silent: AbstractSet[int], frame_rate: float) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        self._frame_rate = frame_rate
        self._frames = 0
        self._words: list[list[tuple[int, int]]] = []  # of each word, its tokens as (frame, token)

    def add(self, token: int) -> str:
        """The token of the next frame; what it says, with a blank in front where a word begins, or nothing."""
        frame, self._frames = self._frames, self._frames + 1
        if token in self._silent or self._tokenizer.is_control(token):
            return ""
        piece: str = self._tokenizer.id_to_piece(token)
        if piece.startswith(BEGINS_WORD) or not self._words:
            self._words.append([])
        self._words[-1].append((frame, token))
        return piece.replace(BEGINS_WORD, " ")

    @property
    def words(self) -> list[Word]:
        """The words so far: each from its first token's frame to the end of its last token's, in seconds."""
        found = []
        for tokens in self._words:
            if text := self._tokenizer.decode([token for _, token in tokens]).strip():
                start, end = tokens[0][0] / self._frame_rate, (tokens[-1][0] + 1) / self._frame_rate
                found.append(Word(text, start, end))
        return found

    @property
    def text(self) -> str:
        """All words, with blanks between."""
        return " ".join(word.text for word in self.words)
