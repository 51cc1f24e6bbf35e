"""``moshi-ttt serve``: talk to Moshi live, several people at once."""

from __future__ import annotations

import typer

from moshi_ttt.apps.arguments import Threads
from moshi_ttt.apps.commands import serving_options as given
from moshi_ttt.apps.console import EXIT_FAILED
from moshi_ttt.core.errors import ConfigError


def serve(
    ctx: typer.Context,
    config: given.LiveConfig,
    adapter: given.LiveAdapter = None,
    slots: given.LiveSlots = 4,
    port: given.Port = 8998,
    host: given.Address = "127.0.0.1",
    memories: given.Memories = None,
    precision: given.MemoryPrecision = "exact",
    per_owner: given.PerOwner = 8,
    max_gib: given.StoreSize = 4.0,
    max_days: given.StoreAge = 30.0,
    waiting: given.Waiting = 32,
    resume: given.Resume = 30.0,
    idle: given.Idle = 300.0,
    request_sec: given.RequestSec = 10.0,
    token_file: given.TokenFile = None,
    allow_origin: given.AllowOrigin = None,
    tls_cert: given.Certificate = None,
    tls_key: given.CertificateKey = None,
    insecure: given.Insecure = False,
    seed: given.LiveSeed = None,
    threads: Threads = None,
) -> None:
    """Talk to Moshi live, several people at once.

    The server has a page, and speaks the protocol of Moshi's own clients. Ctrl-C saves what callers asked to keep.
    """
    from typing import get_args

    from moshi_ttt.apps.live import LiveRequest, listen, page_address
    from moshi_ttt.apps.talker import Talker
    from moshi_ttt.serving.access import read_token, rules_for
    from moshi_ttt.serving.http import HttpOptions
    from moshi_ttt.serving.memory_store import DAY, MIB, StoreLimits
    from moshi_ttt.serving.precision import Precision
    from moshi_ttt.serving.server import bound_socket, tls_context
    from moshi_ttt.serving.sessions import SessionLimits

    if precision not in get_args(Precision):
        raise ConfigError(f"--memory-precision {precision!r}: allowed are {', '.join(get_args(Precision))}.")
    token = None if token_file is None else read_token(token_file)
    tls = tls_context(tls_cert, tls_key)
    request = LiveRequest(
        config=config, adapter=adapter, slots=slots, seed=seed, memories=memories, precision=precision,
        store=StoreLimits(
            per_owner=per_owner, total_bytes=int(max_gib * 1024 * MIB), max_age_sec=max_days * DAY or None
        ),
        sessions=SessionLimits(waiting=waiting, resume_sec=resume, idle_sec=idle),
        http=HttpOptions(request_sec=request_sec),
        access=rules_for(host, token=token, insecure=insecure, origins=allow_origin or []), tls=tls,
    )  # fmt: skip

    def ready(talker: Talker, bound: int) -> None:
        address = page_address(host, bound, tls=tls is not None, token_file=token_file)
        typer.echo(f"Talk to {talker.facts['base model']} at {address}", err=True)

    with bound_socket(host, port) as listening:  # before a model is loaded for it
        if not listen(ctx, request, listening, threads, ready):
            raise typer.Exit(EXIT_FAILED)
