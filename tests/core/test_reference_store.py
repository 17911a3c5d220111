"""What is kept comes back: as it was, or as near as its format promises, and nothing is hidden."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import kv_formats, reference_store
from pack.core.reference_store import FORMATS, KVStore, bytes_of
from pack.tests.examples import examples
from pack.tests.live_bytes import LiveBytes
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_MEGAPIXEL = (1, 24, 4096, 128)  # of one block of Qwen-Image
GIB = 1 << 30


def drawn(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of one kind, within the range of the type."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=random)
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "largest":
        return (numbers.sign() * torch.finfo(dtype).max).to(dtype)
    if kind == "same":  # rotated, it is all in one number, and its scale is rounded up
        return torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    if kind == "large":  # next to the largest of the type, rounding up finds no number
        return (numbers.sign() * torch.finfo(dtype).max / 4).to(dtype)
    if kind == "smallest":
        return (numbers * torch.finfo(dtype).tiny).to(dtype)
    if kind == "heavy":  # tails
        return (numbers / torch.rand(shape, generator=random).clamp_min(1e-2)).to(dtype)
    return numbers.to(dtype)


shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 6, 32, 96, 128])
)
kinds = st.sampled_from(["zeros", "large", "smallest", "heavy", "normal"])
seeds = st.integers(0, 1000)


def kept(format: str, *tensors: Tensor, place: str = "gpu") -> tuple[Tensor, Tensor]:
    """What a store gives back."""
    store = KVStore(format, place, CPU)
    store.put(0, tensors[0], tensors[-1])
    return store.get(0)


@given(shapes, kinds, st.sampled_from(DTYPES), seeds)
def test_the_models_own_type_is_exact(shape, kind, dtype, seed) -> None:
    key, value = (drawn(shape, kind, dtype, seed + i) for i in (0, 1))
    got = kept("model", key, value)
    assert torch.equal(got[0], key) and torch.equal(got[1], value)
    assert got[0].dtype == dtype


@given(shapes, kinds, st.sampled_from(DTYPES), seeds)
def test_8_bits_are_within_half_a_step_of_each_token_and_head(shape, kind, dtype, seed) -> None:
    key = drawn(shape, kind, dtype, seed)
    got = kept("int8", key)[0]
    assert got.dtype == dtype
    largest = key.double().abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny
    allowed = largest / 254 * 1.001 + rounding + 1e-30
    assert ((got.double() - key.double()).abs() <= allowed).all()


@given(shapes, kinds, st.sampled_from(DTYPES), seeds)
def test_4_bits_are_within_a_step_of_each_group(shape, kind, dtype, seed) -> None:
    key = drawn(shape, kind, dtype, seed)
    error = kept("int4", key)[0].double() - key.double()
    width = shape[-1]
    rotated = key.double()
    if not width & (width - 1):  # the error of the rotated numbers is what has a bound
        rotated, error = (t @ hadamard(width) / width for t in (rotated, error))
    groups = rotated.unflatten(-1, (-1, math.gcd(width, 32)))
    step = groups.abs().amax(-1, keepdim=True) / 8
    rounding = width * torch.finfo(dtype).eps * key.double().abs().amax() + 1e-7
    assert (error.unflatten(-1, groups.shape[3:]).abs() <= 1.04 * step + rounding).all()


@given(shapes, st.sampled_from(["largest", "same", "heavy"]), st.sampled_from(FORMATS), seeds)
def test_in_float16_what_is_finite_stays_finite(shape, kind, format, seed) -> None:
    key = drawn(shape, kind, torch.float16, seed)
    if kind == "heavy":  # up to the largest
        key = key * (65504 / key.double().abs().max())
    got = kept(format, key)[0]
    assert key.isfinite().all() and got.isfinite().all()


def hadamard(width: int) -> Tensor:
    """By its definition: the parity of the bits that two places have in common."""
    ones = [[bin(i & j).count("1") for j in range(width)] for i in range(width)]
    return (-1.0) ** torch.tensor(ones, dtype=torch.float64)


@pytest.mark.parametrize(("format", "most"), [("int8", 0.02), ("int4", 0.09)])
def test_a_few_large_channels_cost_little(format: str, most: float) -> None:
    key = drawn((1, 4, 200, 128), "normal", torch.float32, 1)
    key[..., 5] *= 8
    key[..., 77] += 10
    error = (kept(format, key)[0] - key).norm() / key.norm()
    assert error < most
    # In 4 bits without the rotation it would be 0.156.


bads = st.sampled_from([math.nan, math.inf, -math.inf])


@given(shapes, st.sampled_from(FORMATS), bads, st.sampled_from(DTYPES), seeds)
def test_what_is_not_finite_is_never_hidden(shape, format, bad, dtype, seed) -> None:
    key = drawn(shape, "normal", dtype, seed)
    place = [seed % size for size in shape]
    key[tuple(place)] = bad
    got = kept(format, key)[0]
    assert not got[tuple(place)].isfinite()
    others = torch.ones(shape[:3], dtype=torch.bool)
    others[tuple(place[:3])] = False
    assert got[others].isfinite().all()  # and it spoils its own token and head alone


@given(shapes, st.sampled_from(FORMATS), st.sampled_from(DTYPES), st.integers(1, 9), seeds)
def test_stored_tokens_come_behind_those_at_hand(shape, format, dtype, length, seed) -> None:
    key, value = (drawn(shape, "normal", dtype, seed + i) for i in (0, 1))
    store = KVStore(format, "gpu", CPU)
    store.put(3, key, value)
    batch, heads, _, width = shape
    own = [drawn((batch, heads, length, width), "normal", dtype, seed + i) for i in (2, 3)]
    for longer, first, then in zip(store.extend(3, *own), own, store.get(3), strict=True):
        assert torch.equal(longer, torch.cat([first, then], 2)) and longer.is_contiguous()


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 40, 32), (1, 2, 7, 96)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_calculated(shape, format, dtype) -> None:
    key = torch.ones(shape, dtype=dtype)
    store = KVStore(format, "gpu", CPU)
    with LiveBytes() as live:
        for block in range(3):
            store.put(block, key, key)
    assert store.bytes_held == {"gpu": 3 * 2 * bytes_of(format, shape, dtype), "ram": 0}
    assert live.now <= store.bytes_held["gpu"] + 128 * 128 * 4  # and the matrix of a rotation


def test_what_a_megapixel_takes() -> None:
    sizes = {f: 120 * bytes_of(f, ONE_MEGAPIXEL, torch.bfloat16) / GIB for f in FORMATS}
    assert sizes["model"] == pytest.approx(2.8125)
    assert sizes["int8"] == pytest.approx(2.8125 / 2, rel=0.05)
    assert sizes["int4"] < 0.8


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", ["gpu", "ram"])
def test_new_values_of_the_same_shape_go_into_the_old_memory(format: str, place: str) -> None:
    store = KVStore(format, place, CPU)
    first, second = (drawn((1, 2, 50, 32), "heavy", torch.float32, seed) for seed in (1, 2))
    store.put(0, first, first)
    with LiveBytes() as live:
        store.put(0, second, second)
    assert live.now == 0  # nothing new stays
    assert torch.equal(store.get(0)[0], kept(format, second)[0])
    assert store.bytes_held[place] == 2 * bytes_of(format, first.shape, first.dtype)


class Pins:
    """Stands in for ComfyUI's account of pinned memory."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.pinned: dict[int, int] = {}
        self.room = room

    def pin(self, tensor: Tensor) -> bool:
        """Within the room."""
        if sum(self.pinned.values()) + tensor.nbytes > self.room:
            return False
        self.pinned[tensor.data_ptr()] = tensor.nbytes
        return True

    def unpin(self, tensor: Tensor) -> None:
        """KeyError: it was not pinned."""
        del self.pinned[tensor.data_ptr()]


def test_values_of_another_shape_take_the_place_of_the_old() -> None:
    pins = Pins()
    store = KVStore("int8", "ram", CPU, pins.pin, pins.unpin)
    for tokens, width in ((50, 32), (3, 32), (50, 6)):
        key = drawn((1, 2, tokens, width), "normal", torch.bfloat16, 1)
        store.put(0, key, key)
        size = 2 * bytes_of("int8", key.shape, key.dtype)
        assert store.bytes_held == {"gpu": 0, "ram": size}
        assert list(pins.pinned.values()) == [size]


def test_pins_end_with_the_store_released_or_not() -> None:
    pins = Pins()
    key = drawn((1, 2, 5, 32), "normal", torch.float32, 1)
    stores = [KVStore("model", "ram", CPU, pins.pin, pins.unpin) for _ in range(2)]
    for store in stores:
        store.put(0, key, key)
        store.put(1, key, key)
    assert len(pins.pinned) == 4
    stores[0].release()
    assert len(pins.pinned) == 2 and stores[0].bytes_held == {"gpu": 0, "ram": 0}
    with pytest.raises(KeyError):
        stores[0].get(0)
    stores[0].put(0, key, key)  # and it can be filled again
    assert torch.equal(stores[0].get(0)[1], key)
    dead = weakref.ref(stores.pop())
    del store
    gc.collect()
    assert dead() is None and len(pins.pinned) == 1


def test_memory_goes_when_no_copy_writes_it_any_more() -> None:
    """Where values of another shape take the place of what was recorded a moment ago."""
    done: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            done.append("copied")

    store = KVStore("model", "ram", CPU, lambda _: True, lambda _: done.append("unpinned"))
    store._ring = reference_store._Ring(CPU, _stream=Stream())
    for tokens in (5, 6):
        store.put(0, torch.ones(1, 2, tokens, 32), torch.ones(1, 2, tokens, 32))
    assert done == ["copied", "unpinned"]


def test_memory_that_may_not_be_pinned_is_used_all_the_same() -> None:
    pins = Pins(room=2 * bytes_of("int8", (1, 2, 5, 32), torch.float32))
    store = KVStore("int8", "ram", CPU, pins.pin, pins.unpin)
    keys = [drawn((1, 2, 5, 32), "normal", torch.float32, seed) for seed in range(3)]
    for block, key in enumerate(keys):
        store.put(block, key, key)
    assert len(pins.pinned) == 1
    for block, key in enumerate(keys):
        assert torch.equal(store.get(block)[0], kept("int8", key)[0])
    store.release()
    assert not pins.pinned


@given(st.lists(st.tuples(st.sampled_from("pge"), st.integers(0, 4), seeds), max_size=25))
@settings(max_examples=examples(60))
def test_through_two_buffers_it_is_the_same(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is put and read in whatever order, as with RAM beside a GPU."""
    plain, ringed = KVStore("int8", "ram", CPU), KVStore("int8", "ram", CPU)
    ringed._ring = reference_store._Ring(CPU)
    for kind, block, seed in steps:
        key = drawn((1, 2, 1 + block % 2 * 3, 32), "normal", torch.float32, seed)
        if kind == "p":
            plain.put(block, key, -key)
            ringed.put(block, key, -key)
        elif block in plain.blocks:
            calls = [s.get if kind == "g" else s.extend for s in (plain, ringed)]
            more: tuple[Any, ...] = () if kind == "g" else (key, key)
            for one, other in zip(*(call(block, *more) for call in calls), strict=True):
                assert torch.equal(one, other)
        assert len(ringed._ring.slots) <= 2
        assert ringed.bytes_held["gpu"] == ringed._ring.nbytes


def test_between_two_passes_nothing_lies_on_the_gpu() -> None:
    store = KVStore("model", "ram", CPU)
    store._ring = reference_store._Ring(CPU)
    key = drawn((1, 2, 5, 32), "normal", torch.float32, 1)
    for block in range(4):
        store.put(block, key, key)
    for block in range(4):
        store.extend(block, key, key)
        on_gpu = store.bytes_held["gpu"]
        assert on_gpu == (0 if block == 3 else 4 * key.nbytes)
    store.put(3, key, key)  # which of a pass is the last that is put is not known here
    assert store.bytes_held["gpu"] == 2 * key.nbytes
    store.unstage()
    assert store.bytes_held == {"gpu": 0, "ram": 8 * key.nbytes}
    assert torch.equal(store.get(3)[0], key)


def test_long_tensors_are_worked_on_in_pieces(monkeypatch) -> None:
    key = drawn((2, 3, 40, 32), "heavy", torch.bfloat16, 1)
    whole = {format: kept(format, key)[0] for format in FORMATS}
    monkeypatch.setattr(kv_formats, "AT_A_TIME", 7 * 2 * 3 * 32)
    for format in FORMATS:
        assert torch.equal(kept(format, key)[0], whole[format])


def test_what_a_store_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="int5"):
        KVStore("int5", "gpu", CPU)
    with pytest.raises(ValueError, match="disk"):
        KVStore("int8", "disk", CPU)
    with pytest.raises(ValueError, match="even width"):
        bytes_of("int4", (1, 2, 3, 7), torch.float32)
    with pytest.raises(ValueError, match="heads, tokens, width"):
        bytes_of("int8", (2, 3, 8), torch.float32)
    with pytest.raises(ValueError, match="one shape"):
        KVStore("int8", "gpu", CPU).put(0, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4))
    with pytest.raises(KeyError):
        KVStore("int8", "gpu", CPU).extend(0, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))


def test_inference_mode_and_gradients_leave_no_trace() -> None:
    key = torch.ones(1, 1, 4, 32, requires_grad=True)
    store = KVStore("int4", "gpu", CPU)
    with torch.inference_mode():
        store.put(0, key, key)
        inside = store.get(0)[0].clone()
    store.release()
    store.put(0, key * 2, key)
    outside = store.get(0)[0]
    assert not outside.requires_grad and torch.allclose(outside, 2 * inside)
