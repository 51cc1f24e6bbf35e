"""Given tokens through the slots' own loop: ``teacher_forcing``'s losses, and a memory that outlives its process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.evaluation.reciting import recite
from moshi_ttt.evaluation.teacher_forcing import stream_losses
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.slots import Slots
from moshi_ttt.hosts.moshi.tiny import memory_adapter, speech_files
from tests.ranks import launch

ROWS, FRAMES = 3, 48


@pytest.fixture(scope="module")
def moshi():
    """The tiny Moshi with the memory that ships with it, and its codec."""
    files = resolve_repo("builtin:tiny")
    model, mimi = files.load_lm(dtype=torch.float32), files.load_mimi()
    codec = SpeechCodec.of(model, mimi, files.tokenizer())
    load_adapter(model, memory_adapter())
    return model, codec


@pytest.fixture(scope="module")
def codes(moshi) -> Tensor:
    """``[ROWS, Q, FRAMES]``: Moshi says a recording without text, the user is silent."""
    _, codec = moshi
    rows = []
    for path in speech_files()[:ROWS]:
        samples = read_audio(path, 24_000)[: FRAMES * int(codec.mimi.frame_size)]
        audio = codec.encode_segment(torch.stack([samples, torch.zeros_like(samples)]))
        rows.append(torch.cat([codec.encode_text(None, FRAMES)[None], audio]))
    return torch.stack(rows)


def test_the_losses_are_those_of_a_teacher_forced_stream(moshi, codes):
    model, codec = moshi
    padded = codes.clone()
    padded[:, 0] = model.text_padding_token_id
    with Slots(model, codec.mimi, ROWS) as slots:
        found = recite(slots, padded, [None] * ROWS)
    expected = stream_losses(model, padded)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert (mine - theirs).nan_to_num().abs().max() < 2e-3  # the codec's silence differs: one encodes it whole


NEXT_DAY = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.evaluation.reciting import recite
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import Slots
from moshi_ttt.hosts.moshi.tiny import memory_adapter
folder = Path(sys.argv[1])
files = resolve_repo("builtin:tiny")
model = files.load_lm(dtype=torch.float32)
load_adapter(model, memory_adapter())
codes = torch.load(folder / "codes.pt")
memories = [RowState.load(folder / f"{row}.safetensors") for row in range(len(codes))]
with Slots(model, files.load_mimi(), len(codes)) as slots:
    own = recite(slots, codes, memories).audio
    other = recite(slots, codes, [*memories[1:], memories[0]]).audio
torch.save(torch.stack([own, other]), folder / "losses.pt")
"""


def test_a_stream_restored_the_next_day_predicts_what_it_heard(moshi, codes, tmp_path: Path):
    model, codec = moshi
    with Slots(model, codec.mimi, ROWS) as slots:
        fresh = recite(slots, codes, [None] * ROWS).audio
        for row in range(ROWS):
            slots.save_row(row, "memory").save(tmp_path / f"{row}.safetensors")
    torch.save(codes, tmp_path / "codes.pt")
    (tmp_path / "next_day.py").write_text(NEXT_DAY)
    launch(tmp_path / "next_day.py", tmp_path, ranks=1)
    own, other = torch.load(tmp_path / "losses.pt")
    gained, strange = (fresh - own).nanmean(1), (fresh - other).nanmean(1)
    assert (gained > 0.15).all()
    assert (strange.abs() < gained / 3).all()


def test_the_slots_sample_for_themselves_again_afterwards(moshi, codes):
    model, codec = moshi
    with Slots(model, codec.mimi, ROWS) as slots:
        recite(slots, codes[:, :, :3], [None] * ROWS)
        generator = slots._generator
        assert "sample" not in vars(generator.text) | vars(generator.audio)


@pytest.mark.parametrize(("rows", "memories"), [(ROWS - 1, ROWS), (ROWS, 1)])
def test_another_number_of_rows_is_refused(moshi, codes, rows, memories):
    model, codec = moshi
    with Slots(model, codec.mimi, ROWS) as slots, pytest.raises(ConfigError, match=r"recordings, .* memories, 3 slots"):
        recite(slots, codes[:rows], [None] * memories)
