"""Trains the transformer: text to image and editing, several sizes, one file."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .context import Text
from .host import QwenImageTransformerBlock, model_management
from .sampling import SHIFT
from .weights import Weights
from .world import TAIL, Groups

PEAK_RATE = 2e-3
WARM_UP = 400
FIRST_PART = 0.4  # of the schedule: mostly small pictures, which teach what words mean
WITHOUT_TEXT = 0.08  # for guidance
PICTURE_IN_TEXT = 0.65  # of the edits: the edit nodes show the picture to the encoder, too
NUMBERED = 0.8  # of those: as TextEncodeQwenImageEditPlus does
LONGEST_BATCH = 512
COMPILING = 4  # rounds through all sizes, with and without pictures, before the clock starts


@dataclass(frozen=True)
class Bucket:
    """Latents of one size, (N, 16, h, w), with their prompts; `before` for edits."""

    name: str
    early: float  # share of the steps in the first part of the schedule
    late: float
    latents: torch.Tensor
    groups: Groups
    before: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.latents.shape[-1] * 8, self.latents.shape[-2] * 8


@dataclass(frozen=True)
class Schedule:
    """How long to train."""

    steps: int
    stop_after: float = math.inf  # seconds of this process
    tokens: int = 72_000  # in a batch
    every: float = 60.0  # seconds between checkpoints


def rate_at(progress: float, step: int) -> float:
    """A short warm-up, then half a cosine."""
    warm = min(1, (step + 1) / WARM_UP)
    return PEAK_RATE * warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.002)


def fused() -> Callable[[], None]:
    """Compiles the blocks for every batch and length at once; call the result to undo it."""
    plain = QwenImageTransformerBlock.forward

    def forward(
        self: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: None,
        temb: torch.Tensor,
        image_rotary_emb: torch.Tensor,
        timestep_zero_index: int | None = None,
        transformer_options: object = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The options hold the number of the block, for which it would be compiled again.
        image, text = hidden_states, encoder_hidden_states
        return plain(self, image, text, None, temb, image_rotary_emb, timestep_zero_index, {})

    def undo() -> None:
        QwenImageTransformerBlock.forward = plain

    torch._dynamo.config.cache_size_limit = 64  # beyond it, blocks would silently run as before
    QwenImageTransformerBlock.forward = torch.compile(forward, dynamic=True)
    return undo


def sigmas(count: int, device: str) -> torch.Tensor:
    """Noise levels: mostly in the middle, some everywhere, then ComfyUI's shift."""
    t = torch.sigmoid(torch.randn(count, device=device) * 1.2)
    t = torch.where(torch.rand(count, device=device) < 0.3, torch.rand_like(t), t)
    return SHIFT * t / (1 + (SHIFT - 1) * t)


class Denoiser:
    """One run of the training loop."""

    def __init__(
        self, weights: Weights, text: Text, buckets: list[Bucket], schedule: Schedule
    ) -> None:
        self.weights, self.text, self.buckets, self.schedule = weights, text, buckets, schedule
        self.rng = random.Random(1000 + weights.step)
        torch.manual_seed(1000 + weights.step)
        self.null = torch.tensor(TAIL).view(1, -1)
        self.losses: dict[str, list[torch.Tensor]] = {bucket.name: [] for bucket in buckets}

    def context(self, bucket: Bucket, tokens: torch.Tensor, shown: bool) -> torch.Tensor:
        """What the transformer reads of `tokens`, now and then nothing."""
        if self.rng.random() < WITHOUT_TEXT:
            tokens = self.null.expand(len(tokens), -1)
        numbered = self.rng.random() < NUMBERED
        context = self.text(tokens, bucket.size if shown else None, numbered)
        return self.text.uncertain(context).to(self.weights.dtype)

    def loss(self, bucket: Bucket) -> torch.Tensor:
        """Flow matching (arXiv 2210.02747) on one batch: the network tells noise minus picture."""
        weights, device = self.weights, self.weights.device
        sizes = [len(group.owner) for group in bucket.groups.values()]
        length = self.rng.choices(list(bucket.groups), sizes)[0]
        shown = bucket.before is not None and self.rng.random() < PICTURE_IN_TEXT
        pixels = bucket.size[0] * bucket.size[1]
        area = pixels // 256 * (1 if bucket.before is None else 2) + length + 210 * shown
        count = min(LONGEST_BATCH, max(4, self.schedule.tokens // area))
        owner, tokens = bucket.groups[length].batch(count)
        owner = owner.to(device)
        x0 = bucket.latents[owner].float().unsqueeze(2)
        references = None
        if bucket.before is not None:
            references = [bucket.before[owner].unsqueeze(2).to(weights.dtype)]
        context = self.context(bucket, tokens, shown)
        t = sigmas(count, device)
        noise = torch.randn_like(x0)
        level = t.view(-1, 1, 1, 1, 1)
        x = (level * noise + (1 - level) * x0).to(weights.dtype)
        v = weights.model(x, t, context, ref_latents=references)
        return (v.float() - (noise - x0)).square().mean()

    def step(self, bucket: Bucket, progress: float) -> None:
        """One batch, one update."""
        loss = self.loss(bucket)
        loss.backward()
        self.weights.update(rate_at(progress, self.weights.step))
        self.losses[bucket.name].append(loss.detach())

    def compile(self) -> None:
        """Every size a few times, so that the blocks are compiled; the weights stay as they are."""
        for bucket in self.buckets * COMPILING:
            self.loss(bucket).backward()
            self.weights.model.zero_grad(set_to_none=True)

    def means(self, last: int) -> dict[str, float]:
        """Mean loss of each bucket's last batches."""
        return {
            name: round(torch.stack(values[-last:]).mean().item(), 4)
            for name, values in self.losses.items()
            if values
        }

    def train(self, checkpoint: Callable[[], None]) -> dict[str, object]:
        """Trains to the end of the schedule, or until it is to stop; always leaves a checkpoint."""
        weights = self.weights
        model_management.in_training = True  # rope without the kernel that has no gradient
        undo = fused() if weights.device == "cuda" else lambda: None
        try:
            if weights.device == "cuda":
                self.compile()
            start, first = time.time(), weights.step
            self._steps(start, checkpoint)
        finally:
            undo()
            model_management.in_training = False
        checkpoint()
        seconds = time.time() - start
        speed = (weights.step - first) / max(seconds, 1e-3)
        return {"steps_per_second": round(speed, 2), "loss": self.means(200)}

    def _steps(self, start: float, checkpoint: Callable[[], None]) -> None:
        weights, schedule, saved = self.weights, self.schedule, start
        while weights.step < schedule.steps and time.time() - start < schedule.stop_after:
            progress = weights.step / schedule.steps
            shares = [b.early if progress < FIRST_PART else b.late for b in self.buckets]
            self.step(self.rng.choices(self.buckets, shares)[0], progress)
            if weights.step % 500 == 0:
                seconds = time.time() - start
                print(f"step {weights.step} {seconds:.0f}s", self.means(100), flush=True)
            if time.time() - saved > schedule.every:
                saved = time.time()
                checkpoint()
