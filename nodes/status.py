"""What a node shows on itself after a run: one line of text, and the same as data in its output."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..core.units import size_text as size_text  # for the nodes that show one
from ..core.workflow_nodes import CHOSEN
from .store import SAVINGS

CACHE_EVENT = "qwen_vram.cache"


def shown(*outputs: Any, text: str, **facts: Any) -> io.NodeOutput:
    """A node's outputs, with `text` shown on the node and `facts` beside it in the history.

    The node's id comes from the execution context: asking for the hidden input unique_id would
    put it into the cache key of this node and of everything behind it.
    """
    say(text)
    return io.NodeOutput(*outputs, ui={"qwen_vram": [{"text": text, **facts}]})


def say(text: str) -> None:
    """Show `text` on the node that runs now, if one does, until something else is shown."""
    context = get_executing_context()
    if context is None:
        return
    server = PromptServer.instance
    if server.client_id is not None:
        server.send_progress_text(text, context.node_id, server.client_id)


def announce(node_id: str, **facts: Any) -> None:
    """Tell the frontend what the cache did for a node; js/badges.js draws it."""
    server = PromptServer.instance
    if server.client_id is not None:
        server.send_sync(CACHE_EVENT, {"node": node_id, **facts}, server.client_id)


def announce_hit(
    tier: str, saved: float, node_id: str | None = None, **more: Any
) -> dict[str, Any]:
    """Count a hit and tell it; `saved` in seconds. Returns the facts for the history."""
    SAVINGS.hit(saved)
    facts = {"result": "hit", "tier": tier, "seconds_saved": saved, **more}
    announce(node_id or get_executing_context().node_id, **facts)
    return facts


def announce_miss(
    why: str, seconds: float, kept: str, node_id: str | None = None
) -> dict[str, Any]:
    """Count a miss and tell it, with what it took in seconds. Returns the facts for the history.

    Where the user chose that nothing is kept it is no miss, and not counted.
    """
    facts = {"result": result_of(why), "why": why, "seconds": seconds, "kept": kept}
    if facts["result"] == "miss":
        SAVINGS.miss()
    announce(node_id or get_executing_context().node_id, **facts)
    return facts


def result_of(why: str) -> str:
    """How a value was made that was not found: a miss, or by the user's choice "not kept"."""
    return "not kept" if why in CHOSEN else "miss"


def announce_partial(why: str, seconds: float, kept: str, saved: float) -> dict[str, Any]:
    """Count a run of which one part was found and another was made: a hit and a miss."""
    SAVINGS.hit(saved)
    SAVINGS.miss()
    facts = {"result": "partial", "why": why, "seconds": seconds, "kept": kept}
    facts["seconds_saved"] = saved
    announce(get_executing_context().node_id, **facts)
    return facts
