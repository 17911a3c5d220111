"""A model that finishes within the memory there is: a clone whose forward passes are repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sampler_helpers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from . import foreign, outcome, recovery, slicing
from .outcome import CANCELLED, FAILED, Metadata, Record
from .passes import Passes
from .vram_limit import LIMIT, VRAMLimit

KEY = "qwen_vram.fit"
RESTARTS = 2  # of a run that ran out of memory between two forward passes
CALLS = 4  # of a calculation that ran out of memory beside the model itself
RESTARTING = "out of memory: starting again from the first step"
CALCULATING = "out of memory beside the model: repeating this step's calculation"
Callback = Callable[[int, Any, Any, int], Any]


class Told(NamedTuple):
    """Where a model patch, which does not run itself when its model samples, tells of a run."""

    node_id: str | None
    metadata: Metadata

    def tell(self, record: Record, nodes: tuple[str | None, ...]) -> None:
        """In the metadata of the sampler's pictures, if there are any, on its node and on the
        patch."""
        if not record.ended:
            record.note(self.metadata.write(nodes[0] or self.node_id, record.facts()))
        outcome.tell(record.line(), *nodes)


class Fitting:
    """Policy and limit (bytes, 0 without) of one node, and the `record` of its model's last run.

    It never refers to the clone that it patches: that would keep a freed model alive.
    """

    def __init__(self, policy: str, limit: int = 0, told: Told | None = None) -> None:
        self.policy, self.limit, self.told = policy, limit, told
        self.plans = slicing.Plans()
        self.not_sliced = ""  # or why
        self.record = Record(policy, limit)
        self._passes: Passes | None = None

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model that fits itself to the memory; an earlier fitting is replaced."""
        clone = model.clone()
        clone.model_options["transformer_options"][LIMIT] = self.limit
        self.not_sliced = slicing.install(clone, self.plans)
        wrappers = {
            WrappersMP.OUTER_SAMPLE: self._sample,
            WrappersMP.PREPARE_SAMPLING: self._prepare,
            WrappersMP.CALC_COND_BATCH: self._calculate,
            WrappersMP.APPLY_MODEL: self._apply_model,
        }
        for kind, wrapper in wrappers.items():
            clone.remove_wrappers_with_key(kind, KEY)
            # First of its kind, around those of others: what is repeated includes them.
            clone.wrappers[kind] = {KEY: [wrapper], **clone.wrappers.get(kind, {})}
        return clone

    # ------------------------------------------------------------------------ ComfyUI's wrappers
    def _sample(
        self,
        executor: WrapperExecutor,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: Callback | None = None,
        *rest: Any,
        **more: Any,
    ) -> torch.Tensor:
        """OUTER_SAMPLE: one run of a sampler, from the loading of the model to its last step."""
        guider = executor.class_obj
        _put_first(guider.model_options["transformer_options"]["wrappers"])
        record = self.record = Record(self.policy, self.limit, steps=len(sigmas) - 1)
        whole = self.not_sliced
        if not whole and slicing.compiled(guider.model_options["transformer_options"]):
            whole = slicing.COMPILED
        record.note(whole)
        limit = VRAMLimit(guider.model_patcher.load_device, self.limit)
        record.note(limit.note)
        before = self._passes  # of a run that this one is nested in
        nodes = (outcome.running_node(), self.told and self.told.node_id)
        passes = Passes(self.policy, self.plans, not whole, record, limit, nodes)
        self._passes = passes
        safe = _callback(callback, record)
        try:
            with limit:
                arguments = (noise, latent_image, sampler, sigmas, denoise_mask, safe, *rest)
                output = _finish(executor, passes, arguments, more)
            passes.learn()
            return output
        except comfy.model_management.InterruptProcessingException:
            record.ended = CANCELLED
            raise
        except Exception:
            record.ended = FAILED
            raise
        finally:
            self._passes = before
            passes.end()
            if self.told is not None:
                self.told.tell(record, nodes)

    def _prepare(
        self,
        executor: WrapperExecutor,
        model: ModelPatcher,
        shape: Sequence[int],
        conds: dict[str, list[dict[str, Any]]],
        *rest: Any,
        **more: Any,
    ) -> Any:
        """PREPARE_SAMPLING: the model is loaded, within the limit."""
        passes = self._passes
        if passes is None:
            return executor(model, shape, conds, *rest, **more)
        need = passes.expect(model, shape, conds)
        planned = passes.limit.load_shape(model, list(shape), need)
        loaded = executor(model, planned, conds, *rest, **more)
        if model.is_dynamic():
            recovery.unpin(model)  # what a run of another node that failed may have left
        passes.used = [model, *loaded[2]]
        passes.limit.fit_weights(model, need, passes.used)
        return loaded

    def _calculate(self, executor: WrapperExecutor, *arguments: Any) -> list[torch.Tensor]:
        """CALC_COND_BATCH: repeated as a whole for what fails beside the model, as a ControlNet.

        Not with several GPUs: ComfyUI leaves the results of the other threads in their queues.
        """
        passes, options = self._passes, arguments[-1]
        if passes is None:
            return executor(*arguments)
        transformer_options = options["transformer_options"]
        for _ in range(0 if "multigpu_clones" in options else CALLS - 1):
            passes.hold()
            restore = foreign.kept(transformer_options)
            output = recovery.attempt(lambda: executor(*arguments))
            if output is not None:
                passes.commit()
                return output
            restore()
            passes.suspect(transformer_options, foreign.AROUND_A_CALCULATION, options)
            passes.record.calculated_again += 1
            passes.make_room()
            passes.say(CALCULATING)
        passes.hold()
        output = executor(*arguments)
        passes.commit()
        return output

    def _apply_model(self, executor: WrapperExecutor, *arguments: Any, **more: Any) -> torch.Tensor:
        """APPLY_MODEL: one forward pass, with a smaller plan if need be."""
        if self._passes is None:
            return executor(*arguments, **more)
        return self._passes.forward(executor, *arguments, **more)


def _finish(
    executor: WrapperExecutor, passes: Passes, arguments: tuple[Any, ...], more: dict[str, Any]
) -> torch.Tensor:
    """Sample; where memory ran out between two forward passes, again from the first step.

    Noise and random numbers are the same again, and so is the picture. Raises DoesNotFit.
    """
    guider = executor.class_obj
    conds = _copied(guider.conds)
    random = _RandomState(guider.model_patcher.load_device)
    for restarts in range(RESTARTS + 1):
        passes.record.restarts, passes.record.step = restarts, 0
        output = recovery.attempt(lambda: executor(*arguments, **more))
        if output is not None:
            return output
        if restarts == RESTARTS:
            break
        _clean_up(guider)
        options = guider.model_options
        passes.suspect(options["transformer_options"], foreign.AROUND_A_STEP, options)
        passes.make_room()
        guider.conds = _copied(conds)
        random.restore()
        passes.say(RESTARTING)
    raise passes.failure_beside(runs=RESTARTS + 1)


def _put_first(wrappers: dict[str, dict[str, list[Any]]]) -> None:
    """Our wrappers around those that other nodes put beside the model, in this run's options."""
    for kind, keyed in wrappers.items():
        if KEY in keyed:
            wrappers[kind] = {KEY: keyed[KEY], **keyed}


def _copied(conds: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Conditionings as ComfyUI copies them for each run."""
    return {name: [cond.copy() for cond in every] for name, every in conds.items()}


def _clean_up(guider: Any) -> None:
    """What ComfyUI does only after a run that succeeded: ControlNets let go of their state."""
    models = getattr(guider, "loaded_models", None)
    if models is not None:
        comfy.sampler_helpers.cleanup_models(guider.conds, models)


class _RandomState:
    """The state of torch's global random numbers, on the CPU and on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type in ("cuda", "xpu") else None
        self._cpu = torch.get_rng_state()
        if self._device is not None:
            self._own = getattr(torch, device.type).get_rng_state(device)

    def restore(self) -> None:
        """As it was."""
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            getattr(torch, self._device.type).set_rng_state(self._own, self._device)


def _callback(callback: Callback | None, record: Record) -> Callback:
    """Counts the steps, and calls a sampler's callback; where memory runs out in that, this
    preview alone is skipped."""

    def call(step: int, x0: Any, x: Any, total: int) -> Any:
        """What ComfyUI calls after each step."""
        record.step = step + 1
        if callback is None:
            return None
        result = recovery.attempt(lambda: (callback(step, x0, x, total),))
        if result is not None:
            return result[0]
        record.previews_skipped += 1
        comfy.utils.ProgressBar(total).update_absolute(step + 1, total)
        return None

    return call
