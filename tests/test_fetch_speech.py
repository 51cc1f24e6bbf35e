"""``scripts/fetch_speech.py`` on packages made here: no network, and neither apt-get nor dpkg of the machine."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from tests.project import ROOT

SPEC = importlib.util.spec_from_file_location("fetch_speech", ROOT / "scripts" / "fetch_speech.py")
fetch_speech = importlib.util.module_from_spec(SPEC)
sys.modules["fetch_speech"] = fetch_speech  # its dataclasses look their own module up there
SPEC.loader.exec_module(fetch_speech)

FetchError, Utterance = fetch_speech.FetchError, fetch_speech.Utterance
VERSIONS = {"fillets-ng-data-cs": "1.0", "fillets-ng-data": "1.0"}

HARBOUR = """-- a comment
dialogId("har-m-ahoj", "font_small", "Hello, you.")
dialogStr("Ahoj, ty tam.")

dialogId("har-v-no", "font_big", "Well -- \\"hello\\".")
dialogStr(
"No -- \\"nazdar\\" ...")

dialogId("har-x-krab", "font_crab", "I am a crab.")
dialogStr("Jsem krab.")

dialogId("har-v-ticho", "font_big", "Never translated.")
"""


def write_wav(path: Path, seconds: float, level: float, rate: int = 22_050) -> None:
    """A square wave: as loud as ``level`` throughout. The reader goes by the contents, not by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    signs = np.where(np.arange(round(seconds * rate)) // 40 % 2, 1, -1)
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(1)
        handle.setsampwidth(2)
        handle.setframerate(rate)
        handle.writeframes((32767 * level * signs).astype("<i2").tobytes())


def read_stereo(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as handle:
        assert (handle.getnchannels(), handle.getsampwidth(), handle.getframerate()) == (2, 2, 24_000)
        return np.frombuffer(handle.readframes(handle.getnframes()), "<i2").reshape(-1, 2).T / 32767


def loud(channel: np.ndarray, start: float, end: float) -> bool:
    """Whether there is sound from ``start`` to ``end`` seconds, a little inside the edges."""
    return bool(np.abs(channel[round((start + 0.01) * 24_000) : round((end - 0.01) * 24_000)]).mean() > 0.05)


@pytest.fixture
def dialogue(tmp_path: Path) -> Path:
    """Two scenes, as unpacked: ``harbour``, longer than 20 s, and ``share/jokes``, shorter."""
    root = tmp_path / "unpacked"
    game = root / fetch_speech.GAME
    for name, seconds in {"har-v-no": 10, "har-m-ahoj": 5, "har-x-krab": 4, "har-v-ticho": 3, "m-navic": 2}.items():
        write_wav(game / "sound/harbour/cs" / f"{name}.ogg", seconds, 1.0)
    write_wav(game / "sound/harbour/en/splash.ogg", 60, 0.5)
    write_wav(game / "sound/share/jokes/cs/ob-v-ha.ogg", 2, 0.5)
    for path, text in {
        "harbour/dialogs_cs.lua": HARBOUR,
        "share/jokes_dialogs_cs.lua": 'dialogId("ob-v-ha", "font_big", "Ha")\ndialogStr("Ha %1 ha!")\n',
    }.items():
        (game / "script" / path).parent.mkdir(parents=True)
        (game / "script" / path).write_text(text, encoding="utf-8")
    licence = root / "usr/share/doc/fillets-ng-data/copyright"
    licence.parent.mkdir(parents=True)
    licence.write_text("Copyleft, by somebody.\n")
    return root


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    root = tmp_path / "unpacked"
    lines = ["; a comment", "beep: [a beep]", "vm-intro: Leave a message. (tone plays)", "demo-instruct: Held out."]
    for name in ("beep", "vm-intro", "demo-instruct", "unknown"):
        write_wav(root / fetch_speech.VOICE / f"{name}.wav", 1, 0.5, rate=8_000)
    for digit in range(8):
        write_wav(root / fetch_speech.VOICE / "digits" / f"{digit}.wav", 9.9, 0.5, rate=8_000)
        lines.append(f"digits/{digit}: number {digit}")
    (root / fetch_speech.TRANSCRIPTS).parent.mkdir(parents=True)
    (root / fetch_speech.TRANSCRIPTS).write_bytes(gzip.compress("\n".join(lines).encode()))
    return root


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of programs there is: put ``apt-get`` and ``dpkg`` into it with ``add_tool``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def add_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
    (folder / name).chmod(0o755)


def manifests(out: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "valid", "test")
    }


# ---- dialogue


def test_dialogs_are_read_in_order_with_escapes_and_gaps(tmp_path):
    path = tmp_path / "dialogs_cs.lua"
    path.write_text(HARBOUR, encoding="utf-8")
    assert list(fetch_speech.read_dialogs(path).items()) == [
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
    assert fetch_speech.speaker_of(name, font) == speaker


def test_dialogue_layout(dialogue, tmp_path):
    out = tmp_path / "new" / "speech"
    summary = fetch_speech.build("dialogue", dialogue, VERSIONS, out)
    listed = manifests(out)
    documents = [entry["path"] for entries in listed.values() for entry in entries]
    names = sorted(path.stem for path in (out / "stereo").glob("*.wav"))
    assert sorted(documents) == [f"stereo/{name}.wav" for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["ATTRIBUTION.md", "stereo", "summary.json", "test.jsonl", "train.jsonl", "valid.jsonl"]
    )
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["main_speaker"] == "big"
    assert sum(split["utterances"] for split in summary["splits"].values()) == 6, "effects are no utterances"
    text = (out / "ATTRIBUTION.md").read_text()
    assert all(part in text for part in ("GPL-2", "fillets-ng-data-cs 1.0", "Copyleft, by somebody."))


def test_speakers_are_on_their_channels(dialogue, tmp_path):
    scenes = {"harbour": fetch_speech.read_dialogue(dialogue)["harbour"]}
    (document,) = fetch_speech.documents_of(scenes)
    stereo, alignments = fetch_speech.lay_out(document, "big")
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


def test_alignments_are_sorted_and_within_bounds(dialogue, prompts, tmp_path):
    for corpus in ("dialogue", "prompts"):
        out = tmp_path / corpus
        fetch_speech.build(corpus, dialogue, VERSIONS, out)
        words = 0
        for entry in (entry for entries in manifests(out).values() for entry in entries):
            stereo = read_stereo(out / entry["path"])
            assert entry["duration"] == pytest.approx(stereo.shape[1] / 24_000, abs=1e-4)
            assert np.abs(stereo).max() <= 1.0
            last = 0.0
            text = (out / entry["path"]).with_suffix(".json").read_text(encoding="utf-8")
            for _, (start, end), speaker in json.loads(text)["alignments"]:
                assert last <= start < end <= entry["duration"]
                assert speaker == "SPEAKER_MAIN"
                assert loud(stereo[0], start, end)
                last, words = end, words + 1
        assert words > 0


def test_words_of_punctuation_alone_are_not_aligned():
    assert fetch_speech.align("... -- !", 0, 24_000) == []
    assert fetch_speech.align("a -- bbb", 0, 24_000) == [
        ("a", (0.0, 0.25), "SPEAKER_MAIN"),
        ("bbb", (0.25, 1.0), "SPEAKER_MAIN"),
    ]


def test_longest_speaker_is_moshi(tmp_path):
    short, long = Utterance(tmp_path, 1.0, "small", "a"), Utterance(tmp_path, 5.0, "big", "a")
    other = Utterance(tmp_path, 100.0, None, None)
    assert fetch_speech.main_speaker({"one": [short, other], "two": [long]}) == "big"
    assert fetch_speech.main_speaker({"one": [short] * 6, "two": [long]}) == "small"


# ---- prompts


def test_prompts_leave_out_the_quickstart_and_what_is_no_speech(prompts, tmp_path):
    assert "demo-instruct" in fetch_speech.recordings_of_quickstart()
    scenes = fetch_speech.read_prompts(prompts)
    said = {u.path.stem: u.text for utterances in scenes.values() for u in utterances}
    assert said == {str(d): f"number {d}" for d in range(8)} | {"unknown": None, "vm-intro": "Leave a message."}
    assert list(scenes) == ["digits-0", "digits-6"], "a document ends with the prompt that reaches a minute"


def test_prompts_are_all_on_the_left(prompts, tmp_path):
    out = tmp_path / "speech"
    fetch_speech.build("prompts", prompts, {}, out)
    entries = [entry for entries in manifests(out).values() for entry in entries]
    stereos = [read_stereo(out / entry["path"]) for entry in entries]
    assert stereos
    assert all(stereo[0].any() and not stereo[1].any() for stereo in stereos)


# ---- splits


def scenes_of(count: int, seconds: float) -> dict[str, list]:
    return {f"scene{n}": [Utterance(Path("a.ogg"), seconds, "big", "a")] for n in range(count)}


def test_split_depends_on_the_name_alone():
    many = fetch_speech.documents_of(scenes_of(400, 30.0))
    few = fetch_speech.documents_of(dict(list(scenes_of(400, 30.0).items())[200:100:-1]))
    where = {document.name: document.split for document in many}
    assert {document.name: document.split for document in few} == {d.name: where[d.name] for d in few}
    shares = {split: sum(document.split == split for document in many) / 400 for split in fetch_speech.SPLITS}
    assert shares == pytest.approx(fetch_speech.SPLITS, abs=0.05)
    # As released: a change moves recordings from training to test for those who fetched them before.
    assert {name: fetch_speech.split_of(name) for name in ("airplane", "linux", "cave", "digits-15")} == {
        "airplane": "train",
        "linux": "valid",
        "cave": "test",
        "digits-15": "train",
    }


def test_short_documents_are_joined_within_their_split():
    documents = fetch_speech.documents_of(scenes_of(100, 12.0))
    assert all(document.seconds >= fetch_speech.SHORTEST for document in documents)
    assert sum(len(document.utterances) for document in documents) == 100
    for document in documents:
        assert {fetch_speech.split_of(name) for name in document.name.split("_")} == {document.split}
    (alone,) = fetch_speech.documents_of(scenes_of(1, 1.0))
    assert alone.name == "scene0"


def test_limit_keeps_some_of_every_split():
    documents = fetch_speech.documents_of(scenes_of(400, 30.0))
    some, more = (fetch_speech.first_minutes(documents, minutes) for minutes in (10, 20))
    assert sum(document.seconds for document in some) == pytest.approx(600, abs=90)
    assert {document.split for document in some} == set(fetch_speech.SPLITS)
    assert set(some) < set(more) < set(documents)


# ---- fetching


def test_main_fetches_unpacks_and_reports(dialogue, tools, tmp_path, capsys):
    add_tool(tools, "apt-get", 'shift; for name in "$@"; do touch "${name}_1%3a2.0-1_all.deb"; done')
    add_tool(tools, "dpkg", f'cp -r {dialogue}/usr "$3"')
    out = tmp_path / "speech"
    fetch_speech.main([str(out)])
    assert json.loads((out / "summary.json").read_text())["packages"]["fillets-ng-data"] == "1:2.0-1"
    printed = capsys.readouterr().out
    assert all(f"{split}: " in printed for split in fetch_speech.SPLITS)
    assert "words" in printed


@pytest.mark.parametrize(
    ("apt_get", "dpkg", "message"),
    [
        (None, "exit 0", "apt-get not found.*Debian or Ubuntu.*--from"),
        ("exit 0", None, "dpkg not found"),
        (
            "echo 'E: Temporary failure' >&2; exit 100",
            "exit 0",
            "E: Temporary failure.*network.*apt-get update.*--from",
        ),
        ("exit 0", "exit 0", "no .deb file of fillets-ng-data-cs, fillets-ng-data"),
        ('shift; for n in "$@"; do touch "${n}_1_all.deb"; done', "exit 2", "dpkg -x .* failed with 2.*Download"),
        ('shift; for n in "$@"; do touch "${n}_1_all.deb"; done', "exit 0", "No recordings in .*fillets-ng/sound"),
    ],
)
def test_fetching_that_fails_says_what_to_do_and_leaves_nothing(tools, tmp_path, apt_get, dpkg, message):
    for name, script in {"apt-get": apt_get, "dpkg": dpkg}.items():
        if script:
            add_tool(tools, name, script)
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        fetch_speech.main([str(tmp_path / "speech")])
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_from_without_the_packages_raises(tools, tmp_path):
    add_tool(tools, "dpkg", "exit 0")
    (tmp_path / "fillets-ng-data_1_all.deb").touch()
    with pytest.raises(SystemExit, match=r"has no .deb file of fillets-ng-data-cs. Put one there"):
        fetch_speech.main([str(tmp_path / "speech"), "--from", str(tmp_path)])
    for version in (1, 2):
        (tmp_path / f"fillets-ng-data-cs_{version}_all.deb").touch()
    with pytest.raises(SystemExit, match=r"several versions.*Leave one of each"):
        fetch_speech.main([str(tmp_path / "speech"), "--from", str(tmp_path)])


def test_folder_that_is_not_empty_raises_before_anything_is_fetched(tools, tmp_path):
    with pytest.raises(SystemExit, match=r"is not empty. Name a folder that is new or empty"):
        fetch_speech.main([str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is a file"):
        fetch_speech.main([str(tmp_path / "file")])


def test_empty_folder_is_filled(dialogue, tmp_path):
    (tmp_path / "speech").mkdir()
    fetch_speech.require_new(tmp_path / "speech")
    fetch_speech.build("dialogue", dialogue, VERSIONS, tmp_path / "speech")
    assert (tmp_path / "speech" / "summary.json").is_file()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_limit_that_is_no_number_of_minutes_raises(tmp_path, capsys, minutes):
    with pytest.raises(SystemExit):
        fetch_speech.main([str(tmp_path / "speech"), f"--limit-minutes={minutes}"])
    assert f"{minutes} is not a number of minutes above 0" in capsys.readouterr().err


def test_packages_without_texts_raise(dialogue, prompts, tmp_path):
    for path in dialogue.rglob("*dialogs_cs.lua"):
        path.unlink()
    with pytest.raises(FetchError, match="No text for any recording"):
        fetch_speech.build("dialogue", dialogue, VERSIONS, tmp_path / "speech")
    (prompts / fetch_speech.TRANSCRIPTS).unlink()
    with pytest.raises(FetchError, match=r"no core-sounds-en.txt.gz, the transcripts"):
        fetch_speech.build("prompts", prompts, {}, tmp_path / "speech")
    assert not (tmp_path / "speech").exists()


def test_recording_that_is_not_audio_raises(dialogue, tmp_path):
    (dialogue / fetch_speech.GAME / "sound/harbour/cs/har-v-no.ogg").write_bytes(b"not audio")
    with pytest.raises(FetchError, match=r"Not readable as audio.*har-v-no\.ogg"):
        fetch_speech.build("dialogue", dialogue, VERSIONS, tmp_path / "speech")


def test_recordings_to_hold_out_that_are_not_there_raise(tmp_path):
    with pytest.raises(FetchError, match="cannot be held out"):
        fetch_speech.recordings_of_quickstart(tmp_path)


def test_failure_while_writing_leaves_no_folder(dialogue, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(fetch_speech, "write_stereo", fail)
    with pytest.raises(OSError, match="disk full"):
        fetch_speech.build("dialogue", dialogue, VERSIONS, tmp_path / "speech")
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"]
