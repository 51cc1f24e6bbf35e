"""``scripts/speech_packages.py``: what is read from the packages of each corpus and language."""

from __future__ import annotations

import gzip

import pytest

from tests.unit.scripts.speech import (
    CORPORA,
    CZECH,
    ENGLISH,
    HARBOUR,
    VOICES,
    FetchError,
    make_dialogue,
    make_prompts,
    speech_packages,
    transcripts_of,
)

SPOKEN = {"es": "¿Está ahí?", "fr": "Ça a été ajouté.", "it": "È già lì.", "ru": "Ещё раз."}


def test_dialogs_are_read_in_order_with_escapes_and_gaps(tmp_path):
    path = tmp_path / "dialogs_cs.lua"
    path.write_text(HARBOUR, encoding="utf-8")
    assert list(speech_packages.read_dialogs(path).items()) == [
        ("har-m-ahoj", ("font_small", "Ahoj, ty tam.")),
        ("har-v-no", ("font_big", 'No -- "nazdar" ...')),
        ("har-x-krab", ("font_crab", "Jsem krab.")),
        ("har-v-ticho", ("font_big", None)),
    ]


@pytest.mark.parametrize(
    ("name", "font", "speaker"),
    [
        ("let-m-oko", None, "small"),
        ("let-v-oko", None, "big"),
        ("m-bude", None, "small"),
        ("ted5-m", None, "small"),
        ("sp-shout_big_00", None, "big"),
        ("rand-0-1", None, None),
        ("rand-0-1", "font_big", "big"),
        ("let-m-oko", "font_crab", None),
    ],
)
def test_speaker_is_told_by_subtitle_then_by_name(name, font, speaker):
    assert speech_packages.speaker_of(name, font) == speaker


def said(scenes):
    return {u.path.stem: u.text for utterances in scenes.values() for u in utterances}


def test_dialogue_is_read_in_the_language_asked_for(dialogue):
    make_dialogue(dialogue, "nl")
    (dialogue / speech_packages.GAME / "script/harbour/dialogs_nl.lua").write_text(
        HARBOUR.replace("Ahoj, ty tam.", "Hallo, jij daar."), encoding="utf-8"
    )
    for language, text in {"cs": "Ahoj, ty tam.", "nl": "Hallo, jij daar."}.items():
        scenes = CORPORA["dialogue"][language].read(dialogue)
        assert {path.parent.name for path in (u.path for made in scenes.values() for u in made)} == {language}
        assert said(scenes)["har-m-ahoj"] == text


def test_prompts_leave_out_the_quickstart_and_what_is_no_speech(prompts):
    assert "demo-instruct" in speech_packages.recordings_of_quickstart()
    scenes = ENGLISH.read(prompts)
    assert said(scenes) == {str(d): f"number {d}" for d in range(8)} | {"unknown": None, "vm-intro": "Leave a message."}
    assert list(scenes) == ["digits-0", "digits-6"], "a document ends with the prompt that reaches a minute"


def test_recordings_to_hold_out_that_are_not_there_raise(tmp_path):
    with pytest.raises(FetchError, match="cannot be held out"):
        speech_packages.recordings_of_quickstart(tmp_path)


@pytest.mark.parametrize(("language", "text"), SPOKEN.items())
def test_prompts_are_read_in_the_language_asked_for(tmp_path, language, text):
    make_prompts(tmp_path, language, {"vm-intro": 1.0}, f"vm-intro: {text}")
    assert said(CORPORA["prompts"][language].read(tmp_path)) == {"vm-intro": text}


def test_prompts_of_the_quickstart_are_held_out_in_english_alone(tmp_path):
    for language in ("en", "fr"):
        make_prompts(tmp_path, language, {"demo-instruct": 1.0, "vm-intro": 1.0}, "demo-instruct: a\nvm-intro: b")
    assert list(said(ENGLISH.read(tmp_path))) == ["vm-intro"]
    assert list(said(CORPORA["prompts"]["fr"].read(tmp_path))) == ["demo-instruct", "vm-intro"]


def test_prompts_without_a_transcript_are_kept_and_sounds_are_not(tmp_path):
    sounds = dict.fromkeys(("silence/10", "beep", "beeperr", "confbridge-join", "confbridge-leave", "monkeys"), 1.0)
    spoken = dict.fromkeys(("digits/1F", "digits/20-and", "dir-welcome", "confbridge-leave-in"), 1.0)
    lines = ["digits/1f: una", "dir-welcome:", "beeperr: un suono", "monkeys: [monkeys]", "confbridge-leave-in: Para"]
    make_prompts(tmp_path, "es", sounds | spoken, "\n".join(lines))
    expected = {"1F": "una", "20-and": None, "dir-welcome": None, "confbridge-leave-in": "Para"}
    assert said(CORPORA["prompts"]["es"].read(tmp_path)) == expected


def test_transcripts_may_begin_with_a_mark_repeat_a_name_and_hold_colons(tmp_path):
    path = tmp_path / "texts.gz"
    path.write_bytes(gzip.compress("\ufeff; comment\ndigits/0: cero\r\ndigits/0: diez\nA: b: c\n".encode()))
    assert speech_packages.read_transcripts(path) == {"digits/0": "cero", "a": "b: c"}
    path.write_bytes(gzip.compress("\ufeffa: (b)\n".encode()))
    assert speech_packages.read_transcripts(path) == {"a": ""}


def test_recordings_known_to_be_empty_are_left_out(tmp_path):
    make_prompts(tmp_path, "ru", {"is": 0.0, "vm-intro": 1.0}, "is:\nvm-intro: a")
    assert list(said(CORPORA["prompts"]["ru"].read(tmp_path))) == ["vm-intro"]


def test_every_corpus_names_its_packages_and_its_licence():
    assert {name: list(languages) for name, languages in CORPORA.items()} == {
        "dialogue": ["cs", "nl"],
        "prompts": list(VOICES),
    }
    licences = {"cs": "GPL-2", "nl": "GPL-2", "it": "CC-BY-3.0", "ru": "CC-BY-3.0"}
    for name, languages in CORPORA.items():
        for language, corpus in languages.items():
            assert corpus.name == name
            assert f"-{language}" in corpus.packages[0]
            assert f"({licences.get(language, 'CC-BY-SA-3.0')})" in corpus.licence


def test_language_left_out_is_the_first_of_the_corpus():
    assert speech_packages.corpus_of("dialogue") is CZECH
    assert speech_packages.corpus_of("prompts") is ENGLISH
    assert speech_packages.corpus_of("prompts", "ru").packages == (
        "asterisk-core-sounds-ru-wav",
        "asterisk-core-sounds-ru",
    )


@pytest.mark.parametrize(
    ("corpus", "language", "allowed"),
    [("prompts", "cs", "en, es, fr, it, ru"), ("dialogue", "en", "cs, nl"), ("prompts", "", "en, es, fr, it, ru")],
)
def test_language_that_the_corpus_lacks_raises(corpus, language, allowed):
    message = rf"{corpus} has no language '{language}'. Choose one of {allowed} with --language, or another --corpus"
    with pytest.raises(FetchError, match=message):
        speech_packages.corpus_of(corpus, language)


@pytest.mark.parametrize("language", SPOKEN)
def test_packages_of_another_language_raise(prompts, language):
    corpus = CORPORA["prompts"][language]
    with pytest.raises(FetchError, match=rf"no core-sounds-{language}.txt.gz, the transcripts"):
        corpus.read(prompts)
    path = transcripts_of(prompts, language)
    path.parent.mkdir()
    path.write_bytes(transcripts_of(prompts, "en").read_bytes())
    with pytest.raises(FetchError, match=rf"No recordings in .*{VOICES[language]}"):
        corpus.read(prompts)


@pytest.mark.parametrize(
    "contents",
    [
        b"vm-intro: plain",
        gzip.compress("vm-intro: été".encode("latin-1")),
        gzip.compress(b"vm-intro: a" * 99)[:-9],
        gzip.compress(b"a: b")[:10] + b"\xff\xff\xff\xff" * 4,
    ],
    ids=["plain", "latin-1", "cut", "damaged"],
)
def test_transcripts_that_are_not_gzip_of_utf8_raise(prompts, contents):
    transcripts_of(prompts, "en").write_bytes(contents)
    with pytest.raises(
        FetchError, match=r"core-sounds-en.txt.gz is not gzip of UTF-8 text: .*Fetch the packages again"
    ):
        ENGLISH.read(prompts)


def test_transcripts_of_other_recordings_raise(tmp_path):
    make_prompts(tmp_path, "it", {"vm-intro": 1.0}, "somebody-else: ciao")
    with pytest.raises(FetchError, match=r"No text for any recording in .*it_IT_m_Carlo"):
        CORPORA["prompts"]["it"].read(tmp_path)


def test_recording_that_is_empty_and_not_known_to_be_raises(tmp_path):
    make_prompts(tmp_path, "fr", {"is": 0.0, "vm-intro": 1.0}, "is:\nvm-intro: a")
    with pytest.raises(FetchError, match=r"Not readable as audio, or empty: .*fr_CA_f_June/is\.wav"):
        CORPORA["prompts"]["fr"].read(tmp_path)
