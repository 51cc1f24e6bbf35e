"""Data strings and manifests: what is found, and every line that must be refused by its number."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import sphn

from moshi_ttt.data.manifest import listed_twice, read_manifest
from moshi_ttt.data.problems import DataError, Problem, check_share
from moshi_ttt.data.sources import parse_sources

from .conftest import RATE, write_audio, write_manifest, write_transcript

CLICKS = Path(__file__).parent / "audio"


@pytest.fixture
def folder(tmp_path):
    write_audio(tmp_path / "a.wav", np.zeros((2, 2 * RATE)))
    write_transcript(tmp_path / "a.json", [("hello", 0.1, 0.5)])
    write_audio(tmp_path / "b.wav", np.zeros((1, 12_000)), rate=8_000)
    return tmp_path


def test_sources_have_weights_and_folders_their_manifests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:2.jsonl", "more/z.jsonl", "more/y.jsonl", "coded/index.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, more, colon, coded = parse_sources("a.jsonl:2.5, more:1e-1,b:2.jsonl,coded:3")
    assert [source.weight for source in (a, more, colon, coded)] == [2.5, 0.1, 1.0, 3.0]
    assert [path.name for path in more.manifests] == ["y.jsonl", "z.jsonl"]
    assert [str(path) for path in a.manifests + colon.manifests] == ["a.jsonl", "b:2.jsonl"]
    assert coded.encoded
    assert coded.manifests == ()
    assert not more.encoded


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is empty"),
        (" , ", "is empty"),
        (",,", "is empty"),
        ("a.jsonl,,a.jsonl", "a.jsonl twice"),
        ("a.jsonl:2,./a.jsonl", "a.jsonl twice"),
        ("x" * 5000, "does not exist"),
        ("a\0.jsonl", "does not exist"),
        ("b.jsonl", "'b.jsonl' does not exist"),
        ("b.jsonl:2", "'b.jsonl:2' does not exist"),
        ("a.jsonl:0", "weight '0' is not a number above 0"),
        ("a.jsonl:-1", "weight '-1'"),
        ("a.jsonl:nan", "weight 'nan'"),
        ("a.jsonl:inf", "weight 'inf'"),
        ("a.jsonl:", "weight ''"),
        ("a.jsonl:much", "weight 'much'"),
        ("empty", "no *.jsonl or *.jsonl.gz files at any depth, and no index.json"),
    ],
)
def test_sources_that_raise(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        parse_sources(text)
    assert said in str(error.value)
    assert repr(text) in str(error.value)


def test_entries_by_their_headers(folder):
    lines = [
        {"path": "a.wav", "duration": 2.05, "speaker": "extra keys are fine"},
        "",
        {"path": str(folder / "b.wav"), "duration": 1.5},
    ]
    (a, b), problems = read_manifest(write_manifest(folder / "t.jsonl", lines), transcripts="optional")
    assert problems == []
    assert (a.name, a.line, a.seconds, a.channels, a.transcript) == ("a.wav", 1, 2.0, 2, folder / "a.json")
    assert (b.path, b.line, b.seconds, b.channels, b.transcript) == (folder / "b.wav", 3, 1.5, 1, None)


def test_transcripts_can_be_ignored_even_when_damaged(folder):
    (folder / "a.json").write_text("{")
    manifest = write_manifest(folder / "t.jsonl", [{"path": "a.wav", "duration": 2}])
    (a,), _ = read_manifest(manifest, transcripts="none")
    assert a.transcript is None
    assert len(read_manifest(manifest, transcripts="optional")[1]) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'path': 'a.wav'}", "is not JSON"),
        ('["a.wav", 2]', "Expected: {"),
        ('{"duration": 2}', "has no path"),
        ("{}", "has no path and no duration"),
        ('{"audio_filepath": "a.wav"}', "has no path and no duration; its keys are 'audio_filepath'"),
        ('{"path": "a.wav"}', "has no duration"),
        ('{"path": "", "duration": 2}', "path is ''"),
        ('{"path": 7, "duration": 2}', "path is 7"),
        ('{"path": "a.wav", "duration": "2"}', "duration is '2'"),
        ('{"path": "a.wav", "duration": true}', "duration is True"),
        ('{"path": "a.wav", "duration": 0}', "duration is 0"),
        ('{"path": "a.wav", "duration": NaN}', "duration is nan"),
        ('{"path": "a.wav", "duration": 1e999}', "duration is inf"),
        ('{"path": "a.wav", "duration": 1' + "0" * 400 + "}", "duration is 1000"),
        ('{"path": "c.wav", "duration": 2}', "c.wav does not exist"),
        ('{"path": ".", "duration": 2}', "is a folder"),
        ('{"path": "a.wav", "duration": 2.2}', "a.wav lasts 2.00 s, not 2.2 s"),
        ('{"path": "b.wav", "duration": 1.5}', "no transcript b.json beside it"),
        ('{"path": "text.wav", "duration": 2}', "text.wav cannot be read as audio"),
        ('{"path": "none.wav", "duration": 2}', "none.wav has no samples"),
        ('{"path": "many.wav", "duration": 2}', "many.wav has 3 channels"),
    ],
)
def test_lines_that_are_problems(folder, line, said):
    (folder / "text.wav").write_text("this is not audio")
    write_audio(folder / "none.wav", np.zeros((1, 0)))
    write_audio(folder / "many.wav", np.zeros((3, 2 * RATE)))
    good = '{"path": "a.wav", "duration": 2}'
    entries, (problem,) = read_manifest(write_manifest(folder / "train.jsonl", [good, "", line, good]))
    assert [entry.line for entry in entries] == [1, 4]
    assert str(problem).startswith(f"{folder / 'train.jsonl'}:3: ")
    assert said in str(problem)


def test_a_missing_transcript_says_what_can_be_set(folder):
    _, (problem,) = read_manifest(write_manifest(folder / "t.jsonl", [{"path": "b.wav", "duration": 1.5}]))
    assert "data.transcripts to 'optional'" in problem.message
    assert "'none'" in problem.message


def test_stereo_is_a_problem_for_a_model_of_one_channel(folder):
    manifest = write_manifest(folder / "t.jsonl", [{"path": "a.wav", "duration": 2}])
    _, (problem,) = read_manifest(manifest, channels=1)
    assert "2 channels; this model takes one. Mix it down to mono." in problem.message


@pytest.mark.parametrize(
    "transcript",
    ["{", "[]", '{"alignments": {}}', '{"alignments": [["hi", 0, 1]]}', '{"alignments": [["hi", [0, null], "X"]]}'],
)
def test_a_malformed_transcript_is_a_problem(folder, transcript):
    (folder / "a.json").write_text(transcript)
    entries, (problem,) = read_manifest(write_manifest(folder / "t.jsonl", [{"path": "a.wav", "duration": 2}]))
    assert entries == []
    assert "a.json" in problem.message
    assert '"SPEAKER_MAIN"' in problem.message


def test_a_long_recording_may_be_off_by_one_percent(tmp_path):
    path = write_audio(tmp_path / "long.wav", np.zeros((1, 8)), rate=8_000)
    header = bytearray(path.read_bytes())
    header[40:44] = struct.pack("<I", 2 * 8_000 * 100)  # the header is all that is read
    header[4:8] = struct.pack("<I", 2 * 8_000 * 100 + 36)
    path.write_bytes(header)
    lines = [{"path": "long.wav", "duration": seconds} for seconds in (99.1, 100.9, 98.9, 101.1)]
    entries, problems = read_manifest(write_manifest(tmp_path / "t.jsonl", lines), transcripts="none")
    assert [entry.line for entry in entries] == [1, 2]
    assert [problem.line for problem in problems] == [3, 4]


def test_a_manifest_that_is_not_there_or_not_text_raises(tmp_path):
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_manifest(tmp_path / "bytes.jsonl")


def test_a_line_may_hold_what_looks_like_a_line_end_to_unicode(folder):
    text = json.dumps({"path": "a.wav", "duration": 2, "said": "one\u2028two"}, ensure_ascii=False)
    (folder / "t.jsonl").write_text(text + "\r\n", encoding="utf-8-sig")
    entries, problems = read_manifest(folder / "t.jsonl")
    assert len(entries) == 1
    assert problems == []


def problems_of(number, path):
    return [Problem(path, line, "is bad") for line in range(1, number + 1)]


def test_the_share_of_problems_is_checked_and_the_first_ten_listed(tmp_path):
    problems = problems_of(12, tmp_path / "t.jsonl")
    check_share(problems, 100, max_bad_share=0.12, text="t")
    with pytest.raises(DataError) as error:
        check_share(problems, 100, max_bad_share=0.11, text="t")
    said = str(error.value)
    assert "12 of 100 recordings (12.0%) cannot be used, and data.max_bad_share allows 11.0%" in said
    assert all(f"t.jsonl:{line}: is bad" in said for line in range(1, 11))
    assert "t.jsonl:11" not in said
    assert "and 2 more" in said


def test_nothing_usable_raises_whatever_the_share(tmp_path):
    with pytest.raises(DataError, match="No recording is left"):
        check_share(problems_of(2, tmp_path), 2, max_bad_share=0.99, text="t")
    with pytest.raises(DataError, match="lists no recordings"):
        check_share([], 0, max_bad_share=0.5, text="t")
    with pytest.raises(DataError, match=r"data.max_bad_share = 1.5"):
        check_share([], 3, max_bad_share=1.5, text="t")


def test_a_folder_is_searched_at_any_depth(tmp_path):
    for name in ("a.jsonl", "._a.jsonl", "sub/b.jsonl.gz", "sub/deeper/c.jsonl", "sub/deeper/no.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    (source,) = parse_sources(str(tmp_path))
    names = [str(path.relative_to(tmp_path)) for path in source.manifests]
    assert names == ["a.jsonl", "sub/b.jsonl.gz", "sub/deeper/c.jsonl"]


@pytest.mark.parametrize("text", ["a.jsonl,", " a.jsonl , ,", ",a.jsonl"])
def test_commas_may_be_left_over(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    assert [(str(source.path), source.weight) for source in parse_sources(text)] == [("a.jsonl", 1.0)]


def test_names_with_colons_commas_and_blanks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["C:\\data\\x.jsonl", "one, two.jsonl", "ü 日本.jsonl", "home.jsonl"]
    for name in names:
        (tmp_path / name).touch()
    texts = ["C:\\data\\x.jsonl:2", "one, two.jsonl", "ü 日本.jsonl : 3", "~/home.jsonl:0.5"]
    found = [parse_sources(text)[0] for text in texts]
    assert [(source.path.name, source.weight) for source in found] == list(
        zip(names, [2.0, 1.0, 3.0, 0.5], strict=True)
    )


def encodings(text: str) -> dict[str, bytes]:
    return {
        "a byte-order mark": text.encode("utf-8-sig"),
        "UTF-16": text.encode("utf-16"),
        "UTF-16, the other order": b"\xfe\xff" + text.encode("utf-16-be"),
        "Windows line ends": text.replace("\n", "\r\n").encode(),
        "gzip": gzip.compress(text.encode()),
        "gzip of Windows": gzip.compress(text.replace("\n", "\r\n").encode("utf-16")),
    }


@pytest.mark.parametrize("kind", encodings(""))
def test_manifests_and_transcripts_of_other_programs(folder, kind):
    line = json.dumps({"path": "a.wav", "duration": 2})
    (folder / "t.jsonl").write_bytes(encodings(f"{line}  \n\n \t\n{line}\n\n")[kind])
    transcript = (folder / "a.json").read_text()
    (folder / "a.json").write_bytes(encodings(transcript + "\n")[kind])
    entries, problems = read_manifest(folder / "t.jsonl")
    assert problems == []
    assert [entry.line for entry in entries] == [1, 4]
    assert entries[0].words.kept == 1


def test_a_manifest_that_is_no_jsonl_says_so(folder):
    entry = {"path": "a.wav", "duration": 2}
    for text, said in (
        (json.dumps([entry, entry]), "a list"),
        (json.dumps([entry], indent=1), "a list"),
        (json.dumps({"recordings": [entry]}, indent=2), "an object"),
    ):
        (folder / "t.jsonl").write_text(text)
        with pytest.raises(DataError, match=f"is one JSON value, {said}; a manifest has one object a line"):
            read_manifest(folder / "t.jsonl")
    (folder / "t.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(DataError, match="damaged gzip file"):
        read_manifest(folder / "t.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.wav ", "begins or ends with a blank"),
        ("sub\\a.wav", "Write / between folders"),
        ("here.wav", "is there from the folder in which you are"),
        ("folder.wav", "is a folder"),
        ("empty.wav", "is an empty file"),
        ("n" * 300, "cannot be read"),
        ("a\0.wav", "does not exist"),
    ],
)
def test_what_lies_where_a_recording_should(folder, tmp_path_factory, monkeypatch, name, said):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    write_audio(elsewhere / "here.wav", np.zeros((1, 2 * RATE)))
    (folder / "sub").mkdir()
    write_audio(folder / "sub" / "a.wav", np.zeros((1, 2 * RATE)))
    (folder / "folder.wav").mkdir()
    (folder / "empty.wav").touch()
    _, (problem,) = read_manifest(write_manifest(folder / "t.jsonl", [{"path": name, "duration": 2}]))
    assert said in problem.message


def test_a_recording_may_lie_below_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "other").mkdir()
    manifest = write_manifest(folder / "other" / "t.jsonl", [{"path": "~/a.wav", "duration": 2}])
    ((entry,), problems) = read_manifest(manifest)
    assert (entry.path, problems) == (folder / "a.wav", [])


def test_a_duration_in_milliseconds_says_so(folder):
    _, (problem,) = read_manifest(write_manifest(folder / "t.jsonl", [{"path": "a.wav", "duration": 2000}]))
    assert "a.wav lasts 2.00 s, not 2000 s. Give the duration in seconds." in problem.message


def test_a_duration_may_be_what_a_wrong_header_says(folder):
    shutil.copy(CLICKS / "clicks_24000_untagged_vbr.mp3", folder / "vbr.mp3")
    path = write_audio(folder / "pipe.wav", np.zeros((1, 2 * RATE)))
    header = bytearray(path.read_bytes())
    header[40:44] = header[4:8] = b"\xff" * 4
    path.write_bytes(header)
    lines = [{"path": path.name, "duration": sphn.durations([str(path)])[0]} for path in (folder / "vbr.mp3", path)]
    lines += [{"path": "vbr.mp3", "duration": 1.5}, {"path": "pipe.wav", "duration": 2.0}]
    entries, problems = read_manifest(write_manifest(folder / "t.jsonl", lines), transcripts="none")
    assert problems == []
    assert [round(entry.seconds, 2) for entry in entries] == [1.51, 2.0, 1.51, 2.0]
    assert lines[0]["duration"] > 1.9
    assert lines[1]["duration"] > 10_000


def test_an_mp3_that_was_cut_off_says_so(folder):
    data = (CLICKS / "clicks_44100.mp3").read_bytes()
    (folder / "cut.mp3").write_bytes(data[: len(data) // 2])
    _, (problem,) = read_manifest(
        write_manifest(folder / "t.jsonl", [{"path": "cut.mp3", "duration": 1.54}]), transcripts="none"
    )
    assert "its header says 1.54 s: it was cut off" in problem.message


def test_recordings_that_are_listed_twice_are_pointed_out(folder):
    lines = [{"path": name, "duration": 2} for name in ("a.wav", "./a.wav", str(folder / "a.wav"))]
    entries, _ = read_manifest(write_manifest(folder / "t.jsonl", lines))
    (note,) = listed_twice(entries)
    assert note.startswith("2 recordings are listed more than once")
    assert listed_twice(entries[:1]) == []
