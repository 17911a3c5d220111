"""Sticker Sheet in ComfyUI: batches and lists, PNGs with alpha, what it says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from pack.demo.animals import Scene, draw
from pack.tests.graphs import node
from pack.tests.host import Host, RunError

SETTINGS = {
    "columns": 3,
    "rows": 0,
    "border": 30.0,
    "paper": "as the picture",
    "background": "white",
    "size_variation": 25.0,
    "turn": 12.0,
    "seed": 0,
}
CUT = 0.2  # of the picture, about


@pytest.fixture(scope="module")
def module(host: Host) -> ModuleType:
    return host.part("nodes.sticker_sheet")


def sheet_of(source: list[Any], **more: Any) -> dict[str, Any]:
    return node("QwenVRAMStickerSheet", image=source, **{**SETTINGS, **more})


def graph_of(host: Host, **more: Any) -> dict[str, Any]:
    """A list of two animals of two sizes, and one in a meadow."""
    graph: dict[str, Any] = {}
    for index, (animal, place, size) in enumerate(
        (("bear", "plain", 128), ("cat", "plain", 160), ("pig", "meadow", 128))
    ):
        scene = Scene(animal, "blue", "none", "standing", place, jitter=3)
        draw(scene, size, size).save(host.base / "input" / f"sticker_{index}.png")
        graph[f"load{index}"] = node("LoadImage", image=f"sticker_{index}.png")
    listed = {f"inputs.input{index}": [f"load{index}", 0] for index in range(3)}
    graph["list"] = node("CreateList", **listed)
    graph["sheet"] = sheet_of(["list", 0], **more)
    graph["png"] = node("JoinImageWithAlpha", image=["sheet", 1], alpha=["sheet", 2])
    graph["out"] = node("PreviewAny", source=["png", 0])
    graph["paper"] = node("PreviewAny", source=["sheet", 0])
    return graph


def test_a_list_of_pictures_takes_turns_and_each_becomes_a_png_with_alpha(host: Host) -> None:
    run = host.run(graph_of(host))
    (sheet,), stickers, masks = (run.outputs["sheet"][i] for i in range(3))
    assert sheet.shape == (1, 128, 128, 3) and len(stickers) == len(masks) == 3
    assert sheet.min() >= 0 and sheet.max() == 1
    for sticker, mask, png in zip(stickers, masks, run.outputs["png"][0], strict=True):
        assert sticker.shape[:3] == mask.shape and mask.min() == 0 and mask.max() == 1
        assert png.shape[-1] == 4 and png[0, 0, 0, 3] == 0  # the corner is transparent
        torch.testing.assert_close(png[..., 3], 1 - mask)
    text = run.status("sheet")["text"]
    assert text.startswith("6 stickers, 128 x 128 pixels; cut out ")
    assert text.endswith("% of the picture; picture 3 kept whole: no plain background")
    shares = [
        int(part.strip("% "))
        for part in text.partition("cut out")[2].partition(" of")[0].split(",")
    ]
    assert all(0.5 * CUT < share / 100 < 2 * CUT for share in shares)


def test_a_batch_gives_a_batch_and_the_same_seed_the_same_sheet(module: ModuleType) -> None:
    image = torch.full((2, 96, 96, 3), 0.9)
    image[0, 30:60, 30:60] = torch.tensor([0.8, 0.2, 0.1])
    image[1, 20:80, 40:50] = torch.tensor([0.1, 0.3, 0.8])
    small = {"paper": "as the picture"}
    first, again, other = (run(module, image, seed=seed, **small) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    (stickers,), (masks,) = first[1], first[2]
    assert len(stickers) == len(masks) == 2 and stickers.shape[:3] == masks.shape
    assert torch.equal(stickers, other[1][0])
    assert first[3].startswith("9 stickers, 96 x 96 pixels; cut out 10%, 7% of")


def run(module: ModuleType, image: torch.Tensor, **more: Any) -> tuple[Any, ...]:
    settings = {**SETTINGS, "paper": "A4 portrait, 150 dpi", **more}
    output = module.StickerSheet.execute([image], **{k: [v] for k, v in settings.items()})
    return *output.args, output.ui["qwen_vram"][0]["text"]


def test_the_status_says_how_many_suit_the_animal(module: ModuleType) -> None:
    """A tall bar: twelve in four columns, six in three, and as many as are asked for."""
    image = torch.full((1, 96, 96, 3), 0.9)
    image[0, 10:86, 35:61] = torch.tensor([0.1, 0.3, 0.8])
    for columns, rows, count in ((0, 0, 12), (3, 0, 6), (3, 4, 12), (5, 1, 5)):
        sheet, *_, text = run(module, image, columns=columns, rows=rows)
        assert text.startswith(f"{count} stickers, 1240 x 1754 pixels; cut out ")
        assert sheet.shape == (1, 1754, 1240, 3)


def test_one_picture_without_plain_background_says_so(module: ModuleType) -> None:
    noise = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    *_, text = run(module, noise, columns=1, rows=1, background="cream")
    assert text == "1 sticker, 1240 x 1754 pixels; picture kept whole: no plain background"
    *_, text = run(module, torch.cat([noise, torch.ones_like(noise)]), columns=1, rows=1)
    assert text.endswith(
        "; picture 1 kept whole: no plain background; "
        "picture 2 kept whole: nothing stands out from the plain background"
    )


def test_the_sheet_has_the_colour_asked_for(module: ModuleType) -> None:
    sheet, *_ = run(module, torch.rand(1, 64, 64, 3), background="pale blue", columns=2)
    torch.testing.assert_close(sheet[0, 0, 0], torch.tensor([0.87, 0.94, 0.98]))


def test_what_cannot_be_used_is_refused_with_a_sentence(host: Host, module: ModuleType) -> None:
    image = torch.rand(1, 64, 64, 3)
    for wrong, told in (
        ({"border": 500.0}, "border is 500"),
        ({"paper": "A3"}, "paper is 'A3'"),
        ({"background": "black"}, "background is 'black'"),
        ({"columns": 30}, "columns and rows are 30 and 0"),
    ):
        with pytest.raises(ValueError, match=told):
            run(module, image, **wrong)
    graph = {
        "load": node("EmptyImage", width=16, height=64, batch_size=1, color=0),
        "sheet": sheet_of(["load", 0]),
        "out": node("PreviewAny", source=["sheet", 0]),
    }
    with pytest.raises(RunError, match="image is 16 x 64 pixels, too small"):
        host.run(graph)
