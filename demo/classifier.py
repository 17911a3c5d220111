"""A small network that tells what a picture shows: the judge of the embedded model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from .animals import ACCESSORIES, ACTIONS, ANIMALS, BACKGROUNDS, COLOURS, Scene
from .embedded import CLASSIFIER, FOLDER

SIDE = 128
HEADS: dict[str, tuple[object, ...]] = {
    "animal": ANIMALS,
    "colour": tuple(COLOURS),
    "accessory": ACCESSORIES,
    "action": ACTIONS,
    "background": BACKGROUNDS,
    "watermark": (False, True),
}
WIDTHS = (16, 24, 32, 48, 48)
FEATURES = 2 * WIDTHS[-1]


class Classifier(torch.nn.Module):
    """Five strided convolutions, mean and maximum over the picture, one linear head each."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for before, after in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [
                torch.nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                torch.nn.BatchNorm2d(after),
                torch.nn.SiLU(),
            ]
        self.body = torch.nn.Sequential(*layers)
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(FEATURES, len(values)) for name, values in HEADS.items()}
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], any size, to (B, FEATURES); sees the square in the middle."""
        height, width = images.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = images[..., top : top + side, left : left + side]
        x = F.interpolate(square, (SIDE, SIDE), mode="area")
        x = self.body(x)
        return torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each head."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def labels(scenes: Iterable[Scene]) -> dict[str, torch.Tensor]:
    """The right class of each head."""
    scenes = list(scenes)
    return {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
        for name, values in HEADS.items()
    }


def seen(model: Classifier, images: torch.Tensor) -> list[dict[str, object]]:
    """What the classifier sees in each picture (B, 3, H, W)."""
    with torch.no_grad():
        found = {name: logits.argmax(1).tolist() for name, logits in model(images).items()}
    return [
        {name: HEADS[name][classes[i]] for name, classes in found.items()}
        for i in range(len(images))
    ]


def right(
    model: Classifier, images: torch.Tensor, scenes: Sequence[Scene]
) -> dict[str, torch.Tensor]:
    """For each head, which of the pictures it finds to be as the scene says."""
    with torch.no_grad():
        found = model(images)
    return {name: found[name].argmax(1).cpu() == wanted for name, wanted in labels(scenes).items()}


def load(path: Path = FOLDER / CLASSIFIER) -> Classifier:
    """The trained classifier. Raises ValueError for a file that is none."""
    model = Classifier()
    state = {k: v.float() for k, v in load_file(path).items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or not all(name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"{path} is not the classifier of this version: it has other tensors.")
    return model.eval()


def frechet(one: torch.Tensor, other: torch.Tensor) -> float:
    """Frechet distance of two sets of features (N, FEATURES), as in FID (arXiv 1706.08500)."""
    one, other = one.double().cpu(), other.double().cpu()
    a, b = torch.cov(one.T), torch.cov(other.T)
    eigenvalues = torch.linalg.eigvals(a @ b).real.clamp(min=0)
    mean = (one.mean(0) - other.mean(0)).square().sum()
    return float(mean + a.trace() + b.trace() - 2 * eigenvalues.sqrt().sum())
