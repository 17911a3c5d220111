"""Which tokens of a picture lie outside a mask, so that a masked edit need not compute them.

RegionE (arXiv 2510.25590) and SpotEdit (arXiv 2512.22323) found that what an edit leaves alone
settles early, and take it out of most steps. They look for it; here the user's mask tells.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import max_pool2d, pad

PATCH = 2  # latent pixels along a token
SIZE = "The mask has {} x {} latent pixels, but the picture has {} x {}."


def active_tokens(mask: Tensor, height: int, width: int, margin: int) -> Tensor:
    """Whether each token of a picture is to be computed: bool (tokens,), row by row.

    mask: (..., height, width), one value for each latent pixel; what any of its leading parts
    (pictures of a batch, channels) marks counts. A token is active where the mask within `margin`
    latent pixels of it, along either axis, is not exactly 0: soft edges are edited too. Sides that
    are no multiple of 2 end in a token that is filled up. Raises ValueError: another size.
    """
    if tuple(mask.shape[-2:]) != (height, width):
        raise ValueError(SIZE.format(*reversed(mask.shape[-2:]), width, height))
    marked = (mask != 0).reshape(-1, height, width).any(0)[None, None].float()
    marked = pad(marked, (0, width % PATCH, 0, height % PATCH))
    rows, columns = (min(margin, side) for side in (height, width))
    return max_pool2d(_spread(marked, rows, columns), PATCH).flatten() != 0


def _spread(marked: Tensor, rows: int, columns: int) -> Tensor:
    """(1, 1, h, w) with 1 wherever there is one at most so many places away."""
    down = max_pool2d(marked, (2 * rows + 1, 1), stride=1, padding=(rows, 0))
    return max_pool2d(down, (1, 2 * columns + 1), stride=1, padding=(0, columns))


def pixels_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """(height, width): for each latent pixel the value of the token that it belongs to."""
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    grid = tokens.reshape(rows, columns)
    wide = grid.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    return wide[:height, :width]
