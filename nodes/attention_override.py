"""One way into ComfyUI's single slot for overrides of attention.

ComfyUI calls transformer_options["optimized_attention_override"] as
`override(function, q, k, v, heads, ...)` instead of `function(q, k, v, heads, ...)`. It is one
slot, and several patches want it. A chain keeps what stood there and calls it as its own function:

    reference cache -> what other nodes put there -> backend -> ComfyUI's function

Slicing (slicing.py) needs no place in the chain: its slices of queries come one by one through all
of it, if every part says that it allows that (`sliceable = True`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .foreign import itemwise, sliceable
from .transformer_options import Options

SLOT = "optimized_attention_override"
REFERENCE_CACHE, BACKEND = "qwen_vram.reference_cache", "qwen_vram.attention"
AROUND, WITHIN = (REFERENCE_CACHE,), (BACKEND,)  # what other nodes put there; outermost first
Attend = Callable[..., Tensor]  # (q, k, v, heads, mask=None, ..., **more) -> Tensor
Override = Callable[..., Tensor]  # (Attend, q, k, v, heads, mask=None, ..., **more) -> Tensor


class Chain:
    """Overrides of this pack by their keys, and what stood in the slot before them."""

    def __init__(self, parts: dict[str, Override], foreign: Override | None) -> None:
        self.parts, self.foreign = parts, foreign

    @property
    def sliceable(self) -> bool:
        """Whether queries may come in slices, each with all keys and values."""
        return all(map(sliceable, self._every()))

    @property
    def itemwise(self) -> bool:
        """Whether each picture of a batch is computed as if it were alone."""
        return all(map(itemwise, self._every()))

    def _foreign(self) -> Override | None:
        """What stood in the slot; the backend is told of each call that it has answered: whether
        it passes all of them on can be seen by that alone."""
        told = getattr(self.parts.get(BACKEND), "asked_first", None)
        foreign = self.foreign
        if foreign is None or told is None:
            return foreign

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            """One call."""
            output = foreign(*args, **kwargs)
            told()
            return output

        return counted

    def _every(self) -> list[Override]:
        return [*self.parts.values(), *([self.foreign] if self.foreign else [])]

    def __call__(self, function: Attend, *args: Any, **kwargs: Any) -> Tensor:
        """What ComfyUI calls."""
        around, within = ([self.parts.get(key) for key in keys] for keys in (AROUND, WITHIN))
        for override in reversed([*around, self._foreign(), *within]):
            if override is not None:
                function = partial(override, function)
        return function(*args, **kwargs)


def put(options: Options, key: str, override: Override | None) -> None:
    """Set, replace or (None) take out an override of this pack. `options`: transformer_options
    that are the caller's own: a clone's, or a copy for one forward pass.

    A slot that another node fills afterwards is that node's: `has` tells.
    """
    if key not in (*AROUND, *WITHIN):
        raise ValueError(f"{key} has no place in the order of overrides.")
    before = options.get(SLOT)
    parts, foreign = (before.parts, before.foreign) if isinstance(before, Chain) else ({}, before)
    parts = {name: part for name, part in parts.items() if name != key}
    if override is not None:
        parts[key] = override
    if parts:
        options[SLOT] = Chain(parts, foreign)
    elif foreign is not None:
        options[SLOT] = foreign
    else:
        options.pop(SLOT, None)


def has(options: Options, key: str) -> bool:
    """Whether an override of this pack still is in the slot."""
    chain = options.get(SLOT)
    return isinstance(chain, Chain) and key in chain.parts


def foreign_in(options: Options) -> Override | None:
    """What another node put into the slot, or None."""
    before = options.get(SLOT)
    return before.foreign if isinstance(before, Chain) else before
