"""Say that fp16 overflowed in a model, where there would be a black picture.

fp16 ends at 65504, and Qwen-Image's activations go beyond (ComfyUI issues 10668 and 10751); bf16
and fp32 hold them. Only what is in fp16 is looked at: a run in another type does nothing here.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..core.refresh_policy import step_of

KEY = "qwen_vram.finite_check"
OVERFLOW = (
    "fp16 overflowed in this model{}: its numbers go beyond 65504, and the picture would be black. "
    "Choose bf16, fp32 or default as weight_dtype of the loader, and leave out --fp16-unet, "
    "--force-fp16 and nodes that set the compute type to fp16."
)
INPUT = (
    "What reached the model{} is no longer a number ({}): it was made so before, by another node "
    "or the text encoder, and the picture would be black."
)
TEXT = (
    "fp16 overflowed in the text encoder: its weights or their results go beyond 65504. Choose "
    "bf16, fp32 or default as weight_dtype of its loader, and leave out --fp16-text-enc."
)


def guard(patcher: ModelPatcher) -> None:
    """Let a transformer's every forward pass in fp16 be checked; call it on a clone."""
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)


def check_text(encoded: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where a text encoder whose weights are of `dtype` fp16 gave no numbers."""
    if dtype is torch.float16 and not _finite(encoded):
        raise ValueError(TEXT)


def _apply_model(executor: WrapperExecutor, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
    """APPLY_MODEL: one forward pass; in fp16 the device is asked once, at its end.

    The type is asked each time, since later nodes can change it (Model Compute Dtype).
    """
    output = executor(x, *arguments, **more)
    if executor.class_obj.get_dtype_inference() is not torch.float16 or _finite(output):
        return output
    options = more.get("transformer_options", arguments[4] if len(arguments) > 4 else {})
    context = more.get("c_crossattn", arguments[2] if len(arguments) > 2 else None)
    step = _step(options)
    for name, tensor in (("the latent", x), ("the prompt", context)):
        if tensor is not None and not _finite(tensor):
            raise ValueError(INPUT.format(step, name))
    raise ValueError(OVERFLOW.format(step))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _step(options: dict[str, Any]) -> str:
    """Which one of the sampler's steps it was, counted from 1, where it tells."""
    sigmas, schedule = options.get("sigmas"), options.get("sample_sigmas")
    if sigmas is None or schedule is None:
        return ""
    step = step_of(float(sigmas.max()), [float(sigma) for sigma in schedule])
    return f" at step {step + 1}"
