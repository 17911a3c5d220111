"""The edit of one picture by tiles: guide, tiles, corrections, blend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ..core.tiling import PIXEL_PATCH, PIXEL_STEP, Tile, TileGrid, crop
from .pictures import Picture
from .registration import require_library
from .tile_canvas import LATENT, Blend, Canvas, Mask, Region, Tiles
from .tile_coding import Coder, in_latent, require_numbers
from .tile_correction import Correction, correct
from .tile_guide import Frame, Guide, without_guide
from .tile_sampling import Progress, Sampling
from .tiled_diffusion import CROP, WHOLE, Tiling, patch, untiled

TOGETHER, ONE_BY_ONE = MODES = ("together", "one after another")
START, EXTRA, OFF = GUIDES = ("start of denoising", "extra reference", "off")
MOST_STORED = 64  # tiles whose latents go to the store: more would push everything else out


@dataclass(frozen=True)
class Settings:
    """How the tiles are made and put together. Sizes in pixels, `skip_threshold` of 255."""

    denoise: float
    mode: str
    tile_size: int
    overlap: int
    guide: str
    skip_threshold: float
    registration: bool
    colour_match: bool
    window: str

    def grid(self, canvas: Canvas) -> TileGrid:
        """The tiles of a picture."""
        sizes = (canvas.height, canvas.width, self.tile_size, self.overlap)
        return TileGrid.cover(*sizes, PIXEL_STEP, PIXEL_PATCH)


class Edited(NamedTuple):
    """What became of one picture: (1, H, W, C), and (1, H, W): where it may differ."""

    image: Tensor
    edited: Tensor
    tiles: Tiles
    untouched: frozenset[int]  # by the mask
    guide: Guide | None
    corrections: dict[int, Correction]
    mask_resized: bool
    differences: dict[int, float]  # from the guide, as by Guide.difference
    was_tiled: bool  # the model, by a node in front


@dataclass
class Edit:
    """One picture and all that its tiles need. `others` are latents of further references."""

    canvas: Canvas
    mask: Mask | None
    settings: Settings
    sampling: Sampling
    coder: Coder
    progress: Progress
    others: Sequence[Tensor]
    guide: Guide | None = None
    region: Region | None = None  # where pixels may change; None: everywhere
    differences: dict[int, float] = field(default_factory=dict)
    grid: TileGrid = field(init=False)

    def __post_init__(self) -> None:
        self.grid = self.settings.grid(self.canvas)

    def run(self) -> Edited:
        """Edit it. Raises ImportError with a sentence, where scikit-image is missing."""
        given = self.sampling.model
        model = untiled(given)  # tiles of tiles, or of the guide, are nobody's wish
        self.sampling = replace(self.sampling, model=model)
        try:
            return self._run(was_tiled=model is not given)
        finally:
            if model is not given:
                model.pinned = set()  # of the weights, shared with the model: see nodes/sampler.py

    def _run(self, *, was_tiled: bool) -> Edited:
        every = range(len(self.grid))
        touched = frozenset(i for i in every if self._is_touched(i))
        settings, active = self.settings, touched
        if settings.registration and len(self.grid) > 1:
            require_library()
        self.progress.begin(self.canvas)
        if len(self.grid) > 1 and settings.guide != OFF and touched:
            self.guide = self._make_guide(len(touched))
            active &= self.guide.changed(self.grid, settings.skip_threshold)
            self.region = self.guide.region(self.mask, settings.skip_threshold)
        elif self.mask is not None:
            self.region = Region(self.mask, None)
        tiles = Tiles(self.grid, settings.window, active)
        blend = Blend(self.canvas, tiles, self.region)
        corrections = self._edit_tiles(tiles, blend) if active else {}
        image, edited = blend.finish()
        untouched = frozenset(every) - touched
        resized = self.mask is not None and self.mask.resized
        found = (self.guide, corrections, resized, self.differences, was_tiled)
        return Edited(image, edited, tiles, untouched, *found)

    def _is_touched(self, index: int) -> bool:
        """Whether the mask lets anything of a tile be edited."""
        return self.mask is None or bool(self.mask.crop(self.grid.tiles()[index]).any())

    def _make_guide(self, tiles: int) -> Guide:
        """Edit the whole picture at about a megapixel: what users do without tiles."""
        steps, settings = self.sampling.steps, self.settings
        self.progress.expect(steps * (tiles + 1))
        frame = Frame.of(self.canvas)
        before = frame.scaled(self.canvas)
        latent = self.coder.reference(Picture(1, before, frame.size, "untouched"))
        height, width = latent.shape[-2:]
        mask = self.mask.reduced(height, width, frame.padded) if self.mask else None
        made = self.sampling.run(
            latent,
            self.sampling.noise(height, width),
            [latent, *self.others],
            denoise=1.0,
            mask=mask,
            callback=self.progress.callback(),
        )
        coded = self.coder.decode(latent)
        after = require_numbers(self.coder.decode(made), "The guide")
        corrections = {"register": settings.registration, "colour": settings.colour_match}
        return Guide.compare(frame, before, coded, after, **corrections)

    def _edit_tiles(self, tiles: Tiles, blend: Blend) -> dict[int, Correction]:
        """Edit, correct and blend every active tile."""
        steps = self.sampling.steps
        guided = steps if self.guide is not None else 0
        self.progress.expect(guided + steps * len(tiles.active))
        way = self._together if self.settings.mode == TOGETHER else self._one_by_one
        pixels_of = way(tiles)
        corrections = {}
        for index in sorted(tiles.active):
            pixels = require_numbers(pixels_of(index), f"Tile {index + 1}")
            if len(self.grid) > 1:
                tile = self.grid.tiles()[index]
                original = self.canvas.crop(tile)
                pixels, corrections[index] = self._corrected(tile, original, pixels)
                if self.guide is not None:
                    found = self.guide.difference(tile, original, pixels, blend.share(index))
                    self.differences[index] = found
            blend.add(index, pixels)
        return corrections

    def _corrected(self, tile: Tile, original: Tensor, pixels: Tensor) -> tuple[Tensor, Correction]:
        """An edited tile in its place and in its colours."""
        if self.guide is not None:
            target, unchanged = self.guide.target(tile, original)
        else:
            target, unchanged = without_guide(pixels, original)
        register, colour = self.settings.registration, self.settings.colour_match
        return correct(pixels, target, unchanged, register=register, colour=colour)

    @property
    def _denoise(self) -> float:
        """What is asked is for tiles that begin with the guide: where it is to begin with and is
        not there, the one tile is edited as the guide would have been."""
        alone = self.guide is None and self.settings.guide == START
        return 1.0 if alone else self.settings.denoise

    def _start(self, original: Tensor, guide: Tensor | None, mask: Tensor | None) -> Tensor:
        """The latent that denoising begins with."""
        if guide is None or self.settings.guide != START:
            return original
        return guide if mask is None else original + mask.to(original) * (guide - original)

    def _references(self, original: Tensor, guide: Tensor | None) -> list[Tensor]:
        """For the latent of a tile, or of all."""
        extra = [guide] if guide is not None and self.settings.guide == EXTRA else []
        return [original, *extra, *self.others]

    # --------------------------------------------------------------------------------- together
    def _together(self, tiles: Tiles) -> Callable[[int], Tensor]:
        """All tiles in every step: how to get the pixels of one."""
        coder, whole = self.coder, self.canvas.whole
        original = coder.encode_tiles(self.grid, self.canvas.crop, coder.stored)
        guide = None
        if self.guide is not None:
            guide = coder.encode_tiles(self.grid, self.guide.crop, coder.encode)
        mask = self.region.latent(whole) if self.region else None
        model = patch(self.sampling.model, self._tiling(tiles, original))
        try:
            made = self.sampling.run(
                self._start(original, guide, mask),
                self.sampling.noise(*original.shape[-2:]),
                self._references(original, guide),
                denoise=self._denoise,
                mask=mask,
                callback=self.progress.callback(tiles=len(tiles.active)),
                model=model,
            )
        finally:
            model.pinned = set()  # of the weights, shared with the model: see nodes/sampler.py
        pixels_of = coder.decoded_tiles(self.grid, made)
        return lambda index: pixels_of(self.grid.tiles()[index])

    def _tiling(self, tiles: Tiles, original: Tensor) -> Tiling:
        """How the model goes through the whole latent."""
        settings = self.settings
        own = len(self._references(original, original)) - len(self.others)
        return Tiling(
            settings.tile_size,
            settings.overlap,
            settings.window,
            references=(*(CROP,) * own, WHOLE),
            active=tiles.active if tiles.skipped() else None,
            known=original if tiles.skipped() else None,
            told=self.progress.told(len(tiles.active)),
        )

    # -------------------------------------------------------------------------- one after another
    def _one_by_one(self, tiles: Tiles) -> Callable[[int], Tensor]:
        """Each tile on its own: how to get the pixels of one, once.

        First all are encoded, then all sampled: the models take turns on the card only twice.
        """
        noise = self.sampling.noise(self.grid.height // LATENT, self.grid.width // LATENT)
        code = self.coder.stored if len(tiles.active) <= MOST_STORED else self.coder.encode
        places = {i: self.grid.tiles()[i] for i in sorted(tiles.active)}
        originals = {i: code(self.canvas.crop(tile)) for i, tile in places.items()}
        guides = {}
        if self.guide is not None:
            guides = {i: self.coder.encode(self.guide.crop(tile)) for i, tile in places.items()}
        made = {}
        for index, tile in places.items():
            mask = self.region.latent(tile) if self.region else None
            original, guide = originals.pop(index), guides.pop(index, None)
            made[index] = self.sampling.run(
                self._start(original, guide, mask),
                crop(noise, in_latent(tile)),
                self._references(original, guide),
                denoise=self._denoise,
                mask=mask,
                callback=self.progress.callback(tile),
            )
        return lambda index: self.coder.decode(made.pop(index))
