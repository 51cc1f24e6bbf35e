"""What stands around the code: workflows, templates, hooks, the citation, and the tables for maintainers."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.project import ROOT, pyproject

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
YAML = [*WORKFLOWS, *sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ROOT / ".pre-commit-config.yaml"]
MAINTAINERS = ROOT / "docs" / "maintainers.md"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow: dict[str, Any]) -> list[str]:
    return [line.strip() for step in steps(workflow) for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("path", YAML, ids=relative)
def test_yaml_can_be_read(path):
    assert isinstance(read(path), dict)


def test_there_are_workflows_and_templates():
    assert [path.name for path in WORKFLOWS] == ["nightly.yml", "tests.yml"]
    assert len(YAML) == 6
    assert (GITHUB / "pull_request_template.md").is_file()


@pytest.mark.parametrize("path", WORKFLOWS, ids=relative)
def test_a_workflow_uses_targets_that_exist_and_may_write_nothing(path):
    workflow = read(path)
    assert workflow[True], "`on` is true in YAML 1.1"
    assert workflow["permissions"] == {"contents": "read"}
    used = {target for line in commands(workflow) for target in re.findall(r"^make ([a-z-]+)", line)}
    assert used
    assert used <= TARGETS
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps(workflow) if "uses" in step)


def test_targets_in_documents_exist():
    for name in ("RELEASING.md", "SECURITY.md", "docs/maintainers.md", ".github/pull_request_template.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"`?make ([a-z][a-z-]+)", " ".join(re.findall(r"`[^`]+`", text)))) <= TARGETS, name


def test_a_target_that_is_no_file_is_phony():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert set(phony.split()) == TARGETS


# ---- versions


def bounds(name: str) -> tuple[str, str]:
    """The oldest version that pyproject.toml allows, and the first that it does not."""
    lines = [line for line in pyproject()["project"]["dependencies"] if re.match(rf"{name}\b", line)]
    found = re.fullmatch(rf"{name}>=([\d.]+),<([\d.]+)", lines[0])
    return found[1], found[2]


def test_the_tests_run_with_the_oldest_and_the_newest_versions():
    matrix = read(GITHUB / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    oldest, beyond = bounds("torch")
    major, minor = beyond.split(".")
    assert matrix["torch"] == [f"{oldest}.*", f"{major}.{int(minor) - 1}.*"]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", pyproject()["project"]["requires-python"]).groups()
    assert matrix["python"] == [f"3.{minor}" for minor in range(int(low), int(high))]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of docs/maintainers.md."""
    text = MAINTAINERS.read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_compatible_versions_are_those_that_pyproject_allows():
    found = {row[0]: row[1] for row in rows("Versions")}
    assert found["Python"] == pyproject()["project"]["requires-python"]
    for name in ("torch", "moshi"):
        assert found[name] == ">={},<{}".format(*bounds(name))


def test_versions_that_were_run_are_allowed():
    for _, allowed, run in rows("Versions"):
        assert run
        for each in run.split(", "):
            assert SpecifierSet(allowed).contains(each), f"{each} is not {allowed}"


# ---- files that others read


def test_the_citation_is_complete_and_of_this_version():
    found = read(ROOT / "CITATION.cff")
    project = pyproject()["project"]
    assert {"cff-version", "message", "title", "type", "authors", "version", "license"} <= found.keys()
    assert (found["cff-version"], found["type"]) == ("1.2.0", "software")
    assert str(found["version"]) == project["version"] == version("moshi-ttt")
    assert found["license"] == project["license"]
    assert found["authors"] == project["authors"]
    assert found["keywords"] == project["keywords"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"title = {{{found['title']}}}" in readme
    assert f"version = {{{found['version']}}}" in readme


def test_hooks_are_local_and_of_the_environment():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert hooks.keys() == {"ruff", "ruff-format", "mypy"}
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    for hook in hooks.values():
        assert hook["language"] == "system"
        command = hook["entry"].removesuffix(" --force-exclude")
        assert f"$(BIN)/{command}" in lint, "a hook runs what `make lint` runs"


def test_a_bug_report_asks_for_info():
    body = read(GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml")["body"]
    assert all(part["attributes"]["label"] for part in body)
    (info,) = (part for part in body if part["id"] == "info")
    assert "`moshi-ttt info`" in info["attributes"]["label"]
    assert info["validations"]["required"] is True


def test_the_security_policy_names_commands_that_exist():
    from moshi_ttt.apps.commands.manuals import MANUALS

    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`moshi-ttt ([a-z-]+)", text)
    assert named
    assert set(named) <= MANUALS.keys()


def test_the_spelling_of_what_commands_write_is_not_checked():
    """`make lint` passes in a folder in which every other command has run."""
    skipped = {pattern.removeprefix("./") for pattern in pyproject()["tool"]["codespell"]["skip"].split(",")}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    caches = {"__pycache__", ".coverage*", *(name for name in ignored if name.endswith("_cache"))}
    assert set(ignored) - caches <= skipped
