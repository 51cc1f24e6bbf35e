"""The frames of an mp3: their number, and which of the decoded samples belong to the recording.

A decoder gives more samples than were encoded: at the start those of its filters and of the encoder's, at the end those
that fill the last frame. The decoder of ``sphn`` keeps both, and takes the number of frames from a tag that may be
wrong or, without one, from the size of the first frame.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

DECODER_DELAY = 529
"""Samples by which every decoder's filters are late."""
ENCODER_DELAY = 576
"""Samples by which LAME's are, and what is assumed of a file whose encoder does not say."""
PREROLL_FRAMES = 30
"""Frames decoded before a stretch. A frame's bits may begin up to 255 bytes before it (511 in MPEG-1), which are
at most 24 frames of the smallest kind (24 bytes, 11 of them sound), and what it decodes to overlaps the one before."""

SEARCHED = 1 << 16
"""Bytes in which the first frame must begin: other things may lie before it, but not a whole file of them."""
OTHERS = (b"fLaC", b"OggS", b"RIFF", b"FORM", b"caff")
"""How other recordings begin, in which bytes that look like frames can be found."""

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_BITRATES = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Kilobits a second by their index, of MPEG-1 and of the others."""


class Mp3(NamedTuple):
    """The properties of an mp3 by its frames.

    Attributes:
        samples: of each channel, without what the encoder and the decoder add.
        delay: decoded samples before the first of them.
        preroll: samples to decode before a stretch so that it is exact.
        cut_off: whether the file is shorter than its own tag says.
    """

    samples: int
    delay: int
    preroll: int
    cut_off: bool


class _Tag(NamedTuple):
    """The tag in a first frame without sound: bytes of the whole stream, and the encoder's delay and padding."""

    size: int | None
    delay: int | None
    padding: int | None


def read_mp3(path: Path) -> Mp3 | None:
    """What the frames of a file say, or None where it is no mp3."""
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = _after_id3(data)
        if data[start : start + 4] in OTHERS:
            return None
        first = _first_frame(data, start)
        if first is None:
            return None
        version = data[first + 1] >> 3 & 3
        per_frame = 1152 if version == 3 else 576
        tag = _tag(data, first)
        frames = _count(data, first) - (tag is not None)
        delay = DECODER_DELAY + (ENCODER_DELAY if tag is None or tag.delay is None else tag.delay)
        padding = 0 if tag is None or tag.padding is None else max(0, tag.padding - DECODER_DELAY)
        stated = None if tag is None else tag.size
        return Mp3(
            samples=max(0, frames * per_frame - delay - padding), delay=delay, preroll=PREROLL_FRAMES * per_frame,
            cut_off=stated is not None and len(data) - first < 0.99 * stated,
        )  # fmt: skip


def _after_id3(data: mmap.mmap) -> int:
    """Where the tags at the start of a file end."""
    start = 0
    while data[start : start + 3] == b"ID3" and len(data) >= start + 10:
        size = 0
        for byte in data[start + 6 : start + 10]:
            size = size << 7 | byte & 0x7F
        start += 10 + size + (10 if data[start + 5] & 0x10 else 0)
    return start


def _first_frame(data: mmap.mmap, start: int) -> int | None:
    """Where the first frame begins that another of its kind follows, or that ends the file."""
    end = start + SEARCHED
    place = data.find(b"\xff", start, end)
    while place != -1:
        length = _length(data[place : place + 4])
        if length:
            after = data[place + length : place + length + 4]
            if place + length == len(data) or (_length(after) and _same(data[place : place + 4], after)):
                return place
        place = data.find(b"\xff", place + 1, end)
    return None


def _count(data: mmap.mmap, first: int) -> int:
    """Complete frames from ``first`` on; what lies between them is passed over."""
    kind, end, frames, place = data[first : first + 4], len(data), 0, first
    lengths: dict[bytes, int] = {}
    while place + 4 <= end:
        header = data[place : place + 3]  # the fourth byte says nothing of a frame's length
        length = lengths.get(header)
        if length is None:
            length = _length(header + b"\0") if _same(kind, header) else 0
            lengths[header] = length
        if length:
            frames += place + length <= end
            place += length
        else:
            place = data.find(b"\xff", place + 1)
            if place == -1:
                break
    return frames


def _same(kind: bytes, header: bytes) -> bool:
    """Whether two headers have the same version, layer and rate."""
    return (kind[1] ^ header[1]) & 0xFE == 0 and (kind[2] ^ header[2]) & 0x0C == 0


def _length(header: bytes) -> int:
    """Bytes of the frame that a header begins; 0 where it is no header of layer III with a known length."""
    if len(header) < 3 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, bitrate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version not in _RATES or rate == 3 or bitrate in (0, 15):
        return 0
    mpeg1 = version == 3
    return (144_000 if mpeg1 else 72_000) * _BITRATES[mpeg1][bitrate] // _RATES[version][rate] + (header[2] >> 1 & 1)


def _tag(data: mmap.mmap, first: int) -> _Tag | None:
    """What the first frame says of the stream, or None where it holds sound."""
    mpeg1, mono = data[first + 1] >> 3 & 3 == 3, data[first + 3] >> 6 == 3
    side = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    if data[first + 36 : first + 40] == b"VBRI":
        return _Tag(_number(data, first + 46), None, None)
    place = first + 4 + side
    if data[place : place + 4] not in (b"Xing", b"Info"):
        return None
    flags, place = _number(data, place + 4), place + 8
    size = None
    for bit, length in ((1, 4), (2, 4), (4, 100), (8, 4)):
        if flags & bit:
            size = _number(data, place) if bit == 2 else size
            place += length
    lame = data[place : place + 24]
    packed = int.from_bytes(lame[21:24], "big")
    if len(lame) < 24 or not lame[:4].isalnum() or not packed:
        return _Tag(size, None, None)
    return _Tag(size, packed >> 12, packed & 0xFFF)


def _number(data: mmap.mmap, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "big")
