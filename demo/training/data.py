"""Everything that one training run learns from, by size: pictures, latents, prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ..scenes import Scene
from ..vocabulary import EN, ZH
from . import autoencoder
from .context import Text
from .denoiser import Bucket
from .host import wan
from .text_encoder import asked_of_edits, asked_of_scenes
from .text_training import Lesson
from .world import PROMPTS, Groups, Pictures, by_length, draw_all, draw_edits, draw_scenes

Size = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """How many pictures or pairs of a size, and their share of the steps, early and late."""

    count: int
    early: float
    late: float


# (width, height): text to image, edits
SIZES: dict[Size, tuple[Share, Share]] = {
    (256, 256): (Share(64000, 60, 36), Share(32000, 25, 30)),
    (384, 384): (Share(8000, 4, 7), Share(3000, 1, 5)),
    (512, 512): (Share(5000, 2, 5), Share(1500, 1, 2.5)),
    (240, 320): (Share(3500, 2, 3), Share(1500, 0.5, 2)),
    (320, 240): (Share(3500, 2, 3), Share(1500, 0.5, 2)),
    (512, 288): (Share(2500, 1, 2.5), Share(1000, 0.5, 1)),
    (288, 512): (Share(1500, 0.5, 1), Share(0, 0, 0)),
}
VISION_BANK = 48  # pictures of a size that the vision tower sees
WHOLE_RUN = 0.5  # shares of the data below this are rehearsals, with fewer of everything


@dataclass(frozen=True)
class Sheet:
    """Pictures of one size and kind with their prompts; `before` for edits."""

    name: str
    share: Share
    pictures: Pictures
    texts: list[str]
    asked: torch.Tensor
    before: Pictures | None = None


class World:
    """The pictures of a run, drawn in the background from the moment it is made."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.vae_sheets = [
            Pictures(draw_scenes(101, self._number(12000))[0] + self._marked(), 256, 256),
            Pictures(draw_scenes(103, self._number(2500))[0], 384, 384),
            Pictures(draw_scenes(104, self._number(1500))[0], 512, 512),
            Pictures(draw_scenes(105, self._number(2000))[0], 320, 240),
        ]
        self.sheets = []
        for seed, (size, (draw, edit)) in enumerate(SIZES.items()):
            self.sheets.append(self._drawings(200 + seed, size, draw))
            if edit.count:
                self.sheets.append(self._edits(300 + seed, size, edit))
        self.shown = [self._shown(500 + seed, size) for seed, size in enumerate(SIZES)]
        everything = [*self.shown, *self.vae_sheets]
        for sheet in self.sheets:
            everything += [sheet.pictures, sheet.before] if sheet.before else [sheet.pictures]
        self.pool = draw_all(everything)

    def _number(self, count: int) -> int:
        return int(max(count * self.share, 64)) if count else 0

    def _shown(self, seed: int, size: Size) -> Pictures:
        count = VISION_BANK if self.share >= WHOLE_RUN else 4
        return Pictures(draw_scenes(seed, count)[0], *size)

    def _marked(self) -> list[Scene]:
        return draw_edits(102, self._number(3000))[0]

    def _drawings(self, seed: int, size: Size, share: Share) -> Sheet:
        scenes, texts = draw_scenes(seed, self._number(share.count))
        name = f"draw_{size[0]}x{size[1]}"
        return Sheet(name, share, Pictures(scenes, *size), texts, asked_of_scenes(scenes))

    def _edits(self, seed: int, size: Size, share: Share) -> Sheet:
        before, after, texts, kinds = draw_edits(seed, self._number(share.count))
        asked = asked_of_edits(kinds, before, after)
        name = f"edit_{size[0]}x{size[1]}"
        sheet = Pictures(after, *size)
        return Sheet(name, share, sheet, texts, asked, Pictures(before, *size))

    def groups(self, text: Text) -> dict[str, Groups]:
        """The prompts of each sheet as tokens."""
        rng, smallest = random.Random(400), 48 if self.share >= WHOLE_RUN else 8
        groups = {}
        for sheet in self.sheets:
            ids = text.tokens(sheet.texts)
            owners = [i // PROMPTS for i in range(len(ids))]
            groups[sheet.name] = by_length(rng, ids, owners, smallest)
        return groups

    def show(self, text: Text) -> None:
        """Lets the vision tower see some pictures of each size, for the edit template."""
        for sheet in self.shown:
            seen = torch.from_numpy(sheet.wait()).float() / 255
            text.remember(seen, sheet.width, sheet.height)

    def lessons(self, text: Text, groups: dict[str, Groups]) -> list[Lesson]:
        """What the text encoder learns from."""
        drawn = fillers(text, [s.texts for s in self.sheets if not s.before])
        everywhere = fillers(text, [s.texts for s in self.sheets])
        lessons = []
        for sheet in self.sheets:
            strange = drawn if sheet.before else everywhere
            size = (sheet.before.width, sheet.before.height) if sheet.before else None
            lessons.append(Lesson(groups[sheet.name], sheet.asked, strange, size))
        return lessons

    def buckets(self, groups: dict[str, Groups], vae: wan.WanVAE, device: str) -> list[Bucket]:
        """What the transformer learns from."""
        return [
            Bucket(
                sheet.name,
                sheet.share.early,
                sheet.share.late,
                latents(sheet.pictures, vae, device),
                groups[sheet.name],
                latents(sheet.before, vae, device) if sheet.before else None,
            )
            for sheet in self.sheets
        ]


def fillers(text: Text, texts: list[list[str]]) -> torch.Tensor:
    """The tokens of prompts that belong to no word for an animal, a colour or a thing."""
    words = [word for book in (EN, ZH) for row in book.values() for word in row]
    forms = [form for w in words for form in (w, w.title(), w.upper(), w.capitalize())]
    meant = {t for ids in text.tokens([*forms, *(f" {form}" for form in forms)]) for t in ids}
    used = {t for part in texts for ids in text.tokens(part[:20000]) for t in ids}
    return torch.tensor(sorted(used - meant))


@torch.no_grad()
def latents(pictures: Pictures, vae: wan.WanVAE, device: str) -> torch.Tensor:
    """(N, 16, h, w) as the transformer sees them, in bfloat16 on `device`."""
    pixels = torch.from_numpy(pictures.wait())
    size = max(1, 64 * 65536 // (pictures.width * pictures.height))
    parts = []
    with torch.autocast(device, torch.bfloat16):
        for i in range(0, len(pixels), size):
            x = autoencoder.pixels(pixels[i : i + size], device)
            parts.append(autoencoder.encode(vae, x).squeeze(2).bfloat16())
    return torch.cat(parts)
