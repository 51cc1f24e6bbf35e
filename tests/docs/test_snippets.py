"""Every block of code and every command of the documents runs, or says why it cannot run here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.running import check_command, check_config, check_options, run_page, run_snippet
from tests.docs.snippets import LANGUAGES, REASONS, Snippet, documents, inline_commands, snippets
from tests.docs.world import RUN
from tests.project import ROOT

PAGES = {path.relative_to(ROOT).as_posix(): path for path in documents()}
FOUND = {page: snippets(path) for page, path in PAGES.items()}
QUICK = ("README.md", "docs/tutorials/first-memory.md")
"""The pages whose code `make test` runs; `make test-full`, and so CI, runs that of all."""


def pages() -> list[object]:
    return [
        pytest.param(page, id=page, marks=() if page in QUICK else pytest.mark.exhaustive)
        for page, found in FOUND.items()
        if found
    ]


@pytest.mark.parametrize("page", pages())
def test_the_code_of_a_page_runs(page, world, tmp_path):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    if any("train train-cpu\n" in re.sub(r" +#.*", "", snippet.code) for snippet in FOUND[page]):
        shutil.rmtree(tmp_path / RUN)  # the page trains it
    run_page(FOUND[page], tmp_path)


def test_code_is_found_on_every_kind_of_page():
    assert set(QUICK) <= FOUND.keys()
    assert sum(map(len, FOUND.values())) > 60
    assert all(snippet.language in LANGUAGES for found in FOUND.values() for snippet in found), [
        snippet.place for found in FOUND.values() for snippet in found if snippet.language not in LANGUAGES
    ]


def test_what_is_not_run_says_why():
    given = {(snippet.not_run, snippet.place) for found in FOUND.values() for snippet in found if snippet.not_run}
    for reason, place in given:
        if reason.endswith(" runs it"):
            assert (ROOT / reason.removesuffix(" runs it")).is_file(), f"{place}: {reason}"
        else:
            assert reason in REASONS, f"{place}: {reason!r} is no reason. Allowed: {', '.join(REASONS)}"
    unused = set(REASONS) - {reason for reason, _ in given}
    assert not unused, f"remove what no page uses: {unused}"


def test_commands_in_the_text_exist():
    wrong, number = [], 0
    for path in PAGES.values():
        for words in inline_commands(path):
            number += 1
            try:
                check_command(words)
            except ValueError as error:
                wrong.append(f"{path.relative_to(ROOT)}: {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)
    assert number > 60


# ---- what must be found


def write(folder: Path, text: str) -> list[Snippet]:
    (folder / "page.md").write_text(text, encoding="utf-8")
    return snippets(folder / "page.md")


def test_blocks_are_found_with_title_and_reason(tmp_path):
    text = (
        'Text\n\n```yaml title="a.yaml"\nx: 1\n```\n\n<!-- not run: needs a GPU -->\n\n- item\n\n'
        "<!-- not run: needs a GPU -->\n\n  ```bash\n  moshi-ttt plugins \\\n    --check  # all\n  ```\n\n"
        "    make test\n"
    )
    first, second, third = write(tmp_path, text)
    assert (first.title, first.not_run, first.line, first.code) == ("a.yaml", None, 3, "x: 1\n")
    assert (second.not_run, second.language) == ("needs a GPU", "bash")
    assert (third.code, third.language, third.not_run) == ("make test\n", "bash", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nraise ValueError('not this')\n```\n", "not this"),
        ("```bash\nmoshi-ttt explain no-such-config\n```\n", "exit code 2"),
        ("```bash\nmoshi-ttt explain --no-such-option\n```\n", "no option '--no-such-option'"),
        ("<!-- not run: needs a GPU -->\n```bash\nmoshi-ttt no-such-command\n```\n", "no command 'no-such-command'"),
        ("```bash\nmake no-such-target\n```\n", "no target 'no-such-target'"),
        ("```bash\npython scripts/no_such_file.py\n```\n", "no file"),
        ("```bash\nfalse\n```\n", "exit code 1"),
        ("```bash\ntrue | true\n```\n", "cannot be run here"),
        ("```yaml\nttt: [{variant: ttt_mpl, layers: all}]\n```\n", "ttt_mlp"),
        ("```json\n{\n```\n", "line 1"),
    ],
)
def test_wrong_code_fails_with_its_place(tmp_path, text, said):
    with pytest.raises(pytest.fail.Exception, match=said) as failure:
        run_page(write(tmp_path, text), tmp_path)
    assert "page.md:" in str(failure.value)


def test_a_titled_block_is_a_file_for_what_follows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = '```python title="show.py"\nraise SystemExit(3)\n```\n\n```bash\npython show.py\n```\n'
    written, command = write(tmp_path, text)
    run_snippet(written, {})
    with pytest.raises(ValueError, match="exit code 3"):
        run_snippet(command, {})


@pytest.mark.parametrize(
    "words", [["explain", "--json", "x"], ["evaluate", "recall", "--frames", "3"], ["COMMAND", "-x"]]
)
def test_options_that_exist_are_accepted(words):
    check_options(words)


@pytest.mark.parametrize("values", [{"ttt": [{"variant": "ttt_mlp", "layers": "1"}]}, {"optim": {"lr": 1e-4}}])
def test_a_part_of_a_config_is_read_as_one(values):
    check_config(values, "here")
