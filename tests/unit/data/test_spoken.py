"""Text tokens to words: what ``text_stream`` makes of words, back again."""

from __future__ import annotations

import pytest

from moshi_ttt.data.spoken import SpokenText
from moshi_ttt.data.text import Word, text_stream
from moshi_ttt.hosts.moshi.loading import resolve_repo

PADDING, END_OF_PADDING, RATE = 3, 0, 12.5


@pytest.fixture(scope="module")
def tokenizer():
    return resolve_repo("builtin:tiny").tokenizer()


@pytest.fixture
def spoken(tokenizer) -> SpokenText:
    return SpokenText(tokenizer, silent={PADDING, END_OF_PADDING}, frame_rate=RATE)


def test_words_come_back_at_the_times_at_which_they_were_said(tokenizer, spoken):
    words = [Word("welcome", 0.4, 0.8), Word("to", 2.0, 2.2), Word("the", 2.24, 2.4), Word("conference", 4.0, 4.5)]
    tokens = text_stream(
        words, 80, tokenizer, frame_rate=RATE, padding=PADDING, end_of_padding=END_OF_PADDING
    ).tolist()  # fmt: skip
    pieces = [spoken.add(token) for token in tokens]
    assert "".join(pieces) == " welcome to the conference"
    assert [word.text for word in spoken.words] == ["welcome", "to", "the", "conference"]
    for found, said in zip(spoken.words, words, strict=True):
        assert found.start == pytest.approx(int(said.start * RATE) / RATE)
        assert found.end > found.start
    assert spoken.words[0].end == pytest.approx(0.4 + len(tokenizer.encode("welcome")) / RATE)
    assert spoken.text == "welcome to the conference"


def test_silence_and_control_tokens_say_nothing(tokenizer, spoken):
    controls = [token for token in range(tokenizer.get_piece_size()) if tokenizer.is_control(token)]
    assert [spoken.add(token) for token in (PADDING, END_OF_PADDING, *controls)] == [""] * (2 + len(controls))
    assert (spoken.words, spoken.text) == ([], "")


def test_a_stream_that_starts_inside_a_word_has_it(tokenizer, spoken):
    inner = next(
        token for token in range(4, tokenizer.get_piece_size())
        if not tokenizer.id_to_piece(token).startswith("▁") and tokenizer.id_to_piece(token).isalpha()
    )  # fmt: skip
    assert spoken.add(inner) == tokenizer.id_to_piece(inner)
    assert [word.start for word in spoken.words] == [0.0]
