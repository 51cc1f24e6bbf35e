"""``scripts/speech_layout.py``: documents, splits, channels and the times of words."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.unit.scripts.speech import CORPORA, CZECH, Utterance, loud, speech_layout


def test_speakers_are_on_their_channels(dialogue, tmp_path):
    scenes = {"harbour": CZECH.read(dialogue)["harbour"]}
    (document,) = speech_layout.documents_of(scenes, CZECH.salt)
    stereo, alignments = speech_layout.lay_out(document, "big")
    assert stereo.shape == (2, round((5 + 10 + 4 + 3 + 2 + 4 * 0.3) * 24_000))
    # In the order of the dialogue, what is not in it last: small, big, a crab, big, small.
    turns = [(0.0, 5.0, 1), (5.3, 15.3, 0), (15.6, 19.6, 0), (19.9, 22.9, 0), (23.2, 25.2, 1)]
    for start, end, channel in turns:
        assert loud(stereo[channel], start, end)
        assert not stereo[1 - channel, round(start * 24_000) : round(end * 24_000)].any()
    for (_, end, _), (start, _, _) in itertools.pairwise(turns):
        assert not stereo[:, round(end * 24_000) : round(start * 24_000)].any(), "silence between two utterances"
    assert [word for word, _, _ in alignments] == ["No", '"nazdar"']
    (_, (start, middle), speaker), (_, (again, end), _) = alignments
    assert (start, again, end, speaker) == (5.3, middle, 15.3, "SPEAKER_MAIN")
    assert middle - start == pytest.approx(10 * 2 / 8), "in proportion to the letters"


def test_words_of_punctuation_alone_are_not_aligned():
    assert speech_layout.align("... -- !", 0, 24_000) == []
    assert speech_layout.align("a -- bbb", 0, 24_000) == [
        ("a", (0.0, 0.25), "SPEAKER_MAIN"),
        ("bbb", (0.25, 1.0), "SPEAKER_MAIN"),
    ]


def test_longest_speaker_is_moshi(tmp_path):
    short, long = Utterance(tmp_path, 1.0, "small", "a"), Utterance(tmp_path, 5.0, "big", "a")
    other = Utterance(tmp_path, 100.0, None, None)
    assert speech_layout.main_speaker({"one": [short, other], "two": [long]}) == "big"
    assert speech_layout.main_speaker({"one": [short] * 6, "two": [long]}) == "small"


def scenes_of(count: int, seconds: float) -> dict[str, list]:
    return {f"scene{n}": [Utterance(Path("a.ogg"), seconds, "big", "a")] for n in range(count)}


def test_split_depends_on_the_name_alone():
    many = speech_layout.documents_of(scenes_of(400, 30.0), CZECH.salt)
    few = speech_layout.documents_of(dict(list(scenes_of(400, 30.0).items())[200:100:-1]), CZECH.salt)
    where = {document.name: document.split for document in many}
    assert {document.name: document.split for document in few} == {d.name: where[d.name] for d in few}
    shares = {split: sum(document.split == split for document in many) / 400 for split in speech_layout.SPLITS}
    assert shares == pytest.approx(speech_layout.SPLITS, abs=0.05)


@pytest.mark.parametrize(
    ("corpus", "language", "train", "valid", "test"),
    [
        ("dialogue", "cs", "airplane", "linux", "cave"),
        ("dialogue", "nl", "airplane", "linux", "cave"),
        ("prompts", "en", "digits-15", "pbx-invalidpark", "letters-ascii91"),
        ("prompts", "es", "agent-alreadyon", "demo-moreinfo", "confbridge-pin-bad"),
        ("prompts", "fr", "cancelled", "confbridge-remove-last-out", "activated"),
        ("prompts", "it", "activated", "conf-userwilljoin", "demo-echodone"),
        ("prompts", "ru", "activated", "dir-intro", "conf-getconfno"),
    ],
)
def test_splits_are_as_released(corpus, language, train, valid, test):
    """A change would move recordings from training to test for those who fetched them before."""
    salt = CORPORA[corpus][language].salt
    assert [speech_layout.split_of(name, salt) for name in (train, valid, test)] == ["train", "valid", "test"]


def test_short_documents_are_joined_within_their_split():
    documents = speech_layout.documents_of(scenes_of(100, 12.0), CZECH.salt)
    assert all(document.seconds >= speech_layout.SHORTEST for document in documents)
    assert sum(len(document.utterances) for document in documents) == 100
    for document in documents:
        assert {speech_layout.split_of(name, CZECH.salt) for name in document.name.split("_")} == {document.split}
    (alone,) = speech_layout.documents_of(scenes_of(1, 1.0), CZECH.salt)
    assert alone.name == "scene0"


def test_limit_keeps_some_of_every_split():
    documents = speech_layout.documents_of(scenes_of(400, 30.0), CZECH.salt)
    some, more = (speech_layout.first_minutes(documents, minutes, CZECH.salt) for minutes in (10, 20))
    assert sum(document.seconds for document in some) == pytest.approx(600, abs=90)
    assert {document.split for document in some} == set(speech_layout.SPLITS)
    assert set(some) < set(more) < set(documents)
