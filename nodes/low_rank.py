"""What LoRAs and other patches ask of layers in a few bits, applied while the model computes.

A packed weight cannot take a difference without being quantised again, one in fp8 not without
being rounded. So a LoRA's two factors stay two factors: the layer adds B(Ax) to its product (Hu et
al. 2021, arXiv 2106.09685). Patches of other kinds are applied by the host's own function to the
dequantised weight, at every call.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

NAMES = {"lora": "LoRA with DoRA, offset or reshape", "loha": "LoHa", "lokr": "LoKr"}


class Patch(NamedTuple):
    """One patch of one weight: what the host keeps of it, in the host's order."""

    strength: float
    value: Any  # a WeightAdapterBase, ("diff", ...), ("set", ...), (tensor,), or a list of patches
    strength_model: float  # what the weight is multiplied with before
    offset: tuple[int, int, int] | None  # dimension, start, length
    function: Any


def factors_of(patch: Patch, shape: tuple[int, int]) -> tuple[Tensor, Tensor, float] | None:
    """(up (out, rank), down (rank, in), scale) of a plain LoRA of a weight (out, in), or None."""
    adapter = patch.value
    if type(adapter) is not LoRAAdapter or patch.strength_model != 1.0:
        return None
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    extras = (patch.offset, patch.function, mid, dora_scale, reshape)
    if any(extra is not None for extra in extras):
        return None
    up, down = up.flatten(1), down.flatten(1)  # factors of a 1x1 convolution are matrices too
    if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        return None
    scale = alpha / down.shape[0] if alpha is not None else 1.0
    return up, down, patch.strength * scale


def changes_nothing(patch: Patch) -> bool:
    """Whether it is of strength 0: then no bit may change, not even by rounding."""
    value = patch.value
    adds = isinstance(value, list) or (
        isinstance(value, WeightAdapterBase) and value.calculate_shape("") is None
    )
    return adds and patch.strength == 0 and patch.strength_model == 1.0


def fits(patch: Patch, shape: tuple[int, int], key: str) -> bool:
    """Whether a LoRA is for weights of this shape; if not, the console says that it is left out.

    So does the host, of one weight at a time, for LoRAs that were made for a larger model.
    """
    if type(patch.value) is not LoRAAdapter or patch.offset is not None:
        return True
    up, down, _, mid, _, reshape = patch.value.weights
    found = (up.shape[0], down.flatten(1).shape[1])
    if mid is not None or reshape is not None or found == shape:
        return True
    logging.warning("A LoRA for weights %s leaves out %s, which has %s.", found, key, shape)
    return False


class Layer:
    """The patches of one quantised weight, in the order in which they were added.

    The factors of all its LoRAs are one pair of matrices, copied to a device when it is first
    used there. Several devices' threads may ask at a time: each only for its own.
    """

    def __init__(self, key: str, shape: tuple[int, int], patches: tuple[Patch, ...]) -> None:
        self.key, self.shape, self.patches = key, shape, patches
        found = [factors_of(patch, shape) for patch in patches]
        self._factors = [f for f in found if f is not None]
        # A later patch may multiply what an earlier one added, so all go one way.
        self.low_rank = len(self._factors) == len(found)
        # Of all its LoRAs together; 0 if they are applied to the dequantised weight.
        self.rank = sum(down.shape[0] for _, down, _ in self._factors) if self.low_rank else 0
        self._numbers = self.rank * sum(shape)
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def bytes_of(self, dtype: torch.dtype) -> int:
        """What the factors take on a device."""
        return self._numbers * dtype.itemsize

    def factors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(down (rank, in), up (out, rank)) there, strengths and alpha in `up`, scaled in fp32."""
        copies = self._copies.get((device, dtype))
        if copies is None:
            # To the device first: it converts faster, and less goes over the bus.
            downs = [down.to(device).to(dtype) for _, down, _ in self._factors]
            ups = [(up.to(device).float() * scale).to(dtype) for up, _, scale in self._factors]
            copies = torch.cat(downs), torch.cat(ups, dim=1)
            self._copies[device, dtype] = copies
        return copies

    def resident_bytes(self, device: torch.device) -> int:
        """Bytes of the copies on a device; asked of every layer before each pass."""
        return sum(self.bytes_of(dtype) for place, dtype in list(self._copies) if place == device)

    def drop(self, device: torch.device) -> int:
        """Forget the copies on a device. Returns their bytes."""
        freed = self.resident_bytes(device)
        for place, dtype in list(self._copies):
            if place == device:
                self._copies.pop((place, dtype), None)
        return freed

    def apply(self, weight: Tensor) -> Tensor:
        """The dequantised weight with every patch, by the host's own function in fp32."""
        exact = weight.to(torch.float32, copy=True)
        return comfy.lora.calculate_weight(self.patches, exact, self.key).to(weight.dtype)


def kind_of(patch: Patch) -> str:
    """What a patch that is no plain LoRA is called in a report."""
    if isinstance(patch.value, WeightAdapterBase):
        return NAMES.get(patch.value.name, patch.value.name.upper())
    if isinstance(patch.value, list):
        return "another model's weights"
    return patch.value[0] if len(patch.value) == 2 else "difference"


@dataclass(frozen=True)
class Patches:
    """All that a patcher and its clones know of patches of quantised layers; never changed."""

    layers: Mapping[str, Layer] = field(default_factory=dict)
    loras: int = 0  # files (or calls) that brought plain LoRAs

    def plus(self, added: Iterable[tuple[str, tuple[int, int], Patch]]) -> Patches:
        """These and more; (key, shape of the weight, patch) each."""
        layers, loras = dict(self.layers), 0
        for key, shape, patch in added:
            if changes_nothing(patch) or not fits(patch, shape, key):
                continue
            before = layers[key].patches if key in layers else ()
            layers[key] = Layer(key, shape, (*before, patch))
            loras |= factors_of(patch, shape) is not None
        return Patches(layers, self.loras + loras)

    def without(self, key: str) -> Patches:
        """These, less those of one weight."""
        return Patches({k: v for k, v in self.layers.items() if k != key}, self.loras)

    def report(self, dtype: torch.dtype) -> str:
        """One line: how they are applied; "" without any."""
        plain = [layer for layer in self.layers.values() if layer.low_rank]
        parts = []
        if plain:
            rank = max(layer.rank for layer in plain)
            megabytes = sum(layer.bytes_of(dtype) for layer in plain) / 1e6
            many = "LoRA" if self.loras == 1 else "LoRAs"
            parts.append(f"{self.loras} {many} added at run time (rank {rank}, {megabytes:.0f} MB)")
        slow = [layer for layer in self.layers.values() if not layer.low_rank]
        kinds = Counter(kind for layer in slow for kind in _slow_kinds(layer))
        parts += [
            f"{kind} on {count} layers computed on dequantised weights (slower)"
            for kind, count in kinds.items()
        ]
        return "; ".join(parts)


def _slow_kinds(layer: Layer) -> set[str]:
    return {kind_of(p) for p in layer.patches if factors_of(p, layer.shape) is None}
