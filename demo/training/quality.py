"""Figures and contact sheets of a transformer, by its own Euler loop in large batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import animals, classifier, prompts
from ..figures import (
    NAMED,
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
from . import autoencoder
from .context import Text
from .sampling import Request, sample
from .world import TAIL

GUIDANCES = (1.0, 2.0, 3.5)
SHOWN_GUIDANCE = 2.0
CUDA_BATCH = 200  # pictures of 256x256


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
        self.text, self.device = text, device

    def request(
        self, ids: list[list[int]], size: tuple[int, int], guidance: float, before: object
    ) -> Request:
        """One batch of prompts, padded at the end, where nothing before can see it."""
        length = max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        real = torch.tensor([[i < len(row) for i in range(length)] for row in ids])
        shown = size if before is not None else None
        null = torch.tensor(TAIL).expand(len(ids), -1)
        context, negative = self.text(padded, shown), self.text(null, shown)
        front = context.shape[1] - length
        mask = torch.cat((torch.ones(len(ids), front), real.long()), 1).long().to(self.device)
        reference = None
        if before is not None:
            reference = autoencoder.encode(self.vae, before.to(self.device))
        return Request(context, mask, negative, reference, guidance)

    @torch.no_grad()
    def draw(
        self,
        texts: Sequence[str],
        size: tuple[int, int] = SQUARE,
        guidance: float = 1.0,
        before: torch.Tensor | None = None,
        steps: int = 8,
    ) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1]; `before` (B, 3, H, W) makes it an edit."""
        ids = [row + TAIL for row in self.text.tokens(texts)]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.zeros(len(texts), 3, size[1], size[0])
        limit = max(8, CUDA_BATCH * 65536 // (size[0] * size[1])) if self.device == "cuda" else 8
        for i in range(0, len(order), limit):
            part = order[i : i + limit]
            given = None if before is None else before[part]
            request = self.request([ids[j] for j in part], size, guidance, given)
            shape = (len(part), 16, 1, size[1] // 8, size[0] // 8)
            x = sample(self.model, shape, request, i, steps)
            out[part] = autoencoder.decode(self.vae, x).clamp(-1, 1).float().cpu()
        return out

    def _by_parts(self, images: torch.Tensor, use: Callable[[int, torch.Tensor], object]) -> list:
        return [use(i, images[i : i + 256].to(self.device)) for i in range(0, len(images), 256)]

    def right(
        self, images: torch.Tensor, scenes: Sequence[animals.Scene]
    ) -> dict[str, torch.Tensor]:
        """The classifier's verdict for each head."""
        parts = self._by_parts(
            images, lambda i, x: classifier.right(self.classifier, x, scenes[i : i + 256])
        )
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the classifier sees in pictures, (B, FEATURES)."""
        return torch.cat(self._by_parts(images, lambda _, x: self.classifier.features(x)))


def judge_prompts(judge: Judge, scenes: list[animals.Scene], out: Path) -> dict[str, object]:
    """Known and held-out wordings at several guidances; writes a sheet of the held-out ones."""
    rng = random.Random(901)
    wordings = {
        "seen": [prompts.describe(rng, s) for s in scenes],
        "held_out": [prompts.held_out(rng, s) for s in scenes],
    }
    true = judge.features(to_tensor([drawn(s) for s in scenes]))
    other = judge.features(to_tensor([drawn(s) for s in again(scenes)]))
    figures: dict[str, object] = {"frechet_of_renderer": round(classifier.frechet(true, other), 3)}
    for name, texts in wordings.items():
        for guidance in GUIDANCES:
            images = judge.draw(texts, guidance=guidance)
            hits = judge.right(images, scenes)
            distance = classifier.frechet(true, judge.features(images))
            figures[f"{name}_cfg{guidance}"] = {**shares_of(hits), "frechet": round(distance, 3)}
            if name == "held_out" and guidance == SHOWN_GUIDANCE:
                _show_held_out(images, texts, hits, out)
    return figures


def _show_held_out(
    images: torch.Tensor, texts: list[str], hits: dict[str, torch.Tensor], out: Path
) -> None:
    lines = []
    for i, text in enumerate(texts):
        missed = [k for k in NAMED if not hits[k][i]]
        if missed:
            lines.append(f"{i}: {', '.join(missed)}: {text}")
    (out / "wrong.txt").write_text("\n".join(lines[:40]), "utf-8")
    contact_sheet([*autoencoder.to_bytes(images[:48])], 12, out / "sheet_held_out.png")


def judge_sizes(judge: Judge, scenes: list[animals.Scene], out: Path) -> dict[str, object]:
    """Sizes other than 256x256, and a sheet of the same prompts at each."""
    rng = random.Random(902)
    shown = [*autoencoder.to_bytes(judge.draw(SHOWN, guidance=SHOWN_GUIDANCE))]
    figures: dict[str, object] = {}
    part = scenes[: max(8, len(scenes) // 8)]
    texts = [prompts.held_out(rng, s) for s in part]
    for size in OTHER_SIZES:
        shown += [*autoencoder.to_bytes(judge.draw(SHOWN, size, SHOWN_GUIDANCE))]
        hits = judge.right(judge.draw(texts, size, SHOWN_GUIDANCE), part)
        figures[f"size_{size[0]}x{size[1]}"] = shares_of(hits)
    contact_sheet(shown, len(SHOWN), out / "sheet_shown.png")
    return figures


def judge_edits(judge: Judge, count: int, out: Path) -> dict[str, object]:
    """Edits at several guidances; before and after in a sheet."""
    asked = edits_to_judge(count)
    before, wanted = (to_tensor([drawn(e[i]) for e in asked]) for i in (1, 2))
    figures: dict[str, object] = {}
    for guidance in GUIDANCES[:2]:
        after = judge.draw([e[3][0] for e in asked], SQUARE, guidance, before)
        errors = (after - wanted).square().mean((1, 2, 3)) / 4
        hits = judge.right(after, [e[2] for e in asked])
        figures[f"edits_cfg{guidance}"] = edit_shares(asked, hits, errors)
        if guidance == 1.0:
            pairs = torch.stack((before, after), 1)[:28].flatten(0, 1)
            contact_sheet([*autoencoder.to_bytes(pairs)], 14, out / "sheet_edits.png")
    return figures


@torch.no_grad()
def judge(subject: Judge, count: int, out: Path) -> dict[str, object]:
    """Every figure of the training; writes the contact sheets."""
    torch.manual_seed(7)
    scenes = scenes_to_judge(count)
    return {
        **judge_prompts(subject, scenes, out),
        **judge_sizes(subject, scenes, out),
        **judge_edits(subject, count, out),
    }
