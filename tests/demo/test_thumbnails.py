"""The thumbnails of the bundled workflows, without running them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from pack.demo import thumbnails
from pack.tests.conftest import ROOT
from PIL import Image

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def test_every_workflow_has_a_recipe() -> None:
    assert set(thumbnails.RECIPES) == {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_names_the_cards_and_fits(path) -> None:
    title, cards = thumbnails.cards_of(json.loads(path.read_text(encoding="utf-8")))
    assert title and cards.endswith(" GB")
    red, tall = Image.new("RGB", (300, 100), "red"), Image.new("RGB", (100, 900), "red")
    sheet = thumbnails.compose([red, tall], title, cards)
    assert sheet.size == Image.open(path.with_suffix(".jpg")).size == thumbnails.SIZE
    band = sheet.crop((0, thumbnails.SIZE[1] - thumbnails.BAND, *thumbnails.SIZE))
    assert (255, 0, 0) not in {colour for _, colour in band.getcolors(100_000)}


def band(image: Image.Image) -> np.ndarray:
    """The lower part of a thumbnail, with the title and the cards."""
    box = (0, thumbnails.SIZE[1] - thumbnails.BAND, *thumbnails.SIZE)
    return np.asarray(image.convert("RGB").crop(box), dtype=int)


def as_file(title: str, cards: str) -> Image.Image:
    """A thumbnail of nothing, as it would be saved."""
    file = io.BytesIO()
    sheet = thumbnails.compose([Image.new("RGB", (300, 300), "white")], title, cards)
    sheet.save(file, "JPEG", quality=thumbnails.QUALITY)
    return Image.open(file)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_band_of_the_file_tells_the_title_and_cards_of_its_note(path) -> None:
    title, cards = thumbnails.cards_of(json.loads(path.read_text(encoding="utf-8")))
    saved = band(Image.open(path.with_suffix(".jpg")))
    assert np.abs(saved - band(as_file(title, cards))).max() < 48, "make the thumbnails again"
    other = cards.replace("12", "10")
    assert np.abs(saved - band(as_file(title, other))).max() > 96


def test_the_text_goes_to_the_side_of_the_prompt_and_links_stay() -> None:
    def encode(title: str, text: object) -> dict:
        return {
            "class_type": "QwenVRAMCachedTextEncode",
            "inputs": {"text": text, "clip": ["9", 0]},
            "_meta": {"title": title},
        }

    sampler = {"positive": ["1", 0], "seed": 1, "cfg": 4.0}
    prompt = {
        "1": encode("Positive prompt", "a bakery"),
        "2": encode("Negative prompt", "blurry"),
        "3": encode("Prompt", ["5", 0]),
        "4": {"class_type": "KSampler", "inputs": sampler, "_meta": {"title": "KSampler"}},
    }
    thumbnails._write(prompt, {"positive": "a fox", "negative": "", "seed": 5})
    assert [prompt[i]["inputs"]["text"] for i in "123"] == ["a fox", "", ["5", 0]]
    assert sampler == {"positive": ["1", 0], "seed": 5, "cfg": 4.0}
