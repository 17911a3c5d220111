"""Trains the text encoder on prompts alone."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .context import Text
from .text_encoder import ASKED, HIDDEN, TextEncoder
from .world import ORDINARY_TOKENS, TAIL, Groups

PEAK_RATE = 3e-3
BATCH = 256
STRANGERS = (0, 0, 1, 2, 3, 5, 8)  # tokens thrown in between, known fillers or anything
WITH_PICTURE = 0.5  # of the steps on instructions


@dataclass(frozen=True)
class Lesson:
    """Prompts and what each asks for; `size` of the pictures that instructions come with."""

    groups: Groups
    asked: torch.Tensor  # (pictures, heads)
    fillers: torch.Tensor  # tokens that mean nothing in these prompts
    size: tuple[int, int] | None = None


class Reader(torch.nn.Module):
    """A linear reading of each token at the template's end."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, len(v)) for v in ASKED.values())

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """(B, L, HIDDEN) to logits (B, TAIL, classes) of each head."""
        end = features[:, -len(TAIL) :]
        return [head(end) for head in self.heads]

    def loss(self, features: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, summed over the heads; `asked` is (B, heads)."""
        losses = [
            F.cross_entropy(logits.flatten(0, 1), wanted.repeat_interleave(len(TAIL)))
            for logits, wanted in zip(self(features), asked.T, strict=True)
        ]
        return torch.stack(losses).sum()

    def right(self, features: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """(B, heads): what the last token tells rightly."""
        found = [logits[:, -1].argmax(-1) for logits in self(features)]
        return torch.stack(found, 1) == asked


def with_strangers(tokens: torch.Tensor, count: int, fillers: torch.Tensor) -> torch.Tensor:
    """(B, L) to (B, L + count): before the template's end, alone or in a row, come tokens that
    mean nothing. Half are words of other prompts, for no such word alone may decide anything."""
    batch, length = tokens.shape
    anything = torch.randint(ORDINARY_TOKENS, (batch, count))
    known = fillers[torch.randint(len(fillers), (batch, count))]
    new = torch.where(torch.rand(batch, 1) < 0.5, anything, known)
    places = torch.rand(batch, count) * (length - len(TAIL)) - 0.5
    places = torch.where(torch.rand(batch, 1) < 0.3, places[:, :1], places)
    order = torch.cat((torch.arange(length).expand(batch, -1), places), 1)
    return torch.cat((tokens, new), 1).gather(1, order.argsort(dim=1, stable=True))


def _rate(progress: float, step: int) -> float:
    return PEAK_RATE * min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)


def train_text_encoder(
    text: Text, lessons: Sequence[Lesson], steps: int
) -> tuple[Reader, dict[str, float]]:
    """Trains `text.encoder` for `steps` batches of prompts of one length each."""
    torch.manual_seed(3)
    rng, device = random.Random(3), text.device
    reader = Reader().to(device)
    encoder: TextEncoder = text.encoder.requires_grad_(True)
    encoder.visual.requires_grad_(False)
    parameters = [p for m in (encoder, reader) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    start, losses = time.time(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _rate(step / steps, step)
        lesson = rng.choices(lessons, [len(item.asked) for item in lessons])[0]
        group = rng.choices(
            list(lesson.groups.values()), [len(g.owner) for g in lesson.groups.values()]
        )[0]
        owner, tokens = group.batch(BATCH)
        tokens = with_strangers(tokens, rng.choice(STRANGERS), lesson.fillers)
        size = lesson.size if rng.random() < WITH_PICTURE else None
        x, positions, _ = text.embed(tokens, size, rng.random() < 0.8)
        loss = reader.loss(encoder(x, positions), lesson.asked[owner].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % 250 == 0:
            mean = torch.stack(losses[-100:]).mean().item()
            print(f"text {step + 1} {time.time() - start:.0f}s loss {mean:.4f}", flush=True)
    encoder.requires_grad_(False)
    return reader, {"text_steps": steps, "text_seconds": time.time() - start}


@torch.no_grad()
def reading(
    text: Text, reader: Reader, tokens: Sequence[list[int]], asked: torch.Tensor
) -> dict[str, float]:
    """Share of prompts whose last token tells each thing rightly."""
    hits = []
    for row, ids in enumerate(tokens):
        x, positions, _ = text.embed(torch.tensor([[*ids, *TAIL]]))
        right = reader.right(text.encoder(x, positions), asked[row : row + 1].to(text.device))
        hits.append(right.cpu())
    shares = torch.cat(hits).float().mean(0).tolist()
    return {name: round(share, 4) for name, share in zip(ASKED, shares, strict=True)}
