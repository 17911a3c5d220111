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

from .. import animals, edits, prompts
from .host import qwen_image

IM_START, IM_END, ASSISTANT, NEWLINE, VISION_END = 151644, 151645, 77091, 198, 151653
TAIL = [IM_END, NEWLINE, IM_START, ASSISTANT, NEWLINE]
ORDINARY_TOKENS = 151643
LONGEST = 60
STRANGE = 0.4  # share of the prompts with unknown tokens among them
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
    """Qwen's tokenizer and ComfyUI's templates for it."""

    def __init__(self) -> None:
        self.host = qwen_image.QwenImageTokenizer()
        self.tokenizer = self.host.qwen25_7b.tokenizer
        draw, edit = self.host.llama_template, self.host.llama_template_images
        start = edit.split("<|vision_start|>")[0]
        self.before_text = self([draw.split("{}")[0]])[0]
        self.before_picture = self([f"{start}<|vision_start|>"])[0]
        self.before_numbered_picture = self([f"{start}Picture 1: <|vision_start|>"])[0]
        self.dropped_before_text = len(self.before_text)  # what ComfyUI cuts off after encoding
        self.dropped_before_picture = len(self([start])[0])

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without template."""
        return self.tokenizer(list(texts))["input_ids"]


@dataclass(frozen=True)
class Group:
    """Prompts of one length, end of the template included, so that a batch needs no mask."""

    owner: torch.Tensor  # (N,) index of the picture
    tokens: torch.Tensor  # (N, length)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` random rows of both."""
        pick = torch.randint(len(self.owner), (count,))
        return self.owner[pick], self.tokens[pick]


Groups = dict[int, Group]


def noisy(rng: random.Random, tokens: list[int]) -> list[int]:
    """Often with tokens in between that nobody has seen, alone or in a row.

    So the model learns to skip whatever it does not know: other wordings, other words.
    """
    if rng.random() < STRANGE:
        tokens = list(tokens)
        for _ in range(rng.choice((1, 1, 2, 3))):
            place = rng.choice((0, len(tokens), rng.randint(0, len(tokens))))
            row = rng.choice((1, 1, 1, 2, 3, 5))
            tokens[place:place] = [rng.randrange(ORDINARY_TOKENS) for _ in range(row)]
    return tokens


def by_length(
    rng: random.Random, tokens: list[list[int]], owners: list[int], smallest: int
) -> Groups:
    """The prompts by their length; lengths of fewer than `smallest` prompts are left out."""
    rows: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for owner, ids in zip(owners, tokens, strict=True):
        ids = noisy(rng, ids)[:LONGEST] + TAIL
        rows[len(ids)].append((owner, ids))
    return {
        length: Group(torch.tensor([o for o, _ in rows]), torch.tensor([i for _, i in rows]))
        for length, rows in sorted(rows.items())
        if len(rows) >= smallest
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
        kind, one, other, wordings = edits.scene_edit(rng, PROMPTS)
        before.append(one)
        after.append(other)
        texts += wordings
        kinds.append(kind)
    return before, after, texts, kinds
