"""What messages and queries mean, and which are refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moshi_ttt.serving import protocol
from moshi_ttt.serving.audio import (
    MOST_SECONDS,
    Framer,
    NotAudioError,
    OpusIn,
    OpusOut,
    PcmIn,
    TooMuchAudioError,
    codecs,
)
from moshi_ttt.serving.metrics import ServerMetrics
from moshi_ttt.serving.protocol import ProtocolError, metadata, read_json, read_query, reason

from .client import FRAME, RATE, Opus


def test_query_of_the_web_client():
    query = {
        "text_temperature": "0.6", "text_topk": "20", "audio_temperature": "0.9", "audio_topk": "100",
        "audio_seed": "7", "text_seed": "9", "pad_mult": "0", "repetition_penalty": "1", "worker_addr": "x",
    }  # fmt: skip
    greeting = read_query(query, seed=1)
    assert not greeting.extension
    settings = greeting.settings
    assert (settings.temperature, settings.top_k, settings.text_temperature, settings.text_top_k) == (0.9, 100, 0.6, 20)
    assert settings.seed == 7


def test_seed_where_none_is_named():
    assert read_query({}, seed=5).settings.seed == 5


def test_format_and_resume_need_the_extension():
    query = {"format": "pcm_s16", "resume": "x" * 32}
    assert read_query(query, seed=0).audio == "opus"
    assert read_query(query, seed=0).resume is None
    greeting = read_query({**query, "protocol": protocol.EXTENSION}, seed=0)
    assert (greeting.audio, greeting.resume) == ("pcm_s16", "x" * 32)


@pytest.mark.parametrize(
    "query",
    [
        {"temp": "hot"}, {"temp": "nan"}, {"temp": "inf"}, {"temp": "-1"}, {"top_k": "0"}, {"top_k": "1.5"},
        {"seed": "-3"}, {"seed": "9" * 400}, {"volume": "1e9"}, {"updates": "maybe"},
        {"protocol": "moshi-ttt.1", "format": "mp3"},
    ],
)  # fmt: skip
def test_query_is_refused_in_words(query):
    with pytest.raises(ProtocolError, match=r"\w+ .*\."):
        read_query(query, seed=0)


def test_metadata_has_no_nan():
    values = json.loads(metadata("stats", loss=math.nan, sites=[{"moved": math.inf}])[1:])
    assert values == {"type": "stats", "loss": None, "sites": [{"moved": None}]}


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"{}", b'{"type": 3}', b"\xff", b"[" * 4000, b'{"type":"' + b"x" * 5000 + b'"}']
)
def test_json_is_refused(payload):
    with pytest.raises(ProtocolError):
        read_json(payload)


def test_reason_fits_a_close_frame():
    assert len(reason("ä" * 200)) <= 123
    reason("ä" * 200).decode()


def test_opus_of_any_cut_is_the_same():
    opus = Opus()
    data = b"".join(opus.page(0.1 * np.sin(np.arange(FRAME) / 20))[1:] for _ in range(12))
    whole = OpusIn(RATE, ServerMetrics()).decode(data)
    reader = OpusIn(RATE, ServerMetrics())
    pieces = np.concatenate([reader.decode(data[start : start + 37]) for start in range(0, len(data), 37)])
    assert len(whole) == 12 * FRAME
    assert np.array_equal(whole, pieces)


def test_bad_pages_are_refused():
    with pytest.raises(NotAudioError, match="Ogg"):
        OpusIn(RATE, ServerMetrics()).decode(b"no page of sound, and long enough for one")
    with pytest.raises(NotAudioError, match="even"):
        PcmIn(RATE).decode(b"\0\0\0")


def ogg_page(packets, sequence, flags=0):
    """A page of small packets, with its checksum."""
    body = b"".join(packets)
    head = b"OggS\0" + bytes([flags]) + (0).to_bytes(8, "little") + (7).to_bytes(4, "little")
    head += sequence.to_bytes(4, "little") + b"\0\0\0\0" + bytes([len(packets)]) + bytes(map(len, packets))
    crc = 0
    for byte in head + body:
        crc ^= byte << 24
        for _ in range(8):
            crc = ((crc << 1) ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    return head[:22] + crc.to_bytes(4, "little") + head[26:] + body


def test_sound_that_a_small_message_promises_is_limited():
    opus_head = b"OpusHead\x01\x01" + (0).to_bytes(2, "little") + RATE.to_bytes(4, "little") + b"\0\0\0"
    pages = [ogg_page([opus_head], 0, 2), ogg_page([b"OpusTags\0\0\0\0\0\0\0\0"], 1)]
    pages += [ogg_page([b"\x10\0\0"] * 60, number) for number in range(2, 42)]  # 40 ms each: 96 s in 10 kB
    with pytest.raises(TooMuchAudioError, match=f"{MOST_SECONDS:g} s"):
        OpusIn(RATE, ServerMetrics()).decode(b"".join(pages))


def test_too_many_samples_are_refused():
    with pytest.raises(TooMuchAudioError):
        PcmIn(RATE).decode(bytes(2 * int(MOST_SECONDS * RATE) + 2))


def test_codecs_by_name():
    metrics = ServerMetrics()
    assert isinstance(codecs("opus", RATE, metrics)[1], OpusOut)
    assert isinstance(codecs("pcm_s16", RATE, metrics)[0], PcmIn)


@pytest.mark.parametrize("cut", [1, 100, 1919, 1920, 1921, 7000])
def test_framer_loses_nothing(cut):
    samples = np.linspace(-1, 1, 5 * FRAME + 13).astype(np.float32)
    framer, got = Framer(FRAME), []
    for start in range(0, len(samples), cut):
        got += list(framer.frames(samples[start : start + cut]))
        if cut == 1 and len(got) == 1:
            break
    together = np.concatenate([each.numpy() for each in got])
    assert np.array_equal(together, samples[: len(together)])
    assert len(got) == (1 if cut == 1 else 5)


def test_framer_cleans():
    dirty = np.array([np.nan, np.inf, -np.inf, 1e30] * (FRAME // 4), np.float32)
    (frame,) = Framer(FRAME).frames(dirty)
    assert frame[:4].tolist() == [0, 1, -1, 1]
