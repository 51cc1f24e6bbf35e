"""``make talk`` and the example that plays a recording twice: programs that start a server and end it again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from tests.programs import load_script
from tests.project import ROOT

TALK, HEAR_TWICE = ROOT / "scripts" / "talk.py", ROOT / "examples" / "hear_twice.py"


@pytest.fixture
def talk():
    return load_script("talk")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ctrl_c(program: subprocess.Popen[str]) -> int:
    """In a terminal it reaches both programs. Returns the exit status to come."""
    os.killpg(program.pid, signal.SIGINT)
    return 0


def terminate(program: subprocess.Popen[str]) -> int:
    """The program alone, as a service manager does. Returns the exit status to come."""
    program.terminate()
    return 128 + signal.SIGTERM


@pytest.mark.exhaustive  # test_callers.py starts and ends the command that this script starts
@pytest.mark.parametrize("end", [terminate, ctrl_c])
def test_talk_opens_the_page_when_the_server_answers_and_ends_with_it(tmp_path, end):
    port = free_port()
    command = [sys.executable, str(TALK), "--port", str(port), "--no-browser"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True)
    try:
        assert program.stdout.readline() == f"Open http://localhost:{port}/ in a browser.\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"<html" in page.read()
        expected = end(program)
        assert program.wait(60) == expected
    finally:
        program.kill()
        program.stdout.close()
    assert not listening(port)


def test_a_port_in_use_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([sys.executable, str(TALK), "--port", port], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, f"Port {port} is in use" in done.stdout) == (2, True)


def test_memories_are_kept_where_they_are_asked_for(talk):
    assert "--memories" not in talk.server_command(8998, None)
    assert talk.server_command(8998, "kept")[-2:] == ["--memories", "kept"]


def test_a_server_that_ends_is_not_waited_for(talk):
    server = subprocess.Popen([sys.executable, "-c", ""])
    assert not talk.wait_until_healthy(server, free_port())
    server.wait()


@pytest.mark.exhaustive  # its parts: test_callers.py, test_reciting.py
def test_hear_twice_plays_to_a_server_of_its_own_and_draws_every_presentation(tmp_path):
    command = [sys.executable, str(HEAR_TWICE), "--seconds", "2.4", "--silence", "0.4", "--out", "twice"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| inner loss, mean | first, learning | second | after another recording |" in done.stdout
    found = json.loads((tmp_path / "twice" / "metrics.json").read_text())
    assert list(found["inner_loss"]) == [f"layers.{layer}.sequence" for layer in (1, 2, 3)]
    for series in found["series"].values():
        for points in series.values():
            assert all(0.9 < seconds <= 2.4 and loss > 0 for seconds, loss in points)
    assert (tmp_path / "twice" / "hear_twice.png").stat().st_size > 1000
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode != 0
    assert "twice exists and is not empty" in again.stderr
