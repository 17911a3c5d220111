"""After a forward pass that ran out of memory: what it left behind goes, and room is made."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.model_prefetch
import comfy_aimdo.model_vbar
import torch
from comfy.model_patcher import ModelPatcher

from . import loaded_models

log = logging.getLogger("qwen_vram")

BUFFER_FAILED = ("VRAM grow failed", "VRAM reservation failed")
ALLOCATORS = (  # that fail by a plain RuntimeError: CPU (and on Windows), Apple, DirectML, Intel
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "Could not allocate tensor with",
    "XPU out of memory",
)
CUDA_INVALID_VALUE = 1  # of torch.AcceleratorError
PINNED = 2  # in the flags of ModelVBAR.get_residency
MOST_PINS = 1000  # of one page; each pin is one cast that did not end
STEP_SECONDS = 0.1  # how long an interrupt may go unnoticed


def is_oom(error: BaseException) -> bool:
    """Whether an error means that memory lacked: what ComfyUI knows, what other devices than
    NVIDIA's and AMD's say, and two of dynamic VRAM's.

    Its buffers fail by a plain RuntimeError (comfy_aimdo/vram_buffer.py). And a cast that an
    out-of-memory left half done points into a buffer that is gone: CUDA's "invalid argument".
    """
    if comfy.model_management.is_oom(error):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATORS):
        return True
    if not comfy.memory_management.aimdo_enabled:
        return False
    mapped = getattr(error, "error_code", None) == CUDA_INVALID_VALUE
    if mapped:
        log.warning("taken for out of memory: %s", str(error).partition("\n")[0])
        comfy.model_management.discard_cuda_async_error()
    return mapped or (type(error) is RuntimeError and str(error).startswith(BUFFER_FAILED))


def recover(patchers: Sequence[ModelPatcher], alone: bool, thorough: bool = True) -> None:
    """Drop what the failed pass of these models left behind, and give torch's cache back.

    With dynamic VRAM all weights have left by then, and stay out until the pages are prioritised.

    Call it outside the `except` block and without a reference to the error: its traceback keeps
    the tensors of the whole stack alive. `alone` says that no other thread computes on another
    GPU; only then may go what ComfyUI keeps for all devices together. Not `thorough`: garbage of
    the last moments only, which takes milliseconds; all of it can take half a second.
    """
    gc.collect(2 if thorough else 1)
    if alone:
        _reset_host()
    for patcher in patchers:
        if patcher.is_dynamic():
            unpin(patcher)
            if (vbar := vbar_of(patcher)) is not None:
                vbar.prioritize()
    comfy.model_management.soft_empty_cache()


def _reset_host() -> None:
    """What ComfyUI resets only at the end of a node (execution.py); the run goes on."""
    active = [state for state in _pin_states() if state["active"]]
    comfy.model_prefetch.cleanup_prefetch_queues()
    comfy.model_management.reset_cast_buffers()  # makes the pins of all models inactive
    if comfy.memory_management.aimdo_enabled:
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()
    for state in active:
        state["active"] = True


def _pin_states() -> list[dict[str, Any]]:
    """How ComfyUI keeps the pinned RAM of each dynamic model that is loaded."""
    dynamic = (patcher for _, patcher in loaded_models.loaded() if patcher.is_dynamic())
    return [patcher.model.dynamic_pins[patcher.load_device] for patcher in dynamic]


def unpin(patcher: ModelPatcher) -> None:
    """Unpin the pages of a dynamic model that a pass has left pinned: they could never leave.

    An error between a cast and its end, as in the matrix product itself, leaves a page pinned; one
    in a prefetch leaves `_prefetch` on the modules. No pass of this model may run meanwhile.
    """
    modules = list(patcher.model.modules())
    cast = [module for module in modules if hasattr(module, "_v")]
    comfy.model_prefetch.cleanup_prefetched_modules(patcher.model, cast)
    for block in modules:
        if getattr(block, "_v_block_faulted", False):
            comfy.model_prefetch.cleanup_prefetched_modules(block, [])
    vbar = vbar_of(patcher)
    for _ in range(MOST_PINS if vbar is not None else 0):
        if not any(flags & PINNED for flags in vbar.get_residency()):
            return
        for module in cast:
            comfy_aimdo.model_vbar.vbar_unpin(module._v)
    if vbar is not None:
        log.warning("Some weights of %s stay pinned.", type(patcher.model).__name__)


def vbar_of(patcher: ModelPatcher) -> Any:
    """The pages that dynamic VRAM keeps a model's weights in; None where it has none."""
    return patcher.model.dynamic_vbars.get(patcher.load_device) if patcher.is_dynamic() else None


def unload_others(device: torch.device, used: Sequence[ModelPatcher]) -> None:
    """Take every model off a device that this run does not use, as ComfyUI itself does."""
    kept = [entry for entry, patcher in loaded_models.loaded() if is_used(patcher, used)]
    comfy.model_management.free_memory(1e30, device, keep_loaded=kept)


def is_used(patcher: ModelPatcher, used: Sequence[ModelPatcher]) -> bool:
    """Whether a model is one of these, or a clone of one."""
    return any(patcher.model is other.model for other in used)


def stream_more(patcher: ModelPatcher, lacking: int) -> None:
    """Take that many bytes of a model's weights off its device; they are streamed from now on.

    Not with dynamic VRAM: there weights give way by themselves, and come back.
    """
    if lacking > 0 and patcher.load_device.type != "cpu" and not patcher.is_dynamic():
        patcher.partially_unload(patcher.offload_device, lacking)


def wait(seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Sleep so that an interrupt still works. Raises ComfyUI's InterruptProcessingException."""
    end = clock() + seconds
    while (left := end - clock()) > 0:
        comfy.model_management.throw_exception_if_processing_interrupted()
        time.sleep(min(left, STEP_SECONDS))
    comfy.model_management.throw_exception_if_processing_interrupted()


def attempt(call: Callable[[], Any]) -> Any:
    """What a call gives, or None where memory ran out; the error is gone by then."""
    try:
        return call()
    except Exception as error:
        if not is_oom(error):
            raise
        log.info("memory ran out: %s", str(error).partition("\n")[0])
    return None
