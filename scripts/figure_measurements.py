"""The measurements behind two figures: made by this package's own commands, in a temporary folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FRAME_SECONDS = 0.08
WINDOW = 64
"""Frames of the running mean of the inner losses, and of a window of the loss by position."""
CURVES = ("initial", "before", "after")
POINTS = 5
"""Every so many frames there is a point of a curve."""


def measure(name: str) -> dict[str, Any]:
    """What the figure ``name`` shows, by the commands that ``commands`` of the result lists."""
    with tempfile.TemporaryDirectory() as folder:
        return {"inner-loop": _inner_loop, "position": _position}[name](Path(folder))


def _run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "moshi_ttt", *words], check=True)


def _inner_loop(folder: Path) -> dict[str, Any]:
    run, out = folder / "quickstart-run", folder / "inner"
    _run("quickstart", "--out", str(run))
    _run("evaluate", "inner-loop", "quickstart", "--data", "builtin:held-out", "-a", f"ttt={run / 'adapter'}",
         "--out", str(out))  # fmt: skip
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    sites = [
        {"site": site["site"], **{name: _smooth(site["mean_of_heads_by_position"][name]) for name in CURVES}}
        for site in found["sites"]
    ]
    commands = [
        "moshi-ttt quickstart",
        "moshi-ttt evaluate inner-loop quickstart --data builtin:held-out -a ttt=quickstart-run/adapter",
    ]
    return {"commands": commands, "seconds": _seconds(len(sites[0]["initial"])), "sites": sites}


def _smooth(values: list[float | None]) -> list[float]:
    """The running mean over ``WINDOW`` frames, thinned; where a loss is not known, of the others in the window."""
    known = np.array([np.nan if value is None else value for value in values])
    windows = np.lib.stride_tricks.sliding_window_view(known, WINDOW)[::POINTS]  # [points, WINDOW]
    return [round(float(mean), 4) for mean in np.nanmean(windows, axis=1)]


def _seconds(points: int) -> list[float]:
    return [round((WINDOW / 2 + POINTS * point) * FRAME_SECONDS, 3) for point in range(points)]


def _position(folder: Path) -> dict[str, Any]:
    from moshi_ttt.hosts.moshi.tiny import memory_adapter

    out = folder / "context"
    options = ("--data", "builtin:held-out", "--window", str(WINDOW))
    _run("evaluate", "long-context", "quickstart", *options, "-a", f"memory={memory_adapter()}", "--out", str(out))
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    wanted = {("base", "updates on"): "base", ("memory", "updates on"): "on", ("memory", "updates off"): "off"}
    losses = {
        wanted[key]: [round(value, 4) for value in curve["mean_by_window"]]
        for curve in found["curves"]
        if curve["stream"] == "audio" and (key := (curve["subject"], curve["condition"])) in wanted
    }
    windows = len(losses["base"])
    return {
        "commands": ["moshi-ttt evaluate long-context quickstart --data builtin:held-out --window 64 -a memory=MEMORY"],
        "context_seconds": found["context_frames"] * FRAME_SECONDS,
        "seconds": [round((at + 0.5) * WINDOW * FRAME_SECONDS, 3) for at in range(windows)],
        "losses": losses,
    }
