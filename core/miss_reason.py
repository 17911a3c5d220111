"""Why an entry was not found, told by the parts of its key and those of what is stored."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PICTURE = re.compile(r"image ?\d*|pixels")  # parts of a key that are a picture
# Nothing with the same first part, called "text", is known.
NEW = "new text"
NEW_PICTURE = "new image"  # of a node that has no text, but a picture, as VAE Encode
_TEXT_ENCODER = "nodes before clip"  # a part of what has a text


def miss_reason(parts: dict[str, str], known: Sequence[dict[str, str]]) -> str:
    """Which part of a key is new against `known` ones, in words; parts are digests by their names.

    Only the first difference in the order of `parts` is told; the later ones follow from it.
    """
    same_text = [p for p in known if p.get("text") == parts["text"]]
    if not same_text:
        return NEW_PICTURE if _is_of_a_picture(parts) else NEW
    seen = {p[name] for p in known for name in p if _PICTURE.fullmatch(name)}
    different = min((_differences(parts, p, seen) for p in same_text), key=len)
    return different[0] if different else "evicted"


def _is_of_a_picture(parts: dict[str, str]) -> bool:
    return _TEXT_ENCODER not in parts and any(_PICTURE.fullmatch(name) for name in parts)


def _differences(parts: dict[str, str], stored: dict[str, str], seen: set[str]) -> list[str]:
    """What is new about `parts`, in their order, then what they have no longer.

    A picture that is not among those `seen` is a new one: nothing was changed about it.
    """
    different = [name for name in parts if stored.get(name) != parts[name]]
    new = {n for n in different if _PICTURE.fullmatch(n) and parts[n] not in seen}
    changed = [f"new {_called(n)}" if n in new else f"{_called(n)} changed" for n in different]
    return changed + [f"{_called(name)} is gone" for name in stored if name not in parts]


def _called(name: str) -> str:
    """What users call a part of a key."""
    return "image" if name == "pixels" else name
