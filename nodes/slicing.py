"""Runs the blocks of a Qwen-Image transformer in slices of tokens, as a plan says.

A keyed DIFFUSION_MODEL wrapper runs a shallow copy of the transformer whose feed-forward and
attention modules work slice by slice. The copy shares every weight and lives as long as the
forward pass: nothing of the model is ever replaced, so nothing has to be put back after a
failure, and clones, devices and models without a plan are as they were.

Every token is computed by the same formula from the same numbers. The feed-forward in slices and
the projections in slices are therefore bit-identical wherever a product of matrices does not
depend on its number of rows. Measured on a CPU: always, in float32 and bfloat16, at widths up to
1024; at Qwen-Image's own 3072 a library may add up in another order (2e-2 of values around 4 in
bfloat16, 1e-6 in float32). Queries in slices are exact up to the attention kernel's rounding: its
blocks lie elsewhere (CUDA's flash kernel: the same bits from 4,096 rows a slice on). Layers that
scale their whole input by its largest value (fp8 and nvfp4 matrix products without a stored scale)
scale each slice by its own: that is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import comfy.model_management
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention_masked
from comfy.ldm.qwen_image.model import (
    Attention,
    FeedForward,
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
)
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor
from torch.nn import Module

from ..core.budget import Plan
from ..core.slicing import slices
from . import foreign

KEY = "qwen_vram.slicing"
NOT_QWEN = "The model is not ComfyUI's own Qwen-Image ({}), and only that runs in slices."
COMPILED = "The model runs under torch.compile, which slices would compile anew: it runs whole."
TRAINING = "Training needs what slices write over: the model runs whole."
REPLACED = "Another node replaced the {}: it runs whole."
WHOLE_QUERIES = "Another node's patch (attn1_patch) wants whole queries: attention runs whole."
WHOLE_OVERRIDE = "Another node's attention wants whole queries: attention runs whole."
OWN_SCALES = (
    "This file's layers scale their input by its largest value. Each slice has its own, so the "
    "picture differs slightly from the one without slices."
)
SCALED_WHOLE = ("float8_e4m3fn", "float8_e5m2", "nvfp4")  # mxfp8 has a scale for every 32 values

M = TypeVar("M", bound=Module)


class Plans:
    """The plan of each device, for one patched model. Several devices may run in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: dict[tuple[str, int], Plan] = {}
        self._reasons: dict[str, None] = {}  # in order

    def of(self, device: torch.device) -> Plan:
        """How to run there; as asked, if nothing was set."""
        with self._lock:
            return self._plans.get(_place(device), Plan())

    def set(self, device: torch.device, plan: Plan) -> None:
        """From the next forward pass on."""
        with self._lock:
            self._plans[_place(device)] = plan

    def reset(self) -> None:
        """As asked everywhere, and no reasons."""
        with self._lock:
            self._plans.clear()
            self._reasons.clear()

    def stepped_aside(self, reason: str) -> None:
        """Remember why a part ran whole although the plan cuts it, or what else is to be told."""
        with self._lock:
            self._reasons[reason] = None

    def reasons(self) -> tuple[str, ...]:
        """What was to be told since the last reset, as sentences."""
        with self._lock:
            return tuple(self._reasons)


def _place(device: torch.device) -> tuple[str, int]:
    """A device without an index is the first of its kind."""
    return device.type, device.index or 0


def install(patcher: ModelPatcher, plans: Plans) -> str:
    """Let this clone follow `plans`. Returns "", or why this model cannot run in slices.

    Clones for other devices take the wrapper along, and each runs by the plan of its device.
    """
    patcher.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    model = getattr(patcher.model, "diffusion_model", None)
    if type(model) is not QwenImageTransformer2DModel:
        return NOT_QWEN.format(type(model).__name__)
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, partial(_run, plans))
    return ""


def replaced(model: BaseModel) -> str:
    """Why slices would not lower this model's peak, or "": every block peaks alike, so one block
    of another node's is enough. For a model that is loaded, with its patches."""
    for block in model.diffusion_model.transformer_blocks.children():
        if not _is_stock(block, QwenImageTransformerBlock):
            return REPLACED.format("transformer block")
        if not _is_stock(block.img_mlp, FeedForward):
            return REPLACED.format("feed-forward")
        if not _is_stock(block.attn, Attention):
            return REPLACED.format("attention")
    return ""


def _run(plans: Plans, executor: WrapperExecutor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The wrapper: the same forward pass, by a sliced copy if the plan has slices."""
    if torch.compiler.is_compiling():  # told by reductions.possible: dynamo would trace a note
        return executor(x, *args, **kwargs)
    plan = plans.of(x.device)
    if not sliced(plan):
        return executor(x, *args, **kwargs)
    if comfy.model_management.in_training:
        plans.stepped_aside(TRAINING)
        return executor(x, *args, **kwargs)
    if getattr(executor.original, "__func__", None) is not QwenImageTransformer2DModel._forward:
        plans.stepped_aside(REPLACED.format("transformer"))
        return executor(x, *args, **kwargs)
    options = _transformer_options(args, kwargs)
    model = _sliced_model(executor.class_obj, plan, options, plans)
    forward = partial(QwenImageTransformer2DModel._forward, model)
    rest = WrapperExecutor.new_class_executor(forward, model, executor.wrappers, executor.idx + 1)
    return rest.execute(x, *args, **kwargs)


def sliced(plan: Plan) -> bool:
    """Whether the plan has slices at all."""
    return max(plan.feed_forward, plan.projections, plan.attention) > 1


def compiled(transformer_options: dict[str, Any]) -> bool:
    """Whether torch.compile wraps the model, by the host's key for it."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return bool(wrappers.get("torch.compile"))


def _transformer_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The host's `forward` passes them as the sixth argument after x, for other callers by name."""
    return kwargs.get("transformer_options", args[5] if len(args) > 5 else {})


# ------------------------------------------------------------------------------ the copy
def _copy(module: M, kind: type[M] | None = None) -> M:
    """A module that shares parameters, buffers and sub-modules with another one.

    Replacing a sub-module of the copy leaves the original as it is. `kind`: a subclass of its
    class that works otherwise.
    """
    kind = kind or type(module)
    copied = kind.__new__(kind)
    copied.__dict__.update(vars(module))
    copied.__dict__["_modules"] = dict(module._modules)
    # ComfyUI leaves a module's own `forward` on it where a patch of it was taken back.
    copied.__dict__.pop("forward", None)
    return copied


def _is_stock(module: Module, kind: type[Module]) -> bool:
    """Whether nobody put another `forward`, or another module, in its place."""
    own = vars(module).get("forward")
    untouched = own is None or (
        getattr(own, "__func__", None) is kind.forward and own.__self__ is module
    )
    return type(module) is kind and untouched


def _sliced_model(
    model: QwenImageTransformer2DModel, plan: Plan, options: dict[str, Any], plans: Plans
) -> QwenImageTransformer2DModel:
    """A copy whose blocks work in slices; what others changed stays as they made it."""
    attention = max(plan.projections, plan.attention) > 1
    if attention and options.get("patches", {}).get("attn1_patch"):
        plans.stepped_aside(WHOLE_QUERIES)
        attention = False
    if plan.attention > 1 and foreign.wants_whole_queries(options):
        plans.stepped_aside(WHOLE_OVERRIDE)
        plan = replace(plan, attention=1)
    copied = _copy(model)
    blocks = _copy(model.transformer_blocks)
    for name, block in model.transformer_blocks.named_children():
        if not _is_stock(block, QwenImageTransformerBlock):
            plans.stepped_aside(REPLACED.format("transformer block"))
            continue
        blocks._modules[name] = own = _copy(block)
        if plan.feed_forward > 1:
            _slice_part(own, "img_mlp", SlicedFeedForward, plan, plans)
        if attention:
            _slice_part(own, "attn", SlicedAttention, plan, plans)
    copied._modules["transformer_blocks"] = blocks
    return copied


def _scales_its_input(module: Module) -> bool:
    """Whether the host quantises this layer's input by one scale that it takes from the input.

    As comfy.ops.mixed_precision_ops decides it (ComfyUI 0.33).
    """
    return (
        getattr(module, "quant_format", None) in SCALED_WHOLE
        and not module._full_precision_mm
        and getattr(module, "input_scale", None) is None
    )


def _slice_part(
    block: Module,
    name: str,
    kind: type[SlicedFeedForward | SlicedAttention],
    plan: Plan,
    plans: Plans,
) -> None:
    """Replace a module of a copied block, unless it is not the host's."""
    module, stock = block._modules[name], kind.__base__
    if not _is_stock(module, stock):
        plans.stepped_aside(REPLACED.format({"attn": "attention"}.get(name, "feed-forward")))
        return
    if any(map(_scales_its_input, module.modules())):
        plans.stepped_aside(OWN_SCALES)
    block._modules[name] = own = _copy(module, kind)
    own.plan = plan


# ------------------------------------------------------------------------------ the modules
def _each(tokens: int, wanted: int) -> Iterator[tuple[int, int]]:
    """The slices, with a look before each at whether the user stops the run."""
    for start, stop in slices(tokens, wanted):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield start, stop


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    """A slice of the tokens, (batch, stop - start, width), without gaps.

    Torch adds the bias in one step only where the rows lie side by side, as they did whole.
    """
    return x[:, start:stop].contiguous()


class SlicedFeedForward(FeedForward):
    """The feed-forward over slices of tokens, each written over the input that it came from.

    The block does not read its input again: it modulated it for this call (QwenImage's
    `QwenImageTransformerBlock.forward`). So no second tensor of all tokens exists.
    """

    plan: Plan

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, tokens, width) to the same, in the same memory."""
        for start, stop in _each(hidden_states.shape[1], self.plan.feed_forward):
            part = _part(hidden_states, start, stop)
            hidden_states[:, start:stop] = super().forward(part, *args, **kwargs)
        return hidden_states


class SlicedAttention(Attention):
    """The host's attention with keys, values and queries computed over slices of image tokens.

    Keys and values of text and image lie in one tensor each from the beginning. Results are
    written over the image's modulated input, which the block made for this call alone.
    """

    plan: Plan

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006, the host's signature
    ) -> tuple[Tensor, Tensor]:
        """(batch, image tokens, width), (batch, text tokens, width) to the same two."""
        image, text, pe = hidden_states, encoder_hidden_states, image_rotary_emb
        tokens, length = image.shape[1], text.shape[1]
        key, value = self._keys_and_values(image, text, pe)
        # An override of optimized_attention that allows slices gets each with all keys and values.
        mask = _mask(encoder_hidden_states_mask, image, length)
        options = {"transformer_options": transformer_options, "skip_reshape": True}

        def attend(query: Tensor) -> Tensor:
            return optimized_attention_masked(query, key, value, self.heads, mask, **options)

        query = self._rotated(text, self.add_q_proj, self.norm_added_q, pe[:, :, :length])

        def image_query(start: int, stop: int) -> Tensor:
            own_pe = pe[:, :, length + start : length + stop]
            return self._rotated(_part(image, start, stop), self.to_q, self.norm_q, own_pe)

        if self.plan.attention == 1:
            out = attend(self._joint(query, tokens, image_query))
            for start, stop in _each(tokens, self.plan.projections):
                image[:, start:stop] = self._out(out[:, length + start : length + stop])
            return image, self.to_add_out(out[:, :length])
        # The text's few queries go with the first slice: kernels treat a few rows otherwise.
        for start, stop in _each(tokens, self.plan.attention):
            part = image_query(start, stop)
            if start == 0:
                part = torch.cat([query, part], dim=2)
            out = attend(part)
            del part
            if start == 0:
                text_out, out = self.to_add_out(out[:, :length]), out[:, length:]
            image[:, start:stop] = self._out(out)
            del out
        return image, text_out

    def _keys_and_values(self, image: Tensor, text: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """Of text and image, (batch, heads, tokens, width of a head)."""
        tokens, length = image.shape[1], text.shape[1]

        def image_key(start: int, stop: int) -> Tensor:
            own_pe = pe[:, :, length + start : length + stop]
            return self._rotated(_part(image, start, stop), self.to_k, self.norm_k, own_pe)

        def image_value(start: int, stop: int) -> Tensor:
            return self._heads(self.to_v(_part(image, start, stop)))

        text_key = self._rotated(text, self.add_k_proj, self.norm_added_k, pe[:, :, :length])
        key = self._joint(text_key, tokens, image_key)
        return key, self._joint(self._heads(self.add_v_proj(text)), tokens, image_value)

    def _rotated(self, x: Tensor, linear: Module, norm: Module, pe: Tensor) -> Tensor:
        """Projected, normed and given its position: (batch, heads, tokens, width of a head)."""
        return apply_rope1(norm(self._heads(linear(x)).contiguous()), pe)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to (batch, heads, tokens, width of a head)."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def _joint(self, text: Tensor, tokens: int, image: Callable[[int, int], Tensor]) -> Tensor:
        """(batch, heads, text and image tokens, width of a head): the text's part, then slices."""
        length = text.shape[2]
        joint = text.new_empty(*text.shape[:2], length + tokens, text.shape[3])
        joint[:, :, :length] = text
        for start, stop in _each(tokens, self.plan.projections):
            joint[:, :, length + start : length + stop] = image(start, stop)
        return joint

    def _out(self, x: Tensor) -> Tensor:
        """The output projection; its second part is a dropout, which does nothing here."""
        return self.to_out[1](self.to_out[0](x))


def _mask(text_mask: Tensor | None, image: Tensor, length: int) -> Tensor | None:
    """What is added to the scores, (batch, 1, text and image tokens), as the host builds it."""
    if text_mask is None:
        return None
    mask = image.new_zeros((image.shape[0], 1, length + image.shape[1]))
    mask[:, 0, :length] = text_mask
    return mask
