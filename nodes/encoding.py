"""What the cached encode nodes share: search, wait for the lazy inputs, keep, hand out."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy_execution.utils import get_executing_context

from ..core.conditioning_codec import Entry
from ..core.conditioning_store import Hit
from ..core.graph_identity import NotCacheable
from ..core.workflow_nodes import CACHE_IS_OFF
from . import environment
from .keys import Key
from .store import STORE, reason_to_keep_nothing

log = logging.getLogger("qwen_vram")

CACHE_MODES = ("memory and disk", "memory", "off")


class Lookup(NamedTuple):
    """What was found: a hit, or a key to store under, or a note why neither."""

    key: Key | None = None
    hit: Hit | None = None
    note: str = ""
    seconds: float = 0.0


class Waiting:
    """Lookups between the lazy check of a node and its execution: nothing changes in between."""

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}

    def put(self, context: Any, found: Any) -> None:
        """Keep what was found; that of runs that were interrupted is dropped."""
        for stale in [c for c in self._found if c.prompt_id != context.prompt_id]:
            del self._found[stale]
        self._found[context] = found

    def get(self, context: Any) -> Any:
        """What the lazy check of this very call found, or None."""
        return self._found.get(context)

    def take(self, context: Any) -> Any:
        """Hand it over, once."""
        return self._found.pop(context, None)


def look_up(current_key: Callable[[], Key], cache: str, node: dict[str, Any]) -> Lookup:
    """Search the store. `node` is the node of the graph that asks."""
    if cache == "off":
        return Lookup(note=CACHE_IS_OFF)
    reason = reason_to_keep_nothing(node, ours=True)
    if reason:
        return Lookup(note=reason)
    start = time.perf_counter()
    try:
        key = current_key()
    except NotCacheable as why:
        return Lookup(note=f"cannot be cached: {why}")
    except Exception as error:  # of ours; it must cost the search, never the picture
        return Lookup(note=f"cannot be cached: {report(error)}")
    hit = STORE.lookup(key.sha256, disk=cache == CACHE_MODES[0])
    note = "" if hit else STORE.why_missed(key.sha256, key.parts)
    return Lookup(key, hit, note, time.perf_counter() - start)


def report(error: Exception) -> str:
    """Log an error of the cache without its message, which may quote a prompt; return its name."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    name = type(error).__name__
    log.warning(
        "The prompt cache failed: %s in %s:%s", name, Path(place.filename).name, place.lineno
    )
    return name


class Made(NamedTuple):
    """Something to keep: the value, what it took, the model that made it, and its device."""

    value: Any
    seconds: float
    model: Any
    device: Any


def keep(key: Key, current_key: Callable[[], Key], made: Made, cache: str) -> str:
    """Store a fresh value unless it may not belong to `key`; say what was done."""
    doubt = environment.LOADED.doubt(made.model, key.files)
    if doubt is None and not _still(key, current_key):
        doubt = "what it depends on changed while it was encoded"
    if doubt:
        return f"not stored: {doubt}"
    disk = cache == CACHE_MODES[0]
    entry = Entry(made.value, made.seconds, key.parts, str(made.device))
    return STORE.put(key.sha256, entry, disk) or ("stored" if disk else "stored in memory")


def _still(key: Key, current_key: Callable[[], Key]) -> bool:
    """Whether the key is what it was before encoding."""
    try:
        return current_key() == key
    except NotCacheable:
        return False


def context_node(dynprompt: Any) -> dict[str, Any]:
    """The node of the graph that is being executed."""
    return dynprompt.get_node(get_executing_context().node_id)


def asking_node(dynprompt: Any) -> dict[str, Any]:
    """The node of the user's graph behind it: nodes that it built run in its name."""
    return dynprompt.get_node(dynprompt.get_real_node_id(get_executing_context().node_id))


def settle(hit: Hit) -> None:
    """Do what encoding does to the process besides encoding."""
    if hit.entry.device.startswith("cuda"):
        settle_attention()


@functools.cache
def settle_attention() -> None:
    """Make the first attention of the process, so that a hit gives the same picture.

    On cards where PyTorch prefers cuDNN attention (Hopper and later) it writes that preference
    over the caller's order of backends at the first attention of the process. In stock that is
    the text encoder's; without it, it would be the diffusion model's, in another kernel.
    """
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        query = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.bfloat16)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
