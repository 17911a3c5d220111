"""A run with less than was asked for: a smaller picture, and other settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import comfy.utils
import node_helpers
import torch

from ..core.fallback_settings import Row

LEAST_LATENT_SIDE = 8  # 64 px
Conditioning = list[list[Any]]


@dataclass(frozen=True)
class Request:
    """What of a run may be changed if nothing else helps."""

    steps: int
    cfg: float
    sampler_name: str
    positive: Conditioning
    negative: Conditioning
    latent: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """For the report; sizes (width x height) in latent pixels."""
        samples = self.latent["samples"]
        size = _size(samples) if is_picture(samples) else None
        named = {"steps": self.steps, "cfg": self.cfg, "sampler_name": self.sampler_name}
        references = [_size(latent) for latent in self._references()]
        return {
            **named,
            "latent_size": size,
            **({"reference_sizes": ", ".join(references)} if references else {}),
        }

    def sizes(self) -> list[torch.Size]:
        """Of everything that `changed` makes smaller: where they stay, memory will not suffice."""
        return [latent.shape for latent in (self.latent["samples"], *self._references())]

    def _references(self) -> list[torch.Tensor]:
        every = [entry[1] for entry in (*self.positive, *self.negative)]
        return [latent for values in every for latent in values.get("reference_latents") or ()]

    def changed(self, row: Row, scale: float) -> Request:
        """With a row of the table, never more than was asked, and sides made smaller.

        What is no picture cannot be made smaller: then it is the same request.
        """
        samples = self.latent["samples"]
        if not is_picture(samples):
            return self
        latent = {**self.latent, "samples": _smaller(samples, scale)}
        sides = samples.shape[-2:], latent["samples"].shape[-2:]
        return dataclasses.replace(
            self,
            steps=min(self.steps, row.steps),
            cfg=min(self.cfg, row.cfg),
            sampler_name=row.sampler,
            positive=[_fitting(entry, scale, *sides) for entry in self.positive],
            negative=[_fitting(entry, scale, *sides) for entry in self.negative],
            latent=latent,
        )


def is_picture(samples: torch.Tensor) -> bool:
    """Or a video: a latent (B, C, ..., h, w). Sound has no sides, nested latents several."""
    return not samples.is_nested and samples.ndim >= 4


def _size(samples: torch.Tensor) -> str:
    return "x".join(str(side) for side in samples.shape[:-3:-1])


def _smaller(samples: torch.Tensor, scale: float) -> torch.Tensor:
    """A latent (B, C, ..., h, w) with smaller sides, even as the model's patches want them."""
    sides = [max(LEAST_LATENT_SIDE, 2 * int(side * scale / 2)) for side in samples.shape[-2:]]
    height, width = (min(new, old) for new, old in zip(sides, samples.shape[-2:], strict=True))
    return comfy.utils.common_upscale(samples, width, height, "area", "disabled")


def _fitting(entry: list[Any], scale: float, old: torch.Size, new: torch.Size) -> list[Any]:
    """One conditioning with smaller references, and its area where it was in the picture.

    ComfyUI itself resizes masks and the hints of ControlNets.
    """
    values: dict[str, Any] = {}
    if latents := entry[1].get("reference_latents"):
        values["reference_latents"] = [_smaller(latent, scale) for latent in latents]
    area = entry[1].get("area")
    if area is not None and area[0] != "percentage":  # which is of the sides anyway
        values["area"] = _area(area, old, new)
    return node_helpers.conditioning_set_values([entry], values)[0]


def _area(area: tuple[int, ...], old: torch.Size, new: torch.Size) -> tuple[int, ...]:
    """An area (..., height, width, ..., y, x), in latent pixels, in a picture of other sides."""
    half = len(area) // 2
    lengths, starts = list(area[:half]), list(area[half:])
    for axis in (-2, -1):
        scale = new[axis] / old[axis]
        start, end = starts[axis], starts[axis] + lengths[axis]
        starts[axis] = min(round(start * scale), max(0, new[axis] - 1))
        lengths[axis] = max(1, round(end * scale) - starts[axis])
    return (*lengths, *starts)
