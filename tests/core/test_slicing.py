"""A sequence is cut without a gap, into slices that are alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.slicing import ROWS, slices


@settings(deadline=None)
@given(
    tokens=st.integers(0, 200_000), wanted=st.integers(1, 300), rows=st.sampled_from([1, 8, ROWS])
)
def test_slices_cover_the_sequence_once_and_are_alike(tokens: int, wanted: int, rows: int) -> None:
    found = slices(tokens, wanted, rows)
    assert found[0][0] == 0 and found[-1][1] == tokens
    assert all(a[1] == b[0] for a, b in zip(found, found[1:], strict=False))
    sizes = [stop - start for start, stop in found]
    assert len(found) == max(1, min(wanted, tokens // rows))
    if len(found) > 1:
        assert min(sizes) >= rows and max(sizes) - min(sizes) < 2 * rows
        assert all(size % rows == 0 for size in sizes[:-1])


def test_what_a_16_megapixel_picture_is_cut_into() -> None:
    assert [stop - start for start, stop in slices(65_536, 4)] == [16_384] * 4
    assert slices(100, 8) == ((0, 100),)


def test_no_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        slices(100, 0)
