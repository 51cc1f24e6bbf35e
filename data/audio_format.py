"""The format of a recording, read from its bytes: the container, what the library does not report, and defects.

``sphn`` reads the samples. It believes every header, makes an mp3's delay part of the recording, and gives no reason
that a user could act on: this module looks at the bytes for that, and decodes nothing.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

UNKNOWN_SIZE = 0x7F000000
"""What writes a wav into a pipe cannot go back to fill in its size, and leaves one of this or more."""
HEAD = 64
"""Bytes that tell what a file is."""
WAV_CODECS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}
"""The codings of a wav in which every sample has its own bytes, by their number in the header."""
COMPRESSED = {
    0x02: "Microsoft ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x40: "G.721 ADPCM", 0x45: "G.726 ADPCM",
    0x50: "MPEG", 0x55: "mp3", 0x160: "WMA", 0x161: "WMA", 0x2000: "AC-3", 0xFF: "AAC",
}  # fmt: skip
OGG_CODECS = {
    b"OpusHead": "Opus", b"Speex   ": "Speex", b"\x80theora": "Theora video", b"\x01video\0\0": "video",
}  # fmt: skip
"""Codings inside an Ogg file that cannot be read, by the first bytes of their first packet."""
OTHERS = (
    (0, b"RF64", "an RF64 file (a wav for more than 4 GiB)"), (0, b"BW64", "a BW64 file (a wav for more than 4 GiB)"),
    (0, b"riff", "a Wave64 file"), (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (4, b"ftyp", "an MPEG-4 file (m4a, mp4)"), (0, b"#!AMR", "an AMR file"), (0, b"wvpk", "a WavPack file"),
    (0, b"MAC ", "a Monkey's Audio file"), (0, b"NIST_1A", "a NIST SPHERE file"), (0, b".snd", "an au file"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a Windows Media file"), (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "compressed with gzip"), (0, b"<", "text (HTML or XML)"),
)  # fmt: skip
"""Files that are often given and cannot be read: where their mark stands, the mark, what they are."""


class Wav(NamedTuple):
    """The header of a wav. ``size`` is the bytes of samples that it states, ``present`` those that the file has."""

    codec: int
    channels: int
    rate: int
    block: int
    size: int | None
    present: int
    riff_size: int


def converted(path: Path, *, to: str = "wav") -> str:
    """The end of a sentence: how to make a recording that can be read."""
    made = path.with_suffix(f".{to}").name
    made = made if made != path.name else f"converted.{to}"
    codec = " -c:a pcm_s16le" if to == "wav" else ""
    return f"Convert it, for instance: ffmpeg -i {_quoted(path.name)}{codec} {_quoted(made)}"


def refusal(path: Path, *, stretches: bool) -> str | None:
    """Why no sample of a file can be read, and what to do; None where nothing speaks against it.

    Args:
        stretches: any stretch of the recording must be readable alone, at a known time.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return f"{path} is an empty file. Give a recording, or remove it."
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer and not the recording itself. Fetch it: git lfs pull"
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return _wav_refusal(path, stretches)
    if head[:4] == b"OggS":
        packet = head[27 + head[26] :] if len(head) > 26 else b""
        inside = next((name for mark, name in OGG_CODECS.items() if packet.startswith(mark)), None)
        if inside is not None:
            return (
                f"{path} is {inside} in an Ogg file; of Ogg files only Vorbis and FLAC can be read. {converted(path)}"
            )
    if head[:4] == b"fLaC" and len(head) >= 26 and not int.from_bytes(head[21:26], "big") & 0xFFFFFFFFF:
        return f"{path} does not say how many samples it has: it was written into a pipe. {converted(path, to='flac')}"
    if stretches and head[0] == 0xFF and head[1:2] and head[1] & 0xF6 == 0xF0:
        return f"{path} is raw AAC, which does not say how long it is nor where its sound begins. {converted(path)}"
    for place, mark, name in OTHERS:
        if head[place:].startswith(mark):
            return f"{path} is {name}, which cannot be read. {converted(path)}"
    return None


def _wav_refusal(path: Path, stretches: bool) -> str | None:
    wav = read_wav(path)
    if wav is None:
        return f"{path} cannot be read as audio: its header does not describe the samples. Make it again."
    if wav.codec not in WAV_CODECS and (stretches or wav.codec not in (0x02, 0x11)):
        name = COMPRESSED.get(wav.codec, f"coding 0x{wav.codec:04x}")
        return (
            f"{path} is a compressed wav ({name}), of which no stretch can be read alone; a wav is read as PCM, float, "
            f"A-law or mu-law. {converted(path)}"
        )
    if not (wav.channels and wav.rate and wav.block):
        return (
            f"{path} says that it has {wav.channels} channels at {wav.rate} Hz: its header is damaged. Make it again."
        )
    if wav.size is None:
        return f"{path} is a wav file without samples: it ends after its header. Make it again, or remove it."
    if wav.present and (wav.size == 0 or wav.riff_size < 36):
        return (
            f"{path} says that it has no samples, and {wav.present} bytes of them follow: what wrote it was stopped, "
            f"or wrote into a pipe. {converted(path)}"
        )
    return None


def read_wav(path: Path) -> Wav | None:
    """The header of a wav file, or None where it has no chunk that describes its samples."""
    length = path.stat().st_size
    form: tuple[int, int, int, int] | None = None
    with path.open("rb") as file:
        riff_size = struct.unpack("<4sI4s", file.read(12))[1]
        while True:
            header = file.read(8)
            if len(header) < 8:
                return Wav(*form, None, 0, riff_size) if form is not None else None
            name, size = struct.unpack("<4sI", header)
            if name == b"data":
                return Wav(*form, size, length - file.tell(), riff_size) if form is not None else None
            contents = file.read(min(size, HEAD))
            if name == b"fmt " and len(contents) >= 16:
                codec, channels, rate, _, block = struct.unpack("<HHIIH", contents[:14])
                if codec == 0xFFFE and len(contents) >= 26:  # extensible: the coding stands in its longer form
                    codec = struct.unpack("<H", contents[24:26])[0]
                form = (codec, channels, rate, block)
            file.seek(size - len(contents) + size % 2, 1)


def wav_samples(path: Path) -> int | None:
    """Samples of each channel of a wav whose header leaves its length open, by the file's size; else None."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    wav = read_wav(path)
    if wav is None or wav.size is None or wav.size < UNKNOWN_SIZE or wav.size <= wav.present:
        return None
    return wav.present // wav.block


def _quoted(name: str) -> str:
    return name if name.replace(".", "").replace("_", "").replace("-", "").isalnum() else f'"{name}"'
