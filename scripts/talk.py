#!/usr/bin/env python3
"""Talk to the small Moshi with a memory: start its server, and open its page when the server answers.

    python scripts/talk.py [--port 8998] [--memories FOLDER] [--no-browser]

Nothing is downloaded, and a CPU is enough. Ctrl-C or SIGTERM ends the server too.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser

HOST = "127.0.0.1"
PATIENCE = 120.0
"""Seconds that the server may take to answer: it loads a model first."""
POLL = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8998, help="where the server listens (default: 8998)")
    parser.add_argument("--memories", help="folder where memories are kept (default: nothing is kept)")
    parser.add_argument("--no-browser", action="store_true", help="print the page's address instead of opening it")
    arguments = parser.parse_args()
    if listening(arguments.port):
        print(
            f"Port {arguments.port} is in use: a server may be running already. Give another with --port N "
            "(make talk ARGS='--port N')."
        )
        return 2
    signal.signal(signal.SIGTERM, stop)
    server = subprocess.Popen(server_command(arguments.port, arguments.memories))
    try:
        page = f"http://localhost:{arguments.port}/"
        if not wait_until_healthy(server, arguments.port):
            print("The server ended, or did not answer in time. What it printed says why.")
            return server.poll() or 1
        if arguments.no_browser or not webbrowser.open_new_tab(page):
            print(f"Open {page} in a browser.")
        return server.wait()
    except KeyboardInterrupt:  # the server has been interrupted too: it belongs to the same terminal
        return server.wait()
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait()


def stop(*_: object) -> None:
    """End this program, and so the server. Raises SystemExit."""
    raise SystemExit(128 + signal.SIGTERM)


def server_command(port: int, memories: str | None) -> list[str]:
    """What starts the server."""
    kept = [] if memories is None else ["--memories", memories]
    return [sys.executable, "-m", "moshi_ttt", "serve", "quickstart", "--port", str(port), *kept]


def listening(port: int) -> bool:
    """Whether a server listens there: another one's page would be opened instead of ours."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server answers, before it ends and before ``PATIENCE`` is over."""
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/api/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            time.sleep(POLL)
    return False


if __name__ == "__main__":
    raise SystemExit(main())
