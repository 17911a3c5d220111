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
from ..core.refresh_policy import Pass, Policy
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
NOT_SETTLED = (
    "region: the outside never settled: it changed by {:.3f} per step at least, and "
    "region_threshold is {:g}"
)
NO_ROOM = "region: everything is computed, since there is {}"
LEFT_OUT = "outside the mask: {} of {} tokens left out in {} of {} steps"


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
        self.count = len(self._tokens)  # tokens to leave out
        self.least: float | None = None  # of the changes per step that were measured
        self.reused: set[int] = set()  # steps in which they were
        if self.count == 0:
            self.notes[ALL_INSIDE] = None
        elif self.count == self.total:
            self.notes[ALL_OUTSIDE] = None
            self.count = 0

    def outside(self, x: Tensor) -> Tensor | None:
        """The places of what lies outside among the tokens of `x`, (batch, channels, frames,
        height, width); None where nothing or everything does, or `x` is not the whole picture."""
        if not self.count:
            return None
        if x.shape[-2:] != self.mask.shape[-2:]:
            self.notes[PARTS] = None
            return None
        if x.ndim == 5 and x.shape[2] > 1:
            self.notes[FRAMES.format(x.shape[2])] = None
            return None
        return self._tokens

    def told(self, steps: int) -> list[str]:
        """For the node, after a run of so many steps."""
        notes = list(self.notes)
        if self.reused:
            notes.append(LEFT_OUT.format(self.count, self.total, len(self.reused), steps))
        elif self.least is not None:
            notes.append(NOT_SETTLED.format(self.least, self.threshold))
        return notes


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

    `tokens`: from `Region.outside`.
    """

    def __init__(self, tokens: Tensor, store: KVStore, region: Region) -> None:
        self.group = Group(NAME, tokens, store)
        self.region = region
        self.change: float | None = None  # of keys and values per step, when last measured
        self._recorded: int | None = None  # the last step that computed them

    @property
    def settled(self) -> bool:
        """Whether the last measurement was below the threshold. NaN never is."""
        return self.change is not None and self.change < self.region.threshold

    def plan(self, policy: Policy, step: int, alone: bool) -> Group:
        """The group for the next pass. `alone`: no reference picture is computed in it, which the
        model could not tell apart any more."""
        group, decision = self.group, policy.decide(step, self._recorded)
        reuse = decision is not Pass.FULL and alone and self.settled
        group.reuse = reuse and group.known
        group.threshold = policy.threshold if decision is Pass.PROBE and group.reuse else None
        return group

    def commit(self, step: int) -> None:
        """That pass has succeeded."""
        group = self.group
        if group.reuse:
            self.region.reused.add(step)
            return
        if self._recorded is not None and step > self._recorded and group.drift is not None:
            self.change = float(group.drift) / (step - self._recorded)
            least = self.region.least
            self.region.least = self.change if least is None else min(least, self.change)
        self._recorded = step

    def forget(self) -> None:
        """What the store holds is of no use any more."""
        self._recorded, self.change = None, None
