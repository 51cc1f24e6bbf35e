"""The options of ``moshi-ttt serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH

LIMITS, ACCESS = "Limits", "Access"

LiveConfig = Annotated[str, typer.Argument(help="A config that names the base model: a YAML file, or a packaged one.")]
LiveAdapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        "-a",
        help="Folder of an adapter, or of a checkpoint that holds one; builtin:memory; or none. Default: "
        "builtin:memory for the tiny Moshi, else none.",
    ),
]
LiveSlots = Annotated[int, typer.Option("--slots", min=1, help="Callers at once, each with a memory of its own.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")]
Address = Annotated[str, typer.Option("--host", help="Address to listen at.")]
Memories = Annotated[
    Path | None,
    typer.Option("--memories", **PATH, help="Folder where callers may keep memories. Default: nothing is kept."),
]
MemoryPrecision = Annotated[
    str, typer.Option("--memory-precision", help="How memories are written: exact, difference, or bfloat16.")
]
LiveSeed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of callers that name none. Default: a random one for each caller."),
]
PerOwner = Annotated[
    int, typer.Option("--memories-per-owner", min=1, help="Memories of one owner.", rich_help_panel=LIMITS)
]
StoreSize = Annotated[
    float, typer.Option("--memories-gib", min=0.001, help="GiB of all memories.", rich_help_panel=LIMITS)
]
StoreAge = Annotated[
    float,
    typer.Option("--memories-days", min=0, help="Age at which memories are removed; 0: never.", rich_help_panel=LIMITS),
]
Waiting = Annotated[
    int, typer.Option("--waiting", min=0, help="Clients that may wait for a slot.", rich_help_panel=LIMITS)
]
Resume = Annotated[
    float,
    typer.Option(
        "--resume-sec", min=0, help="Seconds that a slot is kept for a lost connection.", rich_help_panel=LIMITS
    ),
]
Idle = Annotated[
    float,
    typer.Option("--idle-sec", min=1, help="Seconds that a slot is kept without sound.", rich_help_panel=LIMITS),
]
RequestSec = Annotated[
    float,
    typer.Option(
        "--request-sec", min=0.1, help="Seconds for a TLS handshake, and for a request to come whole.",
        rich_help_panel=LIMITS,
    ),
]  # fmt: skip
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        **PATH,
        help="File with a token that clients must send. Default: no token.",
        rich_help_panel=ACCESS,
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        help="Another server whose pages may connect; repeatable. Default: none.",
        rich_help_panel=ACCESS,
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option("--tls-cert", **PATH, help="Certificate, in PEM. Default: no TLS.", rich_help_panel=ACCESS),
]
CertificateKey = Annotated[
    Path | None,
    typer.Option("--tls-key", **PATH, help="Key of the certificate, in PEM. Default: no TLS.", rich_help_panel=ACCESS),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Let everybody connect who reaches --host.", rich_help_panel=ACCESS)
]
