"""``moshi-ttt completion``: scripts for three shells, and the answers that they ask for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from moshi_ttt.apps.console import COMPLETION_VARIABLE

PROGRAM = [sys.executable, "-m", "moshi_ttt"]


def answers(**environment: str) -> str:
    done = subprocess.run(
        PROGRAM, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=True
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_this_program(cli, shell):
    result = cli("completion", shell)
    assert result.exit_code == 0
    assert f"{COMPLETION_VARIABLE}=complete_{shell}" in result.stdout
    assert "moshi-ttt" in result.stdout


def test_another_shell_is_refused(cli):
    result = cli("completion", "tcsh")
    assert result.exit_code == 2
    assert "no completion for the shell 'tcsh'" in result.said
    for shell in ("bash", "zsh", "fish"):
        assert shell in result.said


def test_commands_and_options_are_completed():
    bash = {COMPLETION_VARIABLE: "complete_bash"}
    assert sorted(answers(**bash, COMP_WORDS="moshi-ttt e", COMP_CWORD="1").split()) == [
        "encode",
        "evaluate",
        "explain",
    ]
    assert answers(**bash, COMP_WORDS="moshi-ttt evaluate re", COMP_CWORD="2").split() == ["recall"]
    assert "--json" in answers(**bash, COMP_WORDS="moshi-ttt info --", COMP_CWORD="2").split()
    zsh = answers(**{COMPLETION_VARIABLE: "complete_zsh", "_TYPER_COMPLETE_ARGS": "moshi-ttt ex"})
    assert '"explain":"' in zsh
    fish = {COMPLETION_VARIABLE: "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert answers(**fish, _TYPER_COMPLETE_ARGS="moshi-ttt ex").startswith("explain\t")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_with_the_script(tmp_path):
    """The function of the script, called as bash calls it."""
    program = tmp_path / "moshi-ttt"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moshi_ttt "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(moshi-ttt completion bash)"\n'
        "COMP_WORDS=(moshi-ttt ver); COMP_CWORD=1\n"
        '_moshi_ttt_completion moshi-ttt\necho "${COMPREPLY[@]}"\n'
        "complete -p moshi-ttt\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )  # fmt: skip
    assert done.stdout.splitlines() == ["verify", "complete -o default -F _moshi_ttt_completion moshi-ttt"]
