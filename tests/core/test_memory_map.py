"""The picture of a report: to scale, in its bounds, and readable whatever it is given."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import memory_map
from pack.tests.examples import examples

GB = 10**9
BLUE = (0, 0x72, 0xB2)


def part(name: str, size: int | None, label: str = "") -> dict[str, Any]:
    return {"id": name, "label": label or name, "bytes": size, "detail": ""}


def device(*parts: dict[str, Any], total: int | None = 8 * GB) -> dict[str, Any]:
    """A device of a report with these parts."""
    return {
        "device": "cuda:0",
        "name": "A card",
        "kind": "cuda",
        "total_bytes": total,
        "parts": list(parts),
    }


def told(*devices: dict[str, Any], findings: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"devices": list(devices), "findings": list(findings)}


def bar(picture: Any) -> list[tuple[int, int, int]]:
    """The pixels of a line near the top of the first bar, between its ends."""
    y = memory_map.MARGIN + memory_map.TITLE + 14 + 8
    return [
        picture.getpixel((x, y))
        for x in range(memory_map.MARGIN, memory_map.WIDTH - memory_map.MARGIN)
    ]


def test_a_part_is_as_wide_as_its_share() -> None:
    picture = memory_map.draw(told(device(part("model:0", 2 * GB), part("free", 6 * GB))))
    row = bar(picture)
    assert row.count(BLUE) / len(row) == pytest.approx(0.25, abs=0.01)


def test_more_than_the_whole_still_stays_in_the_picture() -> None:
    parts = (part("model:0", 9 * GB), part("unexplained", -3 * GB), part("free", 2 * GB))
    row = bar(memory_map.draw(told(device(*parts))))
    assert row.count(BLUE) / len(row) == pytest.approx(9 / 11, abs=0.01)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_ground_is_the_themes(theme: str) -> None:
    picture = memory_map.draw(told(device(part("free", 8 * GB))), theme)
    assert picture.width == 800 and picture.mode == "RGB"
    corner = picture.getpixel((2, 2))
    assert corner == ((31, 31, 31) if theme == "dark" else (255, 255, 255))


def test_a_legend_never_has_more_rows_than_can_be_read() -> None:
    many = [part(f"model:{i}", GB // 3 + i) for i in range(20)]
    drawn = memory_map.pieces(device(*many, part("unexplained", 0), part("free", GB)))
    assert len(drawn) <= memory_map.MOST_ROWS
    assert [piece.id for piece in drawn[-3:]] == ["smaller", "unexplained", "free"]
    assert drawn[-3].label == "14 smaller"
    assert sum(piece.bytes for piece in drawn) == sum(p["bytes"] for p in many) + GB


def test_one_small_part_keeps_its_name() -> None:
    drawn = memory_map.pieces(device(part("model:0", 5 * GB), part("pack", 1000), part("free", GB)))
    assert [piece.id for piece in drawn] == ["model:0", "pack", "free"]


def test_a_part_has_one_colour_on_every_device() -> None:
    one = device(part("model:0", 5 * GB), part("model:1", 2 * GB))
    two = device(part("model:1", 5 * GB), part("model:0", 2 * GB))
    colours = memory_map._colours(told(one, two))
    assert colours["model:0"] != colours["model:1"]
    assert set(memory_map.MODEL_COLOURS) >= {colours["model:0"], colours["model:1"]}


def test_no_text_is_wider_than_its_room() -> None:
    sheet = memory_map._Sheet(memory_map.THEMES["dark"], memory_map.Image.new("RGB", (800, 16)))
    name = "Transformer " + "a_very_long_name_" * 20
    shorter = sheet.fitting(name, memory_map.TEXT, 500)
    assert "..." in shorter and shorter.startswith("Trans") and shorter.endswith("name_")
    lines = list(sheet.wrapped(f"one two {name} three " * 3, memory_map.TEXT, 500))
    for line in [shorter, *lines]:
        assert sheet.pen.textlength(line, memory_map._font(memory_map.TEXT)) <= 500


labels = st.text(max_size=60)
any_part = st.builds(
    part,
    st.sampled_from(["model:0", "model:1", "rest", "unknown", "context", "new_kind", "pack"]),
    st.none() | st.integers(-(10**13), 10**13),
    labels,
)
any_device = st.builds(
    lambda parts, total, rest, free: device(
        *parts, part("unexplained", rest), part("free", free), total=total
    ),
    st.lists(any_part, max_size=12),
    st.none() | st.integers(0, 10**13),
    st.none() | st.integers(-(10**13), 10**13),
    st.none() | st.integers(-5, 10**13),
)
any_finding = st.fixed_dictionaries(
    {"severity": st.sampled_from(["info", "warning", "problem"]), "text": labels, "action": labels}
)


@settings(max_examples=examples(15), deadline=None)
@given(st.lists(any_device, max_size=3), st.lists(any_finding, max_size=6))
def test_any_report_can_be_drawn(devices: list[Any], findings: list[Any]) -> None:
    picture = memory_map.draw(told(*devices, findings=tuple(findings)), "light")
    assert picture.width == 800 and 20 < picture.height < 3000
