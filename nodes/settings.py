"""What the user set in ComfyUI's settings dialog; js/settings.js declares the same ids."""

from __future__ import annotations

import json
import logging
import os
from typing import Any, NamedTuple

import folder_paths

log = logging.getLogger("qwen_vram")

KEEP_ALL, KEEP_OURS, KEEP_NOTHING = "all encode nodes", "nodes of Qwen VRAM", "nothing"
REDIS_VARIABLE = "QWEN_VRAM_REDIS_URL"  # for machines whose settings are not edited by hand


class Settings(NamedTuple):
    """Sizes in bytes, times in seconds."""

    keep: str = KEEP_ALL
    memory_bytes: int = 256 << 20
    disk_bytes: int = 2_000_000_000
    more_nodes: frozenset[str] = frozenset()
    redis_url: str = ""
    redis_seconds: int = 30 * 86400
    redis_bytes: int = 1_000_000_000


_read: tuple[tuple[int, int] | None, dict[str, Any]] = (None, {})


def settings() -> Settings:
    """As they are now. A value that makes no sense is reported once and the default used."""
    stored, usual = _stored(), Settings()
    keep = stored.get("QwenVRAM.Conditioning.Keep", usual.keep)
    if keep not in (KEEP_ALL, KEEP_OURS, KEEP_NOTHING):
        _complain("Keep", keep, f"{KEEP_ALL}, {KEEP_OURS} or {KEEP_NOTHING}; nothing is kept")
        keep = KEEP_NOTHING
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
    )


def _number(stored: dict[str, Any], name: str, unit: int, usual: int) -> int:
    value = stored.get(f"QwenVRAM.Conditioning.{name}")
    if value is None:
        return usual
    if type(value) in (int, float) and 0 <= value < 1e9:
        return int(value * unit)
    _complain(name, value, "a number of at least 0")
    return usual


def _stored() -> dict[str, Any]:
    """ComfyUI's settings file, read again when it changed; with several users, the first one's."""
    global _read
    path = os.path.join(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        stat = os.stat(path)
        version = (stat.st_mtime_ns, stat.st_size)
        if _read[0] != version:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            _read = (version, content if isinstance(content, dict) else {})
    except FileNotFoundError:
        _read = (None, {})
    except (OSError, ValueError) as error:  # being written, or damaged: what was read last counts
        log.warning("Cannot read ComfyUI's settings (%s); they are taken as they were.", error)
    return _read[1]


_complained: set[str] = set()


def _complain(name: str, value: Any, wanted: str) -> None:
    if name not in _complained:
        _complained.add(name)
        log.warning("The setting QwenVRAM.Conditioning.%s is %r, not %s.", name, value, wanted)
