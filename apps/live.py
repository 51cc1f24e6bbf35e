"""Loading a Moshi and serving it live: what ``moshi-ttt serve`` does."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import typer

from moshi_ttt.apps.talker import Talker, chosen_adapter, load_talker
from moshi_ttt.hosts.moshi.slots import Slots
from moshi_ttt.serving.access import AccessRules, is_loopback
from moshi_ttt.serving.http import HttpOptions
from moshi_ttt.serving.logs import log_as_json
from moshi_ttt.serving.memory_store import MemoryStore, StoreLimits
from moshi_ttt.serving.precision import Precision
from moshi_ttt.serving.server import ServerOptions, serve
from moshi_ttt.serving.sessions import SessionLimits
from moshi_ttt.system.threads import computing, largest


@dataclass(frozen=True, kw_only=True)
class LiveRequest:
    """What is served, to whom, and within which limits."""

    config: str
    adapter: str | None
    slots: int
    seed: int | None
    memories: Path | None
    precision: str
    store: StoreLimits
    sessions: SessionLimits
    http: HttpOptions
    access: AccessRules
    tls: ssl.SSLContext | None


def listen(
    ctx: typer.Context,
    request: LiveRequest,
    listening: socket.socket,
    threads: int | None,
    ready: Callable[[Talker, int], None],
) -> bool:
    """Load the model and serve it at a bound socket until a signal asks to stop. False where the model failed.

    ``ready`` is called when clients can connect, with the port.
    """
    talker = load_talker(request.config, chosen_adapter(request.config, request.adapter))
    ctx.with_resource(computing(largest(talker.model, talker.mimi), threads))
    handler = log_as_json()
    try:
        with Slots(talker.model, talker.mimi, request.slots) as slots:
            slots.warm_up()
            store = None
            if request.memories is not None:
                start = slots.learned_start() if request.precision == "difference" else None
                precision = cast(Precision, request.precision)
                store = MemoryStore(request.memories, request.store, precision=precision, start=start)
            options = ServerOptions(
                access=request.access, sessions=request.sessions, http=request.http, store=store, tls=request.tls,
                seed=request.seed,
                facts={"model": talker.facts, "memories": store is not None, "blocks": _blocks(talker)},
            )  # fmt: skip
            return serve(slots, text_of(talker), listening, options, lambda port: ready(talker, port))
    finally:
        logging.getLogger("moshi_ttt.serving").removeHandler(handler)


def page_address(host: str, port: int, *, tls: bool, token_file: Path | None) -> str:
    """Where the page is; how to give a token, but not the token."""
    name = "localhost" if is_loopback(host) else f"[{host}]" if ":" in host else host
    address = f"http{'s' if tls else ''}://{name}:{port}/"
    return address if token_file is None else f"{address}#token=TOKEN, with the token in {token_file}"


def text_of(talker: Talker) -> Callable[[int], str | None]:
    """What a text token says, as Moshi's own server writes it; None for one that says nothing."""
    silent, tokenizer = talker.silent_tokens, talker.codec.tokenizer

    def said(token: int) -> str | None:
        return None if token in silent else str(tokenizer.id_to_piece(token)).replace("▁", " ")

    return said


def _blocks(talker: Talker) -> list[str]:
    if talker.injection is None:
        return []
    return [f"{site}: {block.config.variant}" for site, block in talker.injection.blocks.items()]
