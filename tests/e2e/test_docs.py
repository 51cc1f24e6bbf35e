"""The documents say what is true: hooks have the signatures they give, names exist. ``tests/docs`` runs their code."""

from __future__ import annotations

import inspect
import re

import pytest

from moshi_ttt.core.hooks import HookSpecs
from moshi_ttt.core.precision import FP32, FP32_STATE, UNIFORM
from moshi_ttt.core.registry import HOOKS
from tests.project import ROOT, root_folders

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_hook_is_documented_with_its_signature():
    for name in HOOKS.values():
        signature = str(inspect.signature(getattr(HookSpecs, name))).replace("self, ", "").replace("'", "")
        assert f"`{name}{signature}`" in EXTENDING, f"docs/extending.md lacks `{name}{signature}`"


def test_the_role_table_is_the_policies_own():
    for role in ("master", "param", "state", "compute", "rope", "matmul", "reduce", "output"):
        (row,) = re.findall(rf"^\| `{role}` \| [^|]+\| (\w+) \| (\w+) \| (\w+) \|$", EXTENDING, flags=re.MULTILINE)
        assert row == tuple(getattr(policy, role) for policy in (FP32_STATE, UNIFORM, FP32)), role


def test_the_readmes_program_is_short_and_needs_no_network():
    (program,) = programs(README)
    assert '"builtin:tiny"' in program
    assert len([line for line in program.splitlines() if line.strip()]) <= 18


def test_the_readme_is_short_and_in_order():
    assert len(README.splitlines()) < 150
    assert re.findall(r"^## (.+)$", README, flags=re.MULTILINE) == [
        "The headline result", "Status", "Install", "A program", "The commands", "What it has", "Documentation",
        "Citation",
    ]  # fmt: skip


def test_the_readmes_commands_exist():
    from typer.main import get_command

    from moshi_ttt.apps.cli import app

    named = re.findall(r"^\| `moshi-ttt ([a-z-]+)", README, flags=re.MULTILINE)
    assert len(named) == 7
    (others,) = re.findall(r"lists the others: (.+)\.$", README, flags=re.MULTILINE)
    listed = {name for name, command in get_command(app).commands.items() if not command.hidden}
    assert {*named, *re.findall(r"`([a-z-]+)`", others)} == listed


def test_every_result_names_the_command_that_makes_it():
    rows = re.findall(r"^\| (?!---|command)(.+?) \|", RESULTS, flags=re.MULTILINE)
    assert len(rows) > 20
    assert all(re.fullmatch(r"`(make|moshi-ttt|python) [^`]+`", row) for row in rows), rows
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {target for row in rows for target in re.findall(r"`make ([a-z-]+)", row)} <= targets
    assert all((ROOT / path).is_file() for row in rows for path in re.findall(r"`python (\S+)`", row))


@pytest.mark.parametrize("document", sorted(ROOT.glob("**/*.md")), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document):
    text = document.read_text()
    if any(part.startswith(".") for part in document.relative_to(ROOT).parts) or "quickstart-run" in str(document):
        return
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    base = next((folder for folder in document.parents if (folder / "pyproject.toml").is_file()), ROOT)
    folders = "|".join((*root_folders(), "tests", "docs", "examples", "benchmarks", "scripts"))
    for path in re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", text):
        assert (base / path).exists(), f"{document.name} names {path}"
