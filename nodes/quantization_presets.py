"""The presets of quantisation: those of the pack, and the user's own from a file."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths

from ..core import quantization
from ..core.quantization import Preset

log = logging.getLogger("qwen_vram")

Presets = dict[str, dict[str, Preset]]
_complained: set[str] = set()


def user_file() -> Path:
    """Where the user's own presets are looked for; usually there is none."""
    return Path(folder_paths.get_user_directory()) / "qwen_vram" / "quantization_presets.json"


def all_presets() -> Presets:
    """Presets by kind (core.quantization.KINDS) and name, for the loaders' lists; never raises.

    While the user's file is broken, the pack's alone: the loader says why when it runs.
    """
    try:
        return _merged()
    except ValueError as error:
        if str(error) not in _complained:  # lists are asked for often
            _complained.add(str(error))
            log.warning("%s", error)
        return quantization.presets()


def preset(kind: str, name: str) -> Preset:
    """The preset for a loader that runs. Raises ValueError: a sentence with the file and why."""
    known = _merged()[kind]
    if not isinstance(name, str) or name not in known:
        if not name:
            raise ValueError(f"No preset is chosen; choose {', '.join(known)}.")
        raise ValueError(
            f"There is no preset {name}; choose {', '.join(known)}, "
            f"or write it into {user_file()} under {kind}."
        )
    return known[name]


def _merged() -> Presets:
    """The pack's presets, and the user's beside them or in their place. Raises ValueError."""
    ours, theirs, file = quantization.presets(), {}, user_file()
    try:
        theirs = quantization.parse_presets(file.read_text(encoding="utf-8-sig"), str(file))
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    return {kind: {**ours[kind], **theirs.get(kind, {})} for kind in ours}
