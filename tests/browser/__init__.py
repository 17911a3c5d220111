"""A package, so that its tests can share one Chromium (conftest.py)."""
