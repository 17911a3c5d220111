"""What is done with a request to run a graph before ComfyUI looks at it."""

from __future__ import annotations

import logging
from typing import Any

from server import PromptServer

from ..core import workflow_nodes

log = logging.getLogger("qwen_vram")


def on_prompt(request: Any) -> Any:
    """Replace pinned nodes, note what shall keep nothing, and log which pins are refused."""
    changed = workflow_nodes.prepared(request)
    if changed is not request:
        for node_id, node in changed["prompt"].items():
            if isinstance(node, dict) and node.get("class_type") == workflow_nodes.PINNED_NODE:
                inputs = node.get("inputs")
                problem = inputs.get("problem") if isinstance(inputs, dict) else None
                if problem:
                    log.warning("Node %s: %s", node_id, problem)
    return changed


def register() -> None:
    """Called when the pack is loaded."""
    PromptServer.instance.add_on_prompt_handler(on_prompt)
