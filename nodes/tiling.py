"""A picture into overlapping tiles, and tiles into a picture, for graphs that people build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from comfy import model_management
from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional as F

from ..core import tile_plan
from ..core.tiling import PIXEL_PATCH, PIXEL_STEP, WINDOWS, TileBlender, TileGrid, crop
from .disk import new_picture
from .status import shown

REFUSE, RESIZE, SCALE = OTHER_SIZES = ("refuse", "resize tiles", "scale picture")
REMEDY = "Choose resize tiles or scale picture at other_size, or give the tiles back as they were."

Grid = io.Custom("QWEN_VRAM_TILE_GRID")


@dataclass(frozen=True)
class Cut:
    """What merging needs to know of a picture that was split: `channels` as it came."""

    grid: TileGrid
    window: str
    batch: int
    channels: int


# --------------------------------------------------------------------------------- split
class SplitTiles(io.ComfyNode):
    """A picture into tiles of one size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMSplitTiles.md."""
        return io.Schema(
            node_id="QwenVRAMSplitTiles",
            display_name="Split into Tiles (Qwen VRAM)",
            category="Qwen VRAM/tiles",
            description=(
                "Cuts a picture into overlapping tiles of one size, as few as cover it. Merge "
                "Tiles puts them together without seams."
            ),
            search_aliases=["split image", "tile image", "tiled", "image tiles", "crop grid"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to cut. A batch stays one."),
                *cls.inputs_of_the_grid(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Cut like the picture. One of another size is resized to the picture's."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="tiles", is_output_list=True),
                io.Mask.Output(display_name="masks", is_output_list=True),
                Grid.Output(display_name="grid"),
                io.Image.Output(display_name="plan"),
            ],
        )

    @classmethod
    def inputs_of_the_grid(cls) -> list[io.Input]:
        """What it is made by."""
        return [
            io.Int.Input(
                "tile_size",
                default=1024,
                min=PIXEL_STEP,
                max=8192,
                step=PIXEL_STEP,
                tooltip="The side of a tile in pixels, a multiple of 32.",
            ),
            io.Int.Input(
                "overlap",
                default=128,
                min=0,
                max=4096,
                step=PIXEL_PATCH,
                tooltip=(
                    "What neighbours share at least, in pixels: less than tile_size by 16 or more."
                ),
            ),
            io.Combo.Input(
                "window",
                options=list(WINDOWS),
                default="hann",
                tooltip=("How tiles will be blended where they overlap. hann fits almost always."),
            ),
        ]

    @classmethod
    def execute(
        cls, image: Tensor, tile_size: int, overlap: int, window: str, mask: Tensor | None = None
    ) -> io.NodeOutput:
        """Cut, as views: a tile takes no memory of its own."""
        _check_pictures(image)
        batch, height, width, channels = image.shape
        grid = _cover(height, width, tile_size, overlap)
        text = tile_plan.summary(grid)
        tiles = [crop(image, tile, -3) for tile in grid.tiles()]
        if mask is None:  # all of each tile, the same for all
            masks = [image.new_ones(batch, grid.tile_height, grid.tile_width)] * len(grid)
        else:
            fitted = _fit(mask, image)
            masks = [crop(fitted, tile) for tile in grid.tiles()]
            if mask.shape[-2:] != fitted.shape[-2:]:
                text += f"; mask resized from {mask.shape[-1]} x {mask.shape[-2]}"
        plan = tile_plan.draw(image[:1], grid, window)
        return shown(tiles, masks, Cut(grid, window, batch, channels), plan, text=text)


def _check_pictures(image: Tensor) -> None:
    if image.ndim != 4 or not image.numel():
        raise ValueError(
            "image must hold pictures (batch, height, width, channels), not "
            f"{tuple(image.shape)}. Connect at least one picture."
        )


def _cover(height: int, width: int, tile_size: int, overlap: int) -> TileGrid:
    try:
        return TileGrid.cover(height, width, tile_size, overlap, PIXEL_STEP, PIXEL_PATCH)
    except ValueError as error:
        raise ValueError(f"{error} Change tile_size or overlap.") from error


def _fit(mask: Tensor, image: Tensor) -> Tensor:
    """A mask as (batch, height, width) of the picture. Raises ValueError: another number."""
    batch, height, width, _ = image.shape
    masks = mask.reshape(mask.shape[:-2].numel(), *mask.shape[-2:])
    if len(masks) not in (1, batch) or not masks.numel():
        raise ValueError(
            f"mask holds {len(masks)} masks for {batch} pictures. Connect one for all, or one for "
            "each."
        )
    if masks.shape[-2:] != (height, width):
        masks = F.interpolate(
            masks[:, None].float(), (height, width), mode="bilinear", antialias=True
        )[:, 0]
    return masks.expand(batch, -1, -1)


# --------------------------------------------------------------------------------- merge
class MergeTiles(io.ComfyNode):
    """Tiles into the picture that they were cut from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMMergeTiles.md."""
        return io.Schema(
            node_id="QwenVRAMMergeTiles",
            display_name="Merge Tiles (Qwen VRAM)",
            category="Qwen VRAM/tiles",
            description=(
                "Blends the tiles of Split into Tiles to one picture, without seams. Tiles that "
                "were not changed give back the picture that was cut."
            ),
            search_aliases=["merge image", "merge tiles", "untile", "stitch", "image tiles"],
            is_input_list=True,
            inputs=[
                io.Image.Input("tiles", tooltip="All tiles, in the order they were cut in."),
                Grid.Input("grid", tooltip="The grid of the Split into Tiles that cut them."),
                io.Combo.Input(
                    "other_size",
                    options=list(OTHER_SIZES),
                    default=REFUSE,
                    tooltip=(
                        "Tiles came back in another size. refuse: stop and say so. resize tiles: "
                        "bring each to its size in the grid, bicubic. scale picture: if all are "
                        "larger or smaller by one factor, the picture is so, too."
                    ),
                ),
            ],
            outputs=[io.Image.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, tiles: list[Tensor], grid: list[Cut], other_size: list[str]) -> io.NodeOutput:
        """One picture (or batch) for each grid."""
        _check_count(tiles, grid)
        pictures, notes, rest = [], [], iter(tiles)
        for cut in grid:
            own = [next(rest) for _ in range(len(cut.grid))]
            picture, note = _merge(own, cut, other_size[0])
            pictures.append(picture)
            notes += [note] if note and note not in notes else []
        source = _tiles(len(tiles))
        text = f"{len(pictures)} pictures from {source}"
        if len(pictures) == 1:
            text = f"{pictures[0].shape[2]} x {pictures[0].shape[1]} from {source}"
        text = "; ".join([text, *notes])
        return shown(pictures, text=text)


def _tiles(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"


def _check_count(tiles: Sequence[Tensor], grid: Sequence[Cut]) -> None:
    belong = sum(len(cut.grid) for cut in grid)
    if len(tiles) != belong:
        raise ValueError(
            f"tiles: {_tiles(len(tiles))} came, but {belong} belong to the grid. Connect the list "
            "with all tiles of Split into Tiles, as single pictures and not as one batch."
        )


def _merge(tiles: list[Tensor], cut: Cut, other_size: str) -> tuple[Tensor, str]:
    """The picture, float32, and what there is to say of it. Raises ValueError."""
    channels = _channels(tiles, cut)
    grid, note = _sized(tiles, cut.grid, other_size)
    shape = (cut.batch, grid.height, grid.width, channels)
    blender = TileBlender(grid, shape, cut.window, dim=-3, into=new_picture(shape))
    for index, tile in enumerate(tiles):
        model_management.throw_exception_if_processing_interrupted()
        if tile.shape[1:3] != (grid.tile_height, grid.tile_width):
            tile = _resized(tile, grid.tile_height, grid.tile_width)
        blender.add(index, tile)
    if channels != cut.channels:
        note += f"{'; ' if note else ''}{channels} channels instead of {cut.channels}"
    return blender.result(), note


def _channels(tiles: Sequence[Tensor], cut: Cut) -> int:
    """Those of the tiles: what edits a picture with alpha often gives back RGB."""
    for number, tile in enumerate(tiles, start=1):
        if tile.ndim != 4 or len(tile) != cut.batch:
            raise ValueError(
                f"tiles: tile {number} came as {tuple(tile.shape)}, but each must hold "
                f"{cut.batch} pictures (batch, height, width, channels) as the picture did that "
                "was cut."
            )
        if tile.shape[-1] != tiles[0].shape[-1]:
            raise ValueError(
                f"tiles: tile {number} has {tile.shape[-1]} channels, but tile 1 has "
                f"{tiles[0].shape[-1]}. Give all of them alpha, or none."
            )
    return tiles[0].shape[-1]


def _sized(tiles: Sequence[Tensor], grid: TileGrid, other_size: str) -> tuple[TileGrid, str]:
    """The grid to merge by, and what was done to fit."""
    asked = (grid.tile_height, grid.tile_width)
    other = [(number, t) for number, t in enumerate(tiles, start=1) if t.shape[1:3] != asked]
    if not other:
        return grid, ""
    number, first = other[0]
    came = f"{first.shape[2]} x {first.shape[1]}"
    told = f"tiles: tile {number} came back as {came}, but was {asked[1]} x {asked[0]}."
    if other_size == REFUSE:
        raise ValueError(f"{told} {REMEDY}")
    if other_size == RESIZE:
        return grid, f"resized {len(other)}, the first from {came}"
    factor = Fraction(first.shape[1], asked[0])
    sizes = {(Fraction(t.shape[1], asked[0]), Fraction(t.shape[2], asked[1])) for t in tiles}
    if sizes != {(factor, factor)}:
        raise ValueError(f"{told} Not all are so by one factor. Choose resize tiles at other_size.")
    try:
        return grid.scaled(*factor.as_integer_ratio()), f"picture scaled by {factor}"
    except ValueError as error:
        raise ValueError(f"{told} {error} Choose resize tiles at other_size.") from error


def _resized(tile: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased; what it swings beyond the tile's own range is cut off."""
    channels_first = tile.float().movedim(-1, 1)
    resized = F.interpolate(channels_first, (height, width), mode="bicubic", antialias=True)
    return resized.movedim(1, -1).clamp(tile.min().float(), tile.max().float())


NODES = [SplitTiles, MergeTiles]
