"""Ogg pages and Opus packets, as RFC 3533, RFC 6716 and RFC 7845 define them: enough to speak as other clients do."""

from __future__ import annotations

import struct

import numpy as np
import sphn

FIRST, LAST = 2, 4
"""Flags of a page: the stream's first, and its last."""


def _table():
    for byte in range(256):
        register = byte << 24
        for _ in range(8):
            register = (register << 1) ^ (0x04C11DB7 if register & 0x80000000 else 0)
        yield register & 0xFFFFFFFF


TABLE = list(_table())


def checksum(data):
    register = 0
    for byte in data:
        register = ((register << 8) & 0xFFFFFFFF) ^ TABLE[(register >> 24) ^ byte]
    return register


class Pages:
    """Writes the pages of one stream."""

    def __init__(self, serial):
        self.serial, self.number = serial, 0

    def page(self, packets, position, flags=0):
        """A page of whole packets; ``position`` is that of its last sample."""
        lacing = b"".join(bytes([255] * (len(each) // 255) + [len(each) % 255]) for each in packets)
        head = struct.pack("<4sBBQIIIB", b"OggS", 0, flags, position, self.serial, self.number, 0, len(lacing))
        self.number += 1
        whole = head + lacing + b"".join(packets)
        return whole[:22] + struct.pack("<I", checksum(whole)) + whole[26:]


def read(data):
    """``(flags, position, serial, packets)`` of each page; raises where it is not whole pages with right checksums."""
    pages = []
    while data:
        magic, version, flags, position, serial, _, given, count = struct.unpack_from("<4sBBQIIIB", data)
        assert (magic, version) == (b"OggS", 0)
        lacing = data[27 : 27 + count]
        size = 27 + count + sum(lacing)
        assert len(data) >= size, "half a page"
        assert checksum(data[:22] + bytes(4) + data[26:size]) == given
        packets, start, length = [], 27 + count, 0
        for part in lacing:
            length += part
            if part < 255:
                packets.append(data[start : start + length])
                start, length = start + length, 0
        assert length == 0, "a packet goes on in the next page"
        pages.append((flags, position, serial, packets))
        data = data[size:]
    return pages


def head(skipped, rate):
    """The packet that begins a stream of one channel."""
    return struct.pack("<8sBBHIhB", b"OpusHead", 1, 1, skipped, rate, 0, 0)


def tags(vendor):
    return struct.pack(f"<8sI{len(vendor)}sI", b"OpusTags", len(vendor), vendor.encode(), 0)


def encode(samples):
    """Opus packets of 40 ms of ``samples`` at 24 kHz, whose number is a multiple of 1,920."""
    written = bytes(sphn.OpusStreamWriter(24_000).append_pcm(np.ascontiguousarray(samples, np.float32)))
    return [packet for *_, packets in read(written)[2:] for packet in packets]


def halves(packet):
    """The two packets of 20 ms that a packet of 40 ms holds (RFC 6716, 3.2)."""
    kind, code, rest = packet[0] & 0xFC, packet[0] & 3, packet[1:]
    if code == 1:
        length = len(rest) // 2
    else:
        assert code == 2, "one frame of 40 ms, which cannot be divided"
        length = rest[0]
        rest = rest[1:]
        if length >= 252:
            length += 4 * rest[0]
            rest = rest[1:]
    return bytes([kind]) + rest[:length], bytes([kind]) + rest[length:]


def decode(pages):
    """Samples at 24 kHz of a stream's pages."""
    return np.concatenate([np.zeros(0, np.float32), sphn.OpusStreamReader(24_000).append_bytes(pages)])
