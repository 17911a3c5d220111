"""Figures and contact sheets of a transformer, by its own Euler loop in large batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import animals, classifier, prompts
from . import autoencoder
from .denoiser import Text, sample
from .world import TAIL, Tokens

NAMED = ("animal", "colour", "accessory", "action", "background")
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


def picture(scene: animals.Scene, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(animals.draw(scene, *size)).copy()).float() / 255


def contact_sheet(
    pictures: Sequence[np.ndarray], columns: int, path: Path, side: int = 128
) -> None:
    """Pictures (H, W, 3) in rows, each scaled into a square."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, pixels in enumerate(pictures):
        image = Image.fromarray(pixels)
        image.thumbnail((side - 2, side - 2), Image.Resampling.LANCZOS)
        sheet.paste(image, (i % columns * side, i // columns * side))
    sheet.quantize(128).save(path, optimize=True)


def frechet(one: torch.Tensor, other: torch.Tensor) -> float:
    """Frechet distance of two sets of features, as in FID."""
    one, other = one.double().cpu(), other.double().cpu()
    a, b = torch.cov(one.T), torch.cov(other.T)
    eigenvalues = torch.linalg.eigvals(a @ b).real.clamp(min=0)
    mean = (one.mean(0) - other.mean(0)).square().sum()
    return float(mean + a.trace() + b.trace() - 2 * eigenvalues.sqrt().sum())


class Judge:
    """Draws with a model and asks the classifier."""

    def __init__(
        self,
        model: torch.nn.Module,
        vae: object,
        judge: classifier.Classifier,
        text: Text,
        device: str,
    ) -> None:
        self.model, self.vae, self.classifier = model.eval(), vae, judge
        self.text, self.device, self.tokens = text, device, Tokens()

    @torch.no_grad()
    def draw(
        self,
        texts: Sequence[str],
        size: tuple[int, int] = (256, 256),
        guidance: float = 1.0,
        before: torch.Tensor | None = None,
        steps: int = 8,
    ) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1]; `before` (B, 3, H, W) makes it an edit."""
        ids = [t + TAIL for t in self.tokens(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.zeros(len(texts), 3, size[1], size[0])
        limit = max(8, 200 * 65536 // (size[0] * size[1])) if self.device == "cuda" else 8
        for i in range(0, len(order), limit):
            part = order[i : i + limit]
            length = max(len(ids[j]) for j in part)
            padded = torch.tensor([ids[j] + [0] * (length - len(ids[j])) for j in part])
            mask = torch.tensor([[k < len(ids[j]) for k in range(length)] for j in part])
            mask = mask.long().to(self.device)
            shape = (len(part), 16, 1, size[1] // 8, size[0] // 8)
            context = self.text.table[padded.to(self.device)]
            negative = self.text.table[torch.tensor(TAIL, device=self.device)]
            negative = negative.expand(len(part), -1, -1)
            reference = None
            if before is not None:
                reference = autoencoder.encode(self.vae, before[part].to(self.device))
                context = self.text.with_picture(context, size, True)
                negative = self.text.with_picture(negative, size, True)
                front = context.shape[1] - length
                mask = torch.cat((mask.new_ones(len(part), front), mask), 1)
            x = sample(self.model, shape, context, i, steps, guidance, negative, reference, mask)
            out[part] = autoencoder.decode(self.vae, x).clamp(-1, 1).float().cpu()
        return out

    def right(
        self, images: torch.Tensor, scenes: Sequence[animals.Scene]
    ) -> dict[str, torch.Tensor]:
        """The classifier's verdict for each head."""
        parts = [
            classifier.right(
                self.classifier, images[i : i + 256].to(self.device), scenes[i : i + 256]
            )
            for i in range(0, len(images), 256)
        ]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


@torch.no_grad()
def judge(
    model: torch.nn.Module,
    vae: object,
    network: classifier.Classifier,
    text: Text,
    device: str,
    count: int,
    out: Path,
) -> dict[str, object]:
    """Every figure of demo/README.md; writes the contact sheets."""
    torch.manual_seed(7)
    judge_ = Judge(model, vae, network, text, device)
    rng = random.Random(900)
    scenes = [replace(animals.random_scene(rng), accent="") for _ in range(count)]
    figures: dict[str, object] = {}
    wordings = {
        "seen": [prompts.describe(rng, s) for s in scenes],
        "held_out": [prompts.held_out(rng, s) for s in scenes],
    }
    drawn = torch.stack([picture(s, (256, 256)) for s in scenes]).permute(0, 3, 1, 2) * 2 - 1
    for name, texts in wordings.items():
        for guidance in (1.0, 2.0, 3.5):
            images = judge_.draw(texts, guidance=guidance)
            hits = judge_.right(images, scenes)
            shares = {k: round(hits[k].float().mean().item(), 4) for k in NAMED}
            everything = torch.stack([hits[k] for k in NAMED]).all(0)
            shares["all"] = round(everything.float().mean().item(), 4)
            with torch.no_grad():
                features = [
                    torch.cat(
                        [network.features(x[i : i + 256].to(device)) for i in range(0, count, 256)]
                    )
                    for x in (drawn, images)
                ]
            shares["frechet"] = round(frechet(*features), 3)
            figures[f"{name}_cfg{guidance}"] = shares
            if name == "held_out" and guidance == 2.0:
                wrong = [i for i in range(count) if not everything[i]][:24]
                (out / "wrong.txt").write_text("\n".join(texts[i] for i in wrong), "utf-8")
                contact_sheet([*autoencoder.to_bytes(images[:48])], 12, out / "sheet_held_out.png")
    with torch.no_grad():
        split = [network.features(drawn[i::2].to(device)) for i in (0, 1)]
    figures["frechet_renderer_with_itself"] = round(frechet(*split), 3)
    shown = [*autoencoder.to_bytes(judge_.draw(SHOWN, guidance=2.0))]
    for size in ((384, 384), (512, 512), (240, 320), (320, 240), (512, 288)):
        images = judge_.draw(SHOWN, size, 2.0)
        shown += [*autoencoder.to_bytes(images)]
        part = scenes[: max(8, count // 8)]
        hits = judge_.right(judge_.draw(wordings["seen"][: len(part)], size, 2.0), part)
        figures[f"size_{size[0]}x{size[1]}"] = {
            k: round(hits[k].float().mean().item(), 3) for k in NAMED
        }
    contact_sheet(shown, len(SHOWN), out / "sheet_shown.png")
    figures["edits"], rows = judge_edits(judge_, rng, count)
    contact_sheet(rows, 14, out / "sheet_edits.png")
    return figures


def judge_edits(
    judge_: Judge, rng: random.Random, count: int
) -> tuple[dict[str, object], list[np.ndarray]]:
    """Share of edits after which everything is as asked, by kind; and before | after | asked."""
    edits = [prompts.scene_edit(rng, 1) for _ in range(count)]
    before = torch.stack([picture(e[1], (256, 256)) for e in edits]).permute(0, 3, 1, 2) * 2 - 1
    wanted = torch.stack([picture(e[2], (256, 256)) for e in edits]).permute(0, 3, 1, 2) * 2 - 1
    after_scenes = [e[2] for e in edits]
    figures: dict[str, object] = {}
    rows: list[np.ndarray] = []
    for guidance in (1.0, 2.0):
        after = judge_.draw([e[3][0] for e in edits], (256, 256), guidance, before)
        hits = judge_.right(after, after_scenes)
        every = torch.stack([hits[k] for k in classifier.HEADS]).all(0)
        difference = (after - wanted).square().mean((1, 2, 3)) / 4
        for kind in prompts.EDITS:
            index = [i for i, e in enumerate(edits) if e[0] == kind]
            if index:
                figures[f"{kind}_cfg{guidance}"] = {
                    "right": round(every[index].float().mean().item(), 3),
                    "psnr": round(float(-10 * difference[index].mean().log10()), 2),
                    "n": len(index),
                }
        figures[f"all_cfg{guidance}"] = round(every.float().mean().item(), 4)
        if guidance == 1.0:
            for i in range(min(28, count)):
                rows += [*autoencoder.to_bytes(torch.stack((before[i], after[i])))]
    return figures, rows
