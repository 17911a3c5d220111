"""What people read where nothing fits into the memory there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pack.core.budget import Memory, Plan, Rung, Work, ladder, largest_side, need
from pack.core.budget_text import NOT_TRIED, Attempt, failure_text, share_of_sides

WORK = Work(2, 65536, 0, 100, 3072, 24, 60, 2)
RUNGS = ladder(WORK, "allow approximations")
FREE = Memory(1_500_000_000, 0, 0, 0)


def rung(name: str) -> Rung:
    return next(rung for rung in RUNGS if rung.id == name)


def test_the_text_of_a_rung_tells_all_that_its_plan_does() -> None:
    assert rung("tiles-2").text == (
        "feed-forward and attention in 16 slices, pictures and sides of CFG one at a time, "
        "2 x 2 overlapping tiles, what other patches hold released"
    )
    assert rung("projections-4").text == "feed-forward and projections in 4 slices"
    with_references = Work(1, 65536, 100, 100, 3072, 24, 60, 2)
    last = ladder(with_references, "allow changed settings")[-1]
    assert last.text == (
        "feed-forward and attention in 16 slices, references at 50% of their size, "
        "4 x 4 overlapping tiles, what other patches hold released, "
        "a smaller picture with other settings"
    )


def test_a_failure_tells_everything_and_one_remedy() -> None:
    attempts = [Attempt(rung(name), 9_000_000_000, 2_000_000_000) for name in ("as-asked", "apart")]
    text = failure_text(WORK, attempts, FREE, 2048, "exact only")
    tried, others = text.split(NOT_TRIED + "\n")
    assert 'with everything done that the policy "exact only" permits' in tried
    assert "- as asked: needs about 9.00 GB, 2.00 GB could be had\n" in tried
    assert "- feed-forward and attention in 16 slices, pictures and sides of CFG one at" in tried
    wanted = need(WORK, rung("attention-4").plan) / 1e9
    assert f"- feed-forward and attention in 4 slices: about {wanted:.2f} GB\n" in others
    assert "overlapping tiles" not in text and "streamed" not in others
    assert text.endswith(
        "Free now: 1.50 GB.\nThe largest square picture that should fit is 2048 x 2048 px: make "
        "the picture no larger than that."
    )


@pytest.mark.parametrize(
    ("largest", "policy", "remedy"),
    [
        (4096, "exact only", "A square picture of 4096 x 4096 px should fit, so something else "),
        (0, "exact only", 'would fit: set the policy to "allow approximations".'),
        (0, "allow approximations", "would fit: close what else uses the device."),
    ],
)
def test_the_remedy_is_one_that_helps(largest: int, policy: str, remedy: str) -> None:
    attempts = [Attempt(rung, 1, 1) for rung in ladder(WORK, policy)]
    text = failure_text(WORK, attempts, FREE, largest, policy)
    assert remedy in text.splitlines()[-1]
    assert "Not tried" not in text


OTHER = Work(1, 21 * 30 * 52, 0, 0, 0, 1, 0, 2, 0, 12_000_000_000)  # a film of 21 latent frames


@pytest.mark.parametrize(
    ("free", "remedy"),
    [
        (3_000_000_000, "A picture with sides of 70 % of those asked for should fit: make it no "),
        (9_000_000_000, "A picture of this size should fit, so something else takes memory"),
        (0, 'No picture of any size would fit: set the policy to "allow approximations".'),
    ],
)
def test_the_size_of_other_models_is_told_as_a_share_of_what_was_asked(
    free: int, remedy: str
) -> None:
    """How many px a latent of theirs has, and how many frames, is not known."""
    memory = Memory(free, 0, 0, 0)
    largest = largest_side(OTHER, "exact only", memory)
    attempts = [Attempt(ladder(OTHER, "exact only")[0], 1, 1)]
    text = failure_text(OTHER, attempts, memory, largest)
    assert text.splitlines()[-1].startswith(remedy) and "px" not in text
    share = share_of_sides(OTHER, largest)
    fits = need(OTHER, Plan()) * share**2
    assert share >= 1 or 0.98 * free <= fits <= free


def test_what_is_not_possible_counts_nowhere() -> None:
    """Another node's patch looks at the whole picture, and nobody holds anything."""
    policy, memory = "allow approximations", Memory(1_500_000_000, 0, 0, 0)
    whole = replace(WORK, tileable=False)
    left_out = {r.id for r in RUNGS} - {r.id for r in ladder(whole, policy, held=False)}
    assert left_out == {"tiles-2", "tiles-4", "release"}
    assert largest_side(whole, policy, memory) == largest_side(WORK, "exact only", memory)
    assert largest_side(whole, policy, memory) < largest_side(WORK, policy, memory)
    last = ladder(WORK, policy, held=False)[-1]
    assert last.text.endswith("4 x 4 overlapping tiles") and not last.release
    attempts = [Attempt(rung("as-asked"), 9_000_000_000, 1_500_000_000)]
    for work, tiles in ((WORK, True), (whole, False)):
        text = failure_text(work, attempts, memory, 1024, policy)
        assert ("tiles" in text) == tiles and "released" not in text
