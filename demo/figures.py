"""What the embedded model is judged by: the prompts, the shares right, the contact sheets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import animals, edits

NAMED = ("animal", "colour", "accessory", "action", "background")
SQUARE = (256, 256)
OTHER_SIZES = ((384, 384), (512, 512), (240, 320), (320, 240), (512, 288))
SHOWN = (
    "a small blue bunny in a dress is dancing in the snow",
    "一只戴帽子的小熊",
    "a red fox reading a book on the beach",
    "green pig with glasses, at night",
    "purple cat",
    "一只粉色的大象在草地上睡觉",
    "An orange lion with a blue scarf sitting in a room.",
    "a yellow duck wearing a red hat",
    "a photo of a brown dog",
    "黄色的青蛙穿着裙子跳舞",
    "bunny, blue",
    "a photo of a mountain",
)

Edit = tuple[str, animals.Scene, animals.Scene, list[str]]


def scenes_to_judge(count: int) -> list[animals.Scene]:
    """The same scenes every time; no prompt of the held-out wordings names an accent."""
    rng = random.Random(900)
    return [replace(animals.random_scene(rng), accent="") for _ in range(count)]


def again(scenes: Sequence[animals.Scene]) -> list[animals.Scene]:
    """The same descriptions with other small differences: the least distance one can ask for."""
    return [replace(scene, jitter=scene.jitter + 1) for scene in scenes]


def edits_to_judge(count: int) -> list[Edit]:
    """Kind, before, after and one instruction, the same every time."""
    rng = random.Random(903)
    return [edits.scene_edit(rng, 1) for _ in range(count)]


def drawn(scene: animals.Scene, size: tuple[int, int] = SQUARE) -> np.ndarray:
    """(H, W, 3) bytes, as the renderer draws it."""
    return np.asarray(animals.draw(scene, *size))


def to_tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Pictures (H, W, 3) of bytes to (B, 3, H, W) in [-1, 1], as the classifier takes them."""
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stack.float() / 127.5 - 1


def shares_of(hits: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share right of each thing that prompts name, and of all of them at once."""
    shares = {k: round(hits[k].float().mean().item(), 4) for k in NAMED}
    everything = torch.stack([hits[k] for k in NAMED]).all(0)
    return {**shares, "all": round(everything.float().mean().item(), 4)}


def edit_shares(
    asked: Sequence[Edit], hits: dict[str, torch.Tensor], errors: torch.Tensor
) -> dict[str, object]:
    """By kind: after which share everything is as asked, and PSNR to the renderer's own picture.

    `errors` (B,) are mean squares on pictures in [0, 1]; the accent counts in PSNR alone.
    """
    every = torch.stack(list(hits.values())).all(0)
    figures: dict[str, object] = {"all": round(every.float().mean().item(), 4)}
    for kind in edits.EDITS:
        index = [i for i, edit in enumerate(asked) if edit[0] == kind]
        if index:
            figures[kind] = {
                "right": round(every[index].float().mean().item(), 3),
                "psnr": round(float(-10 * errors[index].mean().log10()), 2),
                "n": len(index),
            }
    return figures


def contact_sheet(images: Sequence[np.ndarray], columns: int, path: Path, side: int = 128) -> None:
    """Pictures (H, W, 3) in rows, each scaled into a square; the suffix tells the format."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        image.thumbnail((side - 2, side - 2), Image.Resampling.LANCZOS)
        sheet.paste(image, (i % columns * side, i // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        sheet.save(path, quality=88)
    else:
        sheet.save(path, optimize=True)
