"""``scripts/table_in_page.py``: the table between two marks is written, and a page without the marks is refused."""

from __future__ import annotations

import sys

import pytest

from tests.programs import load_script

BEGIN, END = "<!-- some costs: written by scripts/some.py -->\n", "<!-- end of some costs -->\n"
MODULE = load_script("table_in_page")


@pytest.fixture
def table(tmp_path):
    (tmp_path / "page.md").write_text(f"Before.\n\n{BEGIN}| a |\n| --- |\n| old | 1 |\n{END}\nAfter.\n")
    return MODULE.TableInPage("some costs", "some.py", tmp_path / "page.md")


def test_only_what_is_between_the_marks_is_replaced(table):
    made = MODULE.markdown(("block", "launches", "bytes"), [("one", "1,234", "5"), ("two", "6", "7")])
    assert made == "| block | launches | bytes |\n| --- | ---: | ---: |\n| one | 1,234 | 5 |\n| two | 6 | 7 |\n"
    table.write(made)
    assert table.page.read_text() == f"Before.\n\n{BEGIN}{made}{END}\nAfter.\n"
    assert table.read() == made
    assert table.rows() == {"one": ["1,234", "5"], "two": ["6", "7"]}


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, BEGIN + BEGIN + END, BEGIN + END + END, END + BEGIN, BEGIN + END + BEGIN]
)
def test_a_page_without_each_mark_once_is_refused_and_unchanged(table, text):
    table.page.write_text(text)
    for use in (table.read, lambda: table.write("| new |\n")):
        with pytest.raises(ValueError, match="has to have the marks of the table 'some costs' once each"):
            use()
    assert table.page.read_text() == text


@pytest.mark.parametrize("write", [False, True])
def test_a_program_prints_its_table_and_writes_it_where_it_is_asked_to(table, write, monkeypatch, capsys):
    before = table.page.read_text()
    monkeypatch.setattr(sys, "argv", ["some.py", *(["--write"] if write else [])])
    MODULE.print_or_write(table, lambda: "| new |\n", "About.")
    assert capsys.readouterr().out == "| new |\n"
    assert (table.page.read_text() == before) is not write
    assert table.read() == ("| new |\n" if write else "| a |\n| --- |\n| old | 1 |\n")
