"""``moshi-ttt serve``: talk to Moshi live, several people at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH, Threads
from moshi_ttt.apps.console import EXIT_FAILED
from moshi_ttt.core.errors import ConfigError

Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", "-a",
        help="Folder of an adapter, or of a checkpoint that holds one; builtin:memory; or none. Default: builtin:memory "
        "for the tiny Moshi, else none.",
    ),
]  # fmt: skip
Limit = "Limits"
Safety = "Access"


def serve(
    ctx: typer.Context,
    config: Annotated[str, typer.Argument(help="A config that names the base model: a YAML file, or a packaged one.")],
    adapter: Adapter = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Callers at once, each with a memory of its own.")] = 4,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes one that is free.")] = 8998,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    memories: Annotated[
        Path | None, typer.Option("--memories", **PATH, help="Folder of memories that callers keep. Default: none is.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--memory-precision", help="Of kept memories: exact, difference, or bfloat16.")
    ] = "exact",
    per_owner: Annotated[int, typer.Option("--memories-per-owner", min=1, rich_help_panel=Limit)] = 8,
    max_gib: Annotated[float, typer.Option("--memories-gib", min=0.001, rich_help_panel=Limit)] = 4.0,
    max_days: Annotated[
        float, typer.Option("--memories-days", min=0, help="0 keeps them forever.", rich_help_panel=Limit)
    ] = 30.0,
    waiting: Annotated[
        int, typer.Option("--waiting", min=0, help="Clients that may wait for a place.", rich_help_panel=Limit)
    ] = 32,
    resume: Annotated[
        float, typer.Option("--resume-sec", min=0, help="How long a place outlasts a lost connection.",
                            rich_help_panel=Limit)
    ] = 30.0,
    idle: Annotated[
        float, typer.Option("--idle-sec", min=1, help="How long a place is kept without sound.", rich_help_panel=Limit)
    ] = 300.0,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", **PATH, help="Clients must know the token in it.",
                                  rich_help_panel=Safety)
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option("--allow-origin", help="Another server's page that may connect; repeatable.",
                                       rich_help_panel=Safety)
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", **PATH, rich_help_panel=Safety)] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", **PATH, rich_help_panel=Safety)] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let anybody connect who reaches --host.", rich_help_panel=Safety)
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of callers that name none. Default: a random one for each.")
    ] = None,
    threads: Threads = None,
) -> None:  # fmt: skip
    """Talk to Moshi live: a page at http://localhost:8998, and the WebSocket protocol of Moshi's own clients.

    Ctrl-C, or SIGTERM, saves what callers asked to keep, says goodbye, and ends with exit code 0; 1 where the model
    failed.
    """
    from typing import get_args

    from moshi_ttt.apps.live import LiveRequest, listen
    from moshi_ttt.apps.talker import Talker
    from moshi_ttt.serving.access import is_loopback, read_token, rules_for
    from moshi_ttt.serving.memory_store import DAY, MIB, StoreLimits
    from moshi_ttt.serving.precision import Precision
    from moshi_ttt.serving.server import bound_socket, tls_context
    from moshi_ttt.serving.sessions import SessionLimits

    if precision not in get_args(Precision):
        raise ConfigError(f"--memory-precision {precision!r}: allowed are {', '.join(get_args(Precision))}.")
    token = None if token_file is None else read_token(token_file)
    access = rules_for(host, token=token, insecure=insecure, origins=allow_origin or [])
    tls = tls_context(tls_cert, tls_key)
    limits = StoreLimits(
        per_owner=per_owner, total_bytes=int(max_gib * 1024 * MIB), max_age_sec=max_days * DAY or None
    )  # fmt: skip
    request = LiveRequest(
        config=config, adapter=adapter, slots=slots, seed=seed, memories=memories, precision=precision, store=limits,
        sessions=SessionLimits(waiting=waiting, resume_sec=resume, idle_sec=idle), access=access, tls=tls,
    )  # fmt: skip

    def ready(talker: Talker, port: int) -> None:
        name = "localhost" if is_loopback(host) else host
        page = f"http{'' if tls is None else 's'}://{name}:{port}/"
        if token_file is not None:
            page += f"#token=TOKEN (the token is in {token_file})"
        typer.echo(f"Talk to {talker.facts['base model']} at {page}", err=True)

    with bound_socket(host, port) as listening:  # before a model is loaded for it
        if not listen(ctx, request, listening, threads, ready):
            raise typer.Exit(EXIT_FAILED)
