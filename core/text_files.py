"""Text as other programs write it: UTF-8, with a byte-order mark or without, UTF-16 with one; as it is or gzipped."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

GZIP = b"\x1f\x8b"
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
"""Byte-order marks and the encodings that they announce; a longer one stands before one that it begins with."""


def read_text(path: Path) -> str:
    """The text of a file, without a byte-order mark; line ends are left as they are.

    Raises OSError, or ValueError with a reason: not text in one of these encodings, or a damaged gzip file.
    """
    data = path.read_bytes()
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"damaged gzip file: {error}") from None
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8, nor in UTF-16 with a byte-order mark: {error}") from None
