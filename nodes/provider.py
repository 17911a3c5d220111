"""The persistent cache for stock encode nodes, through ComfyUI's cache provider interface.

ComfyUI asks it for nodes that its own cache in memory does not know, before the prompt starts and
again before a node runs. A hit spares the node and, with it, the loaders that only it needs.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import comfy.model_management
from comfy_api.latest import Caching, ComfyAPI
from comfy_execution.progress import get_progress_state

from ..core.conditioning_codec import Entry
from ..core.graph_identity import NotCacheable
from .encoding import report, settle
from .keys import Key, node_key
from .loaders import REGISTRY
from .settings import settings
from .status import announce_hit, announce_miss
from .store import SAVINGS, STORE, reason_to_keep_nothing, set_up

log = logging.getLogger("qwen_vram")

# Nodes whose output is a function of their inputs, models and code. Users add more by a setting.
STOCK_NODES = frozenset(
    {"CLIPTextEncode", "TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus", "VAEEncode"}
)


@dataclass
class Asked:
    """What one node of the running prompt was told, and since when it may be running."""

    key: Key | None
    why: str
    since: float
    tiled: int = 0


class ConditioningProvider(Caching.CacheProvider):
    """Answers from the store; stores what stock nodes made."""

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}
        self._started_ns = 0

    def on_prompt_start(self, prompt_id: str) -> None:
        """Forget the last prompt and take over changed settings."""
        self._asked.clear()
        self._started_ns = time.time_ns()
        set_up()

    def on_prompt_end(self, prompt_id: str) -> None:
        """Write what was counted."""
        try:
            SAVINGS.persist()
        except OSError as error:
            log.debug("The totals of the prompt cache were not written: %s", error)

    def should_cache(
        self, context: Caching.CacheContext, value: Caching.CacheValue | None = None
    ) -> bool:
        """Whether to ask `on_lookup`; with a value, store it now.

        ComfyUI runs `on_store` as a task that is cancelled when the prompt ends first. The copy
        is therefore made here, and written by the store's own thread.
        """
        wanted = context.class_type in STOCK_NODES | settings().more_nodes
        if not wanted or value is None:
            return wanted
        self._keep(context.node_id, value)
        return False

    async def on_store(self, context: Caching.CacheContext, value: Caching.CacheValue) -> None:
        """Never called: see `should_cache`."""

    async def on_lookup(self, context: Caching.CacheContext) -> Caching.CacheValue | None:
        """The stored outputs of a node, or None. The second question after a miss counts once."""
        asked = self._asked.get(context.node_id)
        if asked is not None:
            asked.since, asked.tiled = time.perf_counter(), TILED.count
            return None
        start = time.perf_counter()
        dynprompt = get_progress_state().dynprompt
        node = dynprompt.get_node(dynprompt.get_real_node_id(context.node_id))
        key, why = None, reason_to_keep_nothing(node, ours=False) or ""
        if not why:
            try:
                key = node_key(context.node_id, dynprompt)
            except NotCacheable as reason:
                why = f"cannot be cached: {reason}"
            except Exception as error:  # ComfyUI would log its message, which may quote a prompt
                why = f"cannot be cached: {report(error)}"
        hit = STORE.lookup(key.sha256) if key else None
        if hit is None:
            why = why or _why_missed(key)
            asked = Asked(key, why, time.perf_counter(), TILED.count)
            self._asked[context.node_id] = asked
            return None
        seconds = time.perf_counter() - start
        REGISTRY.forget_leaving()
        settle(hit)
        saved = max(0.0, hit.entry.seconds - seconds)
        announce_hit(hit.tier, saved, _shown_at(context.node_id), seconds=seconds)
        return Caching.CacheValue(outputs=_outputs(hit.entry.value))

    def _keep(self, node_id: str, value: Caching.CacheValue) -> None:
        """Store what a node gave, if it was asked for and may be kept; tell why not."""
        asked = self._asked.pop(node_id, None)
        if asked is None:
            return
        seconds = time.perf_counter() - asked.since
        kept = self._store(node_id, asked, value, seconds) if asked.key else ""
        announce_miss(asked.why, seconds, kept, _shown_at(node_id))

    def _store(self, node_id: str, asked: Asked, value: Caching.CacheValue, seconds: float) -> str:
        key = asked.key
        try:
            doubt = key.doubt()
            changed = key.changed_since(self._started_ns)
            if changed:  # what ComfyUI read of it before is not known
                doubt = doubt or f"{changed} changed while the prompt ran"
            if doubt is None and node_key(node_id, get_progress_state().dynprompt) != key:
                doubt = "what it depends on changed while it was encoded"
        except NotCacheable as reason:
            doubt = str(reason)
        if doubt is None and asked.tiled != TILED.count:
            doubt = "too little memory, it was encoded in tiles"
        if doubt is None and any(len(items) != 1 for items in value.outputs):
            doubt = "it worked on a list"
        if doubt is None and value.ui is not None:
            doubt = "it shows something of its own"
        if doubt:
            return f"not stored: {doubt}"
        device = comfy.model_management.get_torch_device()
        kept = _value(value.outputs)
        entry = Entry(kept, seconds, key.parts, str(device))
        return STORE.put(key.sha256, entry) or "stored"


def _value(outputs: list[list[Any]]) -> Any:
    """One value for one output, which Cached Text Encode stores in the same way."""
    values = [items[0] for items in outputs]
    alone = len(values) == 1 and isinstance(values[0], list)
    return values[0] if alone else {"outputs": values}


def _outputs(value: Any) -> list[list[Any]]:
    """The inverse."""
    return [[item] for item in value["outputs"]] if isinstance(value, dict) else [[value]]


def _why_missed(key: Key) -> str:
    return STORE.why_missed(key.sha256, key.parts)


def _shown_at(node_id: str) -> str:
    """The node of the editor that a node of a sub-graph belongs to."""
    return get_progress_state().dynprompt.get_display_node_id(node_id)


class TiledEncodes(logging.Handler):
    """Counts how often ComfyUI fell back to encoding in tiles, of which it tells only its log."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Called for every line of the log."""
        self.count += "retrying with tiled VAE encoding" in str(record.msg)


TILED = TiledEncodes(logging.WARNING)
PROVIDER = ConditioningProvider()


async def register() -> None:
    """Tell ComfyUI of the provider; called when the pack is loaded."""
    logging.getLogger().addHandler(TILED)
    await ComfyAPI().caching.register_provider(PROVIDER)
