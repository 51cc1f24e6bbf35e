"""Check that this commit can be released, build it, and tag it. RELEASING.md has the steps before and after.

    python scripts/release.py [--dry-run]

Nothing is changed but the folder dist/ and, without --dry-run, the tag. Exit code 0 when the commit is tagged (or could
be), 1 when something is in the way; every reason is printed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LARGEST_WHEEL = 20 * 1000 * 1000
"""Bytes: wheels are smaller."""
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("make", "lint"),
    ("make", "test-full"),
    (sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."),
)
"""What has to pass; the last one builds the files of the release into dist/."""


class ReleaseError(Exception):
    """Something is in the way of a release."""


def git(root: Path, *arguments: str) -> str:
    """What git prints. Raises ReleaseError where it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ReleaseError(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def version_of(root: Path) -> str:
    """The version in pyproject.toml. Raises ReleaseError where it is none that can be released."""
    version: str = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise ReleaseError(f"pyproject.toml has the version {version!r}. Write it as 1.2.3, or 1.2.3rc1.")
    return version


def changes_of(root: Path, version: str) -> str:
    """The dated section of CHANGELOG.md on a version. Raises ReleaseError where it is missing, undated or empty."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    match = re.search(rf"^## \[{re.escape(version)}\] - (.+?)\n(.*?)(?=^## \[|\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ReleaseError(f"CHANGELOG.md has no section on {version}. Write it: ## [{version}] - YYYY-MM-DD")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", match[1].strip()):
        raise ReleaseError(
            f"The section on {version} of CHANGELOG.md is {match[1].strip()!r}. Give it a date, YYYY-MM-DD."
        )
    if not re.search(r"^- ", match[2], re.MULTILINE):
        raise ReleaseError(f"The section on {version} of CHANGELOG.md is empty. List what changes for a user.")
    return match[2].strip()


def refuse_dirty(root: Path) -> None:
    """Raise ReleaseError where a file is changed, or is neither in the repository nor ignored."""
    if changed := git(root, "status", "--porcelain"):
        raise ReleaseError(f"The working tree is not clean. Commit or remove:\n{changed}")


def refuse_tagged(root: Path, version: str) -> None:
    """Raise ReleaseError where the version is a tag already."""
    if git(root, "tag", "--list", f"v{version}"):
        raise ReleaseError(f"The tag v{version} exists. Write the next version in pyproject.toml.")


def refuse_other_versions(root: Path, version: str) -> None:
    """Raise ReleaseError where a file that tells how to cite the package names another version."""
    for name, pattern in (("CITATION.cff", r"^version: (\S+)$"), ("README.md", r"version = \{(\S+?)\}")):
        found = re.findall(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        if found != [version]:
            raise ReleaseError(f"{name} names the version {', '.join(found) or '(none)'}, pyproject.toml {version}.")


def refuse_prebuilt(root: Path) -> None:
    """Raise ReleaseError where C++ is prebuilt for this kind of machine: the wheel of a release is for every one."""
    if found := sorted((root / "plugins" / "common" / "prebuilt").glob("*.so")):
        raise ReleaseError(
            f"plugins/common/prebuilt has {', '.join(path.name for path in found)}, which would be in the wheel. "
            "Remove it: python scripts/prebuild.py --remove"
        )


def reasons(root: Path) -> Iterator[str]:
    """Every reason, found without running anything, why this commit cannot be released."""
    try:
        version = version_of(root)
    except ReleaseError as error:
        yield str(error)
        return
    for check in (
        lambda: refuse_dirty(root), lambda: refuse_tagged(root, version), lambda: changes_of(root, version),
        lambda: refuse_other_versions(root, version), lambda: refuse_prebuilt(root),
    ):  # fmt: skip
        try:
            check()
        except ReleaseError as error:
            yield str(error)


def run(root: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run each command. Raises ReleaseError at the first that fails, and where the tree is not clean afterwards."""
    for command in commands:
        print(f"$ {' '.join(command)}", flush=True)
        try:
            code = subprocess.run(command, cwd=root).returncode
        except OSError as error:
            raise ReleaseError(f"{' '.join(command)} cannot be run: {error}") from error
        if code:
            raise ReleaseError(f"{' '.join(command)} ended with exit code {code}. Make it pass first.")
    refuse_dirty(root)


def built(root: Path, version: str) -> Path:
    """The wheel of the version in dist/. Raises ReleaseError where there is none, or it is too large."""
    wheels = sorted((root / "dist").glob(f"*-{version}-*.whl"))
    if len(wheels) != 1:
        raise ReleaseError(f"dist/ has {len(wheels)} wheels of {version}, and one is expected. Empty the folder.")
    size = wheels[0].stat().st_size
    if size >= LARGEST_WHEEL:
        raise ReleaseError(
            f"{wheels[0].name} has {size / 1e6:.1f} MB, and less than {LARGEST_WHEEL / 1e6:.0f} are allowed. "
            "docs/maintainers.md lists what is in it."
        )
    return wheels[0]


def release(root: Path, *, dry_run: bool, commands: Sequence[Sequence[str]] = COMMANDS) -> str:
    """Check, build and tag; the tag's name. Raises ReleaseError, with every reason that is known, before it tags."""
    if found := list(reasons(root)):
        raise ReleaseError("\n".join(found))
    version = version_of(root)
    commit = git(root, "rev-parse", "HEAD")
    run(root, commands)
    built(root, version)
    if git(root, "rev-parse", "HEAD") != commit:
        raise ReleaseError("Another commit was checked out meanwhile. Run this again.")
    refuse_tagged(root, version)
    if not dry_run:
        git(root, "tag", "--annotate", f"v{version}", "--message", f"moshi-ttt {version}", commit)
    return f"v{version}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="check and build, and set no tag")
    arguments = parser.parse_args()
    try:
        tag = release(ROOT, dry_run=arguments.dry_run)
    except ReleaseError as error:
        print(f"Not released.\n{error}", file=sys.stderr)
        return 1
    print(f"{tag} could be released." if arguments.dry_run else f"Tagged {tag}. Next: git push origin {tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
