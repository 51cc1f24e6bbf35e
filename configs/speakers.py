"""Moshi's channel in a recording and Moshi's label in its transcript."""

from __future__ import annotations

from typing import Literal

MAIN_SPEAKER = "SPEAKER_MAIN"
"""The label of Moshi's words in a transcript, unless a config names another; other words are not in its text."""
Side = Literal["left", "right"]
"""On which channel of a stereo recording Moshi is; the user is on the other."""
SIDES: dict[str, Side] = {"0": "left", "1": "right"}
"""The channels by their numbers."""
