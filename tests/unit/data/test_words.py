"""Words that become text and words that do not: counted with their reasons, and never all lost in silence."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from moshi_ttt.data.corpus import open_corpus
from moshi_ttt.data.problems import DataError
from moshi_ttt.data.shards import read_index, write_shards
from moshi_ttt.data.text import Transcript, Word, text_stream
from moshi_ttt.data.words import WordCounts, count_words, total_words

from .conftest import FRAME, RATE, write_audio, write_manifest
from .test_text import END, PADDING, Letters, random_words

MAIN, OTHER = "SPEAKER_MAIN", "SPEAKER_00"
SECONDS = 4.0


@pytest.fixture
def corpus_of(tmp_path):
    """A manifest of one silent recording for each list of alignments."""

    def make(*transcripts: object, name: str = "train") -> str:
        entries = []
        for number, alignments in enumerate(transcripts):
            stem = f"{name}{number}"
            write_audio(tmp_path / f"{stem}.wav", np.zeros((2, round(SECONDS * RATE))))
            (tmp_path / f"{stem}.json").write_text(json.dumps({"alignments": alignments}))
            entries.append({"path": f"{stem}.wav", "duration": SECONDS})
        return str(write_manifest(tmp_path / f"{name}.jsonl", entries))

    return make


def said(*words: str, by: str = MAIN, scale: float = 1.0) -> list[object]:
    """A word every half second."""
    return [[word, [0.5 * n * scale, (0.5 * n + 0.3) * scale], by] for n, word in enumerate(words, start=1)]


SILENT = {  # a transcript, and what is said of two of them
    "another diariser's label": (
        said("a", "b", by=OTHER),
        ["4 of other speakers: 'SPEAKER_00' (4)", "data.speaker_label is 'SPEAKER_MAIN'"],
    ),
    "milliseconds": (
        said("a", "b", scale=1000), ["4 that start after their recording's end", "Are the times in milliseconds?"]
    ),
    "another file's": ([["a", [1e6, 1e6 + 1], MAIN]], ["2 that start after", "are these transcripts of other files?"]),
    "no words": ([], ["Their lists of alignments are empty."]),
    "backwards": ([["a", [2.0, 1.0], MAIN], ["b", [1, 1], MAIN]], ["4 that do not end after their start"]),
    "no text": ([["", [1.0, 2.0], MAIN], [" \n", [2.0, 3.0], MAIN]], ["4 without text"]),
}  # fmt: skip


@pytest.mark.parametrize(("alignments", "reasons"), SILENT.values(), ids=SILENT)
def test_transcripts_without_a_word_are_refused_where_they_are_required(
    tmp_path, codec, corpus_of, alignments, reasons
):
    manifest = corpus_of(alignments, alignments)
    for read in (
        lambda: open_corpus(manifest, codec, frames=10),
        lambda: write_shards(manifest, tmp_path / "out", codec, frames=10),
    ):
        with pytest.raises(DataError) as error:
            read()
        message = str(error.value)
        assert "not one word" in message
        assert "0 words kept" in message
        assert "2 of 2 transcripts keep none" in message
        assert "data.transcripts to 'none'" in message
        assert [reason for reason in reasons if reason not in message] == []
    assert not (tmp_path / "out").exists()
    (note,) = open_corpus(manifest, codec, frames=10, transcripts="optional").notes
    assert "0 words kept" in note
    assert open_corpus(manifest, codec, frames=10, transcripts="none").notes == ()


def test_words_are_counted_with_their_reasons(codec, corpus_of):
    first = [*said("a", "b", "c"), ["d", [1.01, 1.2], MAIN], *said("x", by=OTHER), ["y", [9, 9.5], MAIN]]
    corpus = open_corpus(corpus_of(first, said("z", by="SPEAKER_01")), codec, frames=10)
    assert corpus.words == WordCounts(
        transcripts=2, silent=1, kept=3, others={OTHER: 1, "SPEAKER_01": 1}, outside=1, if_milliseconds=1, replaced=1
    )
    assert str(corpus.words) == (
        "3 words kept, 4 dropped (2 of other speakers: 'SPEAKER_00' (1), 'SPEAKER_01' (1); 1 that start after their "
        "recording's end; 1 replaced by a later word that starts in the same 80 ms); 1 of 2 transcripts keep none"
    )


def test_losing_most_words_is_warned_of_and_losing_few_is_not(codec, corpus_of):
    few = corpus_of(said("a", "b", "c") + said("x", by=OTHER))
    most = corpus_of(said("a") + said("x", "y", by=OTHER), name="most")
    assert open_corpus(few, codec, frames=10).notes == ()
    (note,) = open_corpus(f"{few},{most}", codec, frames=10).notes
    assert note.startswith(most)
    assert "most words are not used: 1 words kept, 2 dropped" in note
    assert "set it to the label of the speaker who is Moshi, if that is another" in note


def test_one_corpus_without_words_beside_another_is_warned_of(codec, corpus_of):
    silent = corpus_of([], name="silent")
    (note,) = open_corpus(f"{corpus_of(said('a'))},{silent}", codec, frames=10).notes
    assert note.startswith(silent)


def test_the_label_can_be_named(codec, corpus_of):
    manifest = corpus_of(said("hello", "there", by=OTHER))
    other = dataclasses.replace(codec, speaker_label=OTHER)
    corpus = open_corpus(manifest, other, frames=50)
    assert corpus.words is not None
    assert corpus.words.kept == 2
    text = corpus.codes(0, 0, 0)[0]
    assert set(codec.tokenizer.encode("hello")) <= set(text.tolist())


@pytest.mark.parametrize("seed", range(40))
def test_what_is_kept_is_what_the_text_stream_says(seed):
    draw = random.Random(seed)
    frames = draw.randint(1, 60)
    words = random_words(draw, frames)
    counts = count_words(Transcript(tuple(words), {}, 0), frames / 12.5, 12.5)
    assert counts.kept + counts.dropped == len(words)
    # Each word alone and with its letter, told apart by a letter of its own.
    lettered = [word._replace(text=chr(0x4E00 + n) if word.text.strip() else word.text) for n, word in enumerate(words)]
    stream = text_stream(lettered, frames, Letters(), frame_rate=12.5, padding=PADDING, end_of_padding=END).tolist()
    assert counts.kept == sum(ord(word.text) in stream for word in lettered if word.text.strip())


def test_counts_add_up():
    one = WordCounts(transcripts=1, kept=2, others={"a": 1, "b": 2}, empty=1)
    assert one + one == WordCounts(transcripts=2, kept=4, others={"a": 2, "b": 4}, empty=2)
    assert total_words([None, one, None]) == one
    assert total_words([None]) is None
    many = WordCounts(others={f"S{n}": n for n in range(1, 9)})
    assert "'S8' (8), 'S7' (7), 'S6' (6), 'S5' (5) and 4 more labels" in str(many)


def test_moshis_channel_can_be_the_right_one(tmp_path, codec, speech):
    left, right = speech[: 12 * FRAME], speech[90_000 : 90_000 + 12 * FRAME]
    stereo = write_audio(tmp_path / "a.wav", np.stack([left, right]))
    mono = write_audio(tmp_path / "b.wav", left[None])
    other = dataclasses.replace(codec, moshi_channel="right")
    np.testing.assert_array_equal(other.read_segment(stereo, 0, 12), codec.read_segment(stereo, 0, 12).flip(0))
    np.testing.assert_array_equal(other.read_segment(mono, 0, 12), codec.read_segment(mono, 0, 12))


def test_shards_remember_who_moshi_is(tmp_path, codec, corpus_of):
    manifest = corpus_of(said("a", "b") + said("x", by=OTHER))
    other = dataclasses.replace(codec, moshi_channel="right", speaker_label=OTHER)
    summary = write_shards(manifest, tmp_path / "shards", other, frames=10)
    index = read_index(tmp_path / "shards")
    assert (index.moshi_channel, index.speaker_label) == ("right", OTHER)
    assert index.words == summary.words == WordCounts(transcripts=1, kept=1, others={MAIN: 2})
    assert len(summary.notes) == 1
    assert open_corpus(str(tmp_path / "shards"), other, frames=10).words == index.words
    with pytest.raises(DataError) as error:
        open_corpus(str(tmp_path / "shards"), codec, frames=10)
    assert "data.moshi_channel 'right', and is read with 'left'" in str(error.value)
    assert "data.speaker_label 'SPEAKER_00', and is read with 'SPEAKER_MAIN'" in str(error.value)
    without_text = dataclasses.replace(other, speaker_label=MAIN)
    assert open_corpus(str(tmp_path / "shards"), without_text, frames=10, transcripts="none").words is None


def test_shards_of_before_are_read_with_the_first_values(tmp_path, codec, corpus_of):
    write_shards(corpus_of(said("a")), tmp_path / "shards", codec, frames=10)
    path = Path(tmp_path / "shards" / "index.json")
    values = json.loads(path.read_text())
    for key in ("moshi_channel", "speaker_label", "words"):
        del values[key]
    path.write_text(json.dumps(values))
    corpus = open_corpus(str(tmp_path / "shards"), codec, frames=10)
    assert (corpus.words, corpus.notes) == (None, ())


def test_a_word_of_the_text_stream_is_in_its_frame():
    word = Word("ab", 0.25, 0.5)
    assert text_stream([word], 5, Letters(), frame_rate=12.5, padding=3, end_of_padding=0).tolist() == [3, 3, 0, 97, 98]
