"""Moshi's WebSocket protocol, and the messages that clients of this package have beside it.

Every message is binary; its first byte is the tag. A client that asks for ``?protocol=moshi-ttt.1`` gets JSON in tag 4
and may send it. Other clients get what Moshi's own server sends, and nothing else: they stop at tags they do not know.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from moshi_ttt.core.errors import HostError, MoshiTTTError
from moshi_ttt.hosts.moshi.slots import SlotSettings

EXTENSION = "moshi-ttt.1"
"""What a client asks for that speaks the messages of this package."""

HANDSHAKE, AUDIO, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
"""Tags."""
START, END_OF_TURN, PAUSE, RESTART = range(4)
"""The byte of a control message."""

DONE, GOING_AWAY, NOT_AUDIO, REFUSED, TOO_BIG, FAILED, FULL = 1000, 1001, 1003, 1008, 1009, 1011, 1013
"""Close codes: the server shuts down; not audio; token, Origin or too slow; too big; the engine failed; no free row."""

MESSAGE_BYTES = 64 * 1024
"""The largest message that is read."""
JSON_BYTES = 4 * 1024
"""The largest JSON that is read."""

AudioFormat = Literal["opus", "pcm_s16"]

_SETTINGS: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "seed": ("seed", int),
    "audio_seed": ("seed", int),
    "temp": ("temperature", float),
    "audio_temperature": ("temperature", float),
    "temp_text": ("text_temperature", float),
    "text_temperature": ("text_temperature", float),
    "top_k": ("top_k", int),
    "audio_topk": ("top_k", int),
    "top_k_text": ("text_top_k", int),
    "text_topk": ("text_top_k", int),
    "volume": ("volume", float),
}
"""Names in a query, ours and those of Moshi's web client -> option of a row. All others are ignored."""
_SWITCHES = {"0": False, "false": False, "off": False, "1": True, "true": True, "on": True}


class ProtocolError(MoshiTTTError, ValueError):
    """A message or query that means nothing here, in words for the client."""


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What a client asks for when it connects.

    Attributes:
        extension: whether it speaks the messages of this package.
        audio: the form of audio in both directions. Moshi's own clients speak Opus.
        settings: of its row.
        resume: the secret of a session that it continues.
    """

    extension: bool
    audio: AudioFormat
    settings: SlotSettings
    resume: str | None = None


def read_query(query: Mapping[str, str], *, seed: int) -> Greeting:
    """What the query of a connection says; ``seed`` where it names none. Raises ProtocolError."""
    extension = query.get("protocol") == EXTENSION
    options: dict[str, Any] = {"seed": seed}
    for name, (option, kind) in _SETTINGS.items():
        if name in query:
            options[option] = _number(name, query[name], kind)
    if "updates" in query:
        if query["updates"].lower() not in _SWITCHES:
            raise ProtocolError(f"updates={query['updates'][:20]!r} is neither on nor off.")
        options["updates"] = _SWITCHES[query["updates"].lower()]
    audio = query.get("format", "opus") if extension else "opus"
    if audio not in ("opus", "pcm_s16"):
        raise ProtocolError(f"format={audio[:20]!r}: give opus or pcm_s16.")
    resume = query.get("resume") if extension else None
    try:
        settings = SlotSettings(**options)
    except HostError as error:
        raise ProtocolError(str(error)) from None
    return Greeting(extension=extension, audio=cast(AudioFormat, audio), settings=settings, resume=resume)


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text[:32])
    except ValueError:
        raise ProtocolError(f"{name}={text[:20]!r} is not a number.") from None
    if not math.isfinite(value):
        raise ProtocolError(f"{name}={text[:20]!r} is not finite.")
    return value


def message(tag: int, payload: bytes = b"") -> bytes:
    return bytes([tag]) + payload


def metadata(kind: str, **fields: Any) -> bytes:
    """A JSON message. What is not finite becomes null, which JSON has."""
    values = {"type": kind, **_plain(fields)}
    return message(METADATA, json.dumps(values, allow_nan=False, separators=(",", ":")).encode())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(payload: bytes) -> dict[str, Any]:
    """The JSON object of a metadata message. Raises ProtocolError."""
    if len(payload) > JSON_BYTES:
        raise ProtocolError(f"A JSON message may have {JSON_BYTES} bytes, and this one has {len(payload)}.")
    try:
        values = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError("A message with tag 4 is a JSON object.") from None
    if not isinstance(values, dict) or not isinstance(values.get("type"), str):
        raise ProtocolError('A message with tag 4 is a JSON object with a "type".')
    return values


def reason(words: str) -> bytes:
    """``words`` as the reason of a close frame, which holds 123 bytes."""
    return words.encode()[:123].decode(errors="ignore").encode()
