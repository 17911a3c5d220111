"""How many examples Hypothesis tries: few as a rule, more with `--hypothesis-profile=thorough`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

USUAL = 30
TIMES = 5


# How long an example takes tells of the machine; the first one reads ComfyUI's sources. Here and
# not in conftest.py, which runs again where a test imports it, and would undo the option.
either = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("any", max_examples=USUAL, **either)
settings.register_profile("thorough", max_examples=USUAL * TIMES, **either)
settings.load_profile("any")


def examples(usual: int) -> int:
    """For a test that says how many it needs: as many times more as the profile tries."""
    return usual * settings.default.max_examples // USUAL
