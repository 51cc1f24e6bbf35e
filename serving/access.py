"""Who may connect: the token, the page that a browser shows, and the name it was asked for by.

A browser lets every page open a WebSocket to any server, and sends the page's Origin along: it must be this server's
own, or one that was allowed. It cannot set headers, so it sends the token as a subprotocol, which it takes from the
fragment of the page's address: fragments are not sent, and not logged.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from moshi_ttt.core.errors import ConfigError

TOKEN_PREFIX = "moshi-ttt.token."
"""What begins the subprotocol that carries a token."""
TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Who may connect.

    Attributes:
        token: what clients must know; None for nobody knows anything.
        origins: pages of other servers that may connect, as in ``https://example.org``.
        hosts: names by which this server may be asked for; None for any. On the loopback interface without a token, a
            page elsewhere could have its own name lead here, and be this server's own page to the browser.
    """

    token: str | None = None
    origins: Collection[str] = ()
    hosts: Collection[str] | None = LOOPBACK_NAMES

    def refusal(self, request: web.BaseRequest) -> str | None:
        """Why a request is refused, in words, or None."""
        name = urlsplit(f"//{request.host}").hostname
        if self.hosts is not None and name not in self.hosts:
            return "This server is asked for as localhost. Other names need a token: --token-file."
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and origin not in self.origins and not _same(origin, request.host):
            return "Pages of other servers may not connect. The server can allow one: --allow-origin."
        if self.token is not None and not self._knows(request):
            return "The token is missing, or wrong."
        return None

    def _knows(self, request: web.BaseRequest) -> bool:
        assert self.token is not None
        kind, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        offered = [given] if kind.lower() == "bearer" else []
        offered += [each.removeprefix(TOKEN_PREFIX) for each in subprotocols(request) if each.startswith(TOKEN_PREFIX)]
        # Every one is compared, each in a time that says nothing of how much of it was right.
        right = [hmac.compare_digest(each.strip().encode(), self.token.encode()) for each in offered]
        return any(right)


def subprotocols(request: web.BaseRequest) -> list[str]:
    """What a client offers to speak, its token among it."""
    listed = ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, []))
    return [name for each in listed.split(",") if (name := each.strip())]


def _same(origin: str, host: str) -> bool:
    """Whether a page comes from the server that it connects to."""
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigError; the message does not show what is in it."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path} cannot be read: {error}.") from None
    if not TOKEN.fullmatch(token):
        raise ConfigError(
            f"--token-file {path}: a token has 16 to 256 letters, digits, or . _ ~ -, on one line. Make one with "
            "`python -c 'import secrets; print(secrets.token_urlsafe())'`."
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def rules_for(host: str, *, token: str | None, insecure: bool, origins: Collection[str]) -> AccessRules:
    """The rules of a server on ``host``. Raises ConfigError for an address that anybody reaches and no token."""
    for origin in origins:
        if urlsplit(origin).scheme not in ("http", "https") or origin != "{0.scheme}://{0.netloc}".format(
            urlsplit(origin)
        ):
            raise ConfigError(f"--allow-origin {origin!r}: write it as in https://example.org, without a path.")
    if token is None and not insecure and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, so anybody there could talk to it. Give --token-file "
            "FILE, or --insecure if that is meant."
        )
    named = is_loopback(host) and token is None and not insecure
    allowed = LOOPBACK_NAMES | {urlsplit(origin).hostname or "" for origin in origins}
    return AccessRules(token=token, origins=tuple(origins), hosts=allowed if named else None)
