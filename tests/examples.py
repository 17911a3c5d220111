"""How many examples Hypothesis tries: few as a rule, more with `--hypothesis-profile=thorough`."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

USUAL = 30
TIMES = 5


def _read_constants_in_the_pack_alone() -> None:
    """Hypothesis tries constants that it finds in all code beside the libraries. That of ComfyUI
    takes it ten seconds to read, in every process, and that of the tests tells it nothing."""
    whole = getattr(providers, "is_local_module_file", None)
    if whole is None:  # a version that reads them in another way, or not at all
        return
    root = Path(__file__).resolve().parents[1]
    rooms = tuple(f"{root / room}{os.sep}" for room in ("core", "nodes"))
    providers.is_local_module_file = lambda path: path.startswith(rooms) and whole(path)


_read_constants_in_the_pack_alone()

# How long an example takes tells of the machine. Here and not in conftest.py, which runs again
# where a test imports it, and would undo the option.
either = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("any", max_examples=USUAL, **either)
settings.register_profile("thorough", max_examples=USUAL * TIMES, **either)
settings.load_profile("any")


def examples(usual: int) -> int:
    """For a test that says how many it needs: as many times more as the profile tries."""
    return usual * settings.default.max_examples // USUAL
