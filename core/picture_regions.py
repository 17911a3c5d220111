"""The areas of one colour that a picture is made of, as a person would colour them in.

Basins of the colour gradient (watershed) are merged wherever no edge parts them: a soft shade
has no edge, and the two sides of a texture's edge have one colour on the average. All pictures are
worked on in one size, so a larger copy of a picture has the same regions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

LONGEST = 768  # pixels of the copy that is worked on, along its longer side
SHORTEST = 32  # pixels of a side, of pictures that are taken
LEVEL = 0.25  # step of the gradient, in CIELAB units a pixel: shallower dips are no basins
GRAIN, GRAIN_REACH = 2.5, 12.0  # how much texture takes off an edge, and from how far (pixels)
WEAKEST = 0.5  # power of the mean along a border: one that ends in a soft shade counts less
PATCHES = 3  # times the edge that the smallest regions need, to be told from texture


class Detail(NamedTuple):
    """What counts: the blur (pixels of the copy), an edge (CIELAB units), the share of an area."""

    blur: float
    edge: float
    area: float


class Libraries(NamedTuple):
    """What is used of NumPy, SciPy and scikit-image."""

    np: Any
    ndimage: Any
    watershed: Any
    lab: Any
    skeletonize: Any
    label: Any


def libraries() -> Libraries:
    """Raises ImportError with the remedy."""
    try:
        import numpy
        from scipy import ndimage
        from skimage.color import rgb2lab
        from skimage.measure import label
        from skimage.morphology import skeletonize
        from skimage.segmentation import watershed
    except ImportError as error:
        raise ImportError(
            "Colouring pages and stickers need scikit-image, which is not installed. Install it "
            "with `pip install scikit-image` in the Python that runs ComfyUI."
        ) from error
    return Libraries(numpy, ndimage, watershed, rgb2lab, skeletonize, label)


def rgb(picture: Tensor) -> Tensor:
    """A picture (H, W, 1, 3 or 4) of a node as (H, W, 3) float32; alpha lies on white.

    Raises ValueError: another shape, a side below `SHORTEST` pixels.
    """
    if picture.ndim != 3 or picture.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"image has the shape {tuple(picture.shape)} for one picture. Connect pictures with 1, "
            "3 or 4 channels."
        )
    if min(picture.shape[:2]) < SHORTEST:
        raise ValueError(
            f"image is {picture.shape[1]} x {picture.shape[0]} pixels, too small to find anything "
            f"in it. Connect one with at least {SHORTEST} pixels along each side."
        )
    values = picture.detach().float().cpu()
    if values.shape[-1] == 4:
        return values[..., :3] * values[..., 3:] + (1 - values[..., 3:])
    return values.expand(-1, -1, 3)


def working_copy(picture: Tensor) -> np.ndarray:
    """A picture (H, W, 3) at `LONGEST` pixels along its longer side: (h, w, 3) float32 in 0..1.

    Raises ValueError: values that are no numbers.
    """
    height, width = picture.shape[:2]
    scale = LONGEST / max(height, width)
    size = [max(SHORTEST // 2, round(side * scale)) for side in (height, width)]
    copy = F.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bicubic", antialias=True)
    if not bool(torch.isfinite(copy).all()):  # one bad pixel shows in the copy
        raise ValueError(
            "image holds values that are no numbers (NaN), as a VAE in float16 can give. Decode "
            "the picture again, with a VAE in bf16 or fp32."
        )
    return copy[0].movedim(0, -1).clamp(0, 1).contiguous().numpy()


def regions(copy: np.ndarray, detail: Detail) -> tuple[np.ndarray, np.ndarray]:
    """The region of every pixel of a working copy, int32 from 0, and its blurred CIELAB colours."""
    lib = libraries()
    lab = lib.lab(copy).astype(lib.np.float32)
    blurred = lib.np.stack(
        [lib.ndimage.gaussian_filter(lab[..., i], detail.blur, mode="nearest") for i in range(3)],
        -1,
    )
    slope = _slope(blurred)
    # An edge of height e, blurred, has the slope e / (blur * sqrt(2 pi)) at its steepest.
    height = slope * (detail.blur * (2 * lib.np.pi) ** 0.5)
    grain = lib.ndimage.gaussian_filter(abs(lab - blurred)[..., 0], GRAIN_REACH, mode="nearest")
    height = (height - GRAIN * grain).clip(min=0)
    basins = lib.watershed(lib.np.round(slope / LEVEL).astype(lib.np.int32)).astype(lib.np.int32)
    basins -= basins.min()  # from 1, but 0 everywhere in a picture of one colour
    labels = _merged(basins, height, blurred, detail)
    return labels, blurred


def _slope(lab: np.ndarray) -> np.ndarray:
    """CIELAB units a pixel, the steeper of the two axes together."""
    np = libraries().np
    padded = np.pad(lab, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    right = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    return np.sqrt((down**2 + right**2).sum(-1))


class _Pairs(NamedTuple):
    """Neighbouring regions: their numbers, the length of their border, the sum of its heights."""

    first: Any
    second: Any
    length: Any
    height: Any


def _neighbours(labels: np.ndarray, height: np.ndarray) -> _Pairs:
    np = libraries().np
    pairs, heights = [], []
    for a, b in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        apart = labels[a] != labels[b]
        pairs.append(np.stack([labels[a][apart], labels[b][apart]], -1))
        heights.append(np.maximum(height[a][apart], height[b][apart]))
    every = np.sort(np.concatenate(pairs), axis=1)
    ones = np.ones(len(every))
    return _summed(_Pairs(every[:, 0], every[:, 1], ones, np.concatenate(heights)))


def _summed(pairs: _Pairs) -> _Pairs:
    """Each pair once."""
    np = libraries().np
    low = np.minimum(pairs.first, pairs.second).astype(np.int64)
    high = np.maximum(pairs.first, pairs.second).astype(np.int64)
    count = int(high.max(initial=0)) + 1
    keys, index = np.unique(low * count + high, return_inverse=True)
    length = np.bincount(index, pairs.length, len(keys))
    height = np.bincount(index, pairs.height, len(keys))
    return _Pairs(keys // count, keys % count, length, height)


def _merged(basins: np.ndarray, height: np.ndarray, lab: np.ndarray, detail: Detail) -> np.ndarray:
    """Basins merged in rounds, each with its nearest neighbour where the two agree on it."""
    np = libraries().np
    flat = basins.ravel()
    area = np.bincount(flat).astype(np.float64)
    total = np.stack([np.bincount(flat, lab[..., i].ravel()) for i in range(3)], -1)
    names = np.arange(len(area))
    pairs = _neighbours(basins, height**WEAKEST)
    least = detail.area * basins.size
    while len(pairs.first):
        mean = total / area[:, None]
        apart = np.sqrt(((mean[pairs.first] - mean[pairs.second]) ** 2).sum(-1))
        edge = np.minimum((pairs.height / pairs.length) ** (1 / WEAKEST), apart)
        small = np.minimum(area[pairs.first], area[pairs.second])
        # Small ones go first and to what is most like them; of the others only a weak edge.
        cost = np.where(small < least, edge * (small / least) ** 0.5 * 0.5, edge)
        limit = detail.edge * np.maximum(1, PATCHES * (least / small) ** 0.5)
        cost = np.where((small >= least) & (edge > limit), np.inf, cost)
        chosen = _agreed(pairs, cost, len(area))
        if not chosen.any():
            break
        into = np.arange(len(area))
        into[pairs.second[chosen]] = pairs.first[chosen]
        kept = np.unique(into)
        new = np.searchsorted(kept, into)
        area = np.bincount(new, area)
        total = np.stack([np.bincount(new, total[:, i]) for i in range(3)], -1)
        names = new[names]
        inner = new[pairs.first] == new[pairs.second]
        moved = _Pairs(new[pairs.first], new[pairs.second], pairs.length, pairs.height)
        pairs = _summed(_Pairs(*(v[~inner] for v in moved)))
    return names[basins].astype(np.int32)


def _agreed(pairs: _Pairs, cost: np.ndarray, count: int) -> np.ndarray:
    """Which pairs are the cheapest for both of their regions."""
    np = libraries().np
    best = np.full(count, np.inf)
    np.minimum.at(best, pairs.first, cost)
    np.minimum.at(best, pairs.second, cost)
    ties = np.isfinite(cost) & (cost <= best[pairs.first]) & (cost <= best[pairs.second])
    # Of equal ones a region takes one only: else three would become one in a round.
    taken = np.zeros(count, bool)
    result = np.zeros(len(cost), bool)
    for index in np.flatnonzero(ties):
        a, b = pairs.first[index], pairs.second[index]
        if not (taken[a] or taken[b]):
            taken[a] = taken[b] = result[index] = True
    return result
