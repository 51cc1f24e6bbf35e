"""Recordings on disk: their length, and any range of their samples.

Shape legend: C channels, S samples.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sphn

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.data.audio_format import converted, refusal, wav_samples
from moshi_ttt.data.mp3 import read_mp3

FORMATS = "wav, ogg, flac or mp3"
"""What can be read."""
Samples = np.ndarray[Any, np.dtype[np.float32]]


class AudioError(MoshiTTTError, ValueError):
    """A recording that cannot be used."""


class Header(NamedTuple):
    """The properties of a recording.

    Attributes:
        samples: of each channel, at ``rate`` a second; without those that an encoder adds.
        channels: C.
        delay: decoded samples before the recording's first.
        preroll: samples to decode before a stretch, so that it is what a decoder that came from the start gives.
        stated: seconds by the file's own header, which may be wrong: what ``sphn.durations`` gives.
        cut_off: whether the file ends before its own end, as far as its header tells.
    """

    samples: int
    channels: int
    rate: int
    delay: int
    preroll: int
    stated: float
    cut_off: bool

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


def read_header(path: Path, *, stretches: bool = True) -> Header:
    """Read the properties of a recording from its header or, of an mp3, from its frames. Nothing is decoded.

    Args:
        stretches: refuse a file that can be read as a whole only, or whose samples have no known time.

    Raises AudioError: no such file, empty, not audio, or of a kind that cannot be read; it says which and what to do.
    """
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise AudioError(f"{path} {what}. Give one recording ({FORMATS}).")
        status = path.stat()
        return _read_header(path, stretches, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise AudioError(f"{path} cannot be read ({error.strerror or error}).") from None


@lru_cache(maxsize=1024)
def _read_header(path: Path, stretches: bool, size: int, changed: int) -> Header:
    """``size`` and ``changed`` (when the file was) make what is kept that of the file as it is."""
    reason = refusal(path, stretches=stretches)
    if reason is not None:
        raise AudioError(reason)
    try:
        reader = sphn.FileReader(str(path))
        stated, channels, rate = reader.duration_sec, reader.channels, reader.sample_rate
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged header can make the decoder panic, which is no Exception
        raise AudioError(f"{path} cannot be read as audio ({error}). Allowed: {FORMATS}. {converted(path)}") from None
    mp3 = read_mp3(path)
    if mp3 is not None:
        samples, delay, preroll, cut_off = mp3
    else:
        found = wav_samples(path)
        samples, delay, preroll, cut_off = round(stated * rate) if found is None else found, 0, 0, False
    if not samples > 0:
        raise AudioError(f"{path} has no samples. Give a recording that is not empty, or remove it.")
    return Header(samples, channels, rate, delay, preroll, stated, cut_off)


def read_samples(path: Path, header: Header, first: int, count: int) -> Samples:
    """``[C, S]``: ``count`` samples from ``first`` on at the recording's own rate, fewer where the file ends.

    A stretch starts at the right sample in wav, flac and mp3; in an ogg the decoder was seen to miss it by up to
    32 ms, less than half a frame.

    Raises AudioError when the file cannot be decoded there.
    """
    start = header.delay + first
    lead = min(start, header.preroll)
    # The decoder turns seconds into samples by rounding down: half a sample more, and it finds the one that is meant.
    start_sec = None if start == lead else (start - lead + 0.5) / header.rate
    try:
        samples, _ = sphn.read(str(path), start_sec=start_sec, duration_sec=(lead + count + 0.5) / header.rate)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # damaged data can make the decoder panic, which is no Exception
        raise AudioError(
            f"{path} cannot be read from {first / header.rate:.2f} s on ({error}). Make it again, for instance as wav."
        ) from None
    return np.ascontiguousarray(samples[:, lead : lead + count], dtype=np.float32)
