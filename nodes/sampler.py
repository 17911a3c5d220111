"""Sampling that does not run out of memory: a KSampler, and the same for any other sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.samplers
import nodes as comfy_nodes
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..core import fallback_settings
from ..core.budget import POLICIES
from ..core.fallback_settings import Row
from .changed_settings import Conditioning, Request
from .fitting import Fitting, Told
from .outcome import Metadata, Record, running_node
from .passes import DoesNotFit
from .status import shown
from .vram_limit import GB, RANGE

SMALLER = 0.75  # of the sides, where a size that should have fitted did not
TIMES_SMALLER = 4
RAN_AGAIN = "as asked it did not fit: the whole run was done again"
WAITS = "fits itself to the memory when a sampler runs with it"


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
                "A KSampler that goes on when memory runs out: it repeats the forward pass "
                "in a way that needs less. Where nothing is short it does exactly what a KSampler "
                "does."
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
                    "picture by more than the rounding of its last digits. allow approximations: "
                    "then also smaller references and tiles. allow changed settings: then also a "
                    "smaller picture and the settings below."
                ),
            ),
            io.Float.Input(
                "vram_limit",
                default=0.0,
                **RANGE,
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
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
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
        record.note(metadata.write(running_node(), facts))
        return shown(latent, record.line(), text=record.line(), **facts)


def _sample(
    fitting: Fitting,
    model: ModelPatcher,
    request: Request,
    rows: Sequence[Row],
    more: dict[str, Any],
) -> tuple[dict[str, Any], Request]:
    """The latent, and what it was made with. Raises DoesNotFit."""
    scale, used = 1.0, request
    before: list[Record] = []
    for _ in range(TIMES_SMALLER + 1):
        latent, failure = _try(model, used, more)
        if latent is not None:
            fitting.record.before = before
            return latent, used
        before.append(fitting.record)
        scale *= min(SMALLER, failure.scale)
        if not rows or scale == 0:
            break
        changed = request.changed(fallback_settings.row_for(rows, failure.free), scale)
        if changed.sizes() == used.sizes():
            break
        used = changed
    try:
        raise failure
    finally:
        del failure  # whose traceback holds this frame, and that the model


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
                        "the picture by more than the rounding of its last digits. allow "
                        "approximations: then also smaller references and tiles."
                    ),
                ),
                io.Float.Input(
                    "vram_limit",
                    default=0.0,
                    **RANGE,
                    tooltip="GB of VRAM that a run may use, with the weights. 0: all there is.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, policy: str, vram_limit: float) -> io.NodeOutput:
        """Patch a clone."""
        told = Told(running_node(), Metadata.of(cls.hidden.extra_pnginfo))
        fitting = Fitting(policy, round(vram_limit * GB), told)
        return shown(fitting.patch(model), text=fitting.not_sliced or WAITS)


NODES = [Sampler, Fit]
