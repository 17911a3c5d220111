"""Layers over tiles: the bits of the untiled chain, halos that are no larger, plans that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.vae_attention import (
    BLOCK,
    FEWEST,
    AttentionSlices,
    attend_by_products,
    slices,
    whole_layer,
)
from pack.core.vae_plan import (
    Network,
    comfortable_bytes,
    largest_side,
    plan_for,
    shape_before,
    whole_bytes,
)
from pack.core.vae_tiles import (
    SMALLEST,
    Buffer,
    Step,
    Tiles,
    axis,
    piece,
    reach,
    scale_of,
    split,
    steps_of,
    tile_bytes,
)
from pack.tests.examples import examples
from torch import Tensor, nn

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """With more, kernels may round differently for another size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------- layers whose sums are exact
class OverSpace(nn.Module):
    """A layer for pictures, as the host's: channels [b, c, 1, h, w]."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x[:, :, 0])[:, :, None]


def convolution(kernel: int, channels: int = 2, **options: int) -> nn.Conv2d:
    """Whole numbers: whatever the order of a sum, its bits are the same."""
    layer = nn.Conv2d(channels, channels, kernel, bias=False, dtype=torch.float64, **options)
    layer.weight.data = torch.randint(-2, 3, layer.weight.shape).double()
    return layer


def same(kernel: int) -> nn.Module:
    return OverSpace(convolution(kernel, padding=kernel // 2))


def up() -> nn.Module:
    resize = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
    return OverSpace(resize, convolution(3, padding=1))


def down() -> nn.Module:
    return OverSpace(nn.ZeroPad2d((0, 1, 0, 1)), convolution(3, stride=2))


def chain(kinds: str) -> list[nn.Module]:
    """c and k are convolutions of 3 and 5, p of 1; u and d change the scale."""
    made = {"p": lambda: same(1), "c": lambda: same(3), "k": lambda: same(5), "u": up, "d": down}
    return [made[kind]() for kind in kinds]


def steps(layers: list[nn.Module]) -> tuple:
    return tuple(step for layer in layers for step in steps_of(layer))


def noise(height: int, width: int) -> Tensor:
    return torch.randint(-3, 4, (1, 2, 1, height, width)).double()


def whole(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def tiled(layers: list[nn.Module], grid: tuple[int, int], source: Tensor) -> Tiles:
    sink = Buffer((1, 2, 1, *whole(layers, source).shape[-2:]), CPU, torch.float64)
    return Tiles(layers, grid, (Buffer.of(source), sink), lambda part: part, 8)


upwards = st.text("pcku", min_size=1, max_size=5).filter(lambda kinds: kinds.count("u") < 4)
downwards = st.text("pckd", min_size=1, max_size=5).filter(lambda kinds: kinds.count("d") < 3)
parts = st.integers(1, 9)


@settings(deadline=None, max_examples=examples(60))
@given(upwards | downwards, st.integers(1, 9), st.integers(1, 9), st.tuples(parts, parts))
def test_tiles_have_the_bits_of_the_whole(kinds: str, height: int, width: int, grid) -> None:
    layers = chain(kinds)
    down = scale_of(steps(layers))[1]
    source = noise(height * down, width * down)
    work = tiled(layers, grid, source)
    while work.pending:
        work.step()
    assert work.sink.tensor.equal(whole(layers, source))


@settings(deadline=None, max_examples=examples(60))
@given(upwards | downwards, st.integers(12, 40), st.data())
def test_a_halo_reaches_what_the_output_depends_on_and_no_more(kinds: str, size: int, data) -> None:
    layers = chain(kinds)
    size *= scale_of(steps(layers))[1]
    length = axis(steps(layers), size, 1).pieces[0].stop
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    for layer in layers:  # positive, so that nothing cancels
        for weight in layer.parameters():
            weight.data.fill_(1.0)
    first, last = reach(steps(layers), size, start, stop)

    def changes(position: int) -> bool:
        """What the output sees of one source position."""
        source = torch.zeros(1, 2, 1, size, 1, dtype=torch.float64)
        source[..., position, :] = 1.0
        source = source.expand(-1, -1, -1, -1, max(8, scale_of(steps(layers))[1])).contiguous()
        return bool(whole(layers, source)[..., start:stop, :].any())

    assert first == 0 or not changes(first - 1)
    assert last == size or not changes(last)
    assert changes(first) and changes(last - 1)


def test_one_pixel_less_of_a_halo_is_wrong() -> None:
    layers = chain("cuck")
    source = noise(30, 16)
    exact = whole(layers, source)[..., 20:32, :]
    found = piece(steps(layers), 30, 20, 32)
    for less, right in ((0, True), (1, False)):
        start = found.source_start + less
        part = whole(layers, source[..., start : found.source_stop, :])
        part = part[..., 20 - start * 2 : 32 - start * 2, :]
        assert part.equal(exact) is right


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 2, 8]))
def test_parts_cover_a_length_and_are_nearly_equal(start, length, count, unit) -> None:
    cuts = split(start, start + length, count, unit)
    assert cuts[0][0] == start and cuts[-1][1] == start + length
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    units = [-(-(stop - first) // unit) for first, stop in cuts]
    assert max(units) - min(units) <= 1 and len(cuts) == min(count, -(-length // unit))


@settings(deadline=None, max_examples=examples(25))
@given(upwards | downwards, st.integers(1, 3), st.integers(0, 40), st.integers(1, 5))
def test_what_fails_stays_pending_and_goes_on_smaller(kinds, grid, fails, times) -> None:
    layers = chain(kinds)
    down = scale_of(steps(layers))[1]
    source = noise(20 * down, 18 * down)
    work = tiled(layers, (grid, grid), source)
    done = 0
    while work.pending:
        if times and done == fails % len(work.pending):
            times -= 1
            before = work.bytes_of(work.pending[0])
            if work.shrink():
                assert all(
                    work.bytes_of(tile) <= before // 2 or _smallest(work, tile)
                    for tile in work.pending
                )
        work.step()
        done += 1
    assert work.sink.tensor.equal(whole(layers, source))


def _smallest(work: Tiles, tile: tuple) -> bool:
    unit = scale_of(work.steps)[0]
    return max((p.stop - p.start) // unit for p in tile) < 2 * SMALLEST


def test_tiles_get_no_smaller_than_the_smallest() -> None:
    work, times = tiled(chain("cuc"), (1, 1), noise(40, 50)), 0
    while work.shrink():
        times += 1
        assert times < 20
    assert times > 1 and len(work.pending) > 4 and all(_smallest(work, t) for t in work.pending)


def test_a_layer_whose_axes_differ_is_refused() -> None:
    for layer in (nn.Conv2d(1, 1, (3, 1)), nn.ZeroPad2d((0, 1, 0, 0)), nn.Upsample((4, 4))):
        with pytest.raises(ValueError, match=type(layer).__name__):
            steps_of(layer)


# --------------------------------------------------------------------------------- the attention
class Attention(nn.Module):
    """As the host's block, without its time axis' peculiarities."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm, self.to_qkv = nn.Identity(), nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        every = self.to_qkv(x[:, :, 0]).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        found = nn.functional.scaled_dot_product_attention(*(e.contiguous() for e in every))
        return x + self.proj(found[:, 0].transpose(1, 2).reshape(x[:, :, 0].shape))[:, :, None]


FUSED = nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("attend", "size"), [(FUSED, 768), (FUSED, 1100), (None, 300)])
def test_slices_of_queries_give_the_whole_attention(attend, size, last) -> None:
    torch.manual_seed(0)
    block, x = Attention(), torch.randn(1, 8, 1, 50, 40)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        exact = block(x)
        buffer = Buffer.of(x.clone())
        work = AttentionSlices(
            block, buffer, size, attend or attend_by_products, lambda part: part, block
        )
        assert len(work.pending) > 1
        while work.pending:
            work.step()
    assert work.keys is None and work.values is None
    if attend is FUSED:
        assert buffer.tensor.equal(exact)
    torch.testing.assert_close(buffer.tensor, exact, rtol=0, atol=1e-5)


def test_attention_that_fails_goes_on_with_smaller_slices() -> None:
    block, x = Attention(), torch.randn(1, 8, 1, 50, 40)
    with torch.inference_mode():
        exact, buffer = block(x), Buffer.of(x.clone())
        work = AttentionSlices(block, buffer, 2000, FUSED, lambda part: part, block)
        sizes = []
        while work.pending:
            sizes.append(work.size)
            if len(sizes) < 4:
                assert work.shrink()
            work.step()
    torch.testing.assert_close(buffer.tensor, exact, rtol=0, atol=1e-5)
    assert sizes[0] == 2000 and sum(sizes[1:]) > 0
    for size in (BLOCK, FEWEST, 1200, 2000):
        work = AttentionSlices(block, buffer, size, FUSED, lambda part: part, block, FEWEST)
        while work.shrink():
            assert all(stop - start >= FEWEST for start, stop in work.pending)
        assert len(work.pending) == len(slices(0, 2000, min(size, FEWEST)))


@pytest.mark.parametrize("last", [False, True])
def test_the_whole_layer_by_hand_has_the_bits_of_its_own_pass(last: bool) -> None:
    block, x = Attention(), torch.randn(1, 8, 1, 20, 30)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        assert whole_layer(block, FUSED, x).equal(block(x))

    def fails(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(torch.OutOfMemoryError):
        whole_layer(block, fails, x)


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 3000))
def test_slices_cover_and_none_is_small_where_blocks_are_whole(start, count, size) -> None:
    cuts = slices(start, start + count, size)
    assert cuts[0][0] == start and cuts[-1][1] == start + count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    if size >= FEWEST and len(cuts) > 1:
        assert all(b - a >= FEWEST for a, b in cuts)
        assert all((b - start) % BLOCK == 0 for _, b in cuts[:-1])


# -------------------------------------------------------------------------------------- the plan
def network(kinds_before: str, kinds_after: str, in_ram: bool = False) -> Network:
    made = (tuple(map(steps_of, chain(kinds))) for kinds in (kinds_before, kinds_after))
    return Network(*made, 2, True, in_ram)


DECODER, ENCODER = network("cc", "ccucucucc"), network("ccdcdcdcc", "cc")
networks = st.sampled_from([DECODER, ENCODER])


@settings(deadline=None, max_examples=examples(30))
@given(networks, st.integers(2, 300), st.integers(2, 300), st.integers(0, 1 << 26))
def test_a_plan_fits_if_any_does_and_covers_every_layer(net, height, width, limit) -> None:
    if net is ENCODER:
        height, width = height * 8, width * 8
    plan = plan_for(net, height, width, limit)
    least = plan_for(net, height, width, 0)
    if least.bytes <= limit:
        assert plan.bytes <= limit
    for part, segments in ((net.before, plan.before), (net.after, plan.after)):
        assert segments[0].first == 0 and segments[-1].last == len(part)
        assert all(a.last == b.first for a, b in itertools.pairwise(segments))
    positions = math.prod(shape_before(net.before, len(net.before), height, width)[1:])
    assert 1 <= plan.attention <= positions


@settings(deadline=None, max_examples=examples(30))
@given(networks, st.integers(8, 300), st.integers(0, 1 << 24))
def test_a_plan_counts_what_lies_between(net, side, limit) -> None:
    side *= 8 if net is ENCODER else 1
    plan = plan_for(net._replace(in_ram=True), side, side, limit)  # all on the device

    def size(part: tuple, layer: int, of: tuple[int, int]) -> int:
        return math.prod(shape_before(part, layer, *of)) * net.element_size

    inner = shape_before(net.before, len(net.before), side, side)[1:]
    for segment in plan.before[:-1]:
        assert plan.bytes > size(net.before, segment.first, (side, side)) * bool(segment.first) + (
            size(net.before, segment.last, (side, side))
        )
    for segment in plan.after[:-1]:
        ends = (size(net.after, layer, inner) for layer in (segment.first, segment.last))
        assert plan.bytes > sum(ends)


def test_more_memory_is_used_and_none_is_asked_for_that_is_of_no_use() -> None:
    for net, side in ((DECODER, 512), (ENCODER, 4096)):
        most = whole_bytes(net, side, side)
        limits = [most // 2**i for i in range(9)]
        plans = [plan_for(net, side, side, limit) for limit in limits]
        costs = [plan.cost for plan in plans]
        assert costs == sorted(costs) and costs[-1] > costs[0]
        enough = comfortable_bytes(net, side, side)
        assert enough < most and plan_for(net, side, side, enough).cost <= costs[0] * 1.1


def test_deep_layers_are_reckoned_with_a_larger_workspace() -> None:
    def bytes_of(channels: int) -> int:
        return tile_bytes((Step(3, 1, 1, 1, 1, channels, channels, True),), (9, 9), (9, 9), 2)

    # An input that is held, and twice an input and an output; a fifth of it more at least.
    assert bytes_of(192) == 5 * 192 * 81 * 2
    assert bytes_of(384) >= 1.2 * 2 * bytes_of(192)


def test_what_lies_between_goes_to_the_ram_only_where_that_is_another_memory() -> None:
    assert plan_for(DECODER, 512, 512, 0).in_ram
    own = DECODER._replace(in_ram=True)
    plan = plan_for(own, 512, 512, 0)
    assert not plan.in_ram and plan.bytes > plan_for(DECODER, 512, 512, 0).bytes


def test_the_largest_side_that_fits_is_found() -> None:
    assert largest_side(lambda side: side <= 1000, 64, 4096) == 960
    assert largest_side(lambda side: True, 64, 4096) == 4096
    assert largest_side(lambda side: False, 64, 4096) == 0
