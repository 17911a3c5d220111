"""Colouring Page in ComfyUI: batches, paper, what it says, and what it refuses."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pack.demo.animals import Scene, draw
from pack.tests.graphs import node
from pack.tests.host import Host, RunError

BEAR = Scene("bear", "brown", "hat", "standing", "plain", jitter=3)


@pytest.fixture(scope="module")
def module(host: Host) -> ModuleType:
    return host.part("nodes.colouring_page")


def graph_of(host: Host, **more: Any) -> dict[str, Any]:
    """A picture that is loaded twice in a batch, and the page."""
    draw(BEAR, 128, 96).save(host.base / "input" / "colouring.png")
    settings = {"line_width": 8.0, "detail": 3, "paper": "as the picture", **more}
    return {
        "load": node("LoadImage", image="colouring.png"),
        "twice": node("RepeatImageBatch", image=["load", 0], amount=2),
        "page": node("QwenVRAMColouringPage", image=["twice", 0], **settings),
        "out": node("PreviewAny", source=["page", 0]),
    }


def test_each_picture_of_a_batch_becomes_a_page(host: Host) -> None:
    run = host.run(graph_of(host))
    pages = run.outputs["page"][0][0]
    assert pages.shape == (2, 96, 128, 3) and pages.dtype == torch.float32
    torch.testing.assert_close(pages[0], pages[1])
    assert pages.min() == 0 and pages.max() == 1
    assert (pages[..., 0] == pages[..., 2]).all()
    text = run.status("page")["text"]
    areas = text.split(",")[0].removeprefix("about ")
    assert int(areas) > 8
    assert text.endswith(f"about {areas}, {areas} areas to colour, 128 x 96 pixels")


def test_on_paper_it_has_the_size_of_the_sheet(host: Host) -> None:
    run = host.run(graph_of(host, paper="Letter landscape, 150 dpi"))
    assert run.outputs["page"][0][0].shape == (2, 1275, 1650, 3)
    assert run.status("page")["text"].endswith(" areas to colour, 1650 x 1275 pixels")


def test_each_picture_of_a_batch_fills_its_own_sheet(module: ModuleType) -> None:
    """A small and a large square, which would be different in one box of both."""
    batch = torch.full((3, 128, 128, 3), 0.95)
    batch[0, 40:80, 30:70] = batch[1, 30:100, 40:110] = torch.tensor([0.2, 0.4, 0.9])
    batch[2, 60:] = torch.tensor([0.2, 0.7, 0.2])
    paper = "A4 portrait, 150 dpi"
    pages = module.ColouringPage.execute(batch, 6.0, 3, paper).args[0][..., 0] < 0.5
    sides = []
    for page in pages:
        rows, columns = (page.any(axis).nonzero() for axis in (1, 0))
        sides.append((int(columns.max() - columns.min()), int(rows.max() - rows.min())))
    assert all(1060 < side < 1122 * 0.98 for side in (*sides[0], *sides[1]))
    assert sides[2] == pytest.approx((1122, 1122), abs=3)  # the whole picture, in its frame


def test_a_page_without_lines_says_so(module: ModuleType) -> None:
    output = module.ColouringPage.execute(torch.zeros(1, 64, 64, 3), 6.0, 3, "as the picture")
    assert output.args[0].shape == (1, 64, 64, 3) and (output.args[0] == 1).all()
    text = output.ui["qwen_vram"][0]["text"]
    assert text == "no lines found: try more detail, 64 x 64 pixels"


def test_it_can_be_interrupted_between_pictures(module: ModuleType) -> None:
    from comfy import model_management

    model_management.interrupt_current_processing()
    with pytest.raises(model_management.InterruptProcessingException):
        module.ColouringPage.execute(torch.zeros(2, 64, 64, 3), 6.0, 3, "as the picture")


def test_what_cannot_be_used_is_refused_with_a_sentence(host: Host, module: ModuleType) -> None:
    with pytest.raises(ValueError, match="image holds no picture"):
        module.ColouringPage.execute(torch.zeros(0, 64, 64, 3), 6.0, 3, "as the picture")
    with pytest.raises(ValueError, match="line_width is 90"):
        module.ColouringPage.execute(torch.zeros(1, 64, 64, 3), 90.0, 3, "as the picture")
    graph = graph_of(host)
    graph["load"] = node("EmptyImage", width=16, height=64, batch_size=1, color=0)
    with pytest.raises(RunError, match="image is 16 x 64 pixels, too small"):
        host.run(graph)


def test_half_precision_gives_the_same_page(module: ModuleType) -> None:
    image = torch.from_numpy(np.array(draw(BEAR, 128, 96))).float()[None] / 255
    full, half = (
        module.ColouringPage.execute(i, 6.0, 3, "as the picture").args[0]
        for i in (image, image.half())
    )
    assert (full - half).abs().mean() < 0.002
