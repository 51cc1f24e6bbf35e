"""The documents say what is true: their programs run, the hooks have the signatures they give, names exist."""

from __future__ import annotations

import inspect
import re

import pytest

import moshi_ttt
from moshi_ttt.core.hooks import HookSpecs
from moshi_ttt.core.precision import FP32, FP32_STATE, UNIFORM
from moshi_ttt.core.registry import HOOKS, default_registry
from tests.project import ROOT, root_folders

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
README = (ROOT / "README.md").read_text()


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_hook_is_documented_with_its_signature():
    for name in HOOKS.values():
        signature = str(inspect.signature(getattr(HookSpecs, name))).replace("self, ", "").replace("'", "")
        assert f"`{name}{signature}`" in EXTENDING, f"docs/extending.md lacks `{name}{signature}`"


def test_the_programs_of_the_guide_run_in_order():
    names: dict = {"__name__": "guide"}
    registry = default_registry()
    try:
        for program in programs(EXTENDING):
            exec(compile(program, "docs/extending.md", "exec", dont_inherit=True), names)
        assert callable(names["test_mean"])
    finally:
        registry.unregister("block", "mean")


def test_the_role_table_is_the_policies_own():
    for role in ("master", "param", "state", "compute", "rope", "matmul", "reduce", "output"):
        (row,) = re.findall(rf"^\| `{role}` \| [^|]+\| (\w+) \| (\w+) \| (\w+) \|$", EXTENDING, flags=re.MULTILINE)
        assert row == tuple(getattr(policy, role) for policy in (FP32_STATE, UNIFORM, FP32)), role


def test_the_readmes_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = programs(README)
    exec(compile(program, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    assert (tmp_path / "my-adapter" / "adapter.safetensors").is_file()


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


def test_the_public_names_are_these():
    assert sorted(moshi_ttt.__all__) == [
        "Injection", "Plan", "Registry", "default_registry", "inject", "load_adapter", "load_config", "make_plan",
        "parse_config", "save_adapter",
    ]  # fmt: skip
    for name in moshi_ttt.__all__:
        assert getattr(moshi_ttt, name).__module__.startswith("moshi_ttt.core."), name
    with pytest.raises(AttributeError, match="no_such"):
        moshi_ttt.no_such  # noqa: B018
