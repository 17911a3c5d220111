"""Corrections of predictions, learned from what forward passes really took on this machine."""

from __future__ import annotations

from pathlib import Path
from statistics import median


class Measured:
    """Ratios of measured to predicted bytes, by key; kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ratios: dict[str, list[float]] = {}

    def factor(self, key: str) -> float:
        """By what a prediction of this key is to be multiplied; 1 if nothing is known."""
        return median([1.0, *self._ratios.get(key, [])])

    def learn(self, key: str, predicted: int, measured: int) -> None:
        """Note what a run took, beside the uncorrected prediction. Both in bytes."""
        self._ratios.setdefault(key, []).append(measured / predicted)
