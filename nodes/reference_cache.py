"""Edits that compute their reference pictures in few steps: a model patch.

What a reference picture does to the picture that is sampled goes through its keys and values. They
change little from step to step (of models whose references are modulated by timestep zero even
less), so most steps can use those of an earlier one. Block by block, so that nothing of the model
is replaced: token_reuse.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..core.refresh_policy import Policy
from . import cache_obstacles, outcome, region_reuse
from . import reference_cache_inputs as inputs
from .cache_record import CacheRecord
from .outcome import CANCELLED, FAILED, Metadata
from .reference_cache_inputs import Settings as Settings
from .reference_memory import (
    activations_of,
    computed,
    expected_bytes,
    for_the_load,
    place_for,
)
from .reference_run import ZERO, Run
from .status import shown
from .transformer_options import HOLDINGS, PARTS

KEY = "qwen_vram.reference_cache"
WAITS = "reuses the reference pictures when a sampler runs with it"
Conds = dict[str, list[dict[str, Any]]]


def patch(model: ModelPatcher, settings: Settings) -> ModelPatcher:
    """A clone of the model that reuses its references; an earlier reference cache is replaced."""
    return ReferenceCache(settings).patch(model)


class ReferenceCache:
    """The wrappers of one node, and the `record` of its model's last run.

    `node_id`: the node that tells of each run. It never refers to the clone that it patches: that
    would keep a freed model alive.
    """

    def __init__(
        self, settings: Settings, node_id: str | None = None, metadata: Metadata | None = None
    ) -> None:
        self.settings, self.node_id = settings, node_id
        self.metadata = metadata or Metadata(None)
        self.record = CacheRecord()
        self._run: Run | None = None

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """See above."""
        clone = model.clone()
        wrappers = {
            WrappersMP.OUTER_SAMPLE: self._sample,
            WrappersMP.PREPARE_SAMPLING: self._prepare,
            WrappersMP.DIFFUSION_MODEL: self._forward,
        }
        for kind, wrapper in wrappers.items():
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    # ------------------------------------------------------------------------ ComfyUI's wrappers
    def _sample(
        self,
        executor: WrapperExecutor,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """OUTER_SAMPLE: one run of a sampler. What it keeps goes with it."""
        guider, before = executor.class_obj, self._run
        record = CacheRecord(len(sigmas) - 1, asdict(self.settings))
        self._run = run = self._begin(guider, record, noise, sampler, sigmas, denoise_mask)
        self.record = record
        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *rest, **more)
        except comfy.model_management.InterruptProcessingException:
            record.ended = CANCELLED
            raise
        except Exception:
            record.ended = FAILED
            raise
        finally:
            self._run = before
            run.end()
            self._tell(record, run)

    def _begin(
        self,
        guider: Any,
        record: CacheRecord,
        noise: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None,
    ) -> Run:
        """The state of one run, among what its options hold on the GPU."""
        settings, options, region = self.settings, guider.model_options, None
        if settings.region:
            wanted = settings.region_margin, settings.region_threshold
            region, why = region_reuse.region_of(denoise_mask, sampler, options, *wanted)
            record.note(why)
        off = cache_obstacles.of_run(
            guider.model_patcher, options, guider.conds, region is not None
        )
        if off:
            record.stand_aside(off)
        run = Run(
            self._policy(guider, sigmas),
            tuple(noise.shape),
            settings.store_format,
            settings.causal,
            record,
            guider,
            pictures=noise.shape[0],
            region=region,
            off=off,
        )
        inner = options["transformer_options"]
        inner[HOLDINGS] = [*inner.get(HOLDINGS, ()), run]
        return run

    def _policy(self, guider: Any, sigmas: Tensor) -> Policy:
        """By the settings, and by how this run's references are modulated."""
        settings = self.settings
        inner = getattr(guider.model_patcher.model, "diffusion_model", None)
        default = getattr(inner, "default_ref_method", "")
        methods = {
            cond.get("reference_latents_method", default)
            for side in guider.conds.values()
            for cond in side
            if cond.get("reference_latents")
        }
        return Policy(
            settings.refresh,
            settings.refresh_every,
            settings.drift_threshold,
            settings.full_last_steps,
            tuple(sigmas.tolist()),
            zero=methods == {ZERO},
        )

    def _tell(self, record: CacheRecord, run: Run) -> None:
        """On the node, and in the metadata of the pictures."""
        for note in run.region.told(record.steps) if run.region is not None else ():
            record.note(note)
        if not record.ended:
            record.note(self.metadata.write(self.node_id, record.facts()))
        outcome.tell(record.line(), self.node_id)

    def _prepare(
        self,
        executor: WrapperExecutor,
        model: ModelPatcher,
        shape: Sequence[int],
        conds: Conds,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """PREPARE_SAMPLING: room for the stores is made beside the weights."""
        run = self._run
        if run is not None and not run.off and not run.policy.always_full:
            shape = self._make_room(run, model, shape, conds, more.get("model_options") or {})
        return executor(model, shape, conds, *rest, **more)

    def _make_room(
        self,
        run: Run,
        model: ModelPatcher,
        shape: Sequence[float],
        conds: Conds,
        options: dict[str, Any],
    ) -> Sequence[float]:
        """Decide where the stores go; returns the shape of the noise to plan the load with."""
        own = computed(conds, run.guider, options)
        activations = activations_of(model, shape, own, run.pictures)
        wanted = self.settings.store_place
        parts = options.get("transformer_options", {}).get(PARTS, 1)

        def place() -> tuple[int, str, str]:
            """Bytes, where they go, and why."""
            outside = run.region.count if run.region is not None and parts == 1 else 0
            pictures = [run.pictures, *shape[1:]]
            need = expected_bytes(model, own, pictures, run.store_format, outside, parts)
            return need, *place_for(wanted, need, model.load_device, model, activations)

        need, run.place, why = place()
        if not run.place and run.region is not None:
            run.record.note(region_reuse.NO_ROOM.format(why))
            run.region = None
            need, run.place, why = place()
        if not run.place:
            run.full = why
            run.record.stand_aside(why)
            return shape
        run.record.note(why)
        run.record.bytes_expected = need
        return for_the_load(model, shape, need, run.place)

    def _forward(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **more: Any,
    ) -> Tensor:
        """DIFFUSION_MODEL: one forward pass."""
        run, options = self._run, transformer_options or {}
        arguments = (x, timestep, context, attention_mask, ref_latents, additional_t_cond)
        if torch.compiler.is_compiling() or run is None or "sigmas" not in options:
            return executor(*arguments, options, **more)
        return run.forward(executor, arguments, options, more)


# ---------------------------------------------------------------------------------- the node
class ReferenceCacheNode(io.ComfyNode):
    """Edits without computing the reference pictures in every step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMReferenceCache.md."""
        return io.Schema(
            node_id="QwenVRAMReferenceCache",
            display_name="Reference Cache (Qwen VRAM)",
            category="Qwen VRAM/speed",
            description=(
                "Makes edits faster: the reference pictures are computed in a few steps, and the "
                "other steps use what was kept of them. The picture changes, with 2509 and with "
                "several references more than with 2511 and one."
            ),
            search_aliases=["kv cache", "faster edit", "qwen image edit", "speed", "region"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. It is not changed itself."),
                *inputs.when_to_refresh(),
                *inputs.how_and_where_to_keep(),
                *inputs.for_masks_and_causal_models(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        refresh: str,
        refresh_every: int,
        drift_threshold: float,
        full_last_steps: int,
        store_format: str,
        store_place: str,
        causal: bool,
        region: bool,
        region_margin: int,
        region_threshold: float,
    ) -> io.NodeOutput:
        """Patch a clone."""
        settings = Settings(
            refresh,
            refresh_every,
            drift_threshold,
            full_last_steps,
            store_format,
            store_place,
            causal,
            region,
            region_margin,
            region_threshold,
        )
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
        cache = ReferenceCache(settings, outcome.running_node(), metadata)
        return shown(cache.patch(model), text=cache_obstacles.of_model(model) or WAITS)


NODES = [ReferenceCacheNode]
