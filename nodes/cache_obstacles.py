"""What keeps a run, or a forward pass, from reusing keys and values: one sentence each."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from . import foreign
from .slicing import compiled
from .token_reuse import BLOCK, is_stock
from .transformer_options import Options, part_of

PATCHES = ("attn1_patch", "double_block", "post_input")  # those that this model calls
Conds = dict[str, list[dict[str, Any]]]

NOT_QWEN = "the model is not ComfyUI's own Qwen-Image ({})"
REPLACED = "another node replaced the model's forward pass"
NO_REFERENCES = "there are no reference pictures"
WINDOWS = "context windows cut the picture's frames"
KEYFRAMES = "keyframes of hooks change the weights while sampling"
TRAINING = "the model is being trained"
COMPILED = "the model runs under torch.compile"
CONTROL = "a ControlNet adds to the tokens"
FLUX_CACHE = "ComfyUI's Flux KV Cache is on the model: take it out"
PATCH = "another node's patch looks at the tokens ({})"
BLOCKS = "another node replaced blocks of the model"
WRAPPERS = "another node wraps the model ({})"
PIECE = "another node ({}) shows the model a part of the picture and does not say which"


def of_model(model: ModelPatcher) -> str:
    """Why this model's keys and values can never be reused, or ""."""
    inner = getattr(model.model, "diffusion_model", None)
    return (
        "" if type(inner) is QwenImageTransformer2DModel else NOT_QWEN.format(type(inner).__name__)
    )


def of_run(model: ModelPatcher, options: dict[str, Any], conds: Conds, region: bool) -> str:
    """Why nothing is reused in one run of a sampler, or "". `options`: the model's, for this run;
    `region`: whether the picture's own tokens may be reused too."""
    if reason := of_model(model):
        return reason
    if options.get("context_handler") is not None:
        return WINDOWS
    every = [cond for side in conds.values() for cond in side]
    if any(_changes(cond.get("hooks")) for cond in every):
        return KEYFRAMES
    if not region and not any(cond.get("reference_latents") for cond in every):
        return NO_REFERENCES
    return ""


def of_pass(
    executor: WrapperExecutor,
    x: Tensor,
    options: Options,
    control: Any,
    sides: tuple[int, ...],
    replaced: bool,
) -> str:
    """Why nothing is reused in one forward pass, or "". `sides`: the whole picture's; `replaced`:
    whether another node's function calls the model."""
    if not is_stock(executor):
        return REPLACED
    if comfy.model_management.in_training:
        return TRAINING
    if compiled(options):
        return COMPILED
    if control and any(hint is not None for hints in control.values() for hint in hints):
        return CONTROL
    if reason := _patched(options):
        return reason
    if names := foreign.strangers(options, (WrappersMP.DIFFUSION_MODEL,)):
        return WRAPPERS.format(", ".join(names))
    if part_of(options) or tuple(x.shape[-2:]) == tuple(sides):
        return ""
    names = foreign.strangers(options, foreign.AROUND_A_CALCULATION)
    names += [foreign.FUNCTION] if replaced else []
    return PIECE.format(", ".join(names)) if names else ""


def _changes(hooks: Any) -> bool:
    """Whether a group of hooks has other strengths later in a run."""
    groups = [hook.hook_keyframe.keyframes for hook in getattr(hooks, "hooks", ())]
    return any(len(each) > 1 or (each and each[0].start_percent > 0) for each in groups)


def _patched(options: Options) -> str:
    """What of other nodes is in the blocks."""
    patches = options.get("patches", {})
    found = [(kind, patch) for kind in PATCHES for patch in patches.get(kind) or ()]
    if any(type(patch).__name__ == foreign.KV_CACHE for _, patch in found):
        return FLUX_CACHE
    if found:
        names = dict.fromkeys(
            f"{getattr(patch, '__qualname__', type(patch).__qualname__)}, {kind}"
            for kind, patch in found
        )
        return PATCH.format("; ".join(names))
    replaced = options.get("patches_replace", {}).get("dit", {})
    return BLOCKS if any(key[0] == BLOCK for key in replaced if isinstance(key, tuple)) else ""
