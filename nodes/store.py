"""The one store of this process, set up as the settings say, and what it saved."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import folder_paths

from ..core.conditioning_store import ConditioningStore
from ..core.savings import Savings
from ..core.workflow_nodes import SETTINGS_KEEP_NOTHING
from .settings import KEEP_NOTHING, KEEP_OURS, Settings, settings

log = logging.getLogger("qwen_vram")

FOLDER = Path(folder_paths.get_system_user_directory("qwen_vram"))
STORE = ConditioningStore(FOLDER / "conditioning", Settings().memory_bytes, Settings().disk_bytes)
LISTS = "qwen_vram"  # in ComfyUI's temporary folder: lists of prompts that js/prefill.js sent
SAVINGS = Savings(FOLDER / "totals.json")
_applied = Settings()
_lock = threading.Lock()


def set_up() -> Settings:
    """Bring the store in line with the settings; called when a prompt starts."""
    global _applied
    wanted = settings()
    with _lock:
        if wanted != _applied:
            changes: dict[str, Any] = {
                "memory_bytes": wanted.memory_bytes,
                "disk_bytes": wanted.disk_bytes,
            }
            if _redis_of(wanted) != _redis_of(_applied):
                changes["redis"] = _redis(wanted)
            _applied = wanted
            STORE.configure(**changes)
    return wanted


def _redis_of(of: Settings) -> tuple[str, int, int]:
    return of.redis_url, of.redis_seconds, of.redis_bytes


def _redis(wanted: Settings) -> Any:
    """The Redis tier, or None with one line in the log."""
    if not wanted.redis_url:
        return None
    from ..core.redis_tier import RedisTier

    try:
        return RedisTier(wanted.redis_url, wanted.redis_seconds, wanted.redis_bytes)
    except (ValueError, ImportError) as error:
        log.warning("Prompts are not shared by Redis: %s", error)
        return None


def reason_to_keep_nothing(node: dict[str, Any], ours: bool) -> str | None:
    """Why nothing of this node of the graph is looked up or stored; else None.

    `_meta` is where queue_time notes what the user chose for a node or for a run.
    """
    keep = settings().keep
    if keep == KEEP_NOTHING or (keep == KEEP_OURS and not ours):
        return SETTINGS_KEEP_NOTHING
    chosen = node.get("_meta", {}).get("qwen_vram", {})
    return chosen.get("keep_nothing")
