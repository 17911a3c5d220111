"""Masked edits: what lies outside the sampler's mask keeps the keys and values that it had.

ComfyUI's samplers put the original back wherever the mask of a latent is 0, before and after each
call of the model (comfy.samplers.KSamplerX0Inpaint). What the model predicts there is thrown away:
to the rest of the picture these tokens matter by their keys and values alone, and those change
little once the sampling is under way (RegionE, arXiv 2510.25590; SpotEdit, arXiv 2512.22323).
"""

from __future__ import annotations

from typing import Any

from comfy.samplers import KSAMPLER
from torch import Tensor

from ..core.reference_store import KVStore
from ..core.region import PATCH, active_tokens
from .token_reuse import Group

NAME = "outside"
LATENT = 8  # pixels of the picture along one latent pixel of Qwen-Image
MASK_FUNCTION = "denoise_mask_function"  # ComfyUI's key in the options of a model
NO_MASK = "region: the latent has no mask, so nothing lies outside of it"
ALL_INSIDE = "region: the mask and its margin cover the whole picture"
ALL_OUTSIDE = "region: the mask is empty"
CHANGING_MASK = (
    "region: a patch (Differential Diffusion) changes the mask from step to step, so everything is "
    "computed"
)
OTHER_SAMPLER = (
    "region: whether this sampler ({}) keeps what lies outside the mask is not known, so "
    "everything is computed"
)
PARTS = "region: parts of the picture (tiles, areas) are computed whole: the mask is for all of it"
FRAMES = "region: only single pictures have a region, not {} frames"
NOT_SETTLED = "region: never settled below region_threshold ({:g})"


class Region:
    """The mask of one run of a sampler, and which tokens it leaves alone.

    `margin` in latent pixels; `threshold`: outside counts as settled below this relative change of
    its keys and values per step. `notes`: sentences for the user.
    """

    def __init__(self, mask: Tensor, margin: int, threshold: float) -> None:
        self.mask, self.margin, self.threshold = mask, margin, threshold
        self.notes: dict[str, None] = {}  # in order
        sides = tuple(mask.shape[-2:])
        self._tokens = (~active_tokens(mask, *sides, margin)).nonzero()[:, 0].cpu()
        self.total = -(-sides[0] // PATCH) * -(-sides[1] // PATCH)
        self.count = len(self._tokens)
        if self.count == 0:
            self.notes[ALL_INSIDE] = None
        elif self.count == self.total:
            self.notes[ALL_OUTSIDE] = None

    def outside(self, x: Tensor) -> Tensor | None:
        """The places of what lies outside among the tokens of `x`, (batch, channels, frames,
        height, width); None where nothing or everything does, or `x` is not the whole picture."""
        if not 0 < self.count < self.total:
            return None
        if x.shape[-2:] != self.mask.shape[-2:]:
            self.notes[PARTS] = None
            return None
        if x.ndim == 5 and x.shape[2] > 1:
            self.notes[FRAMES.format(x.shape[2])] = None
            return None
        return self._tokens


def region_of(
    mask: Tensor | None,
    sampler: Any,
    model_options: dict[str, Any],
    margin: int,
    threshold: float,
) -> tuple[Region | None, str]:
    """The region of a run, or None and why there is none.

    `mask`, `sampler`: as an OUTER_SAMPLE wrapper gets them: the mask in the latent's shape.
    `margin`: pixels of the picture.
    """
    if mask is None:
        return None, NO_MASK
    if MASK_FUNCTION in model_options:
        return None, CHANGING_MASK
    if not isinstance(sampler, KSAMPLER):
        return None, OTHER_SAMPLER.format(type(sampler).__name__)
    return Region(mask, -(-margin // LATENT), threshold), ""


class Outside:
    """What one slot keeps of the tokens outside: their group, and how fast they still change.

    `tokens`: from `Region.outside`. Passes are numbered by `step`.
    """

    def __init__(self, tokens: Tensor, store: KVStore, threshold: float) -> None:
        self.group = Group(NAME, tokens, store, reuse=False)
        self.threshold = threshold
        self.change: float | None = None  # of keys and values per step, when last measured
        self.reused = 0  # steps
        self._recorded: int | None = None  # step

    @property
    def settled(self) -> bool:
        """Whether the last measurement was below the threshold. NaN never is."""
        return self.change is not None and self.change < self.threshold

    def plan(self, full: bool, alone: bool) -> Group:
        """The group for the next pass. `full`: the policy wants a step in full. `alone`: no
        reference picture is computed in this pass, which the model could not tell apart."""
        self.group.reuse = not full and alone and self.group.known and self.settled
        return self.group

    def commit(self, step: int) -> None:
        """That pass has succeeded."""
        group = self.group
        if group.reuse:
            self.reused += 1
            return
        if self._recorded is not None and step > self._recorded and group.drift is not None:
            self.change = float(group.drift) / (step - self._recorded)
        self._recorded, group.known = step, True

    def forget(self) -> None:
        """Of a store that was released, or a pass that failed halfway."""
        self.change, self._recorded = None, None
        self.group.known, self.group.last = False, None
