"""``scripts/fetch_speech.py``: fetching, and the folder that comes out."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.project import ROOT
from tests.unit.scripts.speech import (
    CORPORA,
    CZECH,
    ENGLISH,
    VERSIONS,
    FetchError,
    add_tool,
    fetch_speech,
    loud,
    make_prompts,
    manifests,
    read_stereo,
    speech_layout,
    speech_packages,
    transcripts_of,
)


def test_dialogue_layout(dialogue, tmp_path):
    out = tmp_path / "new" / "speech"
    summary = fetch_speech.build(CZECH, dialogue, VERSIONS, out)
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


def test_alignments_are_sorted_and_within_bounds(dialogue, prompts, tmp_path):
    for corpus in (CZECH, ENGLISH):
        out = tmp_path / corpus.name
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


def test_prompts_are_all_on_the_left(prompts, tmp_path):
    out = tmp_path / "speech"
    fetch_speech.build(ENGLISH, prompts, {}, out)
    entries = [entry for entries in manifests(out).values() for entry in entries]
    stereos = [read_stereo(out / entry["path"]) for entry in entries]
    assert stereos
    assert all(stereo[0].any() and not stereo[1].any() for stereo in stereos)


def test_prompts_without_any_text_are_silent_in_the_alignments(tmp_path):
    """One document has a transcript, the other none: that is data too, for a model that only listens."""
    make_prompts(tmp_path / "unpacked", "it", {"a": 61.0, "b": 61.0}, "a: uno due")
    out = tmp_path / "speech"
    summary = fetch_speech.build(CORPORA["prompts"]["it"], tmp_path / "unpacked", {}, out)
    texts = {path.stem: json.loads(path.read_text())["alignments"] for path in (out / "stereo").glob("*.json")}
    assert {name: [word for word, _, _ in words] for name, words in texts.items()} == {"a": ["uno", "due"], "b": []}
    assert sum(split["utterances_main_without_text"] for split in summary["splits"].values()) == 1
    assert "CC-BY-3.0" in (out / "ATTRIBUTION.md").read_text()


def test_main_fetches_unpacks_and_reports(dialogue, tools, tmp_path, capsys):
    add_tool(tools, "apt-get", 'shift; for name in "$@"; do touch "${name}_1%3a2.0-1_all.deb"; done')
    add_tool(tools, "dpkg", f'cp -r {dialogue}/usr "$3"')
    out = tmp_path / "speech"
    fetch_speech.main([str(out)])
    assert json.loads((out / "summary.json").read_text())["packages"]["fillets-ng-data"] == "1:2.0-1"
    printed = capsys.readouterr().out
    assert all(f"{split}: " in printed for split in speech_layout.SPLITS)
    assert "words" in printed


def test_language_chooses_the_packages(tools, tmp_path):
    make_prompts(tmp_path / "unpacked", "fr", {"vm-intro": 30.0}, "vm-intro: Ça va ?")
    add_tool(tools, "apt-get", 'shift; for name in "$@"; do touch "${name}_1.6.1-1_all.deb"; done')
    add_tool(tools, "dpkg", f'cp -r {tmp_path}/unpacked/usr "$3"')
    out = tmp_path / "speech"
    fetch_speech.main([str(out), "--corpus", "prompts", "--language", "fr"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["packages"] == {"asterisk-core-sounds-fr-wav": "1.6.1-1", "asterisk-core-sounds-fr": "1.6.1-1"}
    assert "June Wallack" in (out / "ATTRIBUTION.md").read_text()


@pytest.mark.parametrize(("corpus", "language"), [("prompts", "de"), ("dialogue", "fr"), (None, "CS")])
def test_language_that_there_is_not_raises_before_anything_is_fetched(tools, tmp_path, corpus, language):
    for name in ("apt-get", "dpkg"):
        add_tool(tools, name, f"touch {tmp_path}/called")
    chosen = ["--corpus", corpus] if corpus else []
    with pytest.raises(
        SystemExit, match=rf"has no language '{language}'.*dialogue: cs, nl; prompts: en, es, fr, it, ru"
    ):
        fetch_speech.main([str(tmp_path / "new" / "speech"), *chosen, "--language", language])
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.exhaustive  # a process; what it does is tested in one above
def test_command_runs_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "fetch_speech.py", "speech", "--language", "xx"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("error: dialogue has no language 'xx'. Choose one of cs, nl with --language")
    assert not any(tmp_path.iterdir())


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
    with pytest.raises(SystemExit, match=r"has no .deb file of fillets-ng-data-nl. Put one there"):
        fetch_speech.main([str(tmp_path / "speech"), "--from", str(tmp_path), "--language", "nl"])


def test_folder_that_is_not_empty_raises_before_anything_is_fetched(tools, tmp_path):
    with pytest.raises(SystemExit, match=r"is not empty. Name a folder that is new or empty"):
        fetch_speech.main([str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is a file"):
        fetch_speech.main([str(tmp_path / "file")])


def test_empty_folder_is_filled(dialogue, tmp_path):
    (tmp_path / "speech").mkdir()
    fetch_speech.require_new(tmp_path / "speech")
    fetch_speech.build(CZECH, dialogue, VERSIONS, tmp_path / "speech")
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
        fetch_speech.build(CZECH, dialogue, VERSIONS, tmp_path / "speech")
    transcripts_of(prompts, "en").unlink()
    with pytest.raises(FetchError, match=r"no core-sounds-en.txt.gz, the transcripts"):
        fetch_speech.build(ENGLISH, prompts, {}, tmp_path / "speech")
    assert not (tmp_path / "speech").exists()


def test_recording_that_is_not_audio_raises(dialogue, tmp_path):
    (dialogue / speech_packages.GAME / "sound/harbour/cs/har-v-no.ogg").write_bytes(b"not audio")
    with pytest.raises(FetchError, match=r"Not readable as audio.*har-v-no\.ogg"):
        fetch_speech.build(CZECH, dialogue, VERSIONS, tmp_path / "speech")


def test_failure_while_writing_leaves_no_folder(dialogue, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(fetch_speech, "write_stereo", fail)
    with pytest.raises(OSError, match="disk full"):
        fetch_speech.build(CZECH, dialogue, VERSIONS, tmp_path / "speech")
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"]
