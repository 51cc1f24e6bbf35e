"""The memory that ships with the tiny Moshi, on the recordings that ship with it: nobody trained on those."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.apps.quickstart.data import Codec, Recording
from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.data.audio import read_audio
from moshi_ttt.evaluation.teacher_forcing import stream_losses
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.tiny import memory_adapter, speech_files

FRAMES, SKIPPED = 96, 64
"""Of a clip, and of each presentation's beginning: the tiny Moshi's attention sees 64 frames."""


@pytest.fixture(scope="module")
def presented_twice():
    """The tiny Moshi, and the first 7.7 s of four recordings, each twice: ``[4, Q, 192]``."""
    files = resolve_repo("builtin:tiny")
    model, mimi = files.load_lm(dtype=torch.float32), files.load_mimi("cpu")
    codec = Codec.of(model, mimi, files.tokenizer())
    rows = []
    for path in speech_files()[:4]:
        samples = read_audio(path, 24_000)[: FRAMES * int(mimi.frame_size)]
        audio = mimi.encode(samples[None, None])[0][: model.dep_q]
        text = torch.full((audio.shape[1],), model.text_padding_token_id)
        recording = Recording(name=path.stem, seconds=FRAMES / 12.5, text=text, audio=audio)
        rows.append(codec.document([recording])[:, :FRAMES].repeat(1, 2))
    return model, torch.stack(rows)


def second_presentations(model, codes):
    """``[4]``: nats per audio token in the second presentation, beyond what attention sees of the first."""
    return stream_losses(model, codes).audio[:, FRAMES + SKIPPED :].nanmean(1)


@pytest.mark.exhaustive  # that it recalls: test_quickstart.py, test_reciting.py; that nothing is left: the kit
def test_the_shipped_memory_recalls_and_leaves_nothing_behind(presented_twice):
    model, codes = presented_twice
    base = second_presentations(model, codes)
    injection = load_adapter(model, memory_adapter())
    assert sum(parameter.numel() for parameter in injection.parameters()) == 599_856
    remembered = second_presentations(model, codes)
    with MOSHI_HOST.updates(model, False):
        frozen = second_presentations(model, codes)
    with MOSHI_HOST.volume(model, 0.0):
        silent = second_presentations(model, codes)
    injection.remove()
    gained = base - remembered
    assert (gained > 0.1).all()
    assert (base - frozen).mean().abs() < gained.mean() / 10
    assert torch.equal(silent, base)
    assert torch.equal(second_presentations(model, codes), base)


def test_its_files_say_where_it_comes_from():
    text = (memory_adapter() / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "CC-BY-SA-3.0" in text
    assert "599,856 parameters" in text
