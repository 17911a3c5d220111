"""What stands before a plain background, cut out as a sticker with a white edge around it.

The background is what is connected to the picture's edge and has its colour, by the regions of the
picture: soft gradients and shadows have no edge and belong to it. Shapes are kept as distances to
their outline, so that a sticker can be drawn sharply in any size and turned by any angle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .picture_regions import Detail, libraries, regions, rgb, working_copy

if TYPE_CHECKING:
    import numpy as np

REGIONS = Detail(2.0, 8, 0.0003)
LIKE_THE_EDGE = 20.0  # CIELAB units: what else at the picture's edge is background, too
HOLE = 6.0  # CIELAB units by which a hole may differ from the background around
PLAIN_EDGE = 0.7  # of the picture's edge must be background
LEAST, MOST = 0.01, 0.92  # of the picture that can be the animal
CRUMB = 0.04  # of the largest part: smaller ones are flakes and flowers
CLEAR = 0.5  # alpha below which a picture is cut out already
SHRUNK = 1.0  # pixels of the working copy: the background shines through at the very edge
ROUNDED = 0.09  # of the shorter side: corners of a picture that stays whole
GAP = 1.5  # borders: narrower bays and holes are closed
NOT_PLAIN = "kept whole: no plain background"
NOTHING = "kept whole: nothing stands out from the plain background"


class Sticker(NamedTuple):
    """One picture, and two shapes by their distance in pixels of the working copy, inside below 0.

    picture: (H, W, 3); `shape` and `edge`: (h, w), the animal and the white edge's outline, with
    `pad` pixels around the working copy. `share`: of the picture that was cut out, 0..1. `whole`:
    why the picture stays whole, `NOT_PLAIN` or `NOTHING`; empty if it was cut out.
    """

    picture: Tensor
    shape: np.ndarray
    edge: np.ndarray
    pad: int
    share: float
    whole: str

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the white edge, in pixels of `edge`."""
        np = libraries().np
        rows, columns = (np.flatnonzero((self.edge < 1).any(axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @property
    def outline(self) -> Tensor:
        """Where the white edge begins and ends in each row: (n, 2) of (x, y), float64.

        In pixels of `edge` from the middle of `box`. All its corners are among them, so a straight
        line that parts them from something parts the whole sticker from it.
        """
        np = libraries().np
        left, top, right, bottom = self.box
        inside = (self.edge < 1)[top:bottom, left:right]
        rows = np.flatnonzero(inside.any(1))
        first, last = inside[rows].argmax(1), inside.shape[1] - inside[rows, ::-1].argmax(1)
        ends = [np.stack([x, rows + below], -1) for x in (first, last) for below in (0, 1)]
        middle = np.array([right - left, bottom - top]) / 2
        return torch.from_numpy(np.concatenate(ends) - middle)


def cut_out(picture: Tensor, border: float) -> Sticker:
    """The sticker of a picture (H, W, 1, 3 or 4); `border` in thousandths of its shorter side.

    A picture with alpha is cut by that; one without a plain background, or with nothing on it that
    is large enough, stays whole. Raises
    ValueError for pictures that cannot be used, ImportError without scikit-image.
    """
    np = libraries().np
    colours = rgb(picture)
    copy = working_copy(colours)
    animal, whole = _by_alpha(picture), ""
    if animal is None:
        animal, whole = _before_plain(copy)
    width = border / 1000 * min(copy.shape[:2])
    pad = int(width * (1 + GAP)) + 8
    if animal is None:
        shape = _rounded(copy.shape[0], copy.shape[1], pad)
    else:
        shape = _smoothed(_distance(np.pad(animal, pad)), 1.0) + SHRUNK
    edge = _edge(shape, width)
    if not (edge < 1).any():  # as fine as a hair: smoothing has taken all of it
        animal, whole = None, NOTHING
        shape = _rounded(copy.shape[0], copy.shape[1], pad)
        edge = _edge(shape, width)
    share = 1.0 if animal is None else float(animal.mean())
    return Sticker(colours, shape, edge, pad, share, whole)


# --------------------------------------------------------------------------------- what is animal
def _by_alpha(picture: Tensor) -> np.ndarray | None:
    """Where the picture is, if it comes with alpha that leaves something out, and something in."""
    if picture.shape[-1] != 4:
        return None
    alpha = picture[..., 3:].detach().float().cpu().expand(-1, -1, 3)
    there = working_copy(alpha)[..., 0] >= CLEAR
    return there if LEAST <= there.mean() < 1 else None


def _before_plain(copy: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(h, w) bool and an empty text, or None and why nothing can be cut out."""
    np = libraries().np
    labels, lab = regions(copy, REGIONS)
    area = np.bincount(labels.ravel())
    mean = np.stack([np.bincount(labels.ravel(), lab[..., i].ravel()) for i in range(3)], -1)
    mean /= np.maximum(area, 1)[:, None]
    ring = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    along = np.bincount(ring, minlength=len(area))
    like = np.sqrt(((mean - mean[along.argmax()]) ** 2).sum(-1)) <= LIKE_THE_EDGE
    background = ((along > 0) & like)[labels]
    at_edge = along[(along > 0) & like].sum() / len(ring)
    background |= _holes(labels, lab, mean, background)
    animal = _without_crumbs(~background)
    if at_edge < PLAIN_EDGE or animal.mean() > MOST:
        return None, NOT_PLAIN
    return (None, NOTHING) if animal.mean() < LEAST else (animal, "")


def _holes(
    labels: np.ndarray, lab: np.ndarray, mean: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """Regions within the animal that have the colour of the background nearest to them."""
    lib = libraries()
    # Away from the animal's edge, where the blur mixes both.
    deep = lib.ndimage.distance_transform_edt(background) > 3 * REGIONS.blur
    if not deep.any():
        return background
    index = lib.ndimage.distance_transform_edt(~deep, return_distances=False, return_indices=True)
    area = lib.np.maximum(lib.np.bincount(labels.ravel()), 1)
    around = lib.np.stack(
        [lib.np.bincount(labels.ravel(), lab[..., i][tuple(index)].ravel()) for i in range(3)], -1
    )
    apart = lib.np.sqrt(((mean - around / area[:, None]) ** 2).sum(-1))
    return (apart <= HOLE)[labels]


def _without_crumbs(animal: np.ndarray) -> np.ndarray:
    lib = libraries()
    parts, count = lib.ndimage.label(animal)
    if not count:
        return animal
    area = lib.np.bincount(parts.ravel())
    area[0] = 0
    return (area >= CRUMB * area.max())[parts]


# --------------------------------------------------------------------------------- shapes
def _distance(inside: np.ndarray) -> np.ndarray:
    """Pixels to the outline, below 0 inside."""
    edt = libraries().ndimage.distance_transform_edt
    return edt(~inside) - edt(inside) + inside - 0.5


def _smoothed(distance: np.ndarray, by: float) -> np.ndarray:
    lib = libraries()
    return lib.ndimage.gaussian_filter(distance.astype(lib.np.float32), by, mode="nearest")


def _edge(shape: np.ndarray, border: float) -> np.ndarray:
    """The outline of the white edge: around the shape, narrow bays closed, holes filled."""
    lib = libraries()
    further = border * (1 + GAP)
    grown = lib.ndimage.binary_fill_holes(shape <= further)
    closed = _distance(grown) + border * GAP  # and back: what has grown together stays so
    return _smoothed(closed, max(1.0, border / 4))


def _rounded(height: int, width: int, pad: int) -> np.ndarray:
    """A rectangle with round corners."""
    np = libraries().np
    radius = ROUNDED * min(height, width)
    y, x = np.ogrid[: height + 2 * pad, : width + 2 * pad]
    half = np.array([height, width]) / 2
    down = abs(y + 0.5 - pad - half[0]) - (half[0] - radius)
    right = abs(x + 0.5 - pad - half[1]) - (half[1] - radius)
    outside = np.hypot(down.clip(min=0), right.clip(min=0))
    return (outside + np.minimum(np.maximum(down, right), 0) - radius).astype(np.float32)


def as_tensor(sticker: Sticker) -> Tensor:
    """Both distances, (1, 2, h, w) float32."""
    both = libraries().np.stack([sticker.shape, sticker.edge])
    return torch.from_numpy(both).float()[None]
