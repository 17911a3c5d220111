"""What the model is trained on: pictures drawn by many processes, and prompts as token numbers."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import animals, prompts

IM_START, IM_END, ASSISTANT, NEWLINE, USER = 151644, 151645, 77091, 198, 872
VISION_START, VISION_END = 151652, 151653
TAIL = [IM_END, NEWLINE, IM_START, ASSISTANT, NEWLINE]
ORDINARY_TOKENS = 151643
LONGEST = 56
PROMPTS = 4  # wordings for each picture


@dataclass
class Pictures:
    """Pictures of one size, drawn in the background: (N, H, W, 3) bytes shared with the drawers."""

    scenes: Sequence[animals.Scene]
    width: int
    height: int
    pixels: np.ndarray = field(init=False)
    pending: list = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (len(self.scenes), self.height, self.width, 3)
        self.memory = mmap.mmap(-1, int(np.prod(shape)))
        self.pixels = np.frombuffer(self.memory, dtype=np.uint8).reshape(shape)

    def wait(self) -> np.ndarray:
        """The pixels, once all are drawn."""
        for result in self.pending:
            result.get()
        self.pending.clear()
        return self.pixels


_SHEETS: list[Pictures] = []


def _draw(job: tuple[int, int, int]) -> None:
    sheet, start, end = job
    pictures = _SHEETS[sheet]
    for i in range(start, end):
        image = animals.draw(pictures.scenes[i], pictures.width, pictures.height)
        pictures.pixels[i] = np.asarray(image)


def draw_all(sheets: Sequence[Pictures]) -> multiprocessing.pool.Pool:
    """Starts drawing in the order given; the processes share the memory of `sheets`."""
    _SHEETS.extend(sheets)
    pool = multiprocessing.get_context("fork").Pool(os.cpu_count(), os.nice, (5,))
    for index, sheet in enumerate(_SHEETS):
        for start in range(0, len(sheet.scenes), 64):
            job = (index, start, min(start + 64, len(sheet.scenes)))
            sheet.pending.append(pool.apply_async(_draw, (job,)))
    return pool


# -------------------------------------------------------------------------------------- tokens
class Tokens:
    """Qwen's tokenizer, as the text encoder of ComfyUI uses it."""

    def __init__(self) -> None:
        from transformers import Qwen2Tokenizer

        folder = os.path.join(os.environ["COMFYUI_PATH"], "comfy/text_encoders/qwen25_tokenizer")
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        self.picture = self.tokenizer("Picture 1: ")["input_ids"] + [VISION_START]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without template."""
        return self.tokenizer(list(texts))["input_ids"]


def noisy(rng: random.Random, tokens: list[int]) -> list[int]:
    """Now and then with tokens in between that the model has never seen: it learns to skip them."""
    if rng.random() < 0.25:
        tokens = list(tokens)
        for _ in range(rng.choice((1, 1, 2, 3, 4))):
            tokens.insert(rng.randint(0, len(tokens)), rng.randrange(ORDINARY_TOKENS))
    return tokens


def by_length(
    rng: random.Random, tokens: list[list[int]], owners: list[int], smallest: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{length: (index of the picture, tokens)}: batches of one length need no mask."""
    groups: dict[int, tuple[list[int], list[list[int]]]] = defaultdict(lambda: ([], []))
    for owner, ids in zip(owners, tokens, strict=True):
        ids = noisy(rng, ids)[:LONGEST] + TAIL
        groups[len(ids)][0].append(owner)
        groups[len(ids)][1].append(ids)
    return {
        length: (torch.tensor(index), torch.tensor(ids))
        for length, (index, ids) in sorted(groups.items())
        if len(index) >= smallest
    }


def draw_scenes(seed: int, count: int) -> tuple[list[animals.Scene], list[str]]:
    """Scenes and PROMPTS prompts for each, flat."""
    rng = random.Random(seed)
    scenes, texts = [], []
    for _ in range(count):
        scene, wordings = prompts.scene_and_prompts(rng, PROMPTS)
        scenes.append(scene)
        texts += wordings
    return scenes, texts


def draw_edits(
    seed: int, count: int
) -> tuple[list[animals.Scene], list[animals.Scene], list[str], list[str]]:
    """Scenes before and after, PROMPTS instructions for each (flat), and the kinds of edits."""
    rng = random.Random(seed)
    before, after, texts, kinds = [], [], [], []
    for _ in range(count):
        kind, one, other, wordings = prompts.scene_edit(rng, PROMPTS)
        before.append(one)
        after.append(other)
        texts += wordings
        kinds.append(kind)
    return before, after, texts, kinds
