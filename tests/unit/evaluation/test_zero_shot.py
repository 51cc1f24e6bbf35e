"""Zero-shot metrics: what a score is, what it leaves behind, accuracy, and the layouts of published pairs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.problems import DataError
from moshi_ttt.evaluation.pair_accuracy import ScoringError, accuracy, evaluate_pairs
from moshi_ttt.evaluation.pairs import DATASETS, Pair, PairsError, PairSet, read_pairs
from moshi_ttt.evaluation.zero_shot import Score, ScoredModel, encode, run, score, score_codes
from moshi_ttt.evaluation.zero_shot_report import zero_shot_lines, zero_shot_metrics
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import load_skeleton, resolve_repo
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm, speech_files
from tests.unit.data.conftest import FRAME, RATE, write_audio

ENTRY = {"variant": "ttt_linear", "layers": "1,3", "chunk": 2}


@pytest.fixture(scope="module")
def codec() -> SpeechCodec:
    bundle = resolve_repo("builtin:tiny")
    return SpeechCodec.of(load_skeleton("builtin:tiny"), bundle.load_mimi(), bundle.tokenizer())


@pytest.fixture(scope="module")
def base():
    return resolve_repo("builtin:tiny").load_lm(dtype=torch.float32)


@pytest.fixture(scope="module")
def model():
    """The tiny Moshi with a disturbed memory."""
    found = resolve_repo("builtin:tiny").load_lm(dtype=torch.float32)
    values = {"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": [ENTRY]}
    injection = inject(found, parse_config(values, registry=default_registry()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture(scope="module")
def wavs(tmp_path_factory) -> list[Path]:
    """Real speech: four recordings of 9, 6, 12 and 7 frames, the last frame not full."""
    folder = tmp_path_factory.mktemp("speech")
    speech = read_audio(speech_files()[0], RATE).numpy()
    return [
        write_audio(folder / f"{number}.wav", speech[None, number * 20_000 :][:, : frames * FRAME - 300])
        for number, frames in enumerate((9, 6, 12, 7))
    ]


@pytest.fixture(scope="module")
def pairs(wavs) -> PairSet:
    found = (Pair("a", "first", wavs[0], wavs[1]), Pair("b", "second", wavs[2], wavs[3]))
    return PairSet(dataset="csv", source=wavs[0].parent, pairs=found, problems=("line 4: no partner.",))


def made_up(count: int, voices: int = 1) -> list[Pair]:
    """Pairs of files that do not exist, in two groups."""
    return [
        Pair(f"{n}/{v}", f"group {n % 2}", Path(f"right{n}-{v}"), Path(f"wrong{n}-{v}"), f"{n}")
        for n in range(count)
        for v in range(voices)
    ]


# Scores


@pytest.mark.parametrize("codebooks", ["all", "semantic"])
def test_a_score_is_the_sum_over_the_predicted_tokens_one_by_one(base, codec, wavs, codebooks):
    codes = encode(codec, wavs[0])
    assert codes.shape == (codec.rows, 9)
    assert bool((codes[0] == base.zero_token_id).all())
    with torch.no_grad():
        out = base(codes[None])
    nats, tokens = 0.0, 0
    for row in range(base.dep_q if codebooks == "all" else 1):
        delay = base.delays[1 + row]
        for frame in range(9 - delay):
            nats += float(F.cross_entropy(out.logits[0, row, frame].float(), codes[1 + row, frame]))
            tokens += 1
    found = score(base, MOSHI_HOST, codec, wavs[0], codebooks=codebooks)
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.by("token") == found.nats / tokens
    assert found.by("sum") == found.nats


def test_what_is_the_zero_token_is_masked(base, codec, wavs):
    codes = encode(codec, wavs[0])
    padded = F.pad(codes, (0, 5), value=base.zero_token_id)
    found = score_codes(base, MOSHI_HOST, padded)
    assert (
        found.tokens == base.dep_q * 9
    )  # every token of the recording, for late codebooks have time now, and no other
    first = [score_codes(base, MOSHI_HOST, each, codebooks="semantic") for each in (codes, padded)]
    assert first[0].tokens == first[1].tokens == 9
    assert first[0].nats == pytest.approx(first[1].nats, rel=1e-5)


def test_the_user_is_silent(codec, wavs):
    codes = encode(codec, wavs[0])
    silence = codec.encode_segment(torch.zeros(codec.channels, 9 * FRAME))
    assert torch.equal(codes[1 + codec.codebooks :], silence[codec.codebooks :])
    assert not torch.equal(codes[1 : 1 + codec.codebooks], silence[: codec.codebooks])


def test_scoring_leaves_nothing_behind(model, codec, wavs):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator, draws = torch.get_rng_state(), np.random.get_state()[1].copy()
    there = [score(model, MOSHI_HOST, codec, path) for path in wavs]
    again = [score(model, MOSHI_HOST, codec, path) for path in reversed(wavs)][::-1]
    assert there == again  # bit for bit: neither order nor repetition matters
    assert torch.equal(torch.get_rng_state(), generator)
    assert np.array_equal(np.random.get_state()[1], draws)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.transformer.__dict__.get("_carry") is None


def test_updates_matter_to_a_model_with_memory_only(base, model, codec, wavs):
    on, off = (score(model, MOSHI_HOST, codec, wavs[0], updates=updates) for updates in (True, False))
    assert on.nats != off.nats
    assert on.tokens == off.tokens
    on, off = (score(base, MOSHI_HOST, codec, wavs[0], updates=updates) for updates in (True, False))
    assert on == off


def test_a_recording_that_cannot_be_scored_raises(base, codec, tmp_path):
    stereo = write_audio(tmp_path / "stereo.wav", np.zeros((2, FRAME)))
    with pytest.raises(ScoringError, match=r"2 channels, and one is scored. Mix it down"):
        score(base, MOSHI_HOST, codec, stereo)
    with pytest.raises(DataError, match=r"none.wav does not exist"):
        score(base, MOSHI_HOST, codec, tmp_path / "none.wav")
    nothing = torch.full((codec.rows, 3), base.zero_token_id)
    with pytest.raises(ScoringError, match=r"nothing.wav has 3 frames, and none is predicted. Give a longer"):
        score_codes(base, MOSHI_HOST, nothing, name="nothing.wav")


# Accuracy


def test_an_oracle_is_always_right_its_reverse_never_and_ties_count_half():
    pairs = made_up(12, voices=2)

    def oracle(path: Path) -> float:
        return 1.0 if path.name.startswith("right") else 2.0

    for scorer, share in ((oracle, 1.0), (lambda path: -oracle(path), 0.0), (lambda path: 1.5, 0.5)):
        found = evaluate_pairs(pairs, scorer)
        for each in (found.overall, *found.groups.values()):
            assert (each.share.value, each.share.low, each.share.high) == (share, share, share)
        assert (found.overall.items, found.overall.pairs) == (12, 24)
        assert list(found.groups) == ["group 0", "group 1"]
        assert found.groups["group 0"].items == 6


def test_a_recording_of_several_pairs_is_scored_once():
    asked: list[Path] = []
    pairs = [Pair(str(n), "", Path("right"), Path(f"wrong{n}")) for n in range(3)]
    found = evaluate_pairs(pairs, lambda path: float(asked.append(path) is None) + len(path.name))
    assert sorted(path.name for path in asked) == ["right", "wrong0", "wrong1", "wrong2"]
    assert found.groups == {}


def test_the_interval_is_over_items_and_seeded():
    def scorer(path: Path) -> float:
        number = int(path.name.removeprefix("right").removeprefix("wrong").split("-")[0])
        return float(path.name.startswith("right") == (number % 3 == 0))  # right about two items of three

    one, many = (evaluate_pairs(made_up(60, voices), scorer, seed=3) for voices in (1, 20))
    assert one.overall.share.value == pytest.approx(2 / 3)
    assert one.overall.share.low < 0.6 < 0.75 < one.overall.share.high
    assert many.overall.share == one.overall.share  # twenty voices that agree are no more evidence
    assert evaluate_pairs(made_up(60), scorer, seed=3).overall == one.overall
    assert evaluate_pairs(made_up(60), scorer, seed=4).overall.share.value == one.overall.share.value


def test_nothing_to_average_raises():
    with pytest.raises(ScoringError, match=r"No pairs to score. Give a data set"):
        accuracy([])
    with pytest.raises(ScoringError, match="right0-0 has the score nan, which is not finite"):
        evaluate_pairs(made_up(1), lambda path: math.nan)


# Base and memory, by the same code on the same pairs


def test_variants_are_scored_on_the_same_pairs(base, model, codec, pairs, wavs):
    variants = {
        "base": ScoredModel(model=base, host=MOSHI_HOST),
        "updates on": ScoredModel(model=model, host=MOSHI_HOST),
        "updates off": ScoredModel(model=model, host=MOSHI_HOST, updates=False),
    }
    seen: list[tuple[int, int]] = []
    results = run(variants, codec, pairs, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 4) for n in range(1, 5)]
    assert list(results.evaluations) == list(variants)
    assert list(results.differences) == ["updates on", "updates off"]
    for name, variant in variants.items():
        outcome = results.evaluations[name].outcomes[0]
        expected = [
            score(variant.model, MOSHI_HOST, codec, path, updates=variant.updates).by("token") for path in wavs[:2]
        ]
        assert [outcome.right, outcome.wrong] == expected

    values = json.loads(json.dumps(zero_shot_metrics(results, scores=True), allow_nan=False))
    assert values["left_out"] == ["line 4: no partner."]
    assert values["variants"]["base"]["groups"]["first"]["accuracy"]["low"] is None  # one item has no interval
    assert values["variants"]["updates on"]["scores"][1]["name"] == "b"
    assert "scores" not in zero_shot_metrics(results)["variants"]["base"]
    text = "\n".join(zero_shot_lines(results))
    assert "2 pairs of 2 items; 1 more could not be used." in text
    assert "over all codebooks (mean per predicted token)" in text
    assert "| model | accuracy, % | minus base, points |" in text
    assert "| group | items | base | updates on | updates off |" in text
    assert text.count("\n| ") == 2 + 3 + 2 + 2

    summed = run({"base": variants["base"]}, codec, pairs, normalization="sum", codebooks="semantic")
    first = summed.evaluations["base"].outcomes[0]
    assert first.right == score(base, MOSHI_HOST, codec, wavs[0], codebooks="semantic").nats
    assert "the first, semantic codebook (sum, not normalized by length)" in "\n".join(zero_shot_lines(summed))


def test_what_cannot_be_compared_raises(base, codec, pairs):
    variant = ScoredModel(model=base, host=MOSHI_HOST)
    with pytest.raises(ScoringError, match=r"No variants to score with. Give at least one"):
        run({}, codec, pairs)
    with pytest.raises(ScoringError, match="normalization = 'mean': allowed are token and sum"):
        run({"base": variant}, codec, pairs, normalization="mean")
    with pytest.raises(ScoringError, match="codebooks = 'first': allowed are all and semantic"):
        run({"base": variant}, codec, pairs, codebooks="first")
    other = ScoredModel(model=random_tiny_lm(), host=MOSHI_HOST)
    with pytest.raises(
        ScoringError, match=r"'base' and 'other' are of different base models: they differ in .*weights"
    ):
        run({"base": variant, "other": other}, codec, pairs)
    with pytest.raises(ScoringError, match=r"'base' takes 17 rows of codes, and the codec makes 9"):
        run({"base": variant}, dataclasses.replace(codec, channels=1), pairs)


def test_a_score_of_no_finite_number_stops_a_run(codec, pairs):
    broken = resolve_repo("builtin:tiny").load_lm(dtype=torch.float32)
    with torch.no_grad():
        broken.text_emb.weight.fill_(math.nan)
        broken.emb[0].weight.fill_(math.nan)
    with pytest.raises(ScoringError, match=r"0.wav has the score nan, .*moshi-ttt doctor"):
        run({"base": ScoredModel(model=broken, host=MOSHI_HOST)}, codec, pairs)


# Layouts


def speak(path: Path, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_audio(path, np.full((channels, 100), 0.1))


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def words(folder: Path, ids: int = 4, voices: str = "AB") -> list[dict[str, object]]:
    """The lexical part of the challenge's evaluation set; its rows are in no order of pairs."""
    rows: list[dict[str, object]] = []
    for correct in (1, 0):
        for number in range(ids):
            for voice in voices:
                name = f"{'xy'[correct]}{number}{voice}"
                speak(folder / "lexical/dev" / f"{name}.wav")
                rows.append({
                    "id": number, "filename": name, "voice": voice, "frequency": (0, 3, 250, "")[number % 4],
                    "word": f"word{number}", "phones": "W ER D", "length": 3, "correct": correct,
                })  # fmt: skip
    write_table(folder / "lexical/dev/gold.csv", rows)
    return rows


def sentences(folder: Path) -> list[dict[str, object]]:
    """The syntactic part: ids begin anew in each subtype."""
    rows: list[dict[str, object]] = []
    for kind, subtype in (("agreement", "one"), ("agreement", "two"), ("binding", "three")):
        for correct in (1, 0):
            name = f"{kind}{subtype}{correct}"
            speak(folder / "syntactic/dev" / f"{name}.wav")
            rows.append({
                "id": 1, "filename": name, "voice": "A", "type": kind, "subtype": subtype, "transcription": "a dog",
                "correct": correct,
            })  # fmt: skip
    write_table(folder / "syntactic/dev/gold.csv", rows)
    return rows


def test_swuggy_is_paired_by_id_and_voice(tmp_path):
    words(tmp_path)
    found = read_pairs("swuggy", tmp_path)
    assert found.problems == ()
    assert len(found.pairs) == 8
    place = tmp_path / "lexical/dev"
    assert found.pairs[3] == Pair("1/B", "1 to 4", place / "y1B.wav", place / "x1B.wav", "1")
    assert [pair.group for pair in found.pairs[::2]] == ["never heard", "1 to 4", "100 or more", "frequency unknown"]
    assert evaluate_pairs(found.pairs, lambda path: float(path.name[0] == "x")).overall.items == 4


def test_each_non_word_of_a_word_makes_a_pair(tmp_path):
    rows = words(tmp_path, ids=1, voices="A")
    speak(tmp_path / "lexical/dev/z0A.wav")
    write_table(tmp_path / "lexical/dev/gold.csv", [*rows, {**rows[-1], "filename": "z0A"}])
    found = read_pairs("swuggy", tmp_path).pairs
    assert [(pair.name, pair.wrong.name, pair.question) for pair in found] == [
        ("0/A", "x0A.wav", "0"), ("0/A#2", "z0A.wav", "0"),
    ]  # fmt: skip


def test_sblimp_is_paired_by_type_subtype_id_and_voice(tmp_path):
    sentences(tmp_path)
    found = read_pairs("sblimp", tmp_path)
    assert [(pair.name, pair.group) for pair in found.pairs] == [
        ("agreement/one/1/A", "agreement"), ("agreement/two/1/A", "agreement"), ("binding/three/1/A", "binding"),
    ]  # fmt: skip
    assert all(pair.right.name.endswith("1.wav") and pair.wrong.name.endswith("0.wav") for pair in found.pairs)


@pytest.mark.parametrize(("dataset", "own"), [("storycloze", "sSC"), ("topic-storycloze", "tSC")])
def test_story_cloze_is_paired_by_name(tmp_path, dataset, own):
    for number in range(3):
        speak(tmp_path / own / f"{number}_correct.wav")
        speak(tmp_path / own / f"{number}_incorrect.wav")
    found = read_pairs(dataset, tmp_path)
    assert found == dataclasses.replace(read_pairs(dataset, tmp_path / own), source=tmp_path)
    place = tmp_path / own
    assert found.pairs[1] == Pair("1", "", place / "1_correct.wav", place / "1_incorrect.wav")


def test_a_csv_names_pairs_from_its_own_folder(tmp_path):
    speak(tmp_path / "a/one.wav")
    speak(tmp_path / "two.wav")
    path = tmp_path / "pairs.csv"
    path.write_text(f"right, wrong, group\na/one.wav, two.wav, greetings\n{tmp_path}/two.wav,a/one.wav,\n")
    found = read_pairs("csv", path).pairs
    assert [(pair.name, pair.group) for pair in found] == [("line 2", "greetings"), ("line 3", "")]
    assert found[0].right == found[1].wrong == tmp_path / "a/one.wav"
    path.write_text("right,wrong\ntwo.wav,a/one.wav\n")
    assert read_pairs("csv", path).pairs[0].group == ""


def test_what_cannot_be_used_is_left_out_up_to_a_share(tmp_path):
    rows = words(tmp_path)
    (tmp_path / "lexical/dev/x0A.wav").unlink()
    speak(tmp_path / "lexical/dev/y1A.wav", channels=2)
    rows = [row for row in rows if row["filename"] != "y2A"]
    next(row for row in rows if row["filename"] == "x3A")["correct"] = "no"
    write_table(tmp_path / "lexical/dev/gold.csv", rows)
    found = read_pairs("swuggy", tmp_path, max_bad_share=0.6)
    assert [pair.name for pair in found.pairs] == ["0/B", "1/B", "2/B", "3/B"]
    said = "\n".join(found.problems)
    assert "0/A: " in said
    assert "x0A.wav does not exist." in said
    assert "y1A.wav has 2 channels; mix it down to mono." in said
    assert "2/A: no partner; gold.csv has no line with this id and voice and correct = 1." in said
    assert "x3A: correct is 'no', and can be 0 or 1." in said
    with pytest.raises(
        PairsError, match=r"(?s)swuggy in .*: 5 of 9 pairs \(55.6%\).*allows 1.0%:.*raise max_bad_share"
    ):
        read_pairs("swuggy", tmp_path)


def test_no_usable_pair_at_all_raises_whatever_the_share(tmp_path):
    speak(tmp_path / "1_correct.wav")
    (tmp_path / "1_incorrect.wav").write_bytes(b"no audio")
    with pytest.raises(PairsError, match=r"(?s)1 of 1 pairs .*1_incorrect.wav cannot be read.*No pair is left: fix"):
        read_pairs("storycloze", tmp_path, max_bad_share=0.9)


@pytest.mark.parametrize(
    ("dataset", "looked_for"),
    [
        ("swuggy", r"looked for lexical/dev/gold.csv and lexical/dev/\*.wav. Give the folder"),
        ("sblimp", r"looked for syntactic/dev/gold.csv and syntactic/dev/\*.wav. Give the folder"),
        ("storycloze", r"looked for ID_correct.wav and ID_incorrect.wav, in it and in sSC/. Give the folder"),
        ("topic-storycloze", r"looked for ID_correct.wav and ID_incorrect.wav, in it and in tSC/. Give the folder"),
        ("csv", r"is no file. Give a csv file with the columns right,wrong\[,group\]"),
    ],
)
def test_a_folder_of_another_layout_raises(tmp_path, dataset, looked_for):
    speak(tmp_path / "speech.wav")
    with pytest.raises(PairsError, match=looked_for):
        read_pairs(dataset, tmp_path)


def test_every_data_set_is_tested():
    assert sorted(DATASETS) == ["csv", "sblimp", "storycloze", "swuggy", "topic-storycloze"]


def test_a_table_that_is_not_what_it_should_be_raises(tmp_path):
    gold = write_table(tmp_path / "lexical/dev/gold.csv", [{"id": 1, "filename": "a"}])
    with pytest.raises(PairsError, match="lacks the columns correct, frequency, voice, and has id, filename"):
        read_pairs("swuggy", tmp_path)
    gold.write_text("id,filename,voice,frequency,correct\n")
    with pytest.raises(PairsError, match="lists no pairs of swuggy"):
        read_pairs("swuggy", tmp_path)
    path = tmp_path / "pairs.csv"
    path.write_text("good,bad\na.wav,b.wav\n")
    with pytest.raises(PairsError, match=r"columns good, bad; wanted are right, wrong and, if you like, group"):
        read_pairs("csv", path)
    path.write_bytes(b"right,wrong\n\xff\xfe,b.wav\n")
    with pytest.raises(PairsError, match="cannot be read"):
        read_pairs("csv", path)
    path.write_text("right,wrong\na.wav,\nb.wav,b.wav\n")
    with pytest.raises(PairsError, match=r"(?s)line 2: no partner.*line 3: right and wrong are the same file, b.wav"):
        read_pairs("csv", path)


def test_stories_apart_from_their_endings_and_the_other_benchmark_raise(tmp_path):
    folder = tmp_path / "tSC"
    for ending in ("correct", "incorrect", "mutual"):
        speak(folder / f"1_{ending}.wav")
    with pytest.raises(PairsError, match=r"stories \(ID_mutual.wav\) apart from their endings"):
        read_pairs("topic-storycloze", folder)
    with pytest.raises(PairsError, match="by its name not storycloze: that is sSC"):
        read_pairs("storycloze", folder)


def test_an_unknown_data_set_and_an_impossible_share_raise(tmp_path):
    with pytest.raises(PairsError, match=r"no data set 'swugy'. Did you mean 'swuggy'\? Allowed: csv, sblimp"):
        read_pairs("swugy", tmp_path)
    with pytest.raises(PairsError, match=r"max_bad_share = 1.0: allowed are shares from 0 to below 1"):
        read_pairs("csv", tmp_path, max_bad_share=1.0)


def test_a_score_by_normalization():
    assert Score(12.0, 4).by("token") == 3.0
    assert Score(12.0, 4).by("sum") == 12.0
