"""Tiles in people's own graphs: what was cut comes back, and what does not belong is refused."""

from __future__ import annotations

import gc
import re
import shutil
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pack.tests.graphs import node
from pack.tests.host import Host, RunError
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

EIGHT_BIT = 1 / 255


@pytest.fixture(scope="module")
def tiling(host: Host) -> ModuleType:
    """The module of the loaded pack."""
    return host.part("nodes.tiling")


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def split(tiling: ModuleType, image: Tensor, tile: int = 96, overlap: int = 32, **more: Any) -> Any:
    """Tiles, masks, grid, plan, and what the node said."""
    output = tiling.SplitTiles.execute(image, tile, overlap, more.pop("window", "hann"), **more)
    return *output.args, output.ui["qwen_vram"][0]["text"]


def merge(tiling: ModuleType, tiles: list[Tensor], *grid: Any, rule: str = "refuse") -> Any:
    """The pictures, and what the node said."""
    output = tiling.MergeTiles.execute(tiles, list(grid), [rule])
    return output.args[0], output.ui["qwen_vram"][0]["text"]


# ------------------------------------------------------------------------------ in graphs
def graph_of(host: Host, *sizes: tuple[int, int], **merging: Any) -> dict[str, Any]:
    """Pictures of these sizes (height, width) as a list, cut and merged; and in stock's nodes."""
    graph: dict[str, Any] = {}
    for index, (height, width) in enumerate(sizes):
        levels = (pixels(height, width, 3, seed=index) * 255).byte().numpy()
        Image.fromarray(levels).save(host.base / "input" / f"tiles_{index}.png")
        graph[f"load{index}"] = node("LoadImage", image=f"tiles_{index}.png")
    listed = {f"inputs.input{index}": [f"load{index}", 0] for index in range(len(sizes))}
    graph["list"] = node("CreateList", **listed)
    graph["split"] = node(
        "QwenVRAMSplitTiles", image=["list", 0], tile_size=96, overlap=32, window="hann"
    )
    settings = {"tiles": ["split", 0], "grid": ["split", 2], "other_size": "refuse", **merging}
    graph["merge"] = node("QwenVRAMMergeTiles", **settings)
    graph["out"] = node("PreviewAny", source=["merge", 0])
    return graph


def enlarged(graph: dict[str, Any]) -> dict[str, Any]:
    """With a node in between that gives back tiles of twice the size."""
    graph["larger"] = node(
        "ImageScaleBy", image=["split", 0], upscale_method="nearest-exact", scale_by=2.0
    )
    graph["merge"]["inputs"]["tiles"] = ["larger", 0]
    return graph


def test_pictures_of_three_sizes_come_back_each_in_its_own(host: Host) -> None:
    sizes = ((200, 300), (64, 64), (97, 250))
    run = host.run(graph_of(host, *sizes))
    loaded = [run.outputs[f"load{index}"][0][0] for index in range(3)]
    merged = run.outputs["merge"][0]
    assert [tuple(picture.shape[1:3]) for picture in merged] == list(sizes)
    for picture, original in zip(merged, loaded, strict=True):
        torch.testing.assert_close(picture, original, rtol=0, atol=1e-6)
    count = len(run.outputs["split"][0])
    assert run.status("merge")["text"] == f"3 pictures from {count} tiles"
    assert [tuple(plan.shape) for plan in run.outputs["split"][3]] == [
        (1, 683, 1024, 3),
        (1, 1024, 1024, 3),
        (1, 397, 1024, 3),
    ]


def test_tiles_of_another_size_are_refused_resized_or_enlarge_the_picture(host: Host) -> None:
    with pytest.raises(
        RunError,
        match=r"tile 1 came back as 192 x 192, but was 96 x 96\. Choose resize tiles or scale",
    ):
        host.run(enlarged(graph_of(host, (200, 300))))
    run = host.run(enlarged(graph_of(host, (200, 300), other_size="scale picture")))
    original = picture_in(host)
    large = run.outputs["merge"][0][0]
    expected = original.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(large, expected, rtol=0, atol=1e-6)
    assert run.status("merge")["text"] == "600 x 400 from 15 tiles; picture scaled by 2"
    run = host.run(enlarged(graph_of(host, (200, 300), other_size="resize tiles")))
    assert run.outputs["merge"][0][0].shape == original.shape
    assert (run.outputs["merge"][0][0] - original).abs().mean() < 0.1
    assert "resized 15, the first from 192 x 192" in run.status("merge")["text"]


def picture_in(host: Host) -> Tensor:
    """The first picture of the graph, as ComfyUI loads it."""
    return host.nodes.NODE_CLASS_MAPPINGS["LoadImage"]().load_image("tiles_0.png")[0]


def stock(name: str) -> Any:
    """ComfyUI's own nodes for tiles."""
    import comfy_extras.nodes_images

    return getattr(comfy_extras.nodes_images, name)


def test_where_stock_scrambles_resized_tiles_ours_does_not(tiling: ModuleType) -> None:
    """Tiles that a model enlarged are laid by a grid of the enlarged size in stock."""
    image = pixels(1, 256, 256, 3)
    twice = F.interpolate(image.movedim(-1, 1), scale_factor=2).movedim(1, -1)
    tiles = stock("SplitImageToTileList").execute(image, 96, 96, 32).args[0]
    larger = [F.interpolate(t.movedim(-1, 1), scale_factor=2).movedim(1, -1) for t in tiles]
    theirs = stock("ImageMergeTileList").execute(larger, [512], [512], [64]).args[0]
    tiles, _, grid, *_ = split(tiling, image)
    larger = [F.interpolate(t.movedim(-1, 1), scale_factor=2).movedim(1, -1) for t in tiles]
    (ours,), _ = merge(tiling, larger, grid, rule="scale picture")
    torch.testing.assert_close(ours, twice, rtol=0, atol=1e-6)
    theirs_small = stock("ImageMergeTileList").execute(larger, [256], [256], [32]).args[0]
    assert (theirs_small - image).abs().mean() > 0.2  # the picture's own size: scrambled
    assert theirs.shape == twice.shape


def test_where_stock_has_black_corners_in_half_precision_ours_has_none(tiling: ModuleType) -> None:
    image = torch.ones(1, 256, 256, 3, dtype=torch.float16)
    tiles = stock("SplitImageToTileList").execute(image, 96, 96, 32).args[0]
    theirs = stock("ImageMergeTileList").execute(tiles, [256], [256], [32]).args[0]
    assert (theirs - 1).abs().max() > 0.5
    tiles, _, grid, *_ = split(tiling, image)
    (ours,), _ = merge(tiling, tiles, grid)
    assert tiles[0].dtype == torch.float16 and ours.dtype == torch.float32
    assert (ours - 1).abs().max() < EIGHT_BIT


# ------------------------------------------------------------------------------ inputs tried
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 1, 1, 3), "1 tile of 1 x 1: the whole picture"),
        ((1, 17, 4000, 3), "62 tiles of 96 x 17, at least 32 shared, 62 x 1"),
        ((1, 4000, 17, 1), "62 tiles of 17 x 96, at least 32 shared, 1 x 62"),
        ((1, 200, 300, 4), "15 tiles of 96 x 96, at least 36 shared, 5 x 3"),
        ((3, 100, 130, 3), "4 tiles of 96 x 96, at least 62 shared, 2 x 2"),
        ((1, 50, 60, 3), "1 tile of 60 x 50: the whole picture"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_picture_is_cut_and_comes_back(tiling: ModuleType, shape, said, dtype) -> None:
    image = pixels(*shape).to(dtype)
    tiles, masks, grid, plan, text = split(tiling, image)
    assert text == said
    assert {tuple(tile.shape) for tile in tiles} == {(shape[0], *tiles[0].shape[1:3], shape[3])}
    assert all(
        mask.shape == tile.shape[:3] and mask.all() for tile, mask in zip(tiles, masks, strict=True)
    )
    assert plan.shape[0] == 1 and plan.shape[-1] == 3
    (merged,), _ = merge(tiling, tiles, grid)
    torch.testing.assert_close(merged, image.float(), rtol=0, atol=1e-6)


def test_values_beyond_white_and_black_pass(tiling: ModuleType) -> None:
    image = pixels(1, 200, 200, 3) * 20 - 10
    tiles, _, grid, *_ = split(tiling, image, window="gaussian")
    (merged,), _ = merge(tiling, tiles, grid)
    torch.testing.assert_close(merged, image, rtol=0, atol=1e-5)


def test_the_mask_is_cut_where_the_picture_is(tiling: ModuleType) -> None:
    image = pixels(2, 200, 300, 1)
    tiles, masks, *_, text = split(tiling, image, mask=image[..., 0])
    assert all(torch.equal(t[..., 0], m) for t, m in zip(tiles, masks, strict=True))
    assert "mask" not in text
    for mask in (image[:1, ..., 0], image[0, ..., 0]):
        one = split(tiling, image, mask=mask)[1]
        assert all(
            torch.equal(m, t[:1, ..., 0].expand(2, -1, -1)) for t, m in zip(tiles, one, strict=True)
        )


def test_a_mask_of_another_size_is_resized_and_that_is_told(tiling: ModuleType) -> None:
    mask = torch.zeros(1, 20, 30)
    mask[:, :10] = 1
    _, masks, *_, text = split(tiling, pixels(1, 200, 300, 3), mask=mask)
    assert text.endswith("; mask resized from 30 x 20")
    assert masks[0].shape == (1, 96, 96)
    assert (masks[0][:, :80] == 1).all() and not masks[-1][:, -90:].any()


def test_edited_tiles_may_have_lost_the_alpha_channel(tiling: ModuleType) -> None:
    image = pixels(1, 200, 300, 4)
    tiles, _, grid, *_ = split(tiling, image)
    (merged,), text = merge(tiling, [tile[..., :3] for tile in tiles], grid)
    torch.testing.assert_close(merged, image[..., :3], rtol=0, atol=1e-6)
    assert text == "300 x 200 from 15 tiles; 3 channels instead of 4"


def test_resized_tiles_stay_within_their_own_range(tiling: ModuleType) -> None:
    """Bicubic swings beyond a hard edge."""
    image = (pixels(1, 200, 300, 3) > 0.5).float()
    tiles, _, grid, *_ = split(tiling, image)
    other = [F.interpolate(t.movedim(-1, 1), (90, 101)).movedim(1, -1) for t in tiles]
    (merged,), text = merge(tiling, other, grid, rule="resize tiles")
    assert merged.shape == image.shape
    assert merged.min() >= 0 and merged.max() <= 1 + 1e-6
    assert text == "300 x 200 from 15 tiles; resized 15, the first from 101 x 90"


@pytest.mark.parametrize("tile", [64, 144])
def test_a_picture_is_scaled_by_what_all_tiles_were(tiling: ModuleType, tile: int) -> None:
    """By 2/3 and by 3/2: the grid must come out even, which one of multiples of 48 does."""
    tiles, _, grid, *_ = split(tiling, torch.ones(1, 192, 288, 3), overlap=48)
    other = [torch.ones(1, tile, tile, 3) for _ in tiles]
    (merged,), text = merge(tiling, other, grid, rule="scale picture")
    assert merged.shape == (1, 192 * tile // 96, 288 * tile // 96, 3)
    assert text.endswith("picture scaled by 2/3" if tile == 64 else "picture scaled by 3/2")
    torch.testing.assert_close(merged, torch.ones_like(merged), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("tile", "overlap", "sentence"),
    [
        (96, 96, "The overlap must lie between 0 and 80, not 96. Change tile_size or overlap."),
        (96, 4096, "The overlap must lie between 0 and 80, not 4096."),
        (100, 32, "The side of a tile must be a multiple of 32, not 100."),
    ],
)
def test_sizes_that_cannot_be_are_refused(tiling: ModuleType, tile, overlap, sentence) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        split(tiling, pixels(1, 200, 300, 3), tile, overlap)


def test_pictures_and_masks_that_cannot_be_are_refused(tiling: ModuleType) -> None:
    with pytest.raises(ValueError, match="image must hold pictures"):
        split(tiling, pixels(0, 200, 300, 3))
    with pytest.raises(ValueError, match="image must hold pictures"):
        split(tiling, pixels(1, 16, 1, 40, 60))
    with pytest.raises(ValueError, match="mask holds 2 masks for 3 pictures. Connect one for all"):
        split(tiling, pixels(3, 200, 300, 3), mask=pixels(2, 200, 300))
    with pytest.raises(ValueError, match="mask holds 0 masks for 1 pictures"):
        split(tiling, pixels(1, 200, 300, 3), mask=pixels(0, 200, 300))


def test_tiles_that_do_not_belong_are_refused(tiling: ModuleType) -> None:
    tiles, _, grid, *_ = split(tiling, pixels(2, 200, 300, 3))
    said = "14 tiles came, but 15 belong to the grid. Connect the list with all tiles"
    with pytest.raises(ValueError, match=said):
        merge(tiling, tiles[1:], grid)
    with pytest.raises(ValueError, match="1 tile came, but 15 belong"):
        merge(tiling, [torch.cat(tiles)], grid)
    with pytest.raises(ValueError, match=r"tile 2 came as \(1, 96, 96, 3\), but each must hold 2"):
        merge(tiling, [tiles[0], *(t[:1] for t in tiles[1:])], grid)
    with pytest.raises(ValueError, match="tile 2 has 1 channels, but tile 1 has 3"):
        merge(tiling, [tiles[0], *(t[..., :1] for t in tiles[1:])], grid)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((96, 48), "Not all are so by one factor. Choose resize tiles at other_size."),
        ((97, 97), "is no whole pixel. Choose resize tiles at other_size."),
    ],
)
def test_a_picture_that_cannot_be_scaled_so_is_refused(tiling, size, sentence) -> None:
    tiles, _, grid, *_ = split(tiling, pixels(1, 200, 300, 3))
    other = [torch.ones(1, *size, 3) for _ in tiles]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        merge(tiling, other, grid, rule="scale picture")
    with pytest.raises(ValueError, match=re.escape("Not all are so by one factor")):
        merge(tiling, [*tiles[:-1], torch.ones(1, 192, 192, 3)], grid, rule="scale picture")


def test_merging_can_be_interrupted(tiling: ModuleType) -> None:
    from comfy import model_management

    tiles, _, grid, *_ = split(tiling, pixels(1, 200, 300, 3))
    model_management.interrupt_current_processing()
    with pytest.raises(model_management.InterruptProcessingException):
        merge(tiling, tiles, grid)


# ------------------------------------------------------------------------------ memory
def test_a_picture_too_large_for_the_ram_is_merged_on_the_disk(
    tiling: ModuleType, host: Host, monkeypatch, tmp_path
) -> None:
    disk = host.part("nodes.disk")
    image = pixels(1, 200, 300, 3)
    tiles, _, grid, *_ = split(tiling, image)
    made = []
    empty = disk.disk_backed.empty
    monkeypatch.setattr(disk.disk_backed, "empty", lambda *args: made.append(args) or empty(*args))
    monkeypatch.setattr(host.folder_paths, "temp_directory", str(tmp_path))
    needed = image.numel() * 4
    for free, times in ((4 * needed, 0), (4 * needed - 4, 1)):
        monkeypatch.setattr(
            disk.model_management, "get_free_memory", lambda device, free=free: free
        )
        (merged,), _ = merge(tiling, tiles, grid)
        torch.testing.assert_close(merged, image, rtol=0, atol=1e-6)
        assert len(made) == times
    assert made == [((1, 200, 300, 3), tmp_path)]
    del merged
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"needs 0\.7 MB .* are free\. Free some .* --temp-directory"):
        merge(tiling, tiles, grid)
