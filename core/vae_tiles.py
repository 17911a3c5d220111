"""A chain of layers over tiles, exactly: every tile brings the halo that its kernels reach.

The only layer of Wan 2.1's VAE that looks beyond a neighbourhood is the attention of its middle.
Everything before and behind it is a chain of convolutions, so a tile of its output depends on a
rectangle of its input, which follows from kernels, strides, paddings and factors. Lengths and
positions are plain ints along one axis; both axes are alike.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Step(NamedTuple):
    """What one convolution, padding or upsampling does: first it scales, then it convolves.

    `channels_out` is 0 where channels stay as they are; `first` marks the first step of a layer.
    """

    kernel: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    scale: int = 1
    channels_in: int = 0
    channels_out: int = 0
    first: bool = False

    def length(self, size: int) -> int:
        """Positions that come out of `size` positions."""
        return (size * self.scale + self.before + self.after - self.kernel) // self.stride + 1

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """Positions that go into [start, stop); paddings count, so they may lie outside."""
        first = start * self.stride - self.before
        last = (stop - 1) * self.stride - self.before + self.kernel
        return first // self.scale, -(-last // self.scale)


Steps = tuple[Step, ...]


def steps_of(layer: nn.Module) -> Steps:
    """The steps of one layer, in the order of its modules; a parallel 1x1 shortcut changes nothing.

    Raises ValueError for a layer whose axes are not alike.
    """
    found = [step for part in layer.modules() if (step := _step(part)) is not None]
    channels = 0
    for i in reversed(range(len(found))):  # paddings and upsampling: as many as come behind them
        channels = found[i].channels_in or channels
        found[i] = found[i]._replace(channels_in=channels, first=i == 0)
    return tuple(found)


def _step(part: nn.Module) -> Step | None:
    """One module without parts, or None if it works on each position alone."""
    if isinstance(part, nn.modules.conv._ConvNd):
        if len(part.kernel_size) == 3 and part.kernel_size[0] > 1 and part.kernel_size[-1] == 1:
            return None  # over time alone: a single picture skips it
        shape = part.kernel_size, part.stride, part.padding, part.dilation
        if any(values[-1] != values[-2] for values in shape):
            raise ValueError(f"{type(part).__name__} with unequal axes")
        kernel, stride, padding, dilation = (values[-1] for values in shape)
        reach = (kernel - 1) * dilation + 1
        channels = part.in_channels, part.out_channels
        return Step(reach, stride, padding, padding, 1, *channels)
    if isinstance(part, nn.Upsample):
        scale = part.scale_factor
        factors = set(scale) if isinstance(scale, tuple) else {scale}
        factor = int(factors.pop() or 0)
        if factors or scale not in (factor, (factor, factor)) or "nearest" not in part.mode:
            raise ValueError(f"{type(part).__name__} {part.extra_repr()}")
        return Step(scale=factor)
    if isinstance(part, nn.ZeroPad2d):
        left, right, top, bottom = part.padding
        if (left, right) != (top, bottom):
            raise ValueError(f"ZeroPad2d of {part.padding}")
        return Step(before=left, after=right)
    return None


class Piece(NamedTuple):
    """A tile along one axis: [start, stop) of the output, and of the source that it takes."""

    start: int
    stop: int
    source_start: int
    source_stop: int


def scale_of(steps: Steps) -> tuple[int, int]:
    """By how much the steps enlarge and by how much they reduce."""
    return math.prod(s.scale for s in steps), math.prod(s.stride for s in steps)


def lengths(steps: Steps, size: int) -> list[int]:
    """Positions before the first step and behind each one."""
    found = [size]
    for step in steps:
        found.append(step.length(found[-1]))
    return found


def reach(steps: Steps, size: int, start: int, stop: int) -> tuple[int, int]:
    """The source positions that output [start, stop) depends on, of `size`; not one more."""
    for step, length in zip(reversed(steps), reversed(lengths(steps, size)[:-1]), strict=True):
        start, stop = step.needed(start, stop)
        start, stop = max(0, start), min(length, stop)
    return start, stop


def piece(steps: Steps, size: int, start: int, stop: int) -> Piece:
    """The source of output [start, stop), from a multiple of the stride on, for the same phase."""
    stride = scale_of(steps)[1]
    first, last = reach(steps, size, start, stop)
    return Piece(start, stop, first // stride * stride, min(size, -(-last // stride) * stride))


def split(start: int, stop: int, parts: int, unit: int) -> list[tuple[int, int]]:
    """[start, stop) in parts of near equal length, cut at multiples of `unit`."""
    units = -(-(stop - start) // unit)
    parts = max(1, min(parts, units))
    cuts = [start + units * i // parts * unit for i in range(parts)] + [stop]
    return list(zip(cuts, cuts[1:], strict=False))


class Axis(NamedTuple):
    """The tiles along an axis; per step the longest, the shortest and the sum, as by `lengths`."""

    pieces: tuple[Piece, ...]
    longest: tuple[int, ...]
    shortest: tuple[int, ...]
    total: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def axis(steps: Steps, size: int, parts: int) -> Axis:
    """`size` source positions, whose output is made in `parts` tiles."""
    up = scale_of(steps)[0]
    cuts = split(0, lengths(steps, size)[-1], parts, up)
    pieces = tuple(piece(steps, size, *cut) for cut in cuts)
    every = [lengths(steps, p.source_stop - p.source_start) for p in pieces]
    columns = list(zip(*every, strict=True))
    return Axis(pieces, *(tuple(map(how, columns)) for how in (max, min, sum)))


# What a convolution takes beside its input and output, as a part of both: its workspace, and the
# copies that normalising makes before it. cuDNN's workspace is larger where channels are many.
WORKSPACE = 1.0
DEEP, DEEP_FACTOR = 384, 1.25


def tile_bytes(
    steps: Steps, heights: Sequence[int], widths: Sequence[int], element_size: int
) -> int:
    """The peak of a tile whose lengths at every step are these."""
    peak = held = 0.0
    for i, step in enumerate(steps):
        before, behind = heights[i] * widths[i], heights[i + 1] * widths[i + 1]
        if step.first:
            held = step.channels_in * before  # a layer's input lives as long as it runs
        moved = step.channels_in * before + (step.channels_out or step.channels_in) * behind
        factor = 1 + WORKSPACE if step.channels_out else 1
        if step.channels_out and step.channels_in >= DEEP:
            factor *= DEEP_FACTOR
        peak = max(peak, held + factor * moved)
    return int(peak * element_size)


# On the CPU torch chooses the kernel of a convolution by channels times rows, and for pictures
# without a time axis by all of their elements (20480 in ATen's ConvParams::use_mkldnn); products of
# few columns round differently, too. So there tiles keep all rows and are never smaller than this.
# With one thread the bits are then those of the whole in all that has been tried; no rule of torch
# promises it, and with more threads some differ.
FEW = 1 << 16


def are_few(steps: Steps, heights: Sequence[int], widths: Sequence[int]) -> bool:
    """Whether a convolution of such a tile has so few elements that another kernel may do it."""
    return any(
        s.channels_out and s.channels_in * h * w < FEW
        for s, h, w in zip(steps, heights, widths, strict=False)
    )


def work(steps: Steps, rows: Axis, columns: Axis) -> int:
    """Multiplications of all tiles of a grid."""
    return sum(
        s.channels_in * s.channels_out * s.kernel**2 * h * w
        for s, h, w in zip(steps, rows.total[1:], columns.total[1:], strict=True)
    )


# ---------------------------------------------------------------------------------- running it
Rectangle = tuple[Piece, Piece]
Load = Callable[[Tensor], Tensor]
SMALLEST = 8  # units of a segment along an axis, below which a tile is not cut again


def strides_like(shape: Sequence[int], like: Tensor) -> tuple[int, ...]:
    """Of a tensor without gaps whose axes lie in memory in the order of those of `like`.

    Kernels of convolutions and sums are chosen by it, also by the axes of one position.
    """
    strides, step = [0] * len(shape), 1
    for place in sorted(range(like.ndim), key=lambda place: (like.stride(place), -place)):
        strides[place] = step
        step *= shape[place]
    return tuple(strides)


def dense(part: Tensor, like: Tensor) -> Tensor:
    """A part of `like` without gaps, its axes in the same order."""
    strides = strides_like(part.shape, like)
    if part.stride() == strides:
        return part
    return torch.empty_strided(part.shape, strides, dtype=part.dtype, device=part.device).copy_(
        part
    )


class Buffer:
    """Whole pictures of channels [b, c, 1, h, w] between two segments; they can go to the RAM.

    They are made when the first tile is written, in that tile's layout.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = tuple(shape), device, dtype
        self.tensor: Tensor | None = None
        self.movable, self.lacking = True, False

    @classmethod
    def of(cls, tensor: Tensor) -> Buffer:
        """Pictures that somebody else has: they stay where they are."""
        buffer = cls(tensor.shape, tensor.device, tensor.dtype)
        buffer.tensor, buffer.movable = tensor, False
        return buffer

    def write(self, rows: slice, columns: slice, tile: Tensor) -> None:
        """A rectangle, from a tile of the same size, of whose channels the first ones are taken."""
        if self.tensor is None:
            strides = strides_like(self.shape, tile)
            self.lacking = True  # if memory runs out in the next line
            self.tensor = torch.empty_strided(
                self.shape, strides, dtype=self.dtype, device=self.device
            )
            self.lacking = False
        self.tensor[..., rows, columns].copy_(tile[:, : self.shape[1]])

    def release(self) -> None:
        """Nobody needs them any more."""
        if self.movable:
            self.tensor = None

    def to_ram(self) -> bool:
        """Move them; False if they are there already, or may not be moved."""
        if self.device.type == "cpu" or not self.movable:
            return False
        if self.tensor is not None:
            self.tensor = self.tensor.to("cpu")
        self.device = torch.device("cpu")
        return True


class Tiles:
    """A segment of the chain, from one buffer to another, tile by tile.

    `step` may fail; the tile then stays pending, and done ones stay done. `load` brings a part of
    the source to the device and dtype of the layers. `element_size` and `strips`: see Network.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        grid: tuple[int, int],
        buffers: tuple[Buffer, Buffer],
        load: Load,
        element_size: int,
        strips: bool = False,
    ) -> None:
        self.layers, self.load = layers, load
        self.element_size, self.strips = element_size, strips
        self.source, self.sink = buffers
        self.steps = tuple(step for layer in layers for step in steps_of(layer))
        self.size = self.source.shape[-2:]
        rows, columns = (axis(self.steps, s, n) for s, n in zip(self.size, grid, strict=True))
        self.pending = deque((r, c) for r in rows.pieces for c in columns.pieces)
        self.limit: int | None = None

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Those that may go to the RAM."""
        return self.source, self.sink

    def step(self) -> None:
        """Do the first pending tile."""
        rows, columns = self.pending[0]
        source = self.source.tensor
        tile = source[
            ..., rows.source_start : rows.source_stop, columns.source_start : columns.source_stop
        ]
        tile = dense(self.load(tile), source)
        for layer in self.layers:
            tile = layer(tile)
        up, down = scale_of(self.steps)
        outer = [slice(p.start, p.stop) for p in (rows, columns)]
        top, left = (p.source_start * up // down for p in (rows, columns))
        inner = tile[..., rows.start - top : rows.stop - top, :]
        self.sink.write(*outer, inner[..., columns.start - left : columns.stop - left])
        self.pending.popleft()

    def bytes_of(self, rectangle: Rectangle) -> int:
        """The predicted peak of a tile."""
        return tile_bytes(self.steps, *self._lengths(rectangle), self.element_size)

    def fit(self, limit: int) -> None:
        """Cut pending tiles until each should take no more than `limit` bytes, or is smallest."""
        self.limit = limit
        self.pending = deque(part for tile in self.pending for part in self._cut(tile))

    def shrink(self) -> bool:
        """Tiles of half the bytes from here on; False if they are the smallest already."""
        first = self.pending[0]
        self.fit(self.bytes_of(first) // 2)
        return self.pending[0] != first

    def _cut(self, tile: Rectangle) -> Iterator[Rectangle]:
        unit = scale_of(self.steps)[0]
        sides = [(p.stop - p.start) // unit for p in tile]
        longer = 1 if self.strips else sides.index(max(sides))
        if self.bytes_of(tile) <= self.limit or sides[longer] < 2 * SMALLEST:
            yield tile
            return
        halves = split(tile[longer].start, tile[longer].stop, 2, unit)
        parts = [piece(self.steps, self.size[longer], *half) for half in halves]
        tiles = [(part, tile[1]) if longer == 0 else (tile[0], part) for part in parts]
        if self.strips and any(are_few(self.steps, *self._lengths(part)) for part in tiles):
            yield tile
            return
        for part in tiles:
            yield from self._cut(part)

    def _lengths(self, tile: Rectangle) -> list[list[int]]:
        return [lengths(self.steps, p.source_stop - p.source_start) for p in tile]
