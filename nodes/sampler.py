"""Sampling that does not run out of memory: a KSampler, and the same for any other sampler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import comfy.utils
import node_helpers
import nodes as comfy_nodes
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..core import fallback_settings
from ..core.budget import POLICIES, TOKEN_SIDE
from ..core.fallback_settings import Row
from .fitting import Fitting, Told
from .outcome import Metadata
from .passes import DoesNotFit
from .status import shown
from .vram_limit import GB

SMALLER = 0.75  # of the sides, where a size that should have fitted did not
TIMES_SMALLER = 4
LEAST_LATENT_SIDE = 8  # 64 px
RAN_AGAIN = "as asked it did not fit: the whole run was done again"
WAITS = "fits itself to the memory when a sampler runs with it"
Conditioning = list[list[Any]]


class Sampler(io.ComfyNode):
    """A KSampler that finishes within the memory there is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMSampler.md."""
        return io.Schema(
            node_id="QwenVRAMSampler",
            display_name="Sampler within VRAM (Qwen VRAM)",
            category="Qwen VRAM/sampling",
            description=(
                "A KSampler that does not fail when memory runs out: it repeats the forward pass "
                "in a way that needs less, and goes on. Where nothing is short it does exactly "
                "what a KSampler does."
            ),
            search_aliases=["ksampler", "low vram", "out of memory", "oom", "fallback"],
            inputs=[
                *cls.inputs_of_a_ksampler(),
                *cls.conditions_of_a_ksampler(),
                *cls.inputs_for_memory(),
            ],
            outputs=[io.Latent.Output(), io.String.Output(display_name="report")],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def inputs_of_a_ksampler(cls) -> list[io.Input]:
        """The first inputs of ComfyUI's KSampler, in its order."""
        return [
            io.Model.Input("model", tooltip="The model that removes the noise."),
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=0xFFFFFFFFFFFFFFFF,
                control_after_generate=True,
                tooltip="The random seed of the noise.",
            ),
            io.Int.Input(
                "steps", default=20, min=1, max=10000, tooltip="How many steps remove the noise."
            ),
            io.Float.Input(
                "cfg",
                default=4.0,
                min=0.0,
                max=100.0,
                step=0.1,
                round=0.01,
                tooltip="How closely the picture follows the prompt. 1 needs half the time.",
            ),
            io.Combo.Input(
                "sampler_name",
                options=comfy.samplers.KSampler.SAMPLERS,
                tooltip="The algorithm that samples.",
            ),
            io.Combo.Input(
                "scheduler",
                options=comfy.samplers.KSampler.SCHEDULERS,
                tooltip="How the noise is spread over the steps.",
            ),
        ]

    @classmethod
    def conditions_of_a_ksampler(cls) -> list[io.Input]:
        """Its other inputs."""
        return [
            io.Conditioning.Input("positive", tooltip="What the picture should show."),
            io.Conditioning.Input("negative", tooltip="What it should not show."),
            io.Latent.Input("latent_image", tooltip="The latent to take the noise from."),
            io.Float.Input(
                "denoise",
                default=1.0,
                min=0.0,
                max=1.0,
                step=0.01,
                tooltip="How much noise is added and removed; less keeps more of the latent.",
            ),
        ]

    @classmethod
    def inputs_for_memory(cls) -> list[io.Input]:
        """What a KSampler has not."""
        return [
            io.Combo.Input(
                "policy",
                options=list(POLICIES),
                default=POLICIES[0],
                tooltip=(
                    "What may be done when memory is short. exact only: nothing that changes the "
                    "picture. allow approximations: then also smaller references and tiles. allow "
                    "changed settings: then also a smaller picture and the settings below."
                ),
            ),
            io.Float.Input(
                "vram_limit",
                default=0.0,
                min=0.0,
                max=1024.0,
                step=0.5,
                tooltip="GB of VRAM that this run may use, with the weights. 0: all there is.",
            ),
            io.String.Input(
                "settings",
                multiline=True,
                default=fallback_settings.DEFAULT,
                tooltip=(
                    "Only for allow changed settings, as the last resort. A line for each amount "
                    "of free VRAM in GB: steps, CFG, sampler. Never more steps or CFG than asked."
                ),
                advanced=True,
            ),
        ]

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: dict[str, Any],
        denoise: float,
        policy: str,
        vram_limit: float,
        settings: str,
    ) -> io.NodeOutput:
        """Sample, and say what was done."""
        rows = _rows(settings) if policy == POLICIES[2] else ()
        fitting = Fitting(policy, round(vram_limit * GB))
        request = Request(steps, cfg, sampler_name, positive, negative, latent_image)
        more = {"seed": seed, "scheduler": scheduler, "denoise": denoise}
        clone = fitting.patch(model)
        try:
            latent, used = _sample(fitting, clone, request, rows, more)
        finally:
            # Clones share the set of their model's weights in pinned RAM, and one that ends unpins
            # them all: without dynamic VRAM the next run would be half as fast, or pin them again.
            clone.pinned = set()
        record = fitting.record
        record.asked, record.used = request.settings(), used.settings()
        if used is not request:
            record.note(RAN_AGAIN)
        facts = record.facts()
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
        record.note(metadata.write(get_executing_context().node_id, facts))
        return shown(latent, record.line(), text=record.line(), **facts)


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
        """For the report; the size in latent pixels."""
        samples = self.latent["samples"]
        size = "x".join(map(str, samples.shape[:-3:-1])) if _is_picture(samples) else None
        named = {"steps": self.steps, "cfg": self.cfg, "sampler_name": self.sampler_name}
        return {**named, "latent_size": size}

    def changed(self, row: Row, scale: float) -> Request:
        """With a row of the table, never more than was asked, and sides made smaller."""
        return dataclasses.replace(
            self,
            steps=min(self.steps, row.steps),
            cfg=min(self.cfg, row.cfg),
            sampler_name=row.sampler,
            positive=_smaller_references(self.positive, scale),
            negative=_smaller_references(self.negative, scale),
            latent={**self.latent, "samples": _smaller(self.latent["samples"], scale)},
        )


def _sample(
    fitting: Fitting,
    model: ModelPatcher,
    request: Request,
    rows: Sequence[Row],
    more: dict[str, Any],
) -> tuple[dict[str, Any], Request]:
    """The latent, and what it was made with. Raises DoesNotFit."""
    scale, used = 1.0, request
    for _ in range(TIMES_SMALLER if rows else 0):
        latent, failure = _try(model, used, more)
        if latent is not None:
            return latent, used
        scale = _next_scale(failure, scale)
        if not _is_picture(request.latent["samples"]) or scale == 0.0:
            break
        row = fallback_settings.row_for(rows, failure.free)
        used = request.changed(row, scale)
        failure = None
    return _run(model, used, more), used


def _try(
    model: ModelPatcher, request: Request, more: dict[str, Any]
) -> tuple[dict[str, Any] | None, DoesNotFit | None]:
    """The latent, or the failure without what its stack holds."""
    try:
        return _run(model, request, more), None
    except DoesNotFit as error:
        return None, error.with_traceback(None)


def _run(model: ModelPatcher, request: Request, more: dict[str, Any]) -> dict[str, Any]:
    """As ComfyUI's KSampler does."""
    return comfy_nodes.common_ksampler(
        model,
        steps=request.steps,
        cfg=request.cfg,
        sampler_name=request.sampler_name,
        positive=request.positive,
        negative=request.negative,
        latent=request.latent,
        **more,
    )[0]


def _next_scale(failure: DoesNotFit, scale: float) -> float:
    """Of the sides that were asked: what should fit; at least a step smaller than before."""
    if not failure.tokens:
        return scale * SMALLER
    return scale * min(SMALLER, failure.largest / (math.sqrt(failure.tokens) * TOKEN_SIDE))


def _is_picture(samples: torch.Tensor) -> bool:
    """Or a video: a latent (B, C, ..., h, w). Sound has no sides, nested latents several."""
    return not samples.is_nested and samples.ndim >= 4


def _smaller(samples: torch.Tensor, scale: float) -> torch.Tensor:
    """A latent (B, C, ..., h, w) with smaller sides, even as the model's patches want them."""
    sides = [max(LEAST_LATENT_SIDE, 2 * int(side * scale / 2)) for side in samples.shape[-2:]]
    height, width = (min(new, old) for new, old in zip(sides, samples.shape[-2:], strict=True))
    return comfy.utils.common_upscale(samples, width, height, "area", "disabled")


def _smaller_references(conditioning: Conditioning, scale: float) -> Conditioning:
    made = []
    for entry in conditioning:
        latents = entry[1].get("reference_latents")
        values = {"reference_latents": [_smaller(x, scale) for x in latents]} if latents else {}
        made += node_helpers.conditioning_set_values([entry], values)
    return made


def _rows(settings: str) -> tuple[Row, ...]:
    """Raises ValueError with a sentence."""
    rows = fallback_settings.parse(settings)
    known = comfy.samplers.KSampler.SAMPLERS
    for row in rows:
        if row.sampler not in known:
            raise ValueError(
                f"settings: ComfyUI has no sampler {row.sampler!r}. Write one of those that "
                f"sampler_name offers, as {known[0]} or dpmpp_2m."
            )
    return rows


class Fit(io.ComfyNode):
    """The same as a model patch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMFit.md."""
        return io.Schema(
            node_id="QwenVRAMFit",
            display_name="Fit to VRAM (Qwen VRAM)",
            category="Qwen VRAM/sampling",
            description=(
                "Lets any sampler finish within the memory there is: a forward pass of this model "
                "that runs out of memory is repeated in a way that needs less."
            ),
            search_aliases=["low vram", "out of memory", "oom", "slicing", "model patch"],
            inputs=[
                io.Model.Input("model", tooltip="The model to fit. It is not changed itself."),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES[:2]),
                    default=POLICIES[0],
                    tooltip=(
                        "What may be done when memory is short. exact only: nothing that changes "
                        "the picture. allow approximations: then also smaller references and tiles."
                    ),
                ),
                io.Float.Input(
                    "vram_limit",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="GB of VRAM that a run may use, with the weights. 0: all there is.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, policy: str, vram_limit: float) -> io.NodeOutput:
        """Patch a clone."""
        node_id = get_executing_context().node_id
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
        fitting = Fitting(policy, round(vram_limit * GB), Told(node_id, metadata))
        return shown(fitting.patch(model), text=fitting.not_sliced or WAITS)


NODES = [Sampler, Fit]
