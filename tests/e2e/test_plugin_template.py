"""A plugin from outside: the template is what ``new-plugin`` writes, and works beside our wheel, alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from moshi_ttt.apps.new_plugin import NewPluginError, create, render
from moshi_ttt.core.registry import Registry, default_registry
from tests.project import ROOT, copy_repository, run_environment

TEMPLATE = ROOT / "examples" / "moshi-ttt-plugin-template"


def test_the_template_is_what_new_plugin_writes():
    ignored = ("__pycache__", ".egg-info", "build", ".pytest_cache")
    found = {
        path.relative_to(TEMPLATE).as_posix(): path.read_text(encoding="utf-8")
        for path in TEMPLATE.rglob("*")
        if path.is_file() and not any(part in path.as_posix() for part in ignored)
    }
    assert found == {path.as_posix(): text for path, text in render("delta_rule").items()}


@pytest.mark.parametrize("name", ["Mine", "my-memory", "2nd", "", "class", "a b", "../x", "mine_", "a__b"])
def test_a_name_that_cannot_be_a_module_is_refused(name, tmp_path):
    with pytest.raises(NewPluginError, match="Use lower-case letters"):
        create(name, tmp_path / "new", Registry())
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_and_a_folder_in_the_way_are_refused(tmp_path):
    with pytest.raises(NewPluginError, match="a variant 'ttt_mlp' already, from moshi-ttt"):
        create("ttt_mlp", tmp_path / "new", default_registry())
    (tmp_path / "there").mkdir()
    with pytest.raises(NewPluginError, match=r"exists\. Choose another folder"):
        create("mine", tmp_path / "there", Registry())
    (tmp_path / "file").write_text("")
    with pytest.raises(NewPluginError, match="cannot be written"):
        create("mine", tmp_path / "file" / "new", Registry())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_another_name_is_used_throughout(tmp_path):
    written = create("my_memory", tmp_path / "mine", Registry())
    text = "\n".join(path.read_text(encoding="utf-8") for path in written)
    assert "delta_rule" not in text
    assert "@" not in text.replace("@hookimpl", "").replace(" @ ", "")
    assert (tmp_path / "mine" / "src" / "moshi_ttt_my_memory" / "block.py") in written
    for line in ('name = "moshi-ttt-my-memory"', 'my_memory = "moshi_ttt_my_memory"', "class MyMemory(SequenceBlock)"):
        assert line in text


FAULTY = {
    "broken": "import a_module_that_nobody_has",
    "outdated": "MOSHI_TTT_API = 0",
    "copycat": "from moshi_ttt_delta_rule import MOSHI_TTT_API, moshi_ttt_blocks",
}


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=run_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A new environment's Python, with our wheel and the template's, and its folder of packages.

    Torch, Moshi and what else they depend on are seen in the environment that runs the tests.
    """
    folder = tmp_path_factory.mktemp("clean")
    copy_repository(folder / "ours")
    shutil.copytree(TEMPLATE, folder / "template")
    for source in ("ours", "template"):
        build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist")
        run(*build, cwd=folder / source)
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(*pip, "--target", packages, *(folder / "dist").glob("*.whl"), cwd=folder)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, packages


@pytest.mark.exhaustive  # what plugins do: tests/conformance/outside, and the registry in tests/unit/core
def test_two_wheels_train_and_stream(clean, tmp_path):
    python, packages = clean
    listed = run(python, "-m", "moshi_ttt.apps.cli", "plugins", cwd=tmp_path)
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in _rows(listed)}
    assert rows["delta_rule"] == ["block", "moshi-ttt-delta-rule", "0.1.0", "loaded"]
    assert rows["ttt_mlp"] == ["block", "moshi-ttt", "0.1.0", "loaded"]
    where = run(python, "-c", "import moshi_ttt; print(moshi_ttt.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(packages), "the wheel is tested, not the checkout"
    said = run(python, TEMPLATE / "try_it.py", cwd=tmp_path)
    losses = [float(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith("step")]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert "streamed 24 frames" in said


@pytest.mark.exhaustive  # what plugins do: tests/conformance/outside, and the registry in tests/unit/core
def test_the_templates_own_tests_pass(clean, tmp_path):
    shutil.copytree(TEMPLATE / "tests", tmp_path / "tests")
    said = run(clean[0], "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path)
    assert "failed" not in said
    assert "passed" in said


@pytest.mark.exhaustive  # each fault in one process: tests/unit/core
def test_faulty_plugins_beside_them_are_reported_and_harmless_until_asked_for(clean, tmp_path):
    python, packages = clean
    for name, source in FAULTY.items():
        (packages / f"faulty_{name}.py").write_text(source + "\n")
        information = packages / f"faulty_{name}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: faulty-{name}\nVersion: 1.2\n")
        (information / "entry_points.txt").write_text(f"[moshi_ttt]\n{name} = faulty_{name}\n")
    table = run(python, "-m", "moshi_ttt.apps.cli", "plugins", cwd=tmp_path)
    claimed = [line for line in _rows(table) if "claimed twice" in line]
    assert len(claimed) == 2, "a name that two claim is shown with both"
    listed = " ".join(table.split())
    assert "broken: failed: ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in listed
    assert "outdated: outdated: it declares MOSHI_TTT_API = 0, this is version 1" in listed
    assert (
        "block 'delta_rule' is claimed by faulty-copycat 1.2 (plugin 'copycat') and by moshi-ttt-delta-rule" in listed
    )
    harmless = tmp_path / "ours.yaml"
    harmless.write_text("host: {name: moshi, hf_repo: builtin:tiny}\nttt: [{variant: ttt_linear, layers: last:1}]\n")
    assert "ttt_linear" in run(python, "-m", "moshi_ttt.apps.cli", "explain", harmless, cwd=tmp_path)
    for variant, reason in (("delta_rule", "is claimed by"), ("broken", "is failed"), ("outdated", "is outdated")):
        asked = tmp_path / "asked.yaml"
        asked.write_text(
            f"host: {{name: moshi, hf_repo: builtin:tiny}}\nttt: [{{variant: {variant}, layers: last:1}}]\n"
        )
        command = [str(python), "-m", "moshi_ttt.apps.cli", "explain", str(asked)]
        result = subprocess.run(command, cwd=tmp_path, env=run_environment(), capture_output=True, text=True)
        assert result.returncode == 2
        assert reason in " ".join(result.stderr.split())


def _rows(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("│")]
