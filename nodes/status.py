"""What a node shows on itself after a run: one line of text, and the same as data in its output."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

log = logging.getLogger("qwen_vram")


def shown(*outputs: Any, text: str, **facts: Any) -> io.NodeOutput:
    """A node's outputs, with `text` shown on the node and `facts` beside it in the history.

    The node's id comes from the execution context: asking for the hidden input unique_id would
    put it into the cache key of this node and of everything behind it.
    """
    context = get_executing_context()
    server = PromptServer.instance
    if context is not None and server.client_id is not None:
        server.send_progress_text(text, context.node_id, server.client_id)
    return io.NodeOutput(*outputs, ui={"qwen_vram": [{"text": text, **facts}]})


def size_text(size_bytes: int) -> str:
    """A size for people: MB below one GB, else GB (decimal, as shops and ComfyUI's log count)."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
