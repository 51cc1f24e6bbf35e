"""The release script, in a repository of its own: what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import load_script
from tests.project import ROOT, pyproject

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
CHANGELOG = "# Changelog\n\n## [1.2.3] - 2026-01-31\n\n### Added\n\n- A thing.\n\n## [1.2.2] - 2025-12-31\n\n- Older.\n"
FILES = {
    "pyproject.toml": '[project]\nname = "moshi-ttt"\nversion = "1.2.3"\n',
    "CHANGELOG.md": CHANGELOG,
    "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
    "README.md": "@software{x,\n  version = {1.2.3},\n}\n",
    ".gitignore": "/dist/\n",
}
WHEEL = "dist/moshi_ttt-1.2.3-py3-none-any.whl"


def program(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", text


PASS = program("pass")
BUILD = program(
    f"import pathlib; p = pathlib.Path({WHEEL!r}); p.parent.mkdir(exist_ok=True); p.write_bytes(b'x' * 100)"
)


@pytest.fixture
def script():
    return load_script("release")


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A Maintainer")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "maintainer@example.org")
    root = tmp_path / "repository"
    root.mkdir()
    for name, text in FILES.items():
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    commit(root)
    return root


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "A commit")


def refused(script, root: Path, *commands: tuple[str, ...]) -> str:
    """The message of a refusal, which must have set no tag."""
    before = git(root, "tag", "--list")
    with pytest.raises(script.ReleaseError) as error:
        script.release(root, dry_run=False, commands=commands or (PASS, BUILD))
    assert git(root, "tag", "--list") == before
    return str(error.value)


def test_a_commit_without_problems_is_tagged(script, repository):
    assert script.release(repository, dry_run=False, commands=(PASS, BUILD)) == "v1.2.3"
    assert git(repository, "rev-parse", "v1.2.3^{commit}") == git(repository, "rev-parse", "HEAD")
    assert git(repository, "cat-file", "-t", "v1.2.3") == "tag", "the tag is an annotated one"


def test_a_dry_run_sets_no_tag(script, repository):
    assert script.release(repository, dry_run=True, commands=(PASS, BUILD)) == "v1.2.3"
    assert git(repository, "tag", "--list") == ""


@pytest.mark.parametrize("name", ["README.md", "new.txt"])
def test_a_dirty_tree_is_refused(script, repository, name):
    path = repository / name
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    said = refused(script, repository)
    assert "The working tree is not clean" in said
    assert name in said


def test_a_failing_command_is_refused(script, repository):
    ran = repository / "dist" / "ran"
    said = refused(script, repository, program("raise SystemExit(3)"), program(f"open({str(ran)!r}, 'w')"), BUILD)
    assert "ended with exit code 3" in said
    assert not ran.exists(), "nothing runs after a failure"


def test_a_command_that_is_not_there_is_refused(script, repository):
    assert "no-such-program cannot be run" in refused(script, repository, ("no-such-program",))


def test_a_command_that_leaves_files_behind_is_refused(script, repository):
    assert "left.txt" in refused(script, repository, program("open('left.txt', 'w')"), BUILD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Changelog\n", "no section on 1.2.3"),
        (CHANGELOG.replace("1.2.3", "1.2.30"), "no section on 1.2.3"),
        (CHANGELOG.replace("2026-01-31", "unreleased"), "is 'unreleased'. Give it a date"),
        (CHANGELOG.replace("- A thing.\n", ""), "is empty"),
    ],
)
def test_a_missing_changelog_section_is_refused(script, repository, text, message):
    (repository / "CHANGELOG.md").write_text(text)
    commit(repository)
    assert message in refused(script, repository)


def test_a_version_that_is_a_tag_is_refused(script, repository):
    git(repository, "tag", "v1.2.3")
    assert "The tag v1.2.3 exists" in refused(script, repository)


@pytest.mark.parametrize("name", ["CITATION.cff", "README.md"])
def test_a_file_of_another_version_is_refused(script, repository, name):
    path = repository / name
    path.write_text(path.read_text().replace("1.2.3", "1.2.2"))
    commit(repository)
    assert f"{name} names the version 1.2.2, pyproject.toml 1.2.3." in refused(script, repository)


def test_a_version_that_is_none_is_refused(script, repository):
    path = repository / "pyproject.toml"
    path.write_text(path.read_text().replace("1.2.3", "1.2.3.dev0"))
    commit(repository)
    assert "has the version '1.2.3.dev0'" in refused(script, repository)


def test_prebuilt_libraries_are_refused(script, repository):
    folder = repository / "plugins" / "common" / "prebuilt"
    folder.mkdir(parents=True)
    (folder / "a.so").touch()
    (repository / ".gitignore").write_text("/dist/\n/plugins/\n")
    commit(repository)
    assert "plugins/common/prebuilt has a.so, which would be in the wheel" in refused(script, repository)


def test_all_reasons_are_given_at_once(script, repository):
    (repository / "CHANGELOG.md").write_text("# Changelog\n")
    git(repository, "tag", "v1.2.3")
    said = refused(script, repository)
    assert [part in said for part in ("not clean", "The tag v1.2.3 exists", "no section")] == [True] * 3


def test_a_wheel_that_is_too_large_or_missing_is_refused(script, repository, monkeypatch):
    assert "dist/ has 0 wheels of 1.2.3" in refused(script, repository, PASS)
    monkeypatch.setattr(script, "LARGEST_WHEEL", 100)
    assert "docs/maintainers.md lists what is in it" in refused(script, repository, BUILD)


def test_outside_a_repository_it_is_refused(script, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(script.ReleaseError, match="git status"):
        script.release(tmp_path, dry_run=True, commands=(PASS,))


def test_it_runs_lint_tests_and_the_build(script):
    assert [command[:2] for command in script.COMMANDS[:2]] == [("make", "lint"), ("make", "test-full")]
    assert script.COMMANDS[2][1:3] == ("-m", "build")
    assert script.version_of(ROOT) == pyproject()["project"]["version"]
