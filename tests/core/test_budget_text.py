"""What people read where nothing fits into the memory there is."""

from __future__ import annotations

import pytest
from pack.core.budget import Memory, Rung, Work, ladder, need
from pack.core.budget_text import Attempt, failure_text

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
    tried, others = text.split("Not tried, because they need more than there was:\n")
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
