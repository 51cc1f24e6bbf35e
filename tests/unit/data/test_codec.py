"""Segments of recordings as samples and as tokens: at the right place, in time, and alone."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import sphn
import torch

from moshi_ttt.core.errors import HostError
from moshi_ttt.data import codec as codec_module
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.problems import DataError
from moshi_ttt.data.text import Word

from .conftest import FRAME, RATE, cut_off, write_audio


@pytest.fixture
def mono(codec) -> SpeechCodec:
    return dataclasses.replace(codec, channels=1)


def model(n_q: int, dep_q: int, delays: list[int] | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        n_q=n_q, dep_q=dep_q, delays=[0, *(delays or [0] * n_q)], audio_offset=1, card=128, text_card=512,
        text_padding_token_id=3, end_of_text_padding_id=0, zero_token_id=-1,
    )  # fmt: skip


VOICE = [0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("n_q", "dep_q", "delays", "channels"),
    [(16, 8, VOICE * 2, 2), (8, 8, VOICE, 1), (8, 8, None, 1), (16, 16, VOICE * 2, 2), (8, 0, None, 1),
     (16, 0, VOICE * 2, 2)],
)  # fmt: skip
def test_one_channel_or_two(codec, n_q, dep_q, delays, channels):
    made = SpeechCodec.of(model(n_q, dep_q, delays), codec.mimi, codec.tokenizer)
    assert (made.channels, made.codebooks, made.rows) == (channels, 8, 1 + 8 * channels)
    assert (made.text_padding, made.end_of_padding, made.zero_token) == (3, 0, -1)


@pytest.mark.parametrize(
    ("n_q", "dep_q", "delays", "message"),
    [
        (24, 8, None, "predicts 8 of the 24 codebooks"),
        (12, 8, None, "predicts 8 of the 12 codebooks"),
        (24, 24, VOICE * 3, "predicts 24 of the 24 codebooks"),
        (16, 16, [*VOICE, 0, 2, 2, 2, 2, 2, 2, 2], "predicts 16 of the 16 codebooks"),
        (16, 16, [0] + [1] * 15, "has 8 codebooks, and a voice of the model 16"),
        (4, 4, None, "has 8 codebooks, and a voice of the model 4"),
    ],
)
def test_other_layouts_raise(codec, n_q, dep_q, delays, message):
    with pytest.raises(HostError, match=message):
        SpeechCodec.of(model(n_q, dep_q, delays), codec.mimi, codec.tokenizer)


def test_everything_that_does_not_fit_is_named(codec):
    mimi = SimpleNamespace(num_codebooks=8, cardinality=2048, frame_rate=25.0)
    tokenizer = SimpleNamespace(get_piece_size=lambda: 511)
    with pytest.raises(HostError) as caught:
        SpeechCodec.of(model(16, 8), mimi, tokenizer)
    assert "2048 codes in a codebook, and the model 128" in str(caught.value)
    assert "25 frames a second, and Moshi takes 12.5" in str(caught.value)
    assert "511 pieces, and the model's text table is for 512: its tokens mean other words" in str(caught.value)


def test_text_of_speech_to_text_is_late(codec):
    words = [Word("hello", 1.0, 1.4), Word("there", 2.0, 2.2)]
    late = dataclasses.replace(codec, text_delay=0.48)  # 6 frames
    plain = codec.encode_text(words, 40)
    assert torch.equal(late.encode_text(words, 40)[6:], plain[:-6])
    assert (plain != 3).any()
    assert late.fingerprint() != codec.fingerprint()


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000])
def test_only_the_asked_stretch_is_read_from_the_right_sample_on(tmp_path, codec, rate, monkeypatch):
    ramp = np.arange(rate * 9 + 13) % 32768 / 32767
    path = write_audio(tmp_path / "ramp.wav", np.stack([ramp, ramp[::-1]]), rate)
    whole = sphn.read(str(path))[0]
    monkeypatch.setattr(codec_module, "_at_rate", lambda samples, *_: samples)
    for start in (0, 1, 13, 15, 18, 77, 111):
        samples = codec.read_segment(path, start, 5)
        first, stop = round(start * rate * 0.08), round((start + 5) * rate * 0.08)
        np.testing.assert_array_equal(samples.numpy(), whole[:, first:stop])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampled_speech_stays_in_time_and_whole(tmp_path, mono, rate):
    seconds = 2 + 0.03
    time = np.arange(round(seconds * rate)) / rate
    path = write_audio(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 100 * time)[None], rate)
    samples = mono.read_segment(path, 0, 1000)[0].numpy()
    assert samples.shape == (round(time.size / rate * RATE),)
    expected = 0.5 * np.sin(2 * np.pi * 100 * np.arange(samples.size) / RATE)
    assert np.abs(samples - expected)[200:-200].max() < 0.01
    assert np.abs(samples - expected).max() < 0.1  # at the ends the resampler hears silence beside the tone
    cut = mono.read_segment(path, 5, 10)[0].numpy()
    assert np.abs(cut - expected[5 * FRAME : 15 * FRAME])[200:-200].max() < 0.01


def test_a_segment_ends_where_the_recording_ends(tmp_path, codec):
    path = write_audio(tmp_path / "a.wav", np.full((2, 5 * FRAME + 7), 0.5))
    assert codec.read_segment(path, 4, 10).shape == (2, FRAME + 7)
    assert codec.read_segment(path, 5, 10).shape == (2, 7)
    assert codec.frames_of((5 * FRAME + 7) / RATE) == 6
    assert codec.frames_of(5 * FRAME / RATE) == 5
    with pytest.raises(DataError, match="ends before frame 6"):
        codec.read_segment(path, 6, 10)


def test_a_mono_recording_has_a_silent_user(tmp_path, codec, mono, speech):
    path = write_audio(tmp_path / "a.wav", speech[None, : 20 * FRAME])
    samples = codec.read_segment(path, 0, 20)
    assert samples[0].abs().max() > 0.05
    assert not samples[1].any()
    codes = codec.encode_segment(samples)
    assert codes.shape == (16, 20)
    assert torch.equal(codes[8:], codec.mimi.encode(torch.zeros(1, 1, 20 * FRAME))[0])
    assert torch.equal(mono.encode_segment(mono.read_segment(path, 0, 20)), codec.mimi.encode(samples[:1, None])[0])


def test_left_is_moshi_and_right_the_user(tmp_path, codec, speech):
    left, right = speech[: 12 * FRAME], speech[90_000 : 90_000 + 12 * FRAME]
    path = write_audio(tmp_path / "a.wav", np.stack([left, right]))
    samples = codec.read_segment(path, 0, 12)
    np.testing.assert_allclose(samples.numpy(), np.stack([left, right]), atol=1e-4)
    codes = codec.encode_segment(samples)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, codec.mimi.encode(samples[:, None]).flatten(0, 1))


def test_a_last_frame_is_filled_with_silence_and_segments_do_not_hear_each_other(codec, speech):
    samples = torch.from_numpy(speech[None, : 10 * FRAME + 1]).repeat(2, 1)
    codes = codec.encode_segment(samples)
    assert codes.shape == (16, 11)
    assert torch.equal(codec.encode_segment(samples), codes)
    padded = torch.cat([samples, torch.zeros(2, FRAME - 1)], dim=1)
    assert torch.equal(codec.encode_segment(padded), codes)


def test_no_transcript_is_the_zero_token(codec):
    assert codec.encode_text(None, 3).tolist() == [-1, -1, -1]
    assert codec.encode_text([], 3).tolist() == [3, 3, 3]
    said = codec.encode_text([Word("hello", 0.16, 0.5)], 40).tolist()
    tokens = codec.tokenizer.encode("hello")
    assert said[:2] == [3, 0]
    assert said[2 : 2 + len(tokens)] == tokens


@pytest.mark.parametrize("channels", [2, 3])
def test_too_many_channels_raise(tmp_path, codec, mono, channels):
    path = write_audio(tmp_path / "a.wav", np.zeros((channels, RATE)))
    with pytest.raises(DataError, match=f"has {channels} channels"):
        (mono if channels == 2 else codec).read_segment(path, 0, 5)


def test_a_file_that_was_cut_off_raises_where_it_ends(tmp_path, codec, speech):
    path = write_audio(tmp_path / "a.wav", speech[None, : 60 * FRAME])
    cut_off(path, 0.5)
    assert codec.read_segment(path, 0, 20).shape == (2, 20 * FRAME)
    with pytest.raises(DataError, match=r"ends at 2.40 s, and its header says 4.80 s"):
        codec.read_segment(path, 20, 20)
    with pytest.raises(DataError, match=r"cut off|cannot be read"):
        codec.read_segment(path, 40, 20)


def test_samples_that_are_not_finite_raise(tmp_path, mono):
    path = write_float_wav(tmp_path / "a.wav", np.full(FRAME * 3, np.nan, dtype="<f4"))
    with pytest.raises(DataError, match="not finite"):
        mono.read_segment(path, 0, 3)


def write_float_wav(path, samples):
    data = samples.tobytes()
    header = b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    header += (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + RATE.to_bytes(4, "little")
    header += (4 * RATE).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    path.write_bytes(header + b"data" + len(data).to_bytes(4, "little") + data)
    return path


class Panic(BaseException):
    """What a decoder written in another language may raise."""


def test_a_decoder_that_panics_raises_an_error_that_names_the_file(tmp_path, codec, monkeypatch):
    path = write_audio(tmp_path / "a.wav", np.zeros((1, RATE)))

    def panic(*_, **__):
        raise Panic("index out of range")

    monkeypatch.setattr("sphn.read", panic)
    with pytest.raises(DataError, match=r"a\.wav cannot be read from 0.00 s on \(index out of range\)"):
        codec.read_segment(path, 0, 5)
    monkeypatch.setattr("sphn.FileReader", panic)
    path = write_audio(tmp_path / "b.wav", np.zeros((1, RATE)))
    with pytest.raises(DataError, match=r"b\.wav cannot be read as audio \(index out of range\)"):
        codec.read_segment(path, 0, 5)


def test_an_interruption_is_not_a_damaged_file(tmp_path, codec, monkeypatch):
    path = write_audio(tmp_path / "a.wav", np.zeros((1, RATE)))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sphn.read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        codec.read_segment(path, 0, 5)


def test_fingerprint_tells_codecs_apart(codec, mono):
    assert codec.fingerprint() == codec.fingerprint()
    others = {codec.fingerprint(), mono.fingerprint(), dataclasses.replace(codec, text_padding=4).fingerprint()}
    weight = next(codec.mimi.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.001)
        others.add(codec.fingerprint())
        weight.copy_(before)
    tokenizer = SimpleNamespace(serialized_model_proto=lambda: b"another")
    others.add(dataclasses.replace(codec, tokenizer=tokenizer).fingerprint())
    assert len(others) == 5
