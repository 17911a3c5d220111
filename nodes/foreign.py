"""What other nodes put around the model: what they remember, and what they want to see whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

CACHE = "easycache"  # in transformer_options: the state of ComfyUI's EasyCache and LazyCache
KNOWN = (CACHE, "lazycache", "torch.compile")  # keys of ComfyUI's wrappers
OWN = "qwen_vram."  # what keys of this pack begin with
KV_CACHE = "KV_Attn_Input"  # the class in ComfyUI's Flux KV Cache, which cannot be imported
AROUND_A_PASS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
AROUND_A_CALCULATION = (WrappersMP.CALC_COND_BATCH, *AROUND_A_PASS)
AROUND_A_STEP = (WrappersMP.PREDICT_NOISE, *AROUND_A_CALCULATION)
FUNCTION = "model_function_wrapper"  # in the options of a model
SAW_A_FAILURE = (
    "another node's patch ({}) may have seen the failed pass and remember it: whether the picture "
    "is the same is not known"
)


def kept(options: dict[str, Any], *inputs: torch.Tensor) -> Callable[[], None]:
    """Remember how ComfyUI's cache of steps stands; what is returned puts that back.

    EasyCache changes its state before the model runs, and where it skips a step it writes over
    the input of the model: a pass that is repeated has to find both as the first attempt did.
    """
    cache = options.get(CACHE)
    if cache is None:
        return lambda: None
    state = {name: _copied(value) for name, value in vars(cache).items()}
    copies = [tensor.clone() for tensor in inputs]

    def restore() -> None:
        """As it was. Once."""
        vars(cache).clear()
        vars(cache).update(state)
        for tensor, copy in zip(inputs, copies, strict=True):
            tensor.copy_(copy)

    return restore


def _copied(value: Any) -> Any:
    """Containers, and the single numbers that EasyCache adds to; it replaces larger tensors."""
    if isinstance(value, (dict, list)):
        return value.copy()
    return value.clone() if torch.is_tensor(value) and value.numel() == 1 else value


def strangers(options: dict[str, Any], kinds: Sequence[str] = AROUND_A_PASS) -> list[str]:
    """Names of wrappers of which nobody knows what they remember."""
    found = {
        str(key or "without a name"): None
        for kind in kinds
        for key, wrappers in options.get("wrappers", {}).get(kind, {}).items()
        if wrappers and key not in KNOWN and not str(key).startswith(OWN)
    }
    return list(found)


def cached(options: dict[str, Any]) -> bool:
    """Whether EasyCache, which compares passes, is around each of them."""
    wrappers = options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    return bool(wrappers.get(CACHE))


def sees_the_batch(options: dict[str, Any]) -> bool:
    """Whether anything of others may mix the pictures of a batch, or keep something for each."""
    return (
        cached(options)
        or bool(strangers(options))
        or any(options.get("patches", {}).values())
        or any(options.get("patches_replace", {}).values())
        or not itemwise(options.get("optimized_attention_override"))
    )


def itemwise(override: Callable[..., Any] | None) -> bool:
    """Whether an override of attention says that it computes each picture of a batch as if it were
    alone, and keeps nothing: `itemwise = True`."""
    return override is None or bool(getattr(override, "itemwise", False))


def wants_whole_queries(options: dict[str, Any]) -> bool:
    """Whether attention is another node's that does not say what it does with slices."""
    override = options.get("optimized_attention_override")
    return override is not None and not sliceable(override)


def sliceable(override: Callable[..., Any]) -> bool:
    """Whether an override of attention takes queries in slices: it says `sliceable = True`.

    ComfyUI's own choice of a kernel, which has a `container_function`, does.
    """
    return bool(getattr(override, "sliceable", False)) or hasattr(override, "container_function")
