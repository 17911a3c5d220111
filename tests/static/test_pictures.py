"""The pictures of the README that `python -m demo pictures` makes: all there, small and sharp."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
from pack.tests.conftest import ROOT
from pack.tests.static.test_documentation import schemas

MEDIA = ROOT / "media"
FOLDERS = {"en": MEDIA / "nodes", "zh": MEDIA / "nodes" / "zh"}
MAKE = "make it: python -m demo pictures nodes --only "


def colours(path: Path) -> int:
    """How many colours a picture has when it is seen from afar."""
    with PIL.Image.open(path) as picture:
        return len(set(picture.convert("RGB").resize((64, 64)).getdata()))


@pytest.mark.parametrize("language", FOLDERS)
@pytest.mark.parametrize("node_id", sorted(schemas()))
def test_every_node_has_a_picture_of_its_own(node_id: str, language: str) -> None:
    path = FOLDERS[language] / f"{node_id}.webp"
    assert path.is_file(), MAKE + node_id
    with PIL.Image.open(path) as picture:
        assert path.stat().st_size <= (20_000 if picture.height <= 1200 else 26_000)
        assert picture.format == "WEBP" and picture.width == 640
        assert 200 <= picture.height <= 2200
    assert colours(path) > 50, "the picture is empty"


def test_no_picture_is_left_over_or_there_twice() -> None:
    files = [path for path in (MEDIA / "nodes").rglob("*") if path.is_file()]
    wanted = {folder / f"{node_id}.webp" for folder in FOLDERS.values() for node_id in schemas()}
    assert set(files) == wanted
    assert len({path.read_bytes() for path in files}) == len(files)


def test_the_picture_on_top_is_wide_and_small() -> None:
    path = MEDIA / "front.jpg"
    assert path.stat().st_size < 200_000
    with PIL.Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.width == 1600
        assert picture.height <= 1200, "higher than a window where a README shows it"
    assert colours(path) > 50
