"""How a VAE goes through a picture within a number of bytes, by shapes alone.

The chain before the attention and the one behind it are cut into segments. Between two segments
lies a whole picture of channels (a buffer); within one nothing is ever whole. A cut costs memory
and saves halo, so the plan with the fewest multiplications is taken of those that fit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .vae_attention import BLOCK
from .vae_tiles import SMALLEST, Axis, Steps, are_few, axis, lengths, scale_of, tile_bytes, work

PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
# The attention's peak in pictures of its channels: the layer's own, keys and values alone, and
# what a slice takes for each of its positions. Scores only where no fused kernel avoids them.
LAYER, KEYS, SLICE, SCORES = 11, 2, 12, 3
WHOLE_POSITIONS = 2**18  # 4096 x 4096 px; above it, slices let interrupt and progress in
SLICE_SCORES = 2**36
# Multiplications that a card does in the time in which a byte goes to the RAM or back.
PER_BYTE_MOVED = 5000
COMFORT = 1.1  # so much more work is worth to leave other models where they are


class Network(NamedTuple):
    """One direction of a VAE: the steps of its layers before and behind the attention.

    `element_size`: bytes of an element, times the pictures that go at once. `fused`: attention
    makes no table of scores. `in_ram`: the device computes in the RAM, so nothing can move there.
    `strips`: tiles keep all rows and are not small, for the CPU (see `vae_tiles.FEW`).
    """

    before: tuple[Steps, ...]
    after: tuple[Steps, ...]
    element_size: int
    fused: bool
    in_ram: bool = False
    strips: bool = False

    @property
    def channels(self) -> int:
        """Of the attention."""
        return _channels_at(self.after, 0)


class Segment(NamedTuple):
    """Layers [first, last) of a part, in `rows` times `columns` tiles."""

    first: int
    last: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Plan:
    """One way through a picture. `attention`: positions of a slice. `in_ram`: of its buffers."""

    before: tuple[Segment, ...]
    attention: int
    after: tuple[Segment, ...]
    in_ram: bool
    bytes: int
    cost: int


def _channels_at(part: tuple[Steps, ...], layer: int) -> int:
    """What goes into a layer, or comes out of the last one."""
    for steps in part[layer:]:
        if steps:
            return steps[0].channels_in
    made = [s.channels_out for steps in part for s in steps if s.channels_out]
    return made[-1]


def _flat(part: tuple[Steps, ...], first: int, last: int) -> Steps:
    return tuple(step for steps in part[first:last] for step in steps)


def _sizes(part: tuple[Steps, ...], size: int) -> list[int]:
    """Lengths before every layer and behind the last."""
    return [lengths(_flat(part, 0, i), size)[-1] for i in range(len(part) + 1)]


def shape_before(
    part: tuple[Steps, ...], layer: int, height: int, width: int
) -> tuple[int, int, int]:
    """Channels, height and width of what goes into a layer, or comes out of the last one."""
    sizes = (_sizes(part, size)[layer] for size in (height, width))
    return _channels_at(part, layer), *sizes


# ------------------------------------------------------------------------------------ a segment
class Grid(NamedTuple):
    """Tiles of a segment, the peak of the largest, and the multiplications of all."""

    rows: int
    columns: int
    bytes: int
    cost: int


def _grid(steps: Steps, rows: Axis, columns: Axis, element_size: int) -> Grid:
    peak = tile_bytes(steps, rows.longest, columns.longest, element_size)
    return Grid(len(rows.pieces), len(columns.pieces), peak, work(steps, rows, columns))


@functools.lru_cache(maxsize=1024)
def grid_within(
    steps: Steps, size: tuple[int, int], limit: int, element_size: int, strips: bool
) -> Grid:
    """The cheapest grid whose tiles take at most `limit` bytes, else the one with the smallest."""
    height, width = size

    def parts_of(size: int) -> list[int]:
        """Numbers of tiles along an axis."""
        most = max(1, lengths(steps, size)[-1] // (scale_of(steps)[0] * SMALLEST))
        return sorted({min(n, most) for n in PARTS})

    found = []
    for rows in [1] if strips else parts_of(height):
        row_axis = axis(steps, height, rows)
        for columns in parts_of(width):
            column_axis = axis(steps, width, columns)
            if strips and columns > 1 and are_few(steps, row_axis.shortest, column_axis.shortest):
                break
            found.append(_grid(steps, row_axis, column_axis, element_size))
            if found[-1].bytes <= limit:
                break
    fitting = [grid for grid in found if grid.bytes <= limit]
    if fitting:
        return min(fitting, key=lambda grid: (grid.cost, grid.rows * grid.columns))
    return min(found, key=lambda grid: (grid.bytes, grid.cost))


# --------------------------------------------------------------------------------------- a part
class Part(NamedTuple):
    """The layers on one side of the attention, for one picture; bytes of buffers at its ends."""

    layers: tuple[Steps, ...]
    height: int
    width: int
    element_size: int
    strips: bool
    source: int = 0
    sink: int = 0

    def cuts(self) -> list[int]:
        """Where it may be cut: behind layers that change the scale."""
        return [i for i, steps in enumerate(self.layers[:-1], 1) if max(scale_of(steps)) > 1]

    def buffer(self, layer: int) -> int:
        """Bytes of the whole picture before a layer."""
        shape = shape_before(self.layers, layer, self.height, self.width)
        return math.prod(shape) * self.element_size


class Way(NamedTuple):
    """A part with its cuts."""

    segments: tuple[Segment, ...]
    bytes: int
    cost: int


def _way(part: Part, cuts: tuple[int, ...], limit: int, in_ram: bool) -> Way:
    """Through a part with these cuts."""
    ends = [0, *cuts, len(part.layers)]
    buffers = [part.source, *(part.buffer(cut) for cut in cuts), part.sink]
    heights, widths = _sizes(part.layers, part.height), _sizes(part.layers, part.width)
    segments, peak, cost = [], 0, 0
    for i, (first, last) in enumerate(itertools.pairwise(ends)):
        held = 0 if in_ram else buffers[i] + buffers[i + 1]
        steps = _flat(part.layers, first, last)
        size = heights[first], widths[first]
        left = max(0, limit - held)
        grid = grid_within(steps, size, left, part.element_size, part.strips)
        segments.append(Segment(first, last, grid.rows, grid.columns))
        peak, cost = max(peak, held + grid.bytes), cost + grid.cost
    moved = 2 * sum(buffers) if in_ram else 0
    return Way(tuple(segments), peak, cost + moved * PER_BYTE_MOVED)


def _best_way(part: Part, limit: int, in_ram: bool) -> Way:
    """The cheapest that fits, else the smallest."""
    places = part.cuts()
    every = [
        _way(part, cuts, limit, in_ram)
        for n in range(len(places) + 1)
        for cuts in itertools.combinations(places, n)
    ]
    return min(every, key=lambda way: (max(0, way.bytes - limit), way.cost))


# --------------------------------------------------------------------------------- the attention
def _attention(network: Network, count: int, limit: int, in_ram: bool) -> tuple[int, int]:
    """Positions of a slice, and the peak in bytes; `count` positions are the whole layer."""
    each = network.channels * network.element_size
    scores = 0 if network.fused else SCORES * count * network.element_size
    whole = count * (LAYER * each + scores)
    if whole <= limit and count <= WHOLE_POSITIONS:
        return count, whole
    held = count * each * (KEYS + (0 if in_ram else 1))
    most = min(count - 1, SLICE_SCORES // count)
    size = min(most, (limit - held) // (SLICE * each + scores))
    size = max(1, min(count - 1, max(BLOCK, size // BLOCK * BLOCK)))
    return size, held + size * (SLICE * each + scores)


# -------------------------------------------------------------------------------------- all of it
@functools.lru_cache(maxsize=256)
def plan_for(network: Network, height: int, width: int, limit: int) -> Plan:
    """The cheapest plan within `limit` bytes for a source of this size, else the smallest one."""
    places = (False,) if network.in_ram else (False, True)
    plans = [_plan(network, height, width, limit, in_ram) for in_ram in places]
    return min(plans, key=lambda plan: (max(0, plan.bytes - limit), plan.cost))


def _plan(network: Network, height: int, width: int, limit: int, in_ram: bool) -> Plan:
    sizes = _sizes(network.before, height)[-1], _sizes(network.before, width)[-1]
    x = math.prod(sizes) * network.channels * network.element_size
    each = network.element_size, network.strips
    parts = (
        Part(network.before, height, width, *each, sink=x),
        Part(network.after, *sizes, *each, source=x),
    )
    before, after = (_best_way(part, limit, in_ram) for part in parts)
    attention, peak = _attention(network, math.prod(sizes), limit, in_ram)
    return Plan(
        before.segments,
        attention,
        after.segments,
        in_ram,
        max(before.bytes, peak, after.bytes),
        before.cost + after.cost,
    )


@functools.lru_cache(maxsize=256)
def whole_bytes(network: Network, height: int, width: int) -> int:
    """The peak of the network's own pass over one whole picture."""
    sizes = _sizes(network.before, height)[-1], _sizes(network.before, width)[-1]
    ways = [
        _way(Part(part, *size, network.element_size, True), (), 1 << 62, in_ram=False).bytes
        for part, size in ((network.before, (height, width)), (network.after, sizes))
    ]
    each = network.channels * network.element_size
    scores = 0 if network.fused else SCORES * math.prod(sizes) * network.element_size
    return max(*ways, math.prod(sizes) * (LAYER * each + scores))


@functools.lru_cache(maxsize=256)
def comfortable_bytes(network: Network, height: int, width: int) -> int:
    """The least in which the work is hardly more than at once: what is worth freeing for."""
    limit = whole_bytes(network, height, width)
    enough = plan_for(network, height, width, limit).cost * COMFORT
    while (smaller := plan_for(network, height, width, limit // 2)).bytes <= limit // 2:
        if smaller.cost > enough:
            break
        limit //= 2
    return limit


def largest_side(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` for which `fits`, by bisection; 0 if none."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step
