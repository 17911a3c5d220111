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
from pack.tests.examples import examples

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
@settings(max_examples=examples(60), deadline=None)
def test_any_value_comes_back_bit_by_bit(value: object) -> None:
    entry = codec.decode(encoded(value, 1.5, {"text": "t"}))
    assert same(entry.value, value)
    assert (entry.seconds, entry.parts, entry.device) == (1.5, {"text": "t"}, "cpu")


def test_a_text_is_kept_exactly_and_not_in_the_header() -> None:
    value = {"prompt": "a fox \N{FOX FACE} \ud800", "more": ("", ["a fox"])}
    data = encoded(value)
    assert same(codec.decode(data).value, value)
    assert b"a fox" not in data[: 8 + codec.header_bytes(data)]
    assert data.count(b"a fox") == 2


def test_a_changed_text_is_not_believed() -> None:
    data = encoded(["a red fox"])
    with pytest.raises(codec.Corrupt, match="digest"):
        codec.decode(data.replace(b"a red fox", b"a bad fox"))


def test_without_threads_the_digest_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(torch.arange(1 << 20))

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    assert same(codec.decode(data).value, torch.arange(1 << 20))


def test_strided_and_aliased_tensors_keep_their_values() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    value = [base.T, base[:, 1], base]
    assert same(codec.decode(encoded(value, 0, {})).value, [t.contiguous() for t in value])


@given(st.data())
@settings(max_examples=examples(60), deadline=None)
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
@settings(max_examples=examples(50), deadline=None)
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
        (1 << 5000, "a number of 5001 bits"),
        ({1 << 5000: 0}, "a number of 5001 bits"),
        ({"x" * (5 << 20): 0}, "its structure takes"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused_with_its_place(value: object, part: str) -> None:
    with pytest.raises(codec.Unstorable, match=part):
        encoded(value, 0, {})


def altered(tree: object, tensors: list[torch.Tensor], **facts: object) -> bytes:
    """An entry with a right digest that `encode` would not write."""
    text = json.dumps({"tree": tree, "seconds": 1.0, "parts": {}, "device": "cpu", **facts})
    metadata = {"format": "qwen_vram.conditioning", "version": "1", "entry": text}
    metadata["digest"] = codec._digest(text, tensors)
    return codec.save_tensors({str(i): t for i, t in enumerate(tensors)}, metadata)


TENSOR = ["tensor", 0, "torch.float32", [2], "cpu"]


@pytest.mark.parametrize(
    ("tree", "facts"),
    [
        (["list", [TENSOR, TENSOR]], {}),
        (None, {}),
        (["float", "00"], {}),
        (["float", 5], {}),
        (1.5, {}),
        ({"a": 1}, {}),
        ([[], []], {}),
        (["dict", [[[], 1]]], {}),
        ([*TENSOR[:4], "meta"], {}),
        ([*TENSOR[:4], "nowhere"], {}),
        ([*TENSOR[:4], 1 << 70], {}),
        (["tensor", 1, *TENSOR[2:]], {}),
        (["tensor", [], *TENSOR[2:]], {}),
        (["tensor", 0, [], [2], "cpu"], {}),
        (["text", 0, 2], {}),
        (["text", 0], {}),
        (["text", [], 2], {}),
        (TENSOR, {"seconds": "x"}),
        (TENSOR, {"parts": []}),
        (TENSOR, {"parts": {"text": 1}}),
        (TENSOR, {"device": None}),
    ],
)
def test_a_false_description_with_a_right_digest_is_corrupt(tree: object, facts: dict) -> None:
    good = codec.decode(altered(TENSOR, [torch.ones(2)]))
    assert same(good.value, torch.ones(2))
    with pytest.raises(codec.Corrupt):
        codec.decode(altered(tree, [torch.ones(2)], **facts))


@pytest.mark.parametrize(("length", "data"), [(2, [1, 2, 3]), (2, [255, 255]), ("2", [1, 2])])
def test_a_false_text_with_a_right_digest_is_corrupt(length: object, data: list[int]) -> None:
    with pytest.raises(codec.Corrupt):
        codec.decode(altered(["text", 0, length], [torch.tensor(data, dtype=torch.uint8)]))


def test_a_device_that_is_not_here_is_told_apart_from_damage() -> None:
    with pytest.raises(codec.Elsewhere, match="cuda:77"):
        codec.decode(altered([*TENSOR[:4], "cuda:77"], [torch.ones(2)]))


def test_the_header_tells_the_size_of_the_whole_file() -> None:
    good = encoded(conditioning(), 1.0, {})
    header = good[: 8 + codec.header_bytes(good)]
    assert codec.declared_bytes(header) == len(good)
    for bad in (b"", good[:7], header[:-1], struct.pack("<Q", 2) + b"[]", good[:8] + b"[" * 999):
        with pytest.raises(codec.Corrupt):
            codec.declared_bytes(bad)


def test_bottomless_nesting_is_refused() -> None:
    value: list = []
    value.append(value)
    with pytest.raises(codec.Unstorable, match="deeper"):
        encoded(value, 0, {})
