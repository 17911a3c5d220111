"""Measures the embedded model as users meet it: ComfyUI's sampling, our loaders, any machine.

`python -m demo quality` prints the figures of demo/README.md, and with `--sheets` draws the
contact sheets of media/. Pictures are judged by a small classifier trained on the renderer.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from . import classifier, prompts
from .artist import Artist, Settings
from .figures import (
    OTHER_SIZES,
    SHOWN,
    SQUARE,
    again,
    contact_sheet,
    drawn,
    edit_shares,
    edits_to_judge,
    scenes_to_judge,
    shares_of,
    to_tensor,
)

EDITING = Settings(cfg=1.0)
FEWEST_FOR_DISTANCE = 200  # fewer say more about their number than about the model
SHEET_COLUMNS = 12
Item = TypeVar("Item")


def counted(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, with a line that says how far it is; into a pipe, one line at the end."""
    start, live = time.time(), sys.stdout.isatty()
    back = "\r" if live else ""
    for number, item in enumerate(items, 1):
        yield item
        if live:
            print(f"\r{what}: {number} of {total}", end="", flush=True)
    print(f"{back}{what}: {total} in {time.time() - start:.0f} s", flush=True)


class Quality:
    """The figures of one model."""

    def __init__(self, artist: Artist, models: Path) -> None:
        self.artist = artist
        self.judge = classifier.load(models / classifier.CLASSIFIER)

    def draw(
        self, texts: list[str], size: tuple[int, int], settings: Settings, what: str
    ) -> list[np.ndarray]:
        """One picture for each prompt, each from noise of its own."""
        jobs = list(enumerate(texts))
        return [
            self.artist.draw(text, size, settings.with_seed(seed))
            for seed, text in counted(jobs, len(jobs), what)
        ]

    def wordings(self, count: int, sheet: Path | None) -> dict[str, object]:
        """Held-out and known wordings at 256x256: shares right, distance to the renderer."""
        scenes, figures = scenes_to_judge(count), {}
        with torch.no_grad():
            features = self.judge.features(to_tensor([drawn(s) for s in scenes]))
            if count >= FEWEST_FOR_DISTANCE:
                other = self.judge.features(to_tensor([drawn(s) for s in again(scenes)]))
                figures["frechet_of_renderer"] = round(classifier.frechet(features, other), 2)
            for name, word in (("held_out", prompts.held_out), ("known", prompts.describe)):
                rng = random.Random(901)
                texts = [word(rng, scene) for scene in scenes]
                pictures = self.draw(texts, SQUARE, Settings(), f"{name} wordings")
                images = to_tensor(pictures)
                figures[name] = shares_of(classifier.right(self.judge, images, scenes))
                if count >= FEWEST_FOR_DISTANCE:
                    distance = classifier.frechet(features, self.judge.features(images))
                    figures[name]["frechet"] = round(distance, 2)
                if sheet and name == "held_out":
                    contact_sheet(pictures[:48], SHEET_COLUMNS, sheet / "demo_held_out.jpg")
        return figures

    def sizes(self, count: int, sheet: Path | None) -> dict[str, object]:
        """Held-out wordings at other sizes."""
        scenes, figures = scenes_to_judge(count), {}
        rng, shown = random.Random(902), []
        texts = [prompts.held_out(rng, scene) for scene in scenes]
        for width, height in OTHER_SIZES:
            name = f"{width}x{height}"
            images = to_tensor(self.draw(texts, (width, height), Settings(), name))
            figures[name] = shares_of(classifier.right(self.judge, images, scenes))
        if sheet:
            for size in (SQUARE, *OTHER_SIZES):
                shown += self.draw(list(SHOWN), size, Settings(), f"sheet {size[0]}x{size[1]}")
            contact_sheet(shown, len(SHOWN), sheet / "demo_sizes.jpg")
        return figures

    def edits(
        self, count: int, size: tuple[int, int] = SQUARE, sheet: Path | None = None
    ) -> dict[str, object]:
        """Instructions to change a picture of the renderer."""
        asked = edits_to_judge(count)
        before = [drawn(edit[1], size) for edit in asked]
        jobs = list(enumerate(zip(asked, before, strict=True)))
        after = [
            self.artist.edit(edit[3][0], picture, EDITING.with_seed(seed))
            for seed, (edit, picture) in counted(jobs, count, f"edits {size[0]}x{size[1]}")
        ]
        images, wanted = to_tensor(after), to_tensor([drawn(edit[2], size) for edit in asked])
        hits = classifier.right(self.judge, images, [edit[2] for edit in asked])
        if sheet:
            pairs = [picture for pair in zip(before, after, strict=True) for picture in pair]
            contact_sheet(pairs[:48], SHEET_COLUMNS, sheet / "demo_edits.jpg")
        return edit_shares(asked, hits, (images - wanted).square().mean((1, 2, 3)) / 4)


def measure(artist: Artist, models: Path, count: int, sheets: Path | None) -> dict[str, object]:
    """Everything; `sheets` is the folder for contact sheets, or None."""
    quality, start = Quality(artist, models), time.time()
    figures = {
        **quality.wordings(count, sheets),
        "sizes": quality.sizes(max(12, count // 8), sheets),
        "edits": quality.edits(count, sheet=sheets),
        "edits_512x512": quality.edits(max(12, count // 6), (512, 512)),
    }
    figures["seconds"] = round(time.time() - start)
    print(json.dumps(figures, indent=1))
    return figures
