"""The text stream against its definition, frame by frame, on random words."""

from __future__ import annotations

import json
import random

import pytest

from moshi_ttt.data.text import TranscriptError, Word, read_words, text_stream

from .conftest import write_transcript

PADDING, END = 3, 0
RATE = 12.5


class Letters:
    """A tokenizer that gives each letter its number."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def stream(words, frames, tokenizer=None) -> list[int]:
    tokens = text_stream(
        words, frames, tokenizer or Letters(), frame_rate=RATE, padding=PADDING, end_of_padding=END
    )  # fmt: skip
    assert tokens.shape == (frames,)
    assert tokens.dtype.is_signed
    return tokens.tolist()


def reference(words, frames, tokenizer) -> list[int]:
    """The definition: at each frame, the words that have started by its end become current, one after the other."""
    waiting = list(words)
    left: list[int] = []
    fresh = False
    row = []
    for frame in range(frames):
        while waiting and waiting[0].start * RATE < frame + 1:
            left = list(tokenizer.encode(waiting.pop(0).text.strip()))
            fresh = True
        if left:
            if fresh and row and row[-1] == PADDING:
                row[-1] = END
            row.append(left.pop(0))
            fresh = False
        else:
            row.append(PADDING)
    return row


def test_one_token_a_frame_and_a_sign_before_the_first():
    assert stream([Word("abc", 0.25, 0.5)], 8) == [3, 3, 0, 97, 98, 99, 3, 3]


def test_a_newer_word_replaces_what_is_left_of_an_older_one():
    assert stream([Word("abcdef", 0.08, 0.2), Word("xy", 0.24, 0.3)], 6) == [0, 97, 98, 120, 121, 3]


def test_of_two_words_in_one_frame_the_second_is_said():
    assert stream([Word("ab", 0.08, 0.1), Word("xy", 0.09, 0.2)], 5) == [0, 120, 121, 3, 3]


def test_bounds():
    assert stream([Word("ab", -1.0, 0.1)], 3) == [97, 98, 3]
    assert stream([Word("abcdef", 0.2, 0.3)], 4) == [3, 0, 97, 98]
    assert stream([Word("ab", 0.32, 0.5), Word("cd", 99.0, 99.5)], 4) == [3, 3, 3, 3]
    assert stream([], 3) == [3, 3, 3]
    assert stream([Word("ab", 0.0, 0.5)], 0) == []
    assert stream([Word(" ab\n", 0.0, 0.5)], 2) == [97, 98]


def random_words(draw: random.Random, frames: int) -> list[Word]:
    words = []
    for _ in range(draw.randint(0, 25)):
        start = draw.choice([draw.uniform(-0.2, frames / RATE + 0.5), draw.randint(0, frames) / RATE])
        text = "".join(draw.choice("ab \x03") for _ in range(draw.randint(0, 6)))
        words.append(Word(text, start, start + 0.1))
    return sorted(words, key=lambda word: word.start)


@pytest.mark.parametrize("letters", [True, False])
def test_equals_the_definition(letters, codec):
    draw = random.Random(letters)
    tokenizer = Letters() if letters else codec.tokenizer
    for _ in range(300):
        frames = draw.randint(1, 60)
        words = random_words(draw, frames)
        assert stream(words, frames, tokenizer) == reference(words, frames, tokenizer), words


def test_a_transcript_keeps_the_main_speaker_sorted(tmp_path):
    path = tmp_path / "a.json"
    alignments = [
        ["late", [2, 2.5], "SPEAKER_MAIN"],
        ["other", [0, 1], "SPEAKER_00"],
        ["backwards", [1, 1], "SPEAKER_MAIN"],
        ["early", [0.5, 0.6], "SPEAKER_MAIN"],
        ["nobody", [0.5, 0.6], None],
    ]
    path.write_text(json.dumps({"alignments": alignments, "more": 1}))
    assert read_words(path) == (Word("early", 0.5, 0.6), Word("late", 2.0, 2.5))
    assert read_words(write_transcript(path, [])) == ()


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("", "cannot be read"),
        ("[1]", "no list of alignments"),
        ('{"alignments": "hi"}', "no list of alignments"),
        ('{"alignments": [["hi", [0, 1], "SPEAKER_MAIN"], ["ho", [0], "X"]]}', "alignment 1 is"),
        ('{"alignments": [["hi", [0, NaN], "X"]]}', "alignment 0 is"),
        ('{"alignments": [[7, [0, 1], "X"]]}', "alignment 0 is"),
        ('{"alignments": [["hi", [false, 1], "X"]]}', "alignment 0 is"),
        ('{"alignments": [["hi", "01", "X"]]}', "alignment 0 is"),
    ],
)
def test_transcripts_that_raise(tmp_path, contents, said):
    path = tmp_path / "a.json"
    path.write_text(contents)
    with pytest.raises(TranscriptError) as error:
        read_words(path)
    assert said in str(error.value)
    assert "Expected: " in str(error.value)
    with pytest.raises(TranscriptError, match="cannot be read"):
        read_words(tmp_path / "none.json")
