"""Corrections of predictions, learned from what forward passes really took on this machine."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from statistics import median

from .atomic_file import write_atomically
from .budget import Plan

log = logging.getLogger("qwen_vram")

LOWEST, HIGHEST = 0.5, 2.0  # what lies outside was not measured but disturbed
LEAST = 256_000_000  # bytes
SAMPLES = 15
ENOUGH, NO_NEWS = 5, 0.01  # so many ratios stay as they are if another one says the same
KEYS = 256
SAME = 0.05  # by how much need and room of a pass may differ from one that ran out


def key_of(model: str, dtype: str, weights: str, device: str, plan: Plan) -> str:
    """What corrections are kept by: the kinds of model, numbers, stored weights ("" where they are
    as it computes) and device, and of the slicing.

    Other parts of a plan only change the sizes, which the prediction knows exactly.
    """
    if plan.attention > 1 or plan.projections > 1:
        sliced = "attention sliced"
    else:
        sliced = "feed-forward sliced" if plan.feed_forward > 1 else "whole"
    numbers = f"{dtype} of {weights}" if weights else dtype
    return " | ".join((model, numbers, device, sliced))


class Measured:
    """Ratios of measured to predicted bytes, by key; the last few of each are kept in a file.

    The factor is their median, and 1 counts among them: one disturbed run (another program, another
    thread on the same device) moves it by half at most and two that agree decide. A maximum would
    keep a card off its fastest way for ever, where too small a factor only costs an attempt.

    Processes that learn at the very same moment may lose one another's ratio, as in `Savings`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._ratios: dict[str, list[float]] | None = None  # None: not read yet
        self._failures: dict[str, list[tuple[int, int]]] = {}  # bytes needed, bytes there were
        self._unsaved = False

    def factor(self, key: str) -> float:
        """By what a prediction of this key is to be multiplied; 1 if nothing is known."""
        with self._lock:
            if self._ratios is None:
                self._ratios = self._stored()
            return median([1.0, *self._ratios.get(key, [])])

    def learn(self, key: str, predicted: int, measured: int) -> None:
        """Note what a run took (bytes), beside the prediction before any correction (factor 1).

        A pass of less than LEAST tells nothing: one weight that is cast outweighs it. Nor does one
        that says what many have said: no file is written then. Raises ValueError for figures that
        were not measured.
        """
        if predicted <= 0 or measured <= 0:
            raise ValueError(f"predicted ({predicted}) and measured ({measured}) must be above 0.")
        if predicted < LEAST:
            return
        ratio = min(max(measured / predicted, LOWEST), HIGHEST)
        with self._lock:
            if self._ratios is not None and self._says_nothing_new(key, ratio):
                return
            known = self._ratios if self._unsaved else None
            ratios = self._stored() if known is None else known
            ratios[key] = [*ratios.pop(key, []), round(ratio, 4)][-SAMPLES:]  # now the newest key
            self._ratios = dict(list(ratios.items())[-KEYS:])
            self._save(self._ratios)

    def _says_nothing_new(self, key: str, ratio: float) -> bool:
        known = self._ratios.get(key, [])
        return len(known) >= ENOUGH and abs(ratio - median([1.0, *known])) <= NO_NEWS

    def ran_out(self, key: str, needed: int, available: int) -> None:
        """Note that a pass did not fit (bytes; `needed` with factor 1), until ComfyUI ends.

        Memory may be in pieces, which no peak shows. Not in the file: another day there may be
        none.
        """
        if needed >= LEAST:
            with self._lock:
                known = self._failures.get(key, [])
                self._failures[key] = [*known, (needed, available)][-SAMPLES:]

    def fails(self, key: str, needed: int, available: int) -> bool:
        """Whether a pass that needed no more has run out where there was no less."""
        with self._lock:
            known = list(self._failures.get(key, []))
        return any(
            needed >= (1 - SAME) * least and available <= (1 + SAME) * most for least, most in known
        )

    def _save(self, ratios: dict[str, list[float]]) -> None:
        try:
            write_atomically(self.path, json.dumps(ratios))
            self._unsaved = False
        except OSError as error:
            if not self._unsaved:
                log.warning(
                    "How much memory runs take cannot be saved in %s (%s): it is known until "
                    "ComfyUI ends. Make the folder writable.",
                    self.path.parent,
                    error,
                )
            self._unsaved = True

    def _stored(self) -> dict[str, list[float]]:
        try:
            return _checked(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning(
                "%s cannot be read (%s): how much memory runs take is learned anew.",
                self.path,
                error,
            )
            return {}


def _checked(content: object) -> dict[str, list[float]]:
    """The content of the file, if it is what `learn` writes. Raises ValueError."""
    if not isinstance(content, dict) or len(content) > KEYS:
        raise ValueError("it is no table of ratios")
    for ratios in content.values():
        if not isinstance(ratios, list) or not 0 < len(ratios) <= SAMPLES:
            raise ValueError("it is no table of ratios")
        # A number that is not one, NaN included, is in no range.
        if not all(isinstance(r, (int, float)) and LOWEST <= r <= HIGHEST for r in ratios):
            raise ValueError("a ratio is out of range")
    return content
