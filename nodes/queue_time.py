"""What is done with a request to run a graph before ComfyUI looks at it."""

from __future__ import annotations

import logging
from typing import Any

from server import PromptServer

from ..core import workflow_nodes
from ..core.pins import PinLost
from .pins import PINS

log = logging.getLogger("qwen_vram")

PIN_EVENT = "qwen_vram.pin_refused"


def on_prompt(request: Any) -> Any:
    """Replace pinned nodes, note what shall keep nothing, and tell which pins are refused."""
    changed = workflow_nodes.prepared(request)
    if changed is not request:
        for node_id, inputs in workflow_nodes.pinned_in(changed).items():
            _tell_refused(node_id, inputs, changed.get("client_id"))
    return changed


def _tell_refused(node_id: str, inputs: dict[str, Any], client_id: Any) -> None:
    """Say why a pin is refused: ComfyUI's editor says only that an input was rejected.

    What cannot be looked at is left to the node, which says so when the graph is validated.
    """
    told = {"node": node_id, "missing": False, "text": inputs.get("problem")}
    if told["text"]:
        log.warning("Node %s: %s", node_id, told["text"])
    else:
        try:
            PINS.check(inputs.get("content"))
        except PinLost as lost:
            told |= {"missing": True, "text": str(lost)}
        except OSError as error:
            log.debug("The pin of node %s cannot be looked at: %s", node_id, error)
    if told["text"] and isinstance(client_id, str):
        PromptServer.instance.send_sync(PIN_EVENT, told, client_id)


def register() -> None:
    """Called when the pack is loaded."""
    PromptServer.instance.add_on_prompt_handler(on_prompt)
