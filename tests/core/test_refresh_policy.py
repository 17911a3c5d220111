"""Which steps compute the references in full."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.refresh_policy import AUTO, DRIFTED, EVERY, FIRST, MODES, Pass, Policy, step_of
from pack.tests.examples import examples


def schedule(steps: int, shift: float = 3.1) -> tuple[float, ...]:
    """As ComfyUI's simple scheduler makes it for Qwen-Image."""
    times = [1 - i / steps for i in range(steps + 1)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


def policy(mode: str = FIRST, steps: int = 40, **more: Any) -> Policy:
    """One that reuses."""
    own = {"every": 10, "threshold": 0.2, "full_last": 0, **more}
    return Policy(mode, sigmas=schedule(steps), **own)


def in_full(rule: Policy) -> list[int]:
    """The steps of a run that are full, with no drift."""
    found: list[int] = []
    for step in range(rule.steps):
        if rule.decide(step, found[-1] if found else None) is Pass.FULL:
            found.append(step)
    return found


def test_auto_needs_fewer_full_steps_where_timestep_zero_modulates() -> None:
    assert in_full(policy(AUTO, 40, zero=True)) == [0, 14, 28]
    assert in_full(policy(AUTO, 20, zero=True)) == [0, 7, 14]
    assert in_full(policy(AUTO, 8, zero=True)) == [0, 4]
    assert in_full(policy(AUTO, 4, zero=True)) == [0, 2]


def test_auto_with_references_that_the_step_itself_modulates() -> None:
    assert in_full(policy(AUTO, 40)) == [0, 10, 20, 30]
    assert in_full(policy(AUTO, 8)) == [0, 2, 4, 6]
    assert in_full(policy(AUTO, 4)) == [0, 2]


def test_the_other_modes() -> None:
    assert in_full(policy(FIRST)) == [0]
    assert in_full(policy(EVERY, 25)) == [0, 10, 20]
    assert in_full(policy(EVERY, 25, full_last=3)) == [0, 10, 20, 22, 23, 24]
    rule = policy(DRIFTED)
    assert rule.decide(0, None) is Pass.FULL and rule.decide(3, 3) is Pass.REUSE
    assert rule.decide(4, 3) is Pass.PROBE


@settings(max_examples=examples(25))
@given(st.sampled_from(MODES), st.integers(1, 60), st.booleans(), st.integers(0, 70))
def test_what_is_never_otherwise(mode: str, steps: int, zero: bool, last: int) -> None:
    rule = policy(mode, steps, zero=zero, full_last=last)
    found = in_full(rule)
    assert found[0] == 0 and set(range(max(0, steps - last), steps)) <= set(found)
    for exact in ({"every": 1}, {"threshold": 0.0}):
        assert in_full(policy(mode, steps, zero=zero, **exact)) == list(range(steps))
    constant = {rule.decide(step, 0, constant=True) for step in range(steps)}
    assert constant == {Pass.FULL if last >= steps else Pass.REUSE}


@given(st.integers(1, 60), st.floats(1.0, 12.0), st.booleans())
def test_each_sigma_of_a_schedule_is_its_step_and_between_two_it_is_the_first(
    steps: int, shift: float, rising: bool
) -> None:
    sigmas = schedule(steps, shift)[:: -1 if rising else 1]
    for step in range(steps):
        assert step_of(sigmas[step] * (1 + 1e-7), sigmas) == step
        assert step_of((sigmas[step] + sigmas[step + 1]) / 2, sigmas) == step


def test_a_schedule_that_goes_up_and_down_has_its_steps() -> None:
    odd = (1.0, 0.7, 0.9, 0.5, 0.8, 0.3, 0.0)
    assert [step_of(sigma, odd) for sigma in odd[:-1]] == [0, 1, 2, 3, 4, 5]
    assert [step_of(0.6, odd, before) for before in range(6)] == [2, 2, 2, 3, 4, 4]
    twice = (1.0, 0.6, 0.2, 1.0, 0.6, 0.2, 0.0)
    steps = [0]
    for sigma in twice[:-1]:
        steps.append(step_of(sigma, twice, steps[-1]))
    assert steps[1:] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("sigmas", [(), (1.0,)])
def test_no_schedule_has_one_step(sigmas: tuple[float, ...]) -> None:
    assert step_of(0.5, sigmas) == 0
