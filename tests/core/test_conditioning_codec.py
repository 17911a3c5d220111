"""Conditioning goes through the store's format unchanged, and nothing altered comes back."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import conditioning_codec as codec

DTYPES = list(codec._DTYPES.values())


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, up to 4 dimensions, empty and 0-dimensional ones too, arbitrary bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0)
    return flat.view(dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def encoded(value: object, seconds: float = 0.0, parts: dict | None = None) -> bytes:
    """An entry's bytes."""
    return codec.encode(codec.Entry(value, seconds, parts or {}, "cpu"))


def same(a: object, b: object) -> bool:
    """Equal in type, structure, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def raw(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def conditioning() -> list:
    """What ComfyUI's encoder returns for Qwen-Image."""
    return [[torch.randn(1, 5, 8), {"pooled_output": None, "attention_mask": torch.ones(1, 5)}]]


@given(values)
@settings(max_examples=300, deadline=None)
def test_any_value_comes_back_bit_by_bit(value: object) -> None:
    entry = codec.decode(encoded(value, 1.5, {"text": "t"}))
    assert same(entry.value, value)
    assert (entry.seconds, entry.parts, entry.device) == (1.5, {"text": "t"}, "cpu")


def test_strided_and_aliased_tensors_keep_their_values() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    value = [base.T, base[:, 1], base]
    assert same(codec.decode(encoded(value, 0, {})).value, [t.contiguous() for t in value])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_flipped_bit_is_believed(data: st.DataObject) -> None:
    good = encoded(conditioning(), 1.0, {"text": "x"})
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        entry = codec.decode(bytes(bad))
    except (codec.Corrupt, codec.FutureVersion):
        return
    assert same(entry.value, codec.decode(good).value)  # white space of the header, at most


@given(st.binary(max_size=300) | st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_garbage_and_truncations_are_corrupt(content: bytes | int) -> None:
    good = encoded(conditioning(), 1.0, {})
    data = good[:content] if isinstance(content, int) else content
    with pytest.raises(codec.Corrupt):
        codec.decode(data)


def test_a_header_that_claims_a_huge_tensor_is_corrupt_and_costs_nothing() -> None:
    table = {"__metadata__": {"format": "qwen_vram.conditioning", "version": "1"}}
    table["0"] = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    header = json.dumps(table).encode()
    with pytest.raises(codec.Corrupt):
        codec.decode(struct.pack("<Q", len(header)) + header)
    with pytest.raises(codec.Corrupt):
        codec.decode(struct.pack("<Q", 1 << 60) + header)


def test_a_future_version_is_told_apart_from_damage() -> None:
    data = encoded(conditioning(), 1.0, {}).replace(b'"version":"1"', b'"version":"7"')
    with pytest.raises(codec.FutureVersion, match="format 7"):
        codec.decode(data)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([{"hooks": object()}], r"value\[0\]\['hooks'\] is a builtins.object"),
        (torch.Size([1]), "torch.Size"),
        ({1.5: 0}, "key of type float"),
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.empty(2, device="meta"), "without data"),
        (torch.nn.Parameter(torch.ones(1)), "Parameter"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused_with_its_place(value: object, part: str) -> None:
    with pytest.raises(codec.Unstorable, match=part):
        encoded(value, 0, {})


def test_bottomless_nesting_is_refused() -> None:
    value: list = []
    value.append(value)
    with pytest.raises(codec.Unstorable, match="deeper"):
        encoded(value, 0, {})
