"""What the transformer reads: prompts in ComfyUI's templates, encoded, with pictures in front."""

from __future__ import annotations

import math

import torch

from .host import qwen_vl, sign_codes
from .text_encoder import TextEncoder
from .world import VISION_END, Tokens

UNCERTAINTY = 0.02  # of the encoder's output, of which half precision and other devices move a bit
PIXELS_SEEN = 384 * 384  # the edit node's size for the vision tower


class Text:
    """Turns token numbers into what ComfyUI's text encode nodes give."""

    def __init__(self, encoder: TextEncoder, device: str) -> None:
        self.encoder = encoder.to(device)
        self.tokens = Tokens()
        self.device = device
        self.codes = sign_codes(encoder.model.norm.weight.shape[0]).to(device)
        self.pictures: dict[tuple[int, int], tuple[torch.Tensor, tuple[int, int]]] = {}

    @torch.no_grad()
    def remember(self, images: torch.Tensor, width: int, height: int) -> None:
        """Keep what the vision tower makes of pictures (B, H, W, 3) in [0, 1]."""
        scale = math.sqrt(PIXELS_SEEN / (width * height))
        size = (round(height * scale), round(width * scale))
        kept = []
        for image in images:
            x = torch.nn.functional.interpolate(
                image.permute(2, 0, 1)[None].to(self.device), size, mode="area"
            )
            patches, grid = qwen_vl.process_qwen2vl_images(x.permute(0, 2, 3, 1))
            seen = self.encoder.visual(patches.to(self.device), grid.to(self.device))
            kept.append(seen.reshape(1, -1, seen.shape[-1]))
        rows, columns = (int(n) // 2 for n in grid[0][1:])
        self.pictures[width, height] = (torch.cat(kept), (rows, columns))

    def _codes(self, tokens: list[int], batch: int) -> torch.Tensor:
        return self.codes[torch.tensor(tokens, device=self.device)].expand(batch, -1, -1)

    def embed(
        self, tokens: torch.Tensor, size: tuple[int, int] | None = None, numbered: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Tokens (B, L) to embeddings in the template, positions, and how many the host drops.

        With `size` a random picture of that size comes first, as the edit nodes place it;
        `numbered` as TextEncodeQwenImageEditPlus does.
        """
        batch, text = len(tokens), self.codes[tokens.to(self.device)]
        if size is None:
            prefix = self._codes(self.tokens.before_text, batch)
            return torch.cat((prefix, text), 1), None, self.tokens.dropped_before_text
        known = self.tokens
        ids = known.before_numbered_picture if numbered else known.before_picture
        bank, grid = self.pictures[size]
        picture = bank[torch.randint(len(bank), (batch,), device=self.device)]
        end = self._codes([VISION_END], batch)
        x = torch.cat((self._codes(ids, batch), picture, end, text), 1)
        return x, self._positions(len(ids), grid, x.shape[1]), known.dropped_before_picture

    def _positions(self, start: int, grid: tuple[int, int], length: int) -> torch.Tensor:
        """(3, length): time, row and column, as Qwen25_7BVLI.forward numbers them."""
        rows, columns = grid
        end = start + rows * columns
        positions = torch.arange(length, device=self.device).expand(3, -1).clone()
        positions[:, end:] += start + max(grid) - end
        index = torch.arange(rows * columns, device=self.device)
        positions[0, start:end] = start
        positions[1, start:end] = start + index // columns
        positions[2, start:end] = start + index % columns
        return positions

    @torch.no_grad()
    def __call__(
        self, tokens: torch.Tensor, size: tuple[int, int] | None = None, numbered: bool = True
    ) -> torch.Tensor:
        """Tokens (B, L), end of the template included, to (B, L', HIDDEN)."""
        x, positions, dropped = self.embed(tokens, size, numbered)
        return self.encoder(x, positions)[:, dropped:]

    def uncertain(self, context: torch.Tensor) -> torch.Tensor:
        """With a little noise, for training."""
        return context + UNCERTAINTY * torch.randn_like(context)
