"""What the prompt cache holds and saved, and its removal; for the settings panel and scripts."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
from aiohttp import web
from server import PromptServer

from ..core.disk_tier import DiskTier
from ..core.savings import Totals
from ..core.statistics import Removed, Size
from .pins import PINS
from .provider import STOCK_NODES
from .requests import refused
from .settings import Settings
from .store import LISTS, SAVINGS, STORE, set_up
from .warmup import SAVED, forget

PATH = "/qwen_vram/conditioning"
DAY_SECONDS = 86400
MOST_DAYS = 36500
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class Wish(NamedTuple):
    """What a DELETE request asks for."""

    unused_seconds: float = 0.0
    everything: bool = False


def report() -> dict[str, Any]:
    """What the panel shows. It lists a directory and may ask Redis: call it off the event loop."""
    wanted, usage = set_up(), STORE.usage()
    redis = _redis_state(wanted, usage.redis)
    return {
        "memory": _tier(usage.memory, wanted.memory_bytes),
        "disk": _tier(usage.disk, wanted.disk_bytes),
        "redis": {**_tier(usage.redis, wanted.redis_bytes), "state": redis},
        "now": _totals(SAVINGS.now),
        "total": _totals(SAVINGS.total()),
        "folder": str(STORE.directory),
        "encode_nodes": sorted(STOCK_NODES | wanted.more_nodes),
        "keep": wanted.keep,
    }


def remove(wish: Wish) -> dict[str, Any]:
    """Remove entries, or everything that the pack ever kept; say what was removed."""
    wanted, removed = set_up(), STORE.clear(wish.unused_seconds)
    answer = _removed(removed)
    answer["redis"]["state"] = _redis_state(wanted, removed.redis)
    if wish.everything:
        pins, failed = DiskTier(PINS.directory, 0).clear(0.0, {})
        lists, lists_left = _remove_lists()
        warm_up, warm_up_left = SAVED.is_file(), forget()
        totals, totals_left = _forget_totals()
        answer |= {"pins": _size(pins), "lists": lists, "totals": totals}
        answer["warm_up"] = warm_up and not SAVED.is_file()
        answer["failed"] += [*failed, *lists_left, *totals_left, *warm_up_left]
    return answer


def wish_of(query: Mapping[str, str]) -> Wish:
    """Read the query of a DELETE request. Raises ValueError with a sentence."""
    unknown = query.keys() - {"unused_days", "everything"}
    if unknown:
        raise ValueError(f"{min(unknown)} is not known: use unused_days=N or everything=true.")
    everything = _FLAGS.get(query.get("everything", "false").lower())
    if everything is None:
        raise ValueError("everything must be true or false.")
    if "unused_days" not in query:
        if "everything" in query and not everything:
            raise ValueError(
                "everything=false alone does not say what to remove: leave it out to remove every "
                "entry, or add unused_days=N."
            )
        return Wish(everything=everything)
    if everything:
        raise ValueError("everything=true takes no unused_days: it removes all there is.")
    try:
        days = float(query["unused_days"])
    except ValueError:
        days = math.nan
    if not 0 <= days <= MOST_DAYS:
        raise ValueError(f"unused_days must be a number from 0 to {MOST_DAYS}.")
    return Wish(days * DAY_SECONDS)


def _redis_state(wanted: Settings, size: Size | None) -> str:
    """Whether Redis answered what was asked just now."""
    if not wanted.redis_url:
        return "off"
    return "connected" if size else "away"


def _tier(size: Size | None, bound_bytes: int) -> dict[str, int | None]:
    return {**_size(size), "bound_bytes": bound_bytes}


def _size(size: Size | None) -> dict[str, int | None]:
    """None where it could not be measured: never 0."""
    return dict(size._asdict()) if size else {"entries": None, "bytes": None}


def _totals(totals: Totals) -> dict[str, float]:
    return {"hits": totals.hits, "misses": totals.misses, "seconds_saved": totals.seconds}


def _removed(removed: Removed) -> dict[str, Any]:
    tiers = {name: _size(getattr(removed, name)) for name in ("memory", "disk", "redis")}
    return {**tiers, "failed": list(removed.failed)}


def _remove_lists() -> tuple[int, list[str]]:
    """Delete lists of prompts that were sent for a prefill; how many, and what could not be."""
    removed, failed = 0, []
    folder = Path(folder_paths.get_temp_directory()) / LISTS
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            os.unlink(path)
            removed += 1
        except OSError as error:
            failed.append(f"{path.name} ({error.strerror or error})")
    return removed, failed


def _forget_totals() -> tuple[bool, list[str]]:
    """Start counting from zero; whether there was anything counted, and what could not be."""
    counted = SAVINGS.total() != Totals()
    try:
        SAVINGS.forget()
    except OSError as error:
        return False, [f"{SAVINGS.path.name} ({error.strerror or error})"]
    return counted, []


async def get_conditioning(request: web.Request) -> web.Response:
    """GET: the report."""
    return refused(request) or web.json_response(await asyncio.to_thread(report))


async def delete_conditioning(request: web.Request) -> web.Response:
    """DELETE: with unused_days=N what was not used for N days, with everything=true all traces."""
    if (refusal := refused(request)) is not None:
        return refusal
    try:
        wish = wish_of(request.query)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(await asyncio.to_thread(remove, wish))


def register() -> None:
    """Add the routes to ComfyUI's; called when the pack is loaded, before the server starts."""
    routes = PromptServer.instance.routes
    routes.get(PATH)(get_conditioning)
    routes.delete(PATH)(delete_conditioning)
