"""Which tokens a mask leaves alone, against a look at every latent pixel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.region import active_tokens
from pack.tests.examples import examples
from torch import Tensor


def by_definition(mask: Tensor, margin: int) -> list[bool]:
    """Token by token: is anything marked in its square, widened by the margin?"""
    height, width = mask.shape[-2:]
    found = []
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            rows = slice(max(0, top - margin), top + 2 + margin)
            columns = slice(max(0, left - margin), left + 2 + margin)
            found.append(bool((mask[..., rows, columns] != 0).any()))
    return found


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """(batch, channels, height, width) or with frames; few marks, some of them faint."""
    sides = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    leading = draw(st.sampled_from([(1, 1), (2, 1), (1, 16, 1), (3, 2, 1)]))
    mask = torch.zeros(*leading, *sides)
    for _ in range(draw(st.integers(0, 3))):
        place = tuple(draw(st.integers(0, side - 1)) for side in mask.shape)
        mask[place] = draw(st.sampled_from([1.0, 1e-30, -0.5, float("nan")]))
    return mask


@settings(max_examples=examples(40))
@given(masks(), st.integers(0, 20))
def test_active_is_what_the_margin_reaches(mask: Tensor, margin: int) -> None:
    active = active_tokens(mask, *mask.shape[-2:], margin)
    assert active.dtype == torch.bool
    assert active.tolist() == by_definition(mask, margin)


@settings(max_examples=examples(30))
@given(masks(), st.integers(0, 6))
def test_a_wider_margin_never_leaves_more_alone(mask: Tensor, margin: int) -> None:
    near, far = (active_tokens(mask, *mask.shape[-2:], wide) for wide in (margin, margin + 1))
    assert not (near & ~far).any()


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="8 x 4 latent pixels, but the picture has 4 x 8"):
        active_tokens(torch.ones(1, 4, 8), 8, 4, 0)
