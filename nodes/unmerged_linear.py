"""Linear layers whose patches stay apart from the weight, and are applied while they compute.

For weights that a patch cannot enter without rounding all of them again: packed ones, and fp8.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn.functional import linear

from .low_rank import Layer


class Dequantized:
    """A weight function of the host's: the patches of one layer, on its dequantised weight."""

    def __init__(self, layer: Layer) -> None:
        self.layer = weakref.ref(layer)

    def __call__(self, weight: Tensor) -> Tensor:
        """(out, in), patched; as it was when the patcher that had the patches is gone."""
        layer = self.layer()
        return weight if layer is None else layer.apply(weight)


class UnmergedLinear:
    """What is added to a Linear of the host's; goes before it in the order of its classes.

    `patches` lives as long as the patcher that is loaded: a module never keeps a LoRA alive.
    """

    patches: weakref.ref[Layer] | None = None
    host_merges = False  # whether the host, too, can patch such a weight

    @property
    def takes_patches(self) -> bool:
        """Whether patches of the weight that it has now are applied at run time."""
        raise NotImplementedError

    def dense_weight(self, device: torch.device | None = None) -> Tensor:
        """(out, in) without patches, in the dtype that it computes in; on `device` if given."""
        raise NotImplementedError

    @property
    def layer(self) -> Layer | None:
        """The patches of the patcher that is loaded."""
        return self.patches() if self.patches is not None else None

    def patch_with(self, layer: Layer | None, device: torch.device) -> None:
        """Take these patches, or none; copies of other ones leave `device`."""
        before = self.layer
        if before is not None and before is not layer:
            before.drop(device)
        self.patches = weakref.ref(layer) if layer is not None else None
        own = [Dequantized(layer)] if layer is not None and not layer.low_rank else []
        others = [f for f in self.weight_function if not isinstance(f, Dequantized)]
        if own or len(others) != len(self.weight_function):
            self.weight_function = own + others  # as in the host: patches first, wrappers then

    def with_loras(self, out: Tensor, x: Tensor) -> Tensor:
        """out (..., out) + B(Ax) of x (..., in); as it is where no LoRA is loaded.

        In place where it can be, for the feed-forward's output is the model's largest tensor.
        """
        layer = self.layer
        if layer is None or not layer.low_rank:
            return out
        down, up = layer.factors(x.device, x.dtype)
        hidden = linear(x, down)
        if out.requires_grad or not out.is_contiguous():
            return out + linear(hidden, up)
        out.view(-1, out.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t())
        return out
