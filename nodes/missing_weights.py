"""Say that a file lacks weights of its model.

The host logs their names and goes on, with whatever lay in memory where they belong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..core.checkpoint import CheckpointError, Header


class Incompatible(NamedTuple):
    """What torch hands to a hook after it has loaded a state dict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Record:
    """What the last state dict that a module was given did not have."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, module: torch.nn.Module, keys: Incompatible) -> None:
        """A hook of torch's `register_load_state_dict_post_hook`."""
        self.names = [*keys.missing_keys, *_without_weight(module)]


def _without_weight(root: torch.nn.Module) -> list[str]:
    """Linear layers whose weight the host's operations for quantised files did not find: they
    set it to None and count it nowhere."""
    layers = ((name, module) for name, module in root.named_modules() if _is_linear(module))
    return [f"{name}.weight" for name, module in layers if module.weight is None]


def _is_linear(module: torch.nn.Module) -> bool:
    """By what the host's linear layers have in common; those for quantised files are no
    torch.nn.Linear."""
    return hasattr(module, "in_features") and hasattr(module, "weight")


def refuse(header: Header, missing: Sequence[str], parts: Sequence[str] = ("",)) -> None:
    """Raise CheckpointError if a weight is `missing` whose name begins with one of `parts`."""
    names = list(dict.fromkeys(name for name in missing if name.startswith(tuple(parts))))
    if names:
        more = f" and {len(names) - 1:,} more of the model's weights" if names[1:] else ""
        raise CheckpointError(
            f"{os.path.basename(header.path)} lacks the weight {names[0]}{more}; download the "
            "complete file."
        )
