"""By how much a tile has moved against its target, and the tile moved back.

Both are reduced to their details and looked at through one soft window over what can be trusted;
scikit-image's `phase_cross_correlation` (Guizar-Sicairos 2008) then finds the displacement in parts
of a pixel. Its own masked variant only knows whole pixels. A window that stands still while the
picture moves draws the result towards zero, so the tile is moved and measured again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 8.0  # pixels: what is further apart is another picture
LEAST = 0.1  # pixels: moving by less costs more sharpness than it mends
GAIN = 0.98  # of the squared difference: more must not remain of it
DETAIL = 0.5 / 255  # standard deviation of details that can be told from noise
FINE, COARSE = 1.0, 4.0  # pixels: what lies between these two blurs is compared
FLAT_DIRECTION = (
    0.02  # of the other direction's slopes, squared: along stripes nothing is to be seen
)
ROUNDS, ENOUGH = 5, 0.02  # looks at most, and pixels of a look that need no further one
UPSAMPLING = 50
LONGEST = 1024  # pixels of a side that is compared; larger tiles are made smaller for it
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Displacement(NamedTuple):
    """Pixels by which a tile has to be moved; `note` says why it should stay, or is empty."""

    down: float
    right: float
    note: str = ""


class _Library(NamedTuple):
    """What is used of scikit-image, and of SciPy, which comes with it."""

    register: Any
    ndimage: Any


def _library() -> _Library:
    """Raises ImportError with the remedy."""
    try:
        from scipy import ndimage
        from skimage.registration import phase_cross_correlation
    except ImportError as error:
        raise ImportError(
            "Registration of tiles needs scikit-image, which is not installed. Install it with "
            "`pip install scikit-image`, or switch registration off."
        ) from error
    return _Library(phase_cross_correlation, ndimage)


def require_library() -> None:
    """Before minutes of work that would end without it. Raises ImportError with the remedy."""
    _library()


def displacement(tile: Tensor, target: Tensor, trusted: Tensor) -> Displacement:
    """How to move a tile (1, h, w, 3) onto its target, where that is `trusted`: (1, h, w), 0..1."""
    factor = -(-max(tile.shape[1:3]) // LONGEST)
    own, wanted = (_array(_grey(picture), factor) for picture in (tile, target))
    trust = _array(trusted[:, None].float(), factor)
    found = _Comparison(own, wanted, trust).displacement()
    return Displacement(found.down * factor, found.right * factor, found.note)


def moved(tile: Tensor, by: Displacement) -> Tensor:
    """A tile (1, h, w, c) moved by parts of a pixel: cubic splines, edges repeated."""
    shifted = [
        _moved(channel.float().cpu().numpy(), by.down, by.right) for channel in tile[0].unbind(-1)
    ]
    return torch.stack([torch.from_numpy(c) for c in shifted], -1)[None].to(tile)


def _moved(picture: Any, down: float, right: float) -> Any:
    return _library().ndimage.shift(picture, (down, right), order=3, mode="nearest")


def _grey(picture: Tensor) -> Tensor:
    """(1, h, w, 3) -> (1, 1, h, w)."""
    return (picture[..., :3].float() @ torch.tensor(LUMA, device=picture.device))[:, None]


def _array(values: Tensor, factor: int) -> Any:
    """(1, 1, h, w) as a NumPy array, the mean of each factor x factor pixels."""
    small = F.avg_pool2d(values, factor) if factor > 1 else values
    return small[0, 0].cpu().numpy()


class _Comparison:
    """Two grey pictures and the trust in them, NumPy arrays (h, w)."""

    def __init__(self, own: Any, wanted: Any, trust: Any) -> None:
        self._register, self._images = _library()
        self._own, self._trust = own, trust
        # Soft, away from what is not trusted: an edge of the window would not move along.
        inside = (2 * self._blurred(trust, COARSE) - 1).clip(0)
        self._window = inside * _taper(trust.shape)
        self._total = float(self._window.sum())
        self._wanted = self._details(wanted)

    def _blurred(self, picture: Any, sigma: float) -> Any:
        return self._images.gaussian_filter(picture, sigma, mode="nearest", truncate=3.0)

    def _details(self, picture: Any) -> Any:
        """What is finer than COARSE and coarser than FINE, without what is not trusted."""
        fine, coarse = (
            self._blurred(picture * self._trust, sigma) / (self._blurred(self._trust, sigma) + 1e-3)
            for sigma in (FINE, COARSE)
        )
        return (fine - coarse) * self._window

    def displacement(self) -> Displacement:
        """What brings the two together, or why the tile should stay where it is."""
        if self._deviation(self._wanted) < DETAIL:
            return Displacement(0.0, 0.0, "too little detail to measure a shift")
        down = right = 0.0
        before = details = self._details(self._own)
        for _ in range(ROUNDS):
            more = self._measured(details)
            down, right = down + more[0], right + more[1]
            if max(abs(down), abs(right)) > MOST:
                return Displacement(0.0, 0.0, "too unlike the original to measure a shift")
            details = self._details(_moved(self._own, down, right))
            if max(map(abs, more)) < ENOUGH:
                break
        return self._believed(before, details, down, right)

    def _believed(self, before: Any, after: Any, down: float, right: float) -> Displacement:
        """The displacement, if it is worth to be mended and does mend."""
        if max(abs(down), abs(right)) < LEAST:
            return Displacement(0.0, 0.0)
        apart, left = (self._deviation(details - self._wanted) for details in (before, after))
        if left**2 > GAIN * apart**2:
            return Displacement(0.0, 0.0, "no shift would bring it closer to the original")
        return Displacement(down, right)

    def _deviation(self, details: Any) -> float:
        """Root of the mean square where there is trust."""
        return float((details**2).sum() / max(self._total, 1.0)) ** 0.5

    def _measured(self, details: Any) -> tuple[float, float]:
        """Down and right by one look, nothing along a direction in which nothing varies."""
        shift, *_ = self._register(
            self._wanted, details, upsample_factor=UPSAMPLING, normalization=None
        )
        return _seen(shift, self._wanted)


def _seen(shift: Any, details: Any) -> tuple[float, float]:
    """The part of a shift along which the details have slopes (aperture problem)."""
    rows, columns = details[1:, :-1] - details[:-1, :-1], details[:-1, 1:] - details[:-1, :-1]
    both = (rows * columns).sum()
    slopes = torch.tensor(
        [[(rows**2).sum(), both], [both, (columns**2).sum()]], dtype=torch.float64
    )
    strengths, directions = torch.linalg.eigh(slopes)
    along = directions.T @ torch.as_tensor(shift, dtype=torch.float64)
    along[strengths < FLAT_DIRECTION * strengths[-1]] = 0
    down, right = (directions @ along).tolist()
    return down, right


def _taper(shape: tuple[int, int]) -> Any:
    """One inside, falling to zero over the outer eighth of each side as a Hann window does."""
    sides = []
    for side in shape:
        place = torch.arange(side) + 0.5
        edge = torch.minimum(place, side - place) / max(1, side / 8)
        sides.append(torch.sin(edge.clamp(max=1) * torch.pi / 2).square())
    return (sides[0][:, None] * sides[1]).numpy()
