"""Real edits by the embedded model: as the guide has them, and nothing else is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pack.core.tiling import Tile
from pack.demo import animals, classifier, figures
from pack.demo.animals import Scene
from pack.tests.graphs import node
from pack.tests.host import Host, Run
from pack.tests.nodes.test_tiled_edit import edit, edited, image, report
from torch import Tensor
from torch.nn import functional

SIZE = (384, 384)  # four tiles of 256 px
CAT = Scene("cat", "orange", background="meadow", jitter=3)
BUNNY = Scene("bunny", "blue", background="meadow", jitter=7)
EDITS = {
    "add a hat": (CAT, replace(CAT, accessory="hat")),
    "add a red scarf": (BUNNY, replace(BUNNY, accessory="scarf", accent="red")),
    "put it on the beach": (CAT, replace(CAT, background="beach")),
}
JUDGED = ("accessory", "background", "colour")  # of a cat in a hat no ears are seen
Edit = Callable[..., Run]


def drawn(scene: Scene) -> Tensor:
    """(1, SIZE[1], SIZE[0], 3)."""
    return torch.from_numpy(np.asarray(animals.draw(scene, *SIZE)) / 255).float()[None]


@pytest.fixture
def small_guide(host: Host, monkeypatch) -> list[Any]:
    """Guides of the size that the embedded model is made for; all that are made."""
    guides = host.part("nodes.tile_guide")
    monkeypatch.setattr(guides, "PIXELS", figures.SQUARE[0] * figures.SQUARE[1])
    compare, made = guides.Guide.compare, []

    def remembered(*arguments: Any, **more: Any) -> Any:
        made.append(compare(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(guides.Guide, "compare", remembered)
    return made


@pytest.fixture
def done(host: Host, small_guide) -> Edit:
    """Do one of the edits with the node's default values, and those given."""
    schema = host.nodes.NODE_CLASS_MAPPINGS["QwenVRAMTiledEdit"].INPUT_TYPES()["required"]
    kept = ("denoise", "guide", "skip_threshold", "registration", "colour_match", "window")
    defaults = {name: schema[name][1]["default"] for name in kept}

    def run(
        instruction: str,
        extra: dict[str, Any] | None = None,
        size: tuple[int, int] = SIZE,
        **inputs: Any,
    ) -> Run:
        name = f"real_{list(EDITS).index(instruction)}.png"
        animals.draw(EDITS[instruction][0], *size).save(host.base / "input" / name)
        graph = edit(name, instruction, **{**defaults, "steps": 4, **inputs})
        return host.run({**graph, **(extra or {})})

    return run


def psnr(made: Tensor, wanted: Tensor) -> float:
    """PSNR in decibels: more is better."""
    return -10 * math.log10(float((made - wanted).square().mean()))


@pytest.mark.parametrize(
    ("instruction", "mode"),
    [
        ("add a red scarf", "together"),
        ("put it on the beach", "one after another"),
    ],
)
def test_an_edit_is_as_asked_and_nothing_else_is_touched(
    done, small_guide, instruction, mode
) -> None:
    before, after = EDITS[instruction]
    run = done(instruction, mode=mode)
    made, original, wanted = image(run), drawn(before), drawn(after)
    small = functional.interpolate(made.movedim(-1, 1), size=figures.SQUARE, mode="area")
    found = classifier.right(classifier.load(), small * 2 - 1, [after])
    assert all(found[name].item() for name in JUDGED), found
    (guide,) = small_guide
    whole = Tile(0, 0, SIZE[1], SIZE[0])
    assert psnr(made, wanted) > psnr(guide.crop(whole), wanted) - 0.7  # and sharper
    kept = edited(run) == 0
    assert torch.equal(made[kept], original[kept])
    assert "far from the guide" not in run.status("edit")["text"]
    if before.background == after.background:
        stays = (wanted == original).all(-1)
        assert (kept & stays).sum() > 0.6 * stays.sum()
    changed = guide.frame.enlarged(guide.change[:, None], whole, "bilinear")[:, 0]
    assert not (kept & (changed > 24 / 255)).any()


def test_tiles_that_lose_the_edit_are_told(done) -> None:
    """Drawn anew from noise, tiles that see no head get no hat, or one of their own."""
    run = done("add a hat", denoise=0.9)
    told = "far from the guide: lower denoise"
    assert told in run.status("edit")["text"]
    assert "is far from the guide where that changes the picture" in report(run)


def test_a_guide_below_the_threshold_says_how_far(done, small_guide) -> None:
    run = done("add a hat", skip_threshold=250.0, steps=2)
    most = float(small_guide[0].change.max()) * 255
    line = f"the guide changes at most {most:.1f} of 255, skip_threshold is 250: lower it"
    assert f"nothing edited: {line}" in run.status("edit")["text"]
    assert f"changes at most {most:.1f} of 255" in report(run)
    assert torch.equal(image(run), drawn(CAT)) and not edited(run).any()


def test_a_threshold_of_zero_lets_every_pixel_change(done, quick_vae) -> None:
    run = done("add a hat", skip_threshold=0.0, steps=1, cache="off")
    assert (edited(run) > 1 - 1e-5).all()


def test_a_tiling_of_the_model_is_left_out_and_told(host, done, quick_vae, monkeypatch) -> None:
    """The guide is as large as the picture here: that tiling would show in it."""
    size = (320, 256)  # two tiles, of the picture and, were it not left out, of the guide
    monkeypatch.setattr(host.part("nodes.tile_guide"), "PIXELS", size[0] * size[1])
    options = {"window": "hann", "reference_1": "auto", "reference_2": "auto"}
    options |= {"other_references": "auto", "tile_batch": 0, "tile_size": 256, "overlap": 64}
    tiled = node("QwenVRAMTiledDiffusion", model=["shift", 0], **options)
    quick = {"steps": 1, "mode": "one after another", "size": size, "cache": "off"}
    plain = done("add a hat", **quick)
    run = done("add a hat", {"tiled": tiled}, model=["tiled", 0], **quick)
    assert torch.equal(image(run), image(plain))
    assert "tiling of the model left out" in run.status("edit")["text"]
    assert "left out" in report(run) and "left out" not in report(plain)
