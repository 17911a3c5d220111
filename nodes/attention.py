"""A model that computes attention by a backend of one's choice: QwenVRAMAttention.

The choice holds for this model alone. It is the innermost part of the chain of overrides
(attention_override.py): a reference cache, slices of queries and what other nodes put there come
before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..core.attention import NO_MASK, visible_keys
from . import attention_health as health
from . import attention_override, foreign, outcome, slicing
from .attention_backends import AS_COMFYUI, BACKENDS, OWN, SDPA, Backend, host_is_pytorch
from .attention_calls import (
    AUTO,
    AUTO_QUANTISED,
    INSTEAD,
    SOME_ONLY,
    Call,
    Run,
    call_of,
    candidates,
    trusted,
)
from .attention_health import Situation
from .attention_override import BACKEND
from .outcome import Metadata
from .status import shown
from .transformer_options import ON_SUCCESS, Options

KEY = "qwen_vram.attention"
WAITS = "{}: runs when a sampler runs with the model"
COMPILED = "the model runs under torch.compile: ComfyUI's own attention"
NOT_FINITE = "gave numbers that are not finite in a forward pass, which was repeated"
NOT_ITS_FAULT = "the model's output is not finite, with PyTorch SDPA neither: not because of {}"
REPLACED = "another node behind this one chooses attention: this one has no effect"
IGNORED = "another node before this one chooses attention by itself: this one has no effect"
NOT_ASKED = "this model computes attention in a way of its own: this node has no effect"
UNUSUAL = "some calls have shapes of their own: ComfyUI's own attention for these"
NO_SUCH = "Attention: there is no backend {}. Choose one of the list at backend."
MISSING = "Attention: {} cannot run here: {}. Or choose auto at backend."


class Attention:
    """The override and the wrappers of one node. It never refers to the clone that it patches:
    that would keep a freed model alive."""

    sliceable = True  # each slice of queries comes with all keys and values
    itemwise = True  # no picture of a batch sees another

    def __init__(
        self, wanted: str, node_id: str | None = None, metadata: Metadata | None = None
    ) -> None:
        if wanted not in (AUTO, AUTO_QUANTISED, *BACKENDS):
            raise ValueError(NO_SUCH.format(wanted))
        self.wanted, self.node_id = wanted, node_id
        self.metadata = metadata
        self.record = Run(wanted)  # of the last run
        self._run: Run | None = None

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        """A clone that computes attention so; an earlier choice of this pack is replaced."""
        clone = model.clone()
        attention_override.put(clone.model_options["transformer_options"], BACKEND, self)
        wrappers = {
            WrappersMP.OUTER_SAMPLE: self._sample,
            WrappersMP.APPLY_MODEL: self._apply_model,
        }
        for kind, wrapper in wrappers.items():
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    # ------------------------------------------------------------------------ the override
    def __call__(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **more: Any,
    ) -> Tensor:
        """As ComfyUI's attention functions, `function` being its own."""
        shape = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}

        def own() -> Tensor:
            return function(q, k, v, heads, mask, attn_precision=attn_precision, **shape, **more)

        if torch.compiler.is_compiling() or comfy.model_management.in_training:
            return own()  # told when the run begins
        if isinstance(function, partial) and isinstance(function.func, Attention):
            return own()  # a later node of this kind, beyond an override that holds on to this one
        run = self._run or self.record
        if self.wanted == OWN and host_is_pytorch():  # nothing to be tested
            run.own_call()
            return own()
        call = call_of(q, k, v, heads, mask, skip_reshape, more)
        if call is None:
            run.own_call()
            run.note(UNUSUAL)
            return own()
        if mask is not None and self.wanted != SDPA:  # for a look the device has to be awaited
            call = call._replace(visible=visible_keys(call.mask))
        backend = run.backend_for(call, own)
        if backend.name == OWN:
            return own()
        out = self._attend(run, backend, call)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def asked_first(self) -> None:
        """Another node's override, before this one in the chain, has answered a call."""
        (self._run or self.record).asked_first()

    @staticmethod
    def _attend(run: Run, backend: Backend, call: Call) -> Tensor:
        """By the backend; where it raises, this call by PyTorch SDPA."""
        try:
            return call.by(backend)
        except Exception as error:
            if health.passes(error) or backend.name == SDPA:
                raise
            run.raised(backend, call, error)
        return call.by(BACKENDS[SDPA])

    # ------------------------------------------------------------------------ ComfyUI's wrappers
    def _sample(self, executor: WrapperExecutor, *arguments: Any, **more: Any) -> Tensor:
        """OUTER_SAMPLE: one run of a sampler."""
        options = executor.class_obj.model_options["transformer_options"]
        before = self._run
        run = self._run = self.record = Run(self.wanted, self.node_id)
        if slicing.compiled(options):
            run.note(COMPILED)
        try:
            output = executor(*arguments, **more)
            if run.calls > 0 and run.asked > run.calls:
                run.note(SOME_ONLY.format(run.asked - run.calls, run.asked))
            if self.metadata is not None:
                run.note(self.metadata.write(self.node_id, run.facts()))
            return output
        except InterruptProcessingException:
            run.ended = outcome.CANCELLED
            raise
        except Exception:
            run.ended = outcome.FAILED
            raise
        finally:
            self._run = before
            if line := run.line():
                outcome.tell(line, self.node_id)

    def _apply_model(
        self, executor: WrapperExecutor, x: Tensor, *arguments: Any, **more: Any
    ) -> Tensor:
        """APPLY_MODEL: one forward pass."""
        run = self._run or self.record
        options = more.get("transformer_options", arguments[4] if len(arguments) > 4 else {})
        if self.wanted in AS_COMFYUI or run.stopped or not run.watched:
            output = executor(x, *arguments, **more)
        else:
            output = self._watched(run, executor, options, x, *arguments, **more)
        if not run.calls and COMPILED not in run.notes:
            run.note(_why_not(options))
        return output

    def _watched(
        self,
        run: Run,
        executor: WrapperExecutor,
        options: Options,
        x: Tensor,
        *arguments: Any,
        **more: Any,
    ) -> Tensor:
        """A pass whose result, if it is not finite, is computed again with PyTorch SDPA.

        One look at the output of a pass, not at each of its attention calls: that would make the
        device wait 60 times for the host.
        """
        own = ON_SUCCESS not in options
        done = options.setdefault(ON_SUCCESS, [])
        count, restore = len(done), foreign.kept(options, x)
        try:
            output = executor(x, *arguments, **more)
            doubtful = {name for name, _ in run.situations} - trusted()
            if doubtful and not output.isfinite().all():
                del output, done[count:]
                restore()
                output = self._again(run, executor, x, arguments, more)
        finally:
            if own:
                del options[ON_SUCCESS]
        for act in done if own else ():
            act()
        return output

    @staticmethod
    def _again(
        run: Run,
        executor: WrapperExecutor,
        x: Tensor,
        arguments: tuple[Any, ...],
        more: dict[str, Any],
    ) -> Tensor:
        """The pass with PyTorch SDPA, as is the rest of the run unless that is no better."""
        suspects = {key: None for key in run.situations if key[0] not in trusted()}
        names = ", ".join({name: None for name, _ in suspects})
        run.stopped = True
        output = executor(x, *arguments, **more)
        if output.isfinite().all():
            for name, situation in suspects:
                health.distrust(name, situation, NOT_FINITE)
            run.note(INSTEAD.format(names, NOT_FINITE))
        else:
            run.stopped = run.watched = False
            run.note(NOT_ITS_FAULT.format(names))
        return output


def _why_not(options: Options) -> str:
    """Why no attention of a pass came here. Seen by what happens: an override of another node may
    call the function that it is given, or not, as it likes."""
    if not attention_override.has(options, BACKEND):
        return REPLACED
    return IGNORED if attention_override.foreign_in(options) else NOT_ASKED


# ---------------------------------------------------------------------------------- the node
def usual(model: ModelPatcher) -> Situation:
    """What most of a model's attention calls are, as far as it is known before it runs: heads 128
    wide if it is no Qwen-Image."""
    inner = getattr(model.model, "diffusion_model", None)
    qwen = isinstance(inner, QwenImageTransformer2DModel)
    width = inner.transformer_blocks[0].attn.dim_head if qwen else 128
    return Situation(model.load_device, model.model.get_dtype_inference(), width, NO_MASK)


class AttentionNode(io.ComfyNode):
    """A backend for one model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMAttention.md."""
        return io.Schema(
            node_id="QwenVRAMAttention",
            display_name="Attention (Qwen VRAM)",
            category="Qwen VRAM/speed",
            description=(
                "Chooses how one model computes attention. Only what passes a self-test on this "
                "device is used; what fails is replaced, and named."
            ),
            search_aliases=["flash attention", "sage attention", "xformers", "sdpa", "backend"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. It is not changed itself."),
                io.Combo.Input(
                    "backend",
                    options=[AUTO, AUTO_QUANTISED, *BACKENDS],
                    default=AUTO,
                    tooltip=(
                        "auto: the fastest that works here and is exact up to rounding, measured "
                        "in the first step. auto, also quantised: SageAttention and int8 too, "
                        "which change the picture slightly. Or one by name; if it is not installed "
                        "the node says what to install."
                    ),
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, backend: str) -> io.NodeOutput:
        """Patch a clone; say what works on the model's device."""
        metadata = Metadata.of(cls.hidden.extra_pnginfo)
        attention = Attention(backend, outcome.running_node(), metadata)
        situation = usual(model)
        if backend in BACKENDS and (missing := BACKENDS[backend].probe(situation.device)):
            raise ValueError(MISSING.format(backend, missing))
        report = f"{backend}, {situation.text()}\n" + health.table(situation, candidates(backend))
        return shown(attention.patch(model), report, text=WAITS.format(backend), report=report)


NODES = [AttentionNode]
