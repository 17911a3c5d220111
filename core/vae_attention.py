"""The attention in the middle of Wan 2.1's VAE: everything sees everything, in slices of queries.

Its one head of 384 channels has no flash kernel, and its layer holds ten pictures of channels at
once. In slices only keys, values and the picture itself are whole. Each query sees all keys, so
the result is exact up to the order in which a kernel adds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .vae_tiles import Buffer, Load, dense

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_by_products(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention [b, 1, n, c] without a fused kernel: softmax(q k / sqrt(c)) v."""
    scores = torch.matmul(query, keys.transpose(-1, -2)).mul_(query.shape[-1] ** -0.5)
    return torch.matmul(torch.softmax(scores, -1), values)


# Torch's kernel for the CPU takes queries in blocks of 256 where there are 768 or more, and smaller
# ones below. Slices of whole blocks, none of them small, give the bits of the whole.
BLOCK, FEWEST = 256, 768


def slices(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) in slices of about `size`, cut at whole blocks where they have that many."""
    if size >= FEWEST:
        size = size // BLOCK * BLOCK
    cuts = list(range(start, stop, size))
    if size >= FEWEST and len(cuts) > 1 and stop - cuts[-1] < FEWEST:
        cuts.pop()
    return list(zip(cuts, [*cuts[1:], stop], strict=True))


def whole_layer(block: nn.Module, attend: Attend, x: Tensor) -> Tensor:
    """The layer's own forward pass [b, c, 1, h, w], operation by operation.

    ComfyUI's catches what its attention fails with and goes on with another kernel, whose bits
    differ (pytorch_attention in ldm/modules/diffusionmodules/model.py). Here the failure arrives.
    """
    b, c, t, h, w = x.shape
    flat = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
    every = block.to_qkv(block.norm(flat)).chunk(3, dim=1)
    shape = every[0].shape
    query, keys, values = (
        each.view(*shape[:1], 1, shape[1], -1).transpose(2, 3).contiguous() for each in every
    )
    del every
    found = attend(query, keys, values).transpose(2, 3).reshape(shape)
    found = block.proj(found)
    return found.reshape(b, t, c, h, w).permute(0, 2, 1, 3, 4) + x


class AttentionSlices:
    """The layer over `x` [b, c, 1, h, w], some positions at a time; its result takes their place.

    `step` may fail; what is done stays done. `x` may lie in the RAM: `load` brings a part of it
    to the device. `block` has a norm over channels and two 1x1 convolutions, to_qkv and proj;
    with all positions in one slice `whole` is called. `fewest`: positions of the smallest slice.
    """

    def __init__(
        self,
        block: nn.Module,
        x: Buffer,
        size: int,
        attend: Attend,
        load: Load,
        whole: Load,
        fewest: int = BLOCK,
    ) -> None:
        self.block, self.x, self.attend, self.load = block, x, attend, load
        self.whole, self.fewest = whole, fewest
        self.count = x.shape[-2] * x.shape[-1]
        self.keys = self.values = None
        self.pending = deque(slices(0, self.count, size))

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Those that may go to the RAM."""
        return (self.x,)

    @property
    def size(self) -> int:
        """Positions of the next slice."""
        start, stop = self.pending[0]
        return stop - start

    def step(self) -> None:
        """Do the first pending slice."""
        if self.size == self.count:
            # Its output may have another layout, on which the kernels behind it depend.
            self.x.tensor = self.whole(self.load(self.x.tensor)).to(self.x.device)
        else:
            if self.keys is None:
                self._make_keys()
            self._answer(*self.pending[0])
        self.pending.popleft()
        if not self.pending:
            self.keys = self.values = None

    def shrink(self) -> bool:
        """Half the size from here on; False if it is the smallest already."""
        before, half = self.size, max(self.fewest, self.size // 2)
        if before > half:
            self.pending = deque(slices(self.pending[0][0], self.count, half))
        return self.size < before

    def _flat(self) -> Tensor:
        """x as [b, c, 1, n]."""
        return self.x.tensor.view(*self.x.shape[:2], 1, -1)

    def _projected(self, start: int, stop: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A part of x as [b, c, 1, n], and its queries, keys and values as [b, n, c]."""
        part = dense(self.load(self._flat()[..., start:stop]), self._flat())
        every = self.block.to_qkv(self.block.norm(part)).chunk(3, dim=1)
        return part, tuple(each.flatten(2).transpose(1, 2) for each in every)

    def _make_keys(self) -> None:
        """Of all positions. Nothing is kept if it fails half-way."""
        keys = values = None
        for start, stop in slices(0, self.count, self.size):
            _, (_, key, value) = self._projected(start, stop)
            if keys is None:
                keys = key.new_empty(key.shape[0], 1, self.count, key.shape[-1])
                values = torch.empty_like(keys)
            keys[:, 0, start:stop] = key
            values[:, 0, start:stop] = value
        self.keys, self.values = keys, values

    def _answer(self, start: int, stop: int) -> None:
        part, (query, _, _) = self._projected(start, stop)
        found = self.attend(query[:, None].contiguous(), self.keys, self.values)[:, 0]
        found = self.block.proj(found.transpose(1, 2).reshape(part.shape))
        self._flat()[..., start:stop] = found + part
