"""Where a sequence of tokens is cut into slices: plain ints, no tensors."""

from __future__ import annotations

# Rows of a slice are a multiple of this, but for the last. Products of matrices treat a few rows
# otherwise than many (MKL below 32, CUDA below a tile), and then round otherwise.
ROWS = 64


def slices(tokens: int, wanted: int, rows: int = ROWS) -> tuple[tuple[int, int], ...]:
    """(start, stop) of at most `wanted` slices that cover `tokens` in order.

    Every slice has at least `rows` tokens, and all but the last a multiple of it, with sizes that
    differ by less than 2 * `rows`; so a short sequence gets fewer slices than wanted, down to one.
    """
    if wanted < 1:
        raise ValueError(f"A sequence cannot be cut into {wanted} slices: ask for at least 1.")
    count = max(1, min(wanted, tokens // rows))
    edges = [tokens * i // count // rows * rows for i in range(count)] + [tokens]
    return tuple(zip(edges, edges[1:], strict=False))
