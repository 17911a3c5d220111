"""What the user set in ComfyUI's settings dialog; js/settings.js declares the same ids."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
from comfy.cli_args import args

log = logging.getLogger("qwen_vram")

FILE = "comfy.settings.json"

KEEP_ALL, KEEP_OURS, KEEP_NOTHING = "all encode nodes", "nodes of Qwen VRAM", "nothing"
WARM_UP_OFF, WARM_UP_OPENED, WARM_UP_START = "off", "workflow opened", "ComfyUI starts"
REDIS_VARIABLE = "QWEN_VRAM_REDIS_URL"  # for machines whose settings are not edited by hand


class Settings(NamedTuple):
    """Sizes in bytes, times in seconds."""

    keep: str = KEEP_ALL
    memory_bytes: int = 256_000_000
    disk_bytes: int = 2_000_000_000
    more_nodes: frozenset[str] = frozenset()
    redis_url: str = ""
    redis_seconds: int = 30 * 86400
    redis_bytes: int = 1_000_000_000
    warm_up: str = WARM_UP_OFF


_read: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}


def settings() -> Settings:
    """As they are now. A value that makes no sense is reported once and the default used.

    With several users (--multi-user) the strictest choice of what is kept counts for all, a warmed
    up workflow included, and the first user's choice for the rest: the cache is one for the
    installation.
    """
    everyone, usual = _stored(), Settings()
    chosen = [_keep(stored) for stored in everyone]
    keep = next((k for k in (KEEP_NOTHING, KEEP_OURS) if k in chosen), usual.keep)
    # The file of the one at start is for all: a user who has not asked for it is not in it.
    wanted = [_warm_up(stored) for stored in everyone] or [WARM_UP_OFF]
    warm_up = next((w for w in (WARM_UP_OFF, WARM_UP_OPENED) if w in wanted), WARM_UP_START)
    stored = {name: value for one in reversed(everyone) for name, value in one.items()}
    more = str(stored.get("QwenVRAM.Conditioning.MoreNodes") or "")
    url = stored.get("QwenVRAM.Conditioning.RedisURL") or os.environ.get(REDIS_VARIABLE, "")
    return Settings(
        keep,
        _number(stored, "MemoryMB", 10**6, usual.memory_bytes),
        _number(stored, "DiskGB", 10**9, usual.disk_bytes),
        frozenset(more.replace(",", " ").split()),
        str(url).strip(),
        _number(stored, "RedisDays", 86400, usual.redis_seconds),
        _number(stored, "RedisGB", 10**9, usual.redis_bytes),
        warm_up,
    )


def words_for_children() -> list[list[str]]:
    """What each user avoids and allows beside the list of Kind Words: two texts per user."""
    names = ("QwenVRAM.KindWords.AlsoAvoid", "QwenVRAM.KindWords.AlwaysAllow")
    return [[_text(stored, name) for name in names] for stored in _stored()]


def locale() -> str:
    """zh if the first user chose Chinese for the frontend, else en."""
    everyone = _stored()
    chosen = str(everyone[0].get("Comfy.Locale", "")) if everyone else ""
    return "zh" if chosen.startswith("zh") else "en"


def _text(stored: dict[str, Any], name: str) -> str:
    value = stored.get(name, "")
    if isinstance(value, str):
        return value
    _complain(name, value, "a text")
    return ""


def _number(stored: dict[str, Any], name: str, unit: int, usual: int) -> int:
    value = stored.get(f"QwenVRAM.Conditioning.{name}")
    if value is None:
        return usual
    if type(value) in (int, float) and 0 <= value < 1e9:
        return int(value * unit)
    _complain(f"QwenVRAM.Conditioning.{name}", value, "a number of at least 0")
    return usual


def _keep(stored: dict[str, Any]) -> str:
    keep = stored.get("QwenVRAM.Conditioning.Keep", KEEP_ALL)
    if keep not in (KEEP_ALL, KEEP_OURS, KEEP_NOTHING):
        _complain(
            "QwenVRAM.Conditioning.Keep",
            keep,
            f"{KEEP_ALL}, {KEEP_OURS} or {KEEP_NOTHING}; nothing is kept",
        )
        return KEEP_NOTHING
    return keep


def _warm_up(stored: dict[str, Any]) -> str:
    chosen = stored.get("QwenVRAM.WarmUp.Automatic", WARM_UP_OFF)
    if chosen in (WARM_UP_OFF, WARM_UP_OPENED, WARM_UP_START):
        return chosen
    options = f"{WARM_UP_OFF}, {WARM_UP_OPENED} or {WARM_UP_START}"
    _complain("QwenVRAM.WarmUp.Automatic", chosen, options)
    return WARM_UP_OFF


def _stored() -> list[dict[str, Any]]:
    """Every user's settings, the first user's first; read again when they changed."""
    base = Path(folder_paths.get_user_directory())
    users = sorted(base.glob("*/" + FILE)) if args.multi_user else [base / "default" / FILE]
    return [_one(str(path)) for path in users]


def _one(path: str) -> dict[str, Any]:
    try:
        stat = os.stat(path)
        version = (stat.st_mtime_ns, stat.st_size)
        if path not in _read or _read[path][0] != version:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            _read[path] = (version, content if isinstance(content, dict) else {})
        return _read[path][1]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # being written, or damaged: what was read last counts
        log.warning("Cannot read %s (%s). What was read last counts.", FILE, error)
        nothing = {"QwenVRAM.Conditioning.Keep": KEEP_NOTHING}  # who knows what was chosen
        return _read[path][1] if path in _read else nothing


_complained: set[str] = set()


def _complain(name: str, value: Any, wanted: str) -> None:
    if name not in _complained:
        _complained.add(name)
        log.warning("The setting %s is %r, not %s.", name, value, wanted)
