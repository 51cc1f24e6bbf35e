"""The options of ``moshi-ttt generate``, with Moshi's own names for those of sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH

Recordings = Annotated[
    list[Path], typer.Argument(**PATH, help="Recordings (wav, ogg, flac, mp3), or folders of recordings.")
]
Out = Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")]
Config = Annotated[
    str, typer.Option("--config", "-c", help="A config that names the base model: a YAML file, or a packaged one.")
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="FOLDER",
        help="Folder of an adapter, or of a checkpoint that holds one; builtin:memory; or none. "
        "Default: builtin:memory for the tiny Moshi, else none.",
    ),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of sampling; repeatable, an answer for each. Default: 0."),
]
Temp = Annotated[float, typer.Option("--temp", min=0.0, help="Temperature of audio tokens; 0 is greedy.")]
TempText = Annotated[float, typer.Option("--temp-text", min=0.0, help="Temperature of text tokens; 0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Number of audio tokens to sample from.")]
TopKText = Annotated[int, typer.Option("--top-k-text", min=1, help="Number of text tokens to sample from.")]
Updates = Annotated[bool, typer.Option("--updates/--no-updates", help="Test-time updates on or off.")]
Volume = Annotated[
    float, typer.Option("--volume", min=0.0, help="Factor on what the blocks add; 0 is the base model, 10 the most.")
]
MemoryIn = Annotated[
    Path | None,
    typer.Option("--memory-in", **PATH, help="File of a saved memory, with which every answer begins. Default: none."),
]
MemoryOut = Annotated[
    Path | None,
    typer.Option(
        "--memory-out",
        **PATH,
        help="File for the memory at the end of the recording; for several answers, a folder with a file for "
        "each. Default: nothing is kept.",
    ),
]
Stereo = Annotated[
    bool, typer.Option("--stereo", help="Write two channels: the user left, Moshi right. Default: Moshi alone.")
]
UserChannelOption = Annotated[
    str, typer.Option("--user-channel", help="What of a recording Moshi hears: mean, or of stereo left or right.")
]
InnerLoss = Annotated[
    bool, typer.Option("--inner-loss", help="Also write a table and plots of the blocks' inner loss over time.")
]
SlotCount = Annotated[
    int | None,
    typer.Option("--slots", min=1, help="Recordings answered at the same time. Default: all, at most 4."),
]
OverwriteAnswers = Annotated[
    bool, typer.Option("--overwrite", help="Replace --out if this command made it, and --memory-out.")
]
