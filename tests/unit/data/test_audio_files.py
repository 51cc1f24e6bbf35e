"""Recordings as other programs write them: in time to the sample, of the right length, or refused with the reason."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.audio_files import AudioError, read_header, read_samples

AUDIO = Path(__file__).parent / "audio"
RATE = 24_000
PCM, FLOAT, A_LAW, ADPCM, EXTENSIBLE = 1, 3, 6, 0x11, 0xFFFE
GUID = bytes.fromhex("000000001000800000aa00389b71")
"""What follows the number of a coding in an extensible wav."""


def clicks(rate: int, seconds: float = 1.5) -> np.ndarray:
    """``[S]``: 20 ms around 0.5 s and 1.1 s, silence elsewhere."""
    time = np.arange(round(seconds * rate)) / rate
    made = np.zeros(time.size)
    for at, pitch in ((0.5, 700), (1.1, 1900)):
        near = np.abs(time - at) < 0.01
        swell = 0.8 * np.cos(np.pi * (time[near] - at) / 0.02) ** 2
        made[near] += swell * np.sin(2 * np.pi * pitch * (time[near] - at) + 1)
    return made


def lateness(samples: np.ndarray, rate: int) -> int:
    """Samples by which ``samples [S]`` are later than the clicks."""
    correlated = np.correlate(samples, clicks(rate)[: samples.size], mode="full")
    return int(correlated.argmax()) - min(clicks(rate).size, samples.size) + 1


def chunk(name: bytes, contents: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(contents) if size is None else size) + contents + b"\0" * (len(contents) % 2)


def wav(
    samples: np.ndarray,
    *,
    bits: int = 16,
    coding: int = PCM,
    extensible: bool = False,
    before: bytes = b"",
    after: bytes = b"",
    size: int | None = None,
    riff: int | None = None,
    **changes: int,
) -> bytes:
    """A wav of ``samples [C, S]``; ``size`` and ``riff`` replace the sizes in its header."""
    scaled = samples.T * (1.0 if coding == FLOAT else 2.0 ** (bits - 1) - 1)
    if coding == FLOAT:
        data = scaled.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = (scaled + 128).round().astype(np.uint8).tobytes()
    elif bits == 24:
        data = scaled.round().astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
    else:
        data = scaled.round().astype(f"<i{bits // 8}").tobytes()
    channels, rate = samples.shape[0], changes.get("rate", RATE)
    block = channels * bits // 8
    number = EXTENSIBLE if extensible else changes.get("written", coding)
    form = struct.pack("<HHIIHH", number, changes.get("channels", channels), rate, rate * block, block, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, coding) + GUID
    body = b"WAVE" + before + chunk(b"fmt ", form) + chunk(b"data", data, size) + after
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


STEREO = np.stack([clicks(RATE), -clicks(RATE)])
UNKNOWN = 0xFFFFFFFF
WAVS = {
    "16 bits": {}, "8 bits": {"bits": 8}, "24 bits": {"bits": 24}, "32 bits": {"bits": 32},
    "32-bit float": {"bits": 32, "coding": FLOAT}, "64-bit float": {"bits": 64, "coding": FLOAT},
    "extensible": {"extensible": True}, "extensible 24": {"bits": 24, "extensible": True},
    "extensible float": {"bits": 32, "coding": FLOAT, "extensible": True},
    "an odd chunk before": {"before": chunk(b"note", b"abc")}, "chunks after": {"after": chunk(b"id3 ", b"x" * 301)},
    "a pipe": {"size": UNKNOWN, "riff": UNKNOWN}, "another pipe": {"size": 0x7FFFF000, "riff": 0x7FFFF024},
}  # fmt: skip


@pytest.mark.parametrize("options", WAVS.values(), ids=WAVS)
def test_every_wav_is_read_to_the_sample(tmp_path, options):
    path = tmp_path / "Ünder scored.WAV"
    path.write_bytes(wav(STEREO, **options))
    header = read_header(path)
    assert (header.samples, header.channels, header.rate) == (36_000, 2, RATE)
    tolerance = 2.0 ** (2 - options.get("bits", 16)) + 1e-7
    for first, count in ((0, 36_000), (11_800, 500), (1, 7), (35_990, 10)):
        read = read_samples(path, header, first, count)
        assert read.shape == (2, count)
        np.testing.assert_allclose(read, STEREO[:, first : first + count], atol=tolerance)


def test_the_length_of_an_unknown_length_is_the_files(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(STEREO, size=UNKNOWN, riff=UNKNOWN))
    header = read_header(path)
    assert header.seconds == 1.5
    assert header.stated > 10_000
    assert read_audio(path, RATE).shape == (36_000,)


@pytest.mark.first_by_default
@pytest.mark.parametrize(
    ("name", "rate", "seconds"),
    [
        ("clicks_44100.mp3", 44_100, 1.5),
        ("clicks_24000_untagged_vbr.mp3", 24_000, 1.514),
        ("clicks_24000.flac", 24_000, 1.5),
        ("clicks_24000.ogg", 24_000, 1.514),
    ],
)
def test_a_click_lands_where_it_is(name, rate, seconds):
    header = read_header(AUDIO / name)
    assert header.rate == rate
    assert header.seconds == pytest.approx(seconds, abs=1e-3)
    assert lateness(read_samples(AUDIO / name, header, 0, header.samples)[0], rate) == 0
    assert lateness(read_audio(AUDIO / name, RATE).numpy(), RATE) == 0


@pytest.mark.parametrize("name", ["clicks_44100.mp3", "clicks_24000_untagged_vbr.mp3", "clicks_24000.flac"])
def test_a_stretch_is_what_the_whole_has_there(name):
    path = AUDIO / name
    header = read_header(path)
    whole = read_samples(path, header, 0, header.samples)
    for first in range(0, header.samples - 3000, 1777):
        np.testing.assert_array_equal(read_samples(path, header, first, 3000), whole[:, first : first + 3000])


def test_the_header_of_an_mp3_may_lie():
    path = AUDIO / "clicks_24000_untagged_vbr.mp3"
    header = read_header(path)
    assert header.stated == pytest.approx(1.944)  # what the library says
    assert header.samples == pytest.approx(36_000, abs=576)
    assert read_samples(path, header, 0, 10**6).shape == (1, header.samples)


def tagged(tmp_path, change) -> Path:
    """The mp3 with a tag, changed."""
    data = bytearray((AUDIO / "clicks_44100.mp3").read_bytes())
    change(data)
    path = tmp_path / "a.mp3"
    path.write_bytes(data)
    return path


def test_a_tag_with_another_number_of_frames_changes_nothing(tmp_path):
    def lie(data: bytearray) -> None:
        place = data.index(b"Xing") + 8
        data[place : place + 4] = (6_000).to_bytes(4, "big")

    header = read_header(tagged(tmp_path, lie))
    assert header.stated > 100
    assert (header.seconds, header.cut_off) == (1.5, False)


def test_what_stands_before_and_after_the_frames_changes_nothing(tmp_path):
    def surround(data: bytearray) -> None:
        data[:0] = b"ID3\x04\0\0\0\0\2\0" + b"\xff\xfb\x90" * 85 + b"\0"
        data += b"TAG" + b"\0" * 125

    path = tagged(tmp_path, surround)
    header = read_header(path)
    assert header.seconds == 1.5
    assert lateness(read_samples(path, header, 0, header.samples)[0], 44_100) == 0


def test_without_a_tag_the_usual_delay_is_taken(tmp_path):
    def forget(data: bytearray) -> None:
        place = data.index(b"LAME")
        data[place : place + 36] = bytes(36)

    path = tagged(tmp_path, forget)
    header = read_header(path)
    assert header.delay == 529 + 576
    assert lateness(read_samples(path, header, 0, header.samples)[0], 44_100) == 0


def test_an_mp3_that_was_cut_off_is_known(tmp_path):
    def cut(data: bytearray) -> None:
        del data[len(data) // 2 :]

    path = tagged(tmp_path, cut)
    header = read_header(path)
    assert header.cut_off
    assert 0.4 < header.seconds < 1.1
    assert read_samples(path, header, 0, header.samples).shape[1] > header.samples - 2 * 1152


def ogg(packet: bytes) -> bytes:
    return b"OggS" + bytes([0, 2]) + bytes(20) + bytes([1, len(packet)]) + packet


REFUSED = {
    "Opus": ("a.ogg", ogg(b"OpusHead\1\1\0\0\x80\xbb\0\0\0\0\0"), "is Opus in an Ogg file; of Ogg files only Vorbis"),
    "Speex": ("a.ogg", ogg(b"Speex   1.2"), "is Speex in an Ogg file"),
    "ADPCM": ("a.wav", wav(STEREO, written=ADPCM), r"compressed wav \(IMA ADPCM\), of which no stretch can be"),
    "mp3 in a wav": ("a.wav", wav(STEREO, written=0x55), r"compressed wav \(mp3\)"),
    "an unknown coding": ("a.wav", wav(STEREO, written=0x1234), r"compressed wav \(coding 0x1234\)"),
    "no rate": ("a.wav", wav(STEREO, rate=0), "2 channels at 0 Hz: its header is damaged"),
    "no channels": ("a.wav", wav(STEREO, channels=0), "0 channels at 24000 Hz"),
    "an interrupted recorder": ("a.wav", wav(STEREO, size=0, riff=0), "no samples, and 144000 bytes of them follow"),
    "a size of 0": ("a.wav", wav(STEREO, size=0), "no samples, and 144000 bytes of them follow"),
    "only a header": ("a.wav", wav(STEREO)[:36], "without samples: it ends after its header"),
    "no description": ("a.wav", b"RIFF\x04\0\0\0WAVEdata\x04\0\0\0abcd", "header does not describe the samples"),
    "no samples": ("a.wav", wav(STEREO[:, :0]), "has no samples"),
    "RF64": ("a.wav", b"RF64" + wav(STEREO)[4:], "is an RF64 file"),
    "m4a": ("a.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0", r"is an MPEG-4 file .* ffmpeg -i a.m4a -c:a pcm_s16le a.wav"),
    "WebM": ("a.wav", b"\x1aE\xdf\xa3\x9f", "is a Matroska or WebM file"),
    "AAC": ("a.aac", b"\xff\xf1\x58\x80\x15\x9f\xfc" + bytes(60), "raw AAC"),
    "flac from a pipe": (
        "a.flac", b"fLaC\0\0\0\x22" + bytes(10) + b"\x05\xdc\x00\xf0" + bytes(20), r"pipe\. .* -i a.flac converted.flac"
    ),
    "gzip": ("a.wav", gzip.compress(b"x"), "is compressed with gzip"),
    "Git LFS": ("a.wav", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a page": ("a.mp3", b"<!DOCTYPE html><html>", "is text"),
    "nothing": ("a.wav", b"", "is an empty file"),
    "noise": ("a.mp3", bytes(range(128)) * 4, "cannot be read as audio"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "contents", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_says_why(tmp_path, name, contents, said):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(AudioError, match=said) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_folders_and_nothing_are_no_recordings(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(AudioError, match="is a folder"):
        read_header(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="does not exist"):
        read_header(tmp_path / "b.wav")
    with pytest.raises(AudioError, match="cannot be read"):
        read_header(tmp_path / ("b" * 300 + ".wav"))


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(STEREO))
    assert read_header(path).samples == 36_000
    path.write_bytes(wav(STEREO[:, :100]))
    assert read_header(path).samples == 100
    shutil.copy(AUDIO / "clicks_44100.mp3", path)
    assert read_header(path).delay == 1105
