"""The criterion of early exit: where it stops, what it never takes for converged, what it saves."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.convergence_plot import CURVE, LIMIT, STOP, Plot, decades, draw
from pack.core.early_exit import (
    TABLE,
    Criterion,
    Curve,
    Point,
    Saving,
    relative_change,
    saved_by,
    savings,
    stops_at,
)
from pack.tests.examples import examples
from PIL import ImageColor

patiences, least = st.integers(1, 6), st.integers(1, 20)
changes = st.lists(
    st.one_of(st.floats(0, 1e3), st.sampled_from([math.nan, math.inf, 0.0])), max_size=30
)


def points(found: list[float]) -> list[Point]:
    """A curve with these changes; the sigmas do not matter."""
    return [Point(1 - i / 100, change) for i, change in enumerate(found)]


def curve(x0s: list[torch.Tensor], sigmas: list[float], mask: torch.Tensor | None = None) -> Curve:
    """As a sampler would fill it."""
    made = Curve(mask)
    for sigma, x0 in zip(sigmas, x0s, strict=True):
        made.add(sigma, x0)
    return made


@settings(max_examples=examples(40))
@given(converged=st.integers(1, 20), patience=patiences, min_steps=least)
def test_it_stops_as_soon_as_patience_and_min_steps_allow(converged, patience, min_steps) -> None:
    """The prediction moves up to a step, and not after it."""
    sigmas = torch.linspace(1, 0.02, 40).tolist()
    still = torch.ones(1, 4, 3, 3)
    x0s = [still * (1 + max(converged - step, 0)) for step in range(1, 41)]
    found = curve(x0s, sigmas).points
    expected = max(converged + patience, min_steps)
    assert stops_at(found, Criterion(1e-4, patience, min_steps)) == expected
    assert stops_at(found[: expected - 1], Criterion(1e-4, patience, min_steps)) is None


@given(found=changes, patience=patiences, min_steps=least)
def test_a_threshold_of_nothing_never_stops(found, patience, min_steps) -> None:
    assert stops_at(points(found), Criterion(0.0, patience, min_steps)) is None


@given(found=changes, threshold=st.floats(1e-6, 1e3), patience=patiences, min_steps=least)
def test_it_stops_only_where_every_one_of_the_last_changes_is_small(
    found, threshold, patience, min_steps
) -> None:
    step = stops_at(points(found), Criterion(threshold, patience, min_steps))
    small = [change < threshold for change in found]  # NaN and infinity are not
    allowed = [
        n
        for n in range(1, len(found) + 1)
        if n >= max(min_steps, patience) and all(small[n - patience : n])
    ]
    assert step == (allowed[0] if allowed else None)


@given(found=changes, patience=patiences, min_steps=least, keep=st.booleans(), more=least)
def test_larger_thresholds_save_no_less(found, patience, min_steps, keep, more) -> None:
    criterion = Criterion(1.0, patience, min_steps)
    for total in (len(found), len(found) + more):
        told = savings(points(found), criterion, total, keep)
        assert [saving.threshold for saving in told] == list(TABLE)
        known = [saving for saving in told if saving.saved is not None]
        assert all(a.saved <= b.saved for a, b in pairwise(known))
        assert all(s.steps + s.saved + (keep and s.saved > 0) == total for s in known)
        if total == len(found):
            assert known == told  # a run with all its steps knows everything


def test_what_a_run_that_stopped_cannot_tell_is_not_told() -> None:
    found = points([math.nan, 5.0, 0.5, 0.5, 0.5])
    told = savings(found, Criterion(1.0, 3, 4), 40, True, (0.1, 1.0, 10.0))
    assert told == [Saving(0.1, None, None), Saving(1.0, 5, 34), Saving(10.0, 4, 35)]
    own = savings(found, Criterion(1.0, 3, 4), None, True, (0.1, 1.0))
    assert own == [Saving(0.1, None, None), Saving(1.0, 5, None)]


def test_a_step_that_is_run_is_not_saved() -> None:
    assert [saved_by(n, 10, True) for n in (7, 8, 9, 10)] == [2, 1, 0, 0]
    assert [saved_by(n, 10, False) for n in (7, 8, 9, 10)] == [3, 2, 1, 0]


def test_the_change_is_that_of_the_worst_item_per_unit_of_sigma() -> None:
    before = torch.ones(2, 4, 3, 3)
    after = before * torch.tensor([1.01, 1.04]).reshape(2, 1, 1, 1)
    assert relative_change(after, before) == pytest.approx(0.04, rel=1e-4)
    found = curve([before, after], [0.9, 0.7]).points
    assert math.isnan(found[0].change) and found[1].change == pytest.approx(0.2, rel=1e-4)
    assert curve([before, after], [0.7, 0.9]).points[1].change == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_bits_do_not_overflow(dtype) -> None:
    large = torch.full((1, 16, 64, 64), 300.0, dtype=dtype)
    assert relative_change(large, large) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prediction_that_is_no_number_spoils_two_changes(bad) -> None:
    x0s = [torch.ones(2, 4, 3, 3) for _ in range(8)]
    x0s[3][1, 2, 1, 1] = bad  # in one item of the batch
    made = curve(x0s, [1 - i / 10 for i in range(8)])
    found = made.points
    assert made.problems == ["the prediction is not a finite number"]
    assert [point.change == 0 for point in found] == [False, True, True, False, False] + [True] * 3
    assert stops_at(found, Criterion(1e-4, 3, 1)) == 8


@pytest.mark.parametrize(
    "sigmas, size, why",
    [
        ([0.5] * 8, 1.0, "the sigma stays the same"),  # as dpm_adaptive repeats
        ([1 - i / 10 for i in range(8)], 0.0, "the prediction is zero"),
    ],
)
def test_neither_a_repeated_step_nor_an_empty_prediction_has_converged(sigmas, size, why) -> None:
    made = curve([torch.full((1, 4, 3, 3), size)] * 8, sigmas)
    found = made.points
    assert made.problems == [why]
    assert all(math.isnan(point.change) for point in found)
    assert stops_at(found, Criterion(1e-4, 3, 1)) is None


def test_only_what_may_change_counts() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2, :2] = 0.5
    before = torch.full((2, 4, 8, 8), 10.0)
    before[0, :, :2, :2] = 1.0
    after = before.clone()
    after[0, :, :2, :2] = 1.1
    assert relative_change(after, before, mask) == pytest.approx(0.1, rel=1e-4)
    assert relative_change(after, before) < 0.01  # a small mask would hide it
    assert relative_change(before, before, mask) == 0.0  # the second item may not change at all


def test_a_sampler_may_go_on_to_work_in_the_prediction() -> None:
    x0 = torch.ones(1, 4, 3, 3)
    made = Curve()
    made.add(0.9, x0)
    x0 *= 2
    made.add(0.8, x0)
    assert made.problems == []
    assert made.points[1].change == pytest.approx(10, rel=1e-4)


# ------------------------------------------------------------------------------ the picture
def colours(image) -> set[tuple[int, int, int]]:
    """Every colour in a picture."""
    return {colour for _, colour in image.getcolors(1 << 20)}


@settings(max_examples=examples(25))
@given(found=changes, threshold=st.sampled_from([0.0, 1e-4, 1.0]), more=st.integers(0, 5))
def test_any_curve_can_be_drawn(found, threshold, more) -> None:
    criterion = Criterion(threshold, 3, 4)
    stopped, total = stops_at(points(found), criterion), len(found) + more
    image = draw(
        Plot(found, threshold, total, stopped, savings(points(found), criterion, total, True))
    )
    seen = colours(image)
    assert (ImageColor.getrgb(LIMIT) in seen) == (threshold > 0)
    assert (ImageColor.getrgb(STOP) in seen) == (stopped is not None)
    low, high = decades(found, threshold)
    assert low < high


def test_the_curve_lies_where_its_values_are() -> None:
    """A curve that falls by a power of ten in each step is a straight line to the lower right."""
    image = draw(Plot([math.nan, 1.0, 0.1, 0.01], 0.0, 4, None, ()))
    wanted = ImageColor.getrgb(CURVE)
    found = [
        (x, y)
        for x in range(image.width)
        for y in range(image.height)
        if image.getpixel((x, y)) == wanted
    ]
    (left, top), (right, bottom) = min(found), max(found)
    for x, y in found:
        line = top + (x - left) / (right - left) * (bottom - top)
        assert abs(y - line) < 8
