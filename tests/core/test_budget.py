"""The ladder, with invented cards: what is needed, what is chosen, what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pack.core.budget import (
    APPROXIMATE,
    CHANGED,
    EXACT,
    POLICIES,
    ROUNDING,
    TILE_OVERLAP,
    TOKEN_SIDE,
    Memory,
    Plan,
    Rung,
    Work,
    choose,
    following,
    ladder,
    largest_side,
    need,
    room,
)
from pack.core.tiling import TileGrid

GIB = 1 << 30
works = st.builds(
    Work,
    batch=st.integers(1, 8),
    tokens=st.integers(1, 1 << 18),
    reference_tokens=st.one_of(st.just(0), st.integers(1, 1 << 17)),
    text_tokens=st.integers(1, 2000),
    width=st.sampled_from([128, 3072]),
    heads=st.sampled_from([1, 24]),
    blocks=st.integers(1, 60),
    element_size=st.sampled_from([2, 4]),
    fixed=st.integers(0, GIB),
    host_estimate=st.one_of(st.none(), st.integers(0, 1 << 36)),
    timestep_zero=st.booleans(),
    aspect=st.floats(1, 4),
)
amounts = st.integers(0, 1 << 36)
memories = st.builds(Memory, amounts, amounts, amounts, amounts)
policies = st.sampled_from(POLICIES)
factors = st.floats(0.5, 2)


def picture(side: int, **changes: int | bool) -> Work:
    """The real model in bf16, one item, a square picture without references."""
    work = Work(1, (side // 16) ** 2, 0, 100, 3072, 24, 60, 2)
    return replace(work, **changes)


def ids(rungs: tuple[Rung, ...]) -> list[str]:
    return [rung.id for rung in rungs]


def test_the_order_is_what_it_costs_the_user() -> None:
    work = picture(2048, batch=4, reference_tokens=8192)
    assert ids(ladder(work, "allow changed settings")) == [
        "as-asked",
        "free-others",
        "headroom",
        "projections-4",
        "attention-4",
        "attention-16",
        "apart",
        "release",
        "references-75",
        "references-50",
        "tiles-2",
        "tiles-4",
        "settings",
    ]


def test_rungs_that_change_nothing_are_left_out() -> None:
    assert ids(ladder(picture(3072), "allow approximations")) == [
        "as-asked",
        "free-others",
        "headroom",
        "feed-forward-4",
        "projections-4",
        "attention-4",
        "attention-16",
        "release",
        "tiles-2",
        "tiles-4",
    ]
    foreign = picture(2048, batch=2, host_estimate=GIB)
    assert ids(ladder(foreign, "exact only")) == [
        "as-asked",
        "free-others",
        "headroom",
        "apart",
        "release",
    ]
    assert ids(ladder(foreign, "allow approximations"))[5:] == ["tiles-2", "tiles-4"]


def test_each_rung_frees_what_it_says() -> None:
    rungs = ladder(picture(2048), "allow changed settings")
    freed = {rung.id: (rung.free_others, rung.headroom, rung.release) for rung in rungs}
    assert freed["as-asked"] == (False, False, False)
    assert freed["free-others"] == (True, False, False)
    assert freed["headroom"] == freed["attention-16"] == (True, True, False)
    assert freed["release"] == freed["tiles-2"] == freed["settings"] == (True, True, True)


def test_references_of_half_the_sides_have_a_quarter_of_the_tokens() -> None:
    whole, quarter = (picture(1024, reference_tokens=tokens) for tokens in (4096, 1024))
    assert need(whole, Plan(reference_scale=0.5)) == need(quarter, Plan())
    assert need(replace(whole, batch=3), Plan(apart=True)) == need(whole, Plan())


def test_what_the_host_reserves_for_other_models_is_not_all_needed() -> None:
    foreign = picture(4096, batch=2, host_estimate=8 * GIB)
    rungs = ladder(foreign, "exact only")
    assert rungs[choose(rungs, foreign, Memory(4 * GIB, 0, 0, 0))].id == "as-asked"
    assert rungs[choose(rungs, foreign, Memory(2 * GIB, 0, 0, 0))].id == "apart"


@given(works, policies)
def test_each_rung_needs_no_more_than_the_one_before_and_includes_it(
    work: Work, policy: str
) -> None:
    rungs = ladder(work, policy)
    needs = [need(work, rung.plan) for rung in rungs]
    assert needs == sorted(needs, reverse=True)
    assert len({rung.id for rung in rungs}) == len(rungs)
    assert rungs[0] == Rung("as-asked", "as asked", EXACT, Plan(), False, False, False)
    order = (EXACT, ROUNDING, APPROXIMATE, CHANGED)
    for before, after in zip(rungs, rungs[1:], strict=False):
        assert order.index(before.exactness) <= order.index(after.exactness)
        assert before.free_others <= after.free_others
        assert before.headroom <= after.headroom
        assert before.release <= after.release
        one, other = before.plan, after.plan
        assert one.feed_forward <= other.feed_forward
        assert one.attention <= other.attention
        assert one.apart <= other.apart
        assert one.reference_scale >= other.reference_scale
        assert one.tiles <= other.tiles


def test_slices_do_not_promise_the_same_bits() -> None:
    found = {rung.id: rung.exactness for rung in ladder(picture(2048), "allow changed settings")}
    assert found == {
        "as-asked": EXACT,
        "free-others": EXACT,
        "headroom": EXACT,
        "feed-forward-4": ROUNDING,
        "projections-4": ROUNDING,
        "attention-4": ROUNDING,
        "attention-16": ROUNDING,
        "release": ROUNDING,
        "tiles-2": APPROXIMATE,
        "tiles-4": APPROXIMATE,
        "settings": CHANGED,
    }


@given(works)
def test_the_policies_permit_what_they_say(work: Work) -> None:
    exact, approximate, changed = (ladder(work, policy) for policy in POLICIES)
    assert {rung.exactness for rung in exact} <= {EXACT, ROUNDING}
    assert CHANGED not in {rung.exactness for rung in approximate}
    assert [rung.exactness for rung in changed].count(CHANGED) == 1
    assert approximate[: len(exact)] == exact
    assert changed[: len(approximate)] == approximate


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policy must be one of: exact only, allow approx"):
        ladder(picture(512), "anything")


@given(works, memories, memories, policies, factors, st.integers(0, 11))
def test_more_memory_never_means_a_later_rung(
    work: Work, memory: Memory, more: Memory, policy: str, factor: float, start: int
) -> None:
    rungs = ladder(work, policy)
    start = min(start, len(rungs) - 1)
    both = Memory(*(a + b for a, b in zip(memory, more, strict=True)))
    chosen, easier = (choose(rungs, work, m, factor, start) for m in (memory, both))
    assert start <= easier <= chosen < len(rungs)


@given(works, memories, policies, factors)
def test_what_surely_fits_runs_as_asked_and_what_is_passed_over_does_not_fit(
    work: Work, memory: Memory, policy: str, factor: float
) -> None:
    rungs = ladder(work, policy)
    chosen = choose(rungs, work, memory, factor)
    for rung in rungs[:chosen]:
        assert need(work, rung.plan, factor) > room(rung, memory)
    if need(work, Plan(), factor) <= memory.free:
        assert chosen == 0


def test_a_prediction_that_may_be_wrong_does_not_slow_a_card_down() -> None:
    work = picture(4096)
    rungs = ladder(work, "exact only")
    close = Memory(round(0.9 * need(work, Plan())), 0, 0, 0)
    assert rungs[choose(rungs, work, close)].id == "as-asked"
    assert rungs[choose(rungs, work, close, factor=1.1)].id == "feed-forward-4"
    assert rungs[choose(rungs, work, close, lambda plan: 1.1)].id == "feed-forward-4"


@pytest.mark.parametrize(
    ("others", "streamable", "held", "rung"),
    [(8, 0, 0, "free-others"), (0, 8, 0, "headroom"), (2, 4, 0, "headroom"), (0, 0, 8, "release")],
)
def test_memory_counts_from_the_rung_that_frees_it(
    others: int, streamable: int, held: int, rung: str
) -> None:
    work = picture(4096)
    rungs = ladder(work, "exact only")
    memory = Memory(0, others * GIB, streamable * GIB, held * GIB)
    assert rungs[choose(rungs, work, memory)].id == rung


def test_cards_as_people_have_them() -> None:
    """Whole, a block of the real model at 4096 px takes about 4.2 GiB; sliced, 1.7."""
    work = picture(4096)
    rungs = ladder(work, "exact only")
    free = {12: 10, 8: 6, 6: 4}  # GiB without what the driver and the display take
    chosen = {
        card: rungs[choose(rungs, work, Memory(gib * GIB, 0, 0, 0))].id
        for card, gib in free.items()
    }
    assert chosen == {12: "as-asked", 8: "as-asked", 6: "as-asked"}
    assert 4.1 < need(work, Plan()) / GIB < 4.3
    assert 1.5 < need(work, rungs[-1].plan) / GIB < 1.8
    assert rungs[choose(rungs, work, Memory(2 * GIB, 0, 0, 0))].id == "attention-4"


@pytest.mark.parametrize(
    ("side", "batch", "references", "plan", "units"),
    [
        (1328, 1, 0, Plan(), 11.13),
        (2048, 1, 0, Plan(), 11.09),
        (4096, 1, 0, Plan(), 11.09),
        (1328, 4, 0, Plan(), 11.17),
        (3072, 1, 3 * 4096, Plan(), 11.08),
        (4096, 1, 0, Plan(4), 10.07),
        (1328, 4, 0, Plan(4), 11.17),
        (4096, 1, 0, Plan(4, 4), 7.07),
        (4096, 1, 0, Plan(4, 4, 4), 5.06),
        (4096, 1, 0, Plan(8, 8, 8), 4.44),
        (4096, 1, 0, Plan(16, 16, 16), 4.26),
        (4096, 1, 0, Plan(32, 32, 32), 4.16),
        (1328, 4, 0, Plan(4, 4), 7.15),
        (1328, 4, 0, Plan(4, 4, 4), 5.41),
    ],
)
def test_passes_need_what_was_measured_on_a_card(
    side: int, batch: int, references: int, plan: Plan, units: float
) -> None:
    """In units of the picture's stream; one H200, torch 2.11, bf16 and fp8, 60 text tokens."""
    work = picture(side, batch=batch, reference_tokens=references, text_tokens=60)
    unit = batch * (work.tokens + references) * 3072 * 2
    assert need(work, plan) / unit == pytest.approx(units, rel=0.015)


@pytest.mark.parametrize(
    ("side", "batch", "few", "order"),
    [
        (4096, 1, 4, ["attention-4", "attention-16"]),
        (1328, 1, 3, ["attention-4", "attention-16"]),
        (1024, 1, 2, ["attention-4", "attention-16"]),
        (256, 1, 2, ["attention-4", "attention-16"]),
        (1328, 4, 4, ["attention-4", "apart", "attention-16"]),
        (2048, 2, 4, ["attention-4", "attention-16", "apart"]),
    ],
)
def test_slices_have_enough_rows_unless_nothing_else_fits(
    side: int, batch: int, few: int, order: list[str]
) -> None:
    """With fewer, flash attention takes a third longer."""
    rungs = {rung.id: rung for rung in ladder(picture(side, batch=batch), "exact only")}
    assert rungs["attention-4"].plan.attention == few
    assert [name for name in rungs if name in order] == order
    assert rungs["release"].plan.attention == 16


# ---------------------------------------------------------------------------- after a failure
def after(work: Work, memory: Memory, failed: str, lowest: int | None = None) -> str | None:
    """The id of the rung that follows; the smallest need that failed is its own by default."""
    rungs = ladder(work, "exact only")
    index = ids(rungs).index(failed)
    lowest = need(work, rungs[index].plan) if lowest is None else lowest
    found = following(rungs, work, memory, index, lowest)
    return None if found is None else rungs[found].id


def test_after_a_failure_the_same_plan_is_tried_only_with_more_room() -> None:
    work = picture(4096)  # 4.2 GiB; a quarter is 1.04
    assert after(work, Memory(5 * GIB, 0, 0, 0), "as-asked") == "projections-4"
    assert after(work, Memory(5 * GIB, 2 * GIB, 0, 0), "as-asked") == "free-others"
    assert after(work, Memory(5 * GIB, 0, 2 * GIB, 0), "as-asked") == "headroom"
    assert after(work, Memory(5 * GIB, GIB, GIB, 0), "as-asked") == "headroom"  # in one step
    assert after(work, Memory(5 * GIB, GIB // 2, GIB // 4, 0), "as-asked") == "projections-4"
    assert after(work, Memory(GIB, 2 * GIB, 0, 0), "as-asked") == "projections-4"
    assert after(work, Memory(5 * GIB, 0, 2 * GIB, 0), "headroom") == "projections-4"
    # What little other patches hold goes before anything is approximated.
    assert after(work, Memory(5 * GIB, 0, 0, 1), "attention-16") == "release"
    assert after(work, Memory(5 * GIB, 0, 0, 0), "attention-16") is None


@given(works, memories, st.integers(0, 9), st.floats(0.1, 1), factors)
def test_after_a_failure_something_really_is_less(
    work: Work, memory: Memory, failed: int, part: float, factor: float
) -> None:
    rungs = ladder(work, "exact only")
    failed = min(failed, len(rungs) - 1)
    lowest = round(part * need(work, rungs[failed].plan, factor))
    index = following(rungs, work, memory, failed, lowest, factor)
    if index is None:
        return
    assert failed < index
    if rungs[index].plan == rungs[failed].plan:
        assert room(rungs[index], memory) > room(rungs[failed], memory)
    else:
        assert need(work, rungs[index].plan, factor) <= 0.9 * lowest


@given(works, policies, memories, factors)
@example(picture(4096), "exact only", Memory(2 * GIB, 0, 0, 0), 1.0)
def test_the_largest_side_fits_and_the_next_one_does_not(
    work: Work, policy: str, memory: Memory, factor: float
) -> None:
    side = largest_side(work, policy, memory, factor)
    assert side % TOKEN_SIDE == 0

    def fits(side: int) -> bool:
        tokens = (side // TOKEN_SIDE) ** 2
        asked = replace(work, tokens=tokens)
        if work.host_estimate is not None:
            scaled = round(work.host_estimate * tokens / work.tokens)
            asked = replace(asked, host_estimate=scaled)
        last = ladder(asked, policy)[-1]
        return need(asked, last.plan, factor) <= room(last, memory)

    assert side == 0 or fits(side)
    assert side == 16384 or not fits(side + TOKEN_SIDE)


@given(works, memories, memories, policies)
def test_more_memory_never_means_a_smaller_picture(
    work: Work, memory: Memory, more: Memory, policy: str
) -> None:
    both = Memory(*(a + b for a, b in zip(memory, more, strict=True)))
    assert largest_side(work, policy, memory) <= largest_side(work, policy, both)


@pytest.mark.parametrize("sides", [(4096, 4096), (3072, 3072), (4096, 2048), (1328, 1328)])
@pytest.mark.parametrize("count", [2, 4])
def test_tiles_are_those_that_will_be_made(sides: tuple[int, int], count: int) -> None:
    height, width = (side // 8 for side in sides)
    tile = TileGrid.along(height, width, count, TILE_OVERLAP).tiles()[0]
    tokens = -(-tile.height // 2) * -(-tile.width // 2)
    work = picture(16, tokens=height * width // 4, aspect=height / width)
    assert need(work, Plan(tiles=count)) == need(replace(work, tokens=tokens), Plan())


@given(works, factors)
def test_only_the_prediction_is_corrected_not_what_is_known(work: Work, factor: float) -> None:
    bare = replace(work, fixed=0)
    assert need(work, Plan(), factor) == need(bare, Plan(), factor) + work.fixed
    assert need(bare, Plan(), factor) == round(factor * need(bare, Plan()))
