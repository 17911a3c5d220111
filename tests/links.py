"""Symbolic links, where the system lets a test make them."""

from __future__ import annotations

from pathlib import Path

import pytest


def symlink(link: Path, target: Path) -> None:
    """Make `link` point to `target`; Windows allows it only with a special right."""
    try:
        link.symlink_to(target)
    except OSError as error:
        pytest.skip(f"*** SKIPPED: no symbolic links here ({error}) ***")
