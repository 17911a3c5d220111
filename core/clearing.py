"""What to free: levels, which of the loaded models, and what the workflow still needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from .graph_identity import strings_in

CACHE, MODELS, EVERYTHING = LEVELS = ("cache", "models", "everything")
DIFFUSION, TEXT, VAE, OTHER = KINDS = ("diffusion model", "text encoder", "VAE", "other")
FIELDS: dict[str, type] = {
    "level": str,
    "kinds": list,
    "keep_needed": bool,
    "prompt": dict,
    "client_id": str,
    "wait_seconds": float,
}
USUAL_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 10.0, 600.0
NOT_CHOSEN = "its kind was not chosen"
NEEDED = "the workflow needs it"
ON_CPU = "it computes on the CPU and takes no VRAM, or something still refers to it"
UNKNOWN = "it is not known which file it was made from, so the workflow may need it"

_HALF = re.compile(r"(.+)_(?:en|de)coder\.")  # nodes.py, VAELoader.load_taesd
_DIFFUSERS_FILE = re.compile(r"(diffusion_pytorch_|pytorch_)?model\.")  # comfy/diffusers_load.py


class Wish(NamedTuple):
    """What is to be freed. `kinds` and `keep_needed` count at the level models."""

    level: str
    kinds: frozenset[str] = frozenset(KINDS)
    keep_needed: bool = False


class Model(NamedTuple):
    """A model that ComfyUI has loaded: `files` it was made from, none if that is not known.

    `bytes` are those on its device.
    """

    name: str
    kind: str
    device: str
    bytes: int
    files: tuple[str, ...] = ()


def wish_of(fields: Mapping[str, Any]) -> Wish:
    """Read the fields of a request (`FIELDS`). Raises ValueError with a sentence."""
    level = fields.get("level")
    if level not in LEVELS:
        raise ValueError(f"level must be {', '.join(LEVELS[:-1])} or {LEVELS[-1]}.")
    if level != MODELS and (unused := sorted({"kinds", "keep_needed"} & fields.keys())):
        raise ValueError(f"{unused[0]} belongs to the level {MODELS}; leave it out.")
    kinds = fields.get("kinds", list(KINDS))
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"kinds must be a list of one or more of: {', '.join(KINDS)}.")
    keep_needed = fields.get("keep_needed", False)
    if keep_needed and "prompt" not in fields:
        raise ValueError("keep_needed needs the workflow: send it as prompt, in the API format.")
    if not 0 <= wait_of(fields) <= LONGEST_WAIT_SECONDS:
        raise ValueError(f"wait_seconds must be a number from 0 to {LONGEST_WAIT_SECONDS:.0f}.")
    return Wish(level, frozenset(kinds), keep_needed)


def wait_of(fields: Mapping[str, Any]) -> float:
    """How many seconds the answer may take."""
    return fields.get("wait_seconds", USUAL_WAIT_SECONDS)


def names_in(prompt: Mapping[str, Any]) -> frozenset[str]:
    """Every text in the inputs of an API-format prompt: the files that it names are among them."""
    inputs = [node.get("inputs") for node in prompt.values() if isinstance(node, dict)]
    return frozenset(_plain(text) for text in strings_in(inputs) if text)


def is_named(path: str, names: Collection[str]) -> bool:
    """Whether one of the names (from `names_in`) is this file, by its path's last parts.

    Two of ComfyUI's loaders name no file: Load VAE the two halves of a tiny autoencoder ("taesd")
    by their common beginning, and DiffusersLoader a folder of models.
    """
    parts = _plain(path).split("/")
    *folders, file = parts
    ways = [parts]
    if half := _HALF.match(file):
        ways.append([*folders, half[1]])
    if _DIFFUSERS_FILE.match(file):
        ways.append(folders[:-1])
    return any("/".join(way[i:]) in names for way in ways for i in range(len(way)))


def _plain(path: str) -> str:
    """With slashes, and in small letters: some systems write a file's name in several ways.

    A model of which only the case differs is then kept, which costs memory but no time.
    """
    return path.replace("\\", "/").lower()


def why_kept(model: Model, wish: Wish, names: Collection[str]) -> str:
    """Why this model stays where it is; empty if it is to be unloaded."""
    if wish.level == CACHE:
        return NOT_CHOSEN
    if model.kind not in wish.kinds:
        return NOT_CHOSEN
    if not wish.keep_needed:
        return ""
    if not model.files:
        return UNKNOWN
    return NEEDED if any(is_named(file, names) for file in model.files) else ""


def freed(before: Iterable[int | None], after: Iterable[int | None]) -> int | None:
    """By how much the first figure fell that was measured both times; below 0 if it rose."""
    for old, new in zip(before, after, strict=True):
        if old is not None and new is not None:
            return old - new
    return None
