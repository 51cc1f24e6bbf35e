"""Running the snippets of a page, in this process where that is possible: torch is then imported once."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from moshi_ttt.apps.cli import app
from moshi_ttt.configs.paths import find_config
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.core.config_parsing import parse_config, read_mapping
from moshi_ttt.core.registry import default_registry
from tests.docs.sizes import at_small_size
from tests.docs.snippets import Snippet, commands
from tests.project import ROOT, tomllib

INSTALLERS = ("pip", "git", "cd", "source", "export", "python3")
"""Programs that change the environment of a shell: nothing is left to check of them here."""
CHECKPOINT = re.compile(r"([\w./-]+/checkpoints)/checkpoint_\d{6}")
SHELL = re.compile(r"[$|;&<>]")


def run_page(found: Sequence[Snippet], folder: Path) -> None:
    """Run the snippets of one page in ``folder``. Fails with the place of the first one that does not work."""
    names: dict[str, Any] = {"__name__": "page"}
    with inside(folder):
        for snippet in found:
            try:
                run_snippet(snippet, names)
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                pytest.fail(f"{snippet.place}: {type(error).__name__}: {error}\n{snippet.code}")


def run_snippet(snippet: Snippet, names: dict[str, Any]) -> None:
    """Run one snippet in the present folder; ``names`` are those of the page's Python."""
    if snippet.title is not None:
        path, written = Path(snippet.title), names.setdefault("__files__", set())
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if path in written else "w", encoding="utf-8") as file:  # a second block continues it
            file.write(("\n\n" if path in written else "") + snippet.code)
        written.add(path)
    if snippet.language == "bash":
        for words in commands(snippet.code):
            check_command(words)
            if snippet.not_run is None and words[0] not in (*INSTALLERS, "make"):
                run_command(words)
    elif snippet.language == "python":
        program = compile(CHECKPOINT.sub(_newest, snippet.code), snippet.place, "exec", dont_inherit=True)
        if snippet.not_run is None and snippet.title is None:
            with redirect_stdout(io.StringIO()):
                exec(program, names)
    elif snippet.language == "toml":
        tomllib.loads(snippet.code)
    elif snippet.language == "json":
        for line in snippet.code.splitlines():
            json.loads(line)
    elif snippet.language == "yaml":
        check_config(yaml.safe_load(snippet.code), snippet.place)


def run_command(words: list[str]) -> None:
    """Run one command at a small size; anything but a zero exit code is an error that has its output."""
    if any(SHELL.search(word) for word in words) or "=" in words[0]:
        raise ValueError(f"a command of the shell that cannot be run here: {' '.join(words)}")
    words = [CHECKPOINT.sub(_newest, word) for word in at_small_size(words)]
    if words[0] == "moshi-ttt":
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        if result.exit_code != 0:
            raise ValueError(f"{' '.join(words)}: exit code {result.exit_code}\n{result.output}")
    elif words[0] == "python":
        run_program(words[1:])
    else:
        words = [sys.executable, "-m", *words, "-p", "no:cacheprovider"] if words[0] == "pytest" else words
        result = subprocess.run(words, capture_output=True, text=True)
        if result.returncode != 0:
            raise ValueError(f"{' '.join(words)}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}")


def _newest(named: re.Match[str]) -> str:
    """The checkpoint that a document names or, where a run had fewer steps here, the newest one of that run."""
    found = sorted(Path(named[1]).glob("checkpoint_*"))
    return named[0] if Path(named[0]).exists() or not found else str(found[-1])


def run_program(words: Sequence[str]) -> None:
    """``python FILE ARGUMENTS`` in this process. A file of the repository is found from any folder."""
    path = next(each for each in (Path(words[0]), ROOT / words[0]) if each.exists())
    output, arguments, search = io.StringIO(), sys.argv, sys.path[:]
    try:
        sys.argv = [str(path), *words[1:]]
        sys.path.insert(0, str(path.parent.resolve()))
        with redirect_stdout(output), redirect_stderr(output):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise ValueError(f"python {' '.join(words)}: exit code {ended.code}\n{output.getvalue()}") from None
    finally:
        sys.argv, sys.path[:] = arguments, search


def check_command(words: Sequence[str]) -> None:
    """The command, its options, the target of make, or the file of a program exist. Raises ValueError."""
    if words[0] == "moshi-ttt":
        check_options(words[1:])
    elif words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
        wrong = [word for word in words[1:] if "=" not in word and word not in targets and not word.startswith("-")]
        if wrong:
            raise ValueError(f"make has no target {wrong[0]!r}")
    elif words[0] == "python" and words[1].endswith(".py"):
        if not (Path(words[1]).exists() or (ROOT / words[1]).exists()):
            raise ValueError(f"there is no file {words[1]}")
    elif words[0] == "python" and words[1] == "-m" and words[2] == "moshi_ttt":
        check_options(words[3:])


def check_options(words: Sequence[str]) -> None:
    """``words`` after ``moshi-ttt`` name commands and options that exist."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        name = rest.pop(0)
        if name == "COMMAND":
            return
        if name not in command.commands:
            raise ValueError(f"moshi-ttt has no command {name!r}")
        command = command.commands[name]
    known = {"--help"} | {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    for word in rest:
        if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known:
            raise ValueError(f"moshi-ttt {command.name} has no option {word!r}")


def check_config(values: Any, where: str) -> None:
    """A config as a whole, or a part of one: a part replaces what train-cpu has at that place."""
    registry = default_registry()
    if isinstance(values, dict) and "host" in values and "run_dir" not in values:
        parse_config(values, registry=registry, where=where)
        return
    if isinstance(values, list):
        values = {"ttt": values}
    if not isinstance(values, dict):
        raise ValueError("neither a config nor a part of one")
    whole = read_mapping(find_config("train-cpu"))
    if "host" in values:
        whole.pop("moshi_paths")
    parse_settings({**whole, **values}, registry=registry, where=where)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in ``folder``, with a registry that has nothing left of it afterwards."""
    registry, before = default_registry(), os.getcwd()
    known = {(entry.kind, entry.name) for entry in registry.entries()}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        for entry in registry.entries():
            if (entry.kind, entry.name) not in known:
                registry.unregister(entry.kind, entry.name)
