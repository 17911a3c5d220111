"""The table of settings for a last resort: what people type, and what is taken from it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core.fallback_settings import DEFAULT, GB, Row, parse, row_for

row_of = st.tuples(st.integers(1, 10_000), st.integers(0, 1000), st.sampled_from(["euler", "ddim"]))
rows_of = st.dictionaries(st.integers(1, 500), row_of, max_size=5)


def test_the_defaults_are_those_of_the_source() -> None:
    rows = parse(DEFAULT)
    assert row_for(rows, 24 * GB) == Row(12 * GB, 30, 7, "dpmpp_2m")
    assert row_for(rows, 12 * GB) == Row(8 * GB, 25, 6, "euler")
    assert row_for(rows, 8 * GB) == Row(0, 20, 5, "ddim")
    assert row_for(rows, 0) == Row(0, 20, 5, "ddim")


@given(rows_of, row_of, st.integers(0, 600 * GB))
def test_what_is_written_is_read_in_any_order(
    rows: dict[int, tuple[int, int, str]], last: tuple[int, int, str], free: int
) -> None:
    rows = {**rows, 0: last}
    lines = [f" {at}:{steps} , {cfg / 10},{name} " for at, (steps, cfg, name) in rows.items()]
    Random(free).shuffle(lines)
    read = parse("\n\n".join(lines))
    expected = {at * GB: Row(at * GB, s, cfg / 10, name) for at, (s, cfg, name) in rows.items()}
    assert set(read) == set(expected.values())
    fitting = [above for above in expected if free > above] or [0]
    assert row_for(read, free) == expected[max(fitting)]


def test_fractions_and_full_width_signs_are_read() -> None:
    assert parse("５．５：２０，５，ddim\r\n0: 8, 1.5, euler") == (
        Row(5_500_000_000, 20, 5, "ddim"),
        Row(0, 8, 1.5, "euler"),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "settings: no line begins with 0; add one"),
        ("8: 20, 5, ddim", "settings: no line begins with 0; add one"),
        ("0 20 5 ddim", r"line 1 \(0 20 5 ddim\): write it as GB free: steps, CFG, sampler"),
        ("0: 20, 5", r"line 1 .*: write it as"),
        ("0: 20, 5,", r"line 1 .*: write it as"),
        ("0: 20, 5, ddim, karras", r"line 1 .*: write it as"),
        ("0: 20, 5, ddim\n\nx: 20, 5, ddim", r"line 3 .*: the GB free must be a number, .* not x"),
        ("-1: 20, 5, ddim", "the GB free must be a number, 0 or more, not -1"),
        ("inf: 20, 5, ddim", "the GB free must be a number"),
        (": 20, 5, ddim", "the GB free must be a number, 0 or more, not nothing"),
        ("0: 20.5, 5, ddim", "steps must be a whole number from 1 to 10000"),
        ("0: 0, 5, ddim", "steps must be a whole number"),
        ("0: nan, 5, ddim", "steps must be a number"),
        ("0: 20, 101, ddim", "CFG must be a number from 0 to 100"),
        ("0: 20, 5, ddim\n0.0: 8, 1, euler", "line 2 .*: an earlier line begins with the same"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line_and_a_remedy(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(text)


@given(st.text(st.sampled_from("0123456789.,:einfa-\n "), max_size=40))
def test_any_text_gives_rows_or_a_sentence(text: str) -> None:
    try:
        rows = parse(text)
    except ValueError as error:
        assert str(error).startswith("settings")
    else:
        assert rows[-1].above == 0
