"""Early exit: a model patch by which any sampler stops when its picture no longer changes."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..core.early_exit import Criterion, Curve, stops_at
from . import outcome
from .early_exit_record import NO_LAST_STEP, NOT_SEEN, Record
from .outcome import CANCELLED, FAILED, Metadata
from .status import shown

KEY = "qwen_vram.early_exit"
WAITS = "watches the prediction when a sampler runs with it"
NO_THRESHOLD = "threshold is {}: give a number from 0 up. With 0 it never stops."
CALLS = 8  # of the model in one step of a sampler that are told apart; the latest
log = logging.getLogger("qwen_vram")
Callback = Callable[[int, Tensor, Tensor, int], Any]


class Settings(NamedTuple):
    """What the node asks for."""

    criterion: Criterion
    keep_last_step: bool


class _Call(NamedTuple):
    """What a sampler gave to the model, and got."""

    x: Tensor
    sigma: Tensor  # 0-dimensional
    x0: Tensor


class _Left(NamedTuple):
    """How a sampler stood when it was left: what it gave to the model and predicted from it, its
    own state, and how many steps it told of."""

    sigma: Tensor
    given: Tensor
    x0: Tensor
    x: Tensor
    total: int


class _Stop(BaseException):
    """Leaves a sampler, which nothing else can do. What samplers and other nodes put in between
    for errors must not take it for one, so it is no Exception; `_sample` always catches it."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run


class _Run:
    """One run of a sampler: watches each step, and ends it by an exception."""

    def __init__(
        self, settings: Settings, sigmas: Tensor, mask: Tensor | None, callback: Callback | None
    ) -> None:
        self.settings, self.callback = settings, callback
        self.sigmas = sigmas.clone()  # uni_pc changes the last one
        self.mask = mask
        self.curve = Curve(mask)
        self.record = Record(settings.criterion, settings.keep_last_step, self.sigmas.tolist())
        self.active = True
        self.left: _Left | None = None
        self._calls: deque[_Call] = deque(maxlen=CALLS)

    def sample(self, sample: Callable[[], Tensor]) -> Tensor | None:
        """Let the sampler run; None if it was left. What it held goes with the exception."""
        try:
            return sample()
        except _Stop as stop:
            if stop.run is not self:
                raise
            return None

    def saw(self, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
        """The model was called."""
        self._calls.append(_Call(x, sigma.flatten()[0], x0))

    def after_step(self, step: int, x0: Tensor, x: Tensor, total: int) -> None:
        """What a sampler calls after each step, with its prediction of the clean image."""
        if self.callback is not None:
            self.callback(step, x0, x, total)
        if not self.active:  # a sampler that was left, and still goes on
            return
        call = self._call_of(x0)
        if call is None:
            self.record.note(NOT_SEEN)
            return
        self.curve.add(float(call.sigma), x0)
        self.record.points, self.record.problems = self.curve.points, self.curve.problems
        steps = len(self.curve.points)
        met = stops_at(self.curve.points, self.settings.criterion) is not None
        if met and self.record.stop(steps):
            self.active = False
            self.left = _Left(call.sigma, call.x, x0, x, total)
            raise _Stop(self)

    def _call_of(self, x0: Tensor) -> _Call | None:
        """The call that this prediction came from: samplers may make several in a step, and call
        back after the first or the last. A mask has been laid over x0 since."""
        calls = list(self._calls)
        self._calls.clear()
        if len(calls) < 2:
            return calls[0] if calls else None
        inside = 1.0 if self.mask is None else self.mask > 0
        return min(calls, key=lambda call: float(((call.x0 - x0) * inside).norm()))


class EarlyExit:
    """The wrappers of one node, and the `record` of its model's last run.

    They never refer to the clone that they patch: that would keep a freed model alive.
    """

    def __init__(
        self, settings: Settings, node_id: str | None = None, metadata: Metadata | None = None
    ) -> None:
        self.settings, self.node_id = settings, node_id
        self.metadata = metadata or Metadata(None)
        self.record: Record | None = None
        self._run: _Run | None = None

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model that stops early; an earlier patch of this kind is replaced."""
        clone = model.clone()
        wrappers = {
            WrappersMP.SAMPLER_SAMPLE: self._sample,
            WrappersMP.PREDICT_NOISE: self._predict,
        }
        for kind, wrapper in wrappers.items():
            clone.remove_wrappers_with_key(kind, KEY)
            # First of its kind, around those of others: LazyCache does not call what is in it.
            clone.wrappers[kind] = {KEY: [wrapper], **clone.wrappers.get(kind, {})}
        return clone

    # ------------------------------------------------------------------------ ComfyUI's wrappers
    def _sample(
        self,
        executor: WrapperExecutor,
        guider: Any,
        sigmas: Tensor,
        extra: dict[str, Any],
        callback: Callback | None,
        noise: Tensor,
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """SAMPLER_SAMPLE: the steps of one run of a sampler."""
        if len(sigmas) < 2:
            return executor(guider, sigmas, extra, callback, noise, latent, mask, *rest, **more)
        before = self._run  # of a run that this one is nested in
        self._run = run = _Run(self.settings, sigmas, mask, callback)
        arguments = (guider, sigmas, extra, run.after_step, noise, latent, mask, *rest)
        try:
            output = run.sample(lambda: executor(*arguments, **more))
            if run.left is not None:
                output = _finish(run, run.left, executor.class_obj, guider, extra, latent)
        except comfy.model_management.InterruptProcessingException:
            self._tell_end(run.record, CANCELLED)
            raise
        except Exception:
            self._tell_end(run.record, FAILED)
            raise
        finally:
            run.active = False
            self._run = before
        self._tell(run.record)
        return output

    def _predict(
        self, executor: WrapperExecutor, x: Tensor, sigma: Tensor, *rest: Any, **more: Any
    ) -> Tensor:
        """PREDICT_NOISE: one call of the model by a sampler."""
        run = self._run
        if run is None:
            return executor(x, sigma, *rest, **more)
        x0 = executor(x, sigma, *rest, **more)
        run.saw(x, sigma, x0)
        return x0

    def _tell(self, record: Record) -> None:
        """On the node, and in the picture's metadata."""
        self.record = record
        if self.node_id is not None:
            record.note(self.metadata.write(self.node_id, record.facts()))
        if record.stopped is not None:  # what the sampler's bar in the console does not tell
            log.info("Early Exit: %s", record.line())
        record.note(outcome.tell_picture(record.picture, record.line(), self.node_id))
        outcome.tell(record.line(), self.node_id)

    def _tell_end(self, record: Record, how: str) -> None:
        """Of a run without a picture, in the place of what the node said of an earlier one."""
        self.record, record.ended = record, how
        outcome.tell(record.line(), self.node_id)


def _finish(
    run: _Run, left: _Left, sampler: Any, guider: Any, extra: dict[str, Any], latent: Tensor | None
) -> Tensor:
    """What the sampler would have put out had its last step been this one."""
    sampling, x, x0 = guider.inner_model.model_sampling, left.x, left.x0
    usual = isinstance(sampler, comfy.samplers.KSAMPLER)
    if run.settings.keep_last_step:
        noise = _implied_noise(sampling, left) if usual else None
        if noise is None:
            run.record.note(NO_LAST_STEP)
        else:
            x, x0 = _last_step(run, guider, extra, latent, noise, x0)
            run.record.last_step = True
    if run.callback is not None:  # the progress is then complete, and the preview the final one
        run.callback(left.total - 1, x0, x, left.total)
    return sampling.inverse_noise_scaling(run.sigmas[-1], x0) if usual else x0


def _implied_noise(sampling: Any, left: _Left) -> Tensor | None:
    """The noise that, scaled by the model's own rule, makes x0 the state that the model was given;
    None where the state holds no noise. The rule is affine in the noise."""
    zeros = torch.zeros_like(left.x0)
    clean = sampling.noise_scaling(left.sigma, zeros.clone(), left.x0)
    scale = sampling.noise_scaling(left.sigma, torch.ones_like(zeros), zeros)
    return (left.given - clean) / scale if bool((scale > 0).all()) else None


def _last_step(
    run: _Run, guider: Any, extra: dict[str, Any], latent: Tensor | None, noise: Tensor, x0: Tensor
) -> tuple[Tensor, Tensor]:
    """The state at the last sigma above 0 and the model's prediction there, in a mask as ever."""
    sigma = run.sigmas[run.sigmas > 0][-1]
    model = comfy.samplers.KSamplerX0Inpaint(guider, run.sigmas)
    model.latent_image, model.noise = latent, noise
    x = guider.inner_model.model_sampling.noise_scaling(sigma, noise, x0)
    arguments = {"model_options": extra.get("model_options", {}), "seed": extra.get("seed")}
    return x, model(x, sigma * x.new_ones([x.shape[0]]), run.mask, **arguments)


# ---------------------------------------------------------------------------------- the node
class EarlyExitNode(io.ComfyNode):
    """Any sampler, as many steps as the picture needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMEarlyExit.md."""
        return io.Schema(
            node_id="QwenVRAMEarlyExit",
            display_name="Early Exit (Qwen VRAM)",
            category="Qwen VRAM/speed",
            description=(
                "Stops any sampler when its prediction of the finished picture no longer changes. "
                "The picture is then not quite the one of all steps. Shows how it converged."
            ),
            search_aliases=["early stopping", "convergence", "fewer steps", "speed", "skip steps"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. It is not changed itself."),
                *cls.inputs_of_the_criterion(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def inputs_of_the_criterion(cls) -> list[io.Input]:
        """When it stops, and how."""
        return [
            io.Float.Input(
                "threshold",
                default=1e-4,
                min=0.0,
                max=100.0,
                step=1e-5,
                round=False,
                tooltip=(
                    "Stop when the predicted picture changes by less than this, relative to "
                    "itself and per unit of sigma. 0: never stop, only show the curve. The "
                    "node shows what other thresholds would have saved."
                ),
            ),
            io.Int.Input(
                "patience",
                default=3,
                min=1,
                max=100,
                tooltip="For how many steps in a row the change has to be that small.",
            ),
            io.Int.Input(
                "min_steps",
                default=4,
                min=1,
                max=10000,
                tooltip="Never stop before so many steps are done.",
            ),
            io.Boolean.Input(
                "keep_last_step",
                default=True,
                tooltip=(
                    "Run the last step of the schedule all the same. It adds fine texture, "
                    "and takes the time of one step."
                ),
            ),
        ]

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        threshold: float,
        patience: int,
        min_steps: int,
        keep_last_step: bool,
    ) -> io.NodeOutput:
        """Patch a clone."""
        if not 0 <= threshold < math.inf:  # ComfyUI lets NaN pass, and whatever a link brings
            raise ValueError(NO_THRESHOLD.format(threshold))
        settings = Settings(Criterion(threshold, patience, min_steps), keep_last_step)
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
        leaving = EarlyExit(settings, outcome.running_node(), metadata)
        return shown(leaving.patch(model), text=WAITS)


NODES = [EarlyExitNode]
