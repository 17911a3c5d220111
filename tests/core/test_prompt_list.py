"""Lists of prompts are read as people and Excel write them; what cannot be read says where."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core import prompt_list
from pack.core.prompt_list import PromptListError, lines_of, read_prompts, table_of

CELLS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",;\t\n'), max_size=30
).map(str.strip)


def saved(path: Path, content: str | bytes) -> list[str]:
    """What is read from a file with that content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(path)


def test_text_has_one_prompt_per_line(tmp_path: Path) -> None:
    text = "\ufeffa red fox\r\n\r\n  # a comment\n  a blue bird \na red fox\n一只小熊, sitting"
    expected = ["a red fox", "a blue bird", "一只小熊, sitting"]
    assert saved(tmp_path / "list.TXT", text) == expected


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["prompt", "Text", " POSITIVE "])
def test_a_table_has_a_named_column(tmp_path: Path, separator: str, name: str) -> None:
    rows = [["id", name, "note"], ["1", "a fox; red, and\nfast", "x"], ["2", 'a "big" bird', ""]]
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows(rows)
    expected = ["a fox; red, and\nfast", 'a "big" bird']
    assert saved(tmp_path / "list.csv", "\ufeff" + out.getvalue()) == expected


def test_negative_prompts_are_taken_too_and_the_empty_one_is_one(tmp_path: Path) -> None:
    text = "positive,negative\na fox,blurry\na bird,\na cat,blurry\n"
    assert saved(tmp_path / "list.csv", text) == ["a fox", "blurry", "a bird", "", "a cat"]


def test_without_a_heading_the_first_column_counts(tmp_path: Path) -> None:
    assert saved(tmp_path / "a.csv", "a fox;1\na bird;2\n") == ["a fox", "a bird"]
    assert saved(tmp_path / "b.csv", "a fox\n\na bird\n") == ["a fox", "a bird"]


def test_rows_of_a_table_that_begin_with_a_hash_are_left_out(tmp_path: Path) -> None:
    text = "# made on Monday, for the kiosk\nprompt;n\na fox;1\n #a cat;2\na #1 bird;3\n"
    assert saved(tmp_path / "a.csv", text) == ["a fox", "a #1 bird"]
    assert saved(tmp_path / "a.csv", "#,prompt\n1,a fox\n") == ["a fox"]  # a heading of numbers


def test_excels_first_line_names_the_separator(tmp_path: Path) -> None:
    assert saved(tmp_path / "a.csv", "sep=;\r\nprompt;n\r\na, b;1\r\n") == ["a, b"]
    with pytest.raises(PromptListError, match="a.csv, line 3: 2 columns"):
        saved(tmp_path / "a.csv", "sep=;\nprompt\na;b\n")


def test_excels_unicode_text_is_read(tmp_path: Path) -> None:
    text = "prompt\tn\r\n一只小熊\t1\r\n"
    assert saved(tmp_path / "a.csv", text.encode("utf-16")) == ["一只小熊"]


@given(st.lists(CELLS.filter(bool), min_size=1, max_size=8), st.sampled_from(",;\t"))
def test_what_a_program_wrote_as_a_table_comes_back(prompts: list[str], separator: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([["number", "prompt"], *([str(i), p] for i, p in enumerate(prompts))])
    assert table_of(out.getvalue(), "list.csv") == list(dict.fromkeys(prompts))


@given(st.text())
def test_any_text_is_read_or_refused_with_the_name(text: str) -> None:
    try:
        found = table_of(text, "list.csv")
    except PromptListError as error:
        assert str(error).startswith("list.csv, line ")
    else:
        assert len(set(found)) == len(found)
    assert all(line and line == line.strip() for line in lines_of(text))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt\na fox, red\n", r"a\.csv, line 2: 2 columns where the first row has 1"),
        ("a.csv", "a fox\na bird, red\n", r"a\.csv, line 2: .* or save the list as \.txt"),
        ("a.csv", "a fox, red\na bird, blue\n", r"a\.csv, line 1: .* as inside of a prompt"),
        ("a.csv", 'prompt,n\n"a fox,1\n', r"a\.csv, line \d: unexpected end of data\. Close every"),
        ("a.txt", "ok\nFüchse\n".encode("latin-1"), r"a\.txt, line 2: not UTF-8\. Save"),
        ("a.txt", "# nothing\n\n", r"a\.txt has no prompts"),
        ("a.csv", "prompt\n", r"a\.csv has no prompts"),
        ("a.xlsx", b"PK", r"a\.xlsx is no list of prompts: use a file that ends in \.txt"),
    ],
)
def test_what_cannot_be_read_says_where_and_what_to_do(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(PromptListError, match=message):
        saved(tmp_path / name, content)


def test_a_missing_file_and_a_huge_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptListError, match="Cannot read none.txt .*input folder"):
        read_prompts(tmp_path / "none.txt")
    monkeypatch.setattr(prompt_list, "LARGEST_FILE_BYTES", 3)
    with pytest.raises(PromptListError, match="split it"):
        saved(tmp_path / "a.txt", "a red fox")
