"""bitsandbytes' formats as the host's quantised tensors: the same numbers on every way it knows."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.core.quantization import FORMATS
from pack.core.quantized_layers import decode, encode, missing_package
from pack.tests import cuda_kernels
from pack.tests.conftest import missing
from pack.tests.examples import examples
from pack.tests.nodes.quantized_models import others_w4a8
from torch.nn import functional as F

BITSANDBYTES = ("bnb_nf4", "bnb_fp4", "bnb_int8")
HOSTS = ("int8", "w4a8", "w4a4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def layouts(host: Any) -> Any:
    if problem := missing_package("bnb_nf4"):
        missing(problem)
    return importlib.import_module(f"{host.pack.__name__}.nodes.quantized_layouts")


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def entries_as_written_by(kind: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """`kind`: a format, or "nf4 64" for scales that are not quantised, in blocks of 64."""
    if kind in FORMATS:
        return encode(weight(rows, columns), kind)
    from pack.core import bitsandbytes_formats as formats

    name, block = kind.split()
    quantized = formats.quantize_4bit(weight(rows, columns), name, int(block), nested=False)
    return formats.entries_4bit(quantized, torch.bfloat16)


def same(a: Any, b: Any) -> bool:
    """Equal storage, scales and all that is no tensor."""
    if a._layout_cls != b._layout_cls or not torch.equal(a._qdata, b._qdata):
        return False
    for name, value in vars(a._params).items():
        other = getattr(b._params, name)
        equal = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        if not equal:
            return False
    return True


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Alike but for some rounding; sums that nearly cancel are measured by the largest."""
    return (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


kinds = st.sampled_from([*BITSANDBYTES, "nf4 64", "fp4 32", "nf4 4096"])
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda s: (s[0], 2 * s[1]))
few = settings(
    max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@given(kind=kinds, shape=shapes, dtype=st.sampled_from(DTYPES))
def test_entries_become_a_tensor_and_entries_again(layouts, kind, shape, dtype) -> None:
    entries = entries_as_written_by(kind, *shape)
    tensor = layouts.tensor_from(entries, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype
    assert tensor._qdata.data_ptr() == entries["weight"].data_ptr()  # a file stays behind it
    assert torch.equal(tensor.dequantize(), decode(entries, dtype))
    again = layouts.entries_of(tensor.to(torch.bfloat16))
    assert set(again) == set(entries)
    assert all(torch.equal(again[name], entries[name]) for name in entries)


@pytest.mark.parametrize("kind", [*BITSANDBYTES, "nf4 64"])
def test_asking_for_the_entries_takes_no_memory_of_the_device(layouts, kind) -> None:
    """ComfyUI does when it counts what it evicts: the card is full then."""
    tensor = layouts.tensor_from(entries_as_written_by(kind, 128, 128), torch.bfloat16).to("meta")
    parts = [tensor._qdata, *(t for t in vars(tensor._params).values() if torch.is_tensor(t))]
    there = {part.untyped_storage()._cdata for part in parts if part.device.type == "meta"}
    assert len(there) == len(parts)
    made = [e for e in layouts.entries_of(tensor).values() if e.device.type == "meta"]
    assert {entry.untyped_storage()._cdata for entry in made} == there


@few
@given(kind=kinds, shape=shapes, dtype=st.sampled_from(DTYPES), bias=st.booleans())
def test_products_are_those_of_the_dequantised_weight(layouts, kind, shape, dtype, bias) -> None:
    tensor = layouts.tensor_from(entries_as_written_by(kind, *shape), dtype)
    plain = tensor.dequantize()
    b = weight(1, shape[0], dtype)[0] if bias else None
    for leading in ((), (3,), (2, 3), (1, 2, 3)):
        x = weight(math.prod(leading), shape[1], dtype).view(*leading, shape[1])
        expected = F.linear(x, plain, b)
        made = layouts.linear(x, tensor, b)
        assert made.dtype == dtype and close(made, expected, dtype)
        assert kind == "bnb_int8" or torch.equal(made, expected)
        with torch.inference_mode():
            assert close(F.linear(x, tensor, b), expected, dtype)
    x = weight(5, shape[1], dtype)
    assert close(torch.mm(x, tensor.t()), x @ plain.t(), dtype)
    assert close(x @ tensor.T, x @ plain.t(), dtype)
    torch.testing.assert_close(
        torch.mm(weight(5, shape[0], dtype), tensor), weight(5, shape[0], dtype) @ plain
    )
    if bias:
        assert close(torch.addmm(b, x, tensor.t()), F.linear(x, plain, b), dtype)
        torch.testing.assert_close(
            torch.addmm(b, x, tensor.t(), beta=2), torch.addmm(b, x, plain.t(), beta=2)
        )
    assert torch.equal(tensor.t().dequantize(), plain.t())
    assert torch.equal(tensor.t().t().dequantize(), plain)


@few
@given(kind=kinds, shape=shapes, dtype=st.sampled_from(DTYPES))
def test_the_hosts_way_through_one_buffer_changes_nothing(layouts, kind, shape, dtype) -> None:
    """How dynamic VRAM streams a layer: gathered in bytes, then read like the original."""
    from comfy import memory_management as memory
    from comfy import model_management

    tensor = layouts.tensor_from(entries_as_written_by(kind, *shape), dtype)
    bias = weight(1, shape[0], dtype)[0]
    size = memory.vram_aligned_size([tensor, bias])
    assert size >= tensor._qdata.nbytes + tensor._params.scale.nbytes + bias.nbytes
    pin, device = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    model_management.cast_to_gathered([tensor, bias], pin, r2=device)
    for buffer in (pin, device):
        found, found_bias = memory.interpret_gathered_like([tensor, bias], buffer)
        assert same(found, tensor) and torch.equal(found_bias, bias)
        assert torch.equal(found.dequantize(), tensor.dequantize())
        start = buffer.data_ptr()
        assert start <= found._params.scale.data_ptr() < start + size
    geometry = memory.tensors_to_geometries([tensor, bias])
    assert memory.vram_aligned_size(geometry) == size
    # Without dynamic VRAM: an empty tensor like it, then a copy; and a move with a new dtype.
    assert same(torch.empty_like(tensor).copy_(tensor), tensor)
    assert same(model_management.cast_to(tensor, None, torch.device("cpu"), copy=True), tensor)
    other = tensor.to(torch.float32)
    assert torch.equal(other.dequantize(), decode(layouts.entries_of(tensor), torch.float32))


@pytest.mark.parametrize("kind", [*BITSANDBYTES, "nf4 64"])
def test_a_module_moves_clones_and_counts_it(layouts, kind) -> None:
    from comfy import model_management

    tensor = layouts.tensor_from(entries_as_written_by(kind, 64, 128), torch.bfloat16)
    clone = tensor.clone()
    assert same(clone, tensor) and clone._params.scale.data_ptr() != tensor._params.scale.data_ptr()
    meta = tensor.to("meta")
    fields = [name for name, v in vars(tensor._params).items() if isinstance(v, torch.Tensor)]
    assert all(getattr(meta._params, name).device.type == "meta" for name in fields)
    assert meta._qdata.device.type == "meta" and set(fields) == set(tensor._params._tensor_fields())
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(tensor, requires_grad=False)
    assert same(layer.weight, tensor)
    assert model_management.module_size(layer) < 64 * 128 * 1.1


@pytest.mark.parametrize("kind", [*BITSANDBYTES, "fp4 32"])
def test_the_hosts_way_back_from_a_patched_weight_keeps_the_layout(layouts, kind) -> None:
    tensor = layouts.tensor_from(entries_as_written_by(kind, 64, 128), torch.bfloat16)
    patched = tensor.dequantize() + 0.01
    back = tensor.requantize_from_float(patched, scale="recalculate", stochastic_rounding=7)
    assert back._layout_cls == tensor._layout_cls
    error = (back.dequantize() - patched).float().norm() / patched.float().norm()
    assert error < {"bnb_int8": 0.01, "bnb_nf4": 0.11}.get(kind, 0.14)
    tensor.copy_(back)
    assert same(tensor, back)


@pytest.mark.parametrize("format", HOSTS)
def test_the_hosts_own_formats_load_in_its_layers_and_come_back(layouts, format) -> None:
    from comfy.ops import mixed_precision_ops

    entries = encode(weight(48, 256), format)
    layer = mixed_precision_ops().Linear(256, 48, bias=False, device="cpu", dtype=torch.bfloat16)
    layer.load_state_dict(dict(entries), strict=False)
    assert torch.equal(layer.weight.dequantize(), decode(entries, torch.bfloat16))
    again = layouts.entries_of(layer.weight)
    stock = layer.state_dict()
    assert set(again) == set(entries) == set(stock)
    assert all(torch.equal(again[name], entries[name]) for name in entries)
    assert all(torch.equal(stock[name], entries[name]) for name in entries)
    x = weight(4, 256)
    error = (layer(x) - x @ weight(48, 256).t()).float().norm() / (
        x @ weight(48, 256).t()
    ).float().norm()
    assert error < {"int8": 0.02, "w4a8": 0.09, "w4a4": 0.25}[format]


def test_scaled_fp8_of_the_host_comes_back_too(layouts) -> None:
    from comfy.quant_ops import QuantizedTensor

    tensor = QuantizedTensor.from_float(
        weight(16, 32), "TensorCoreFP8E4M3Layout", scale="recalculate"
    )
    entries = layouts.entries_of(tensor)
    assert set(entries) == {"weight", "weight_scale", "comfy_quant"}
    assert torch.equal(decode(entries, torch.bfloat16), tensor.dequantize())


def test_other_formats_are_refused_in_a_sentence(layouts) -> None:
    for format in HOSTS:
        with pytest.raises(ValueError, match="not in bitsandbytes'"):
            layouts.tensor_from(encode(weight(16, 256), format), torch.bfloat16)
    entries = encode(weight(16, 64), "bnb_nf4")
    del entries["weight.absmax"]
    with pytest.raises(ValueError, match=r"weight\.absmax is missing"):
        layouts.tensor_from(entries, torch.bfloat16)


def test_a_second_import_of_the_module_leaves_its_tensors_alone(layouts) -> None:
    entries = encode(weight(16, 64), "bnb_nf4")
    tensor = layouts.tensor_from(entries, torch.bfloat16)
    second = importlib.import_module("pack.nodes.quantized_layouts")
    assert second is not layouts
    assert torch.equal(tensor.dequantize(), decode(entries, torch.bfloat16))
    assert torch.equal(
        second.linear(weight(3, 64), tensor, None), layouts.linear(weight(3, 64), tensor, None)
    )
    assert set(second.entries_of(tensor)) == set(entries)
    assert same(second.tensor_from(entries, torch.bfloat16), tensor)


def test_rotations_of_others_are_computed_without_kernels_that_refuse_them(
    host, monkeypatch
) -> None:
    operations = host.part("nodes.quantized_ops").operations
    layer = operations(torch.bfloat16, False, torch.device("cpu")).Linear(
        128, 48, bias=False, device="cpu", dtype=torch.bfloat16
    )
    layer.load_state_dict(others_w4a8(weight(48, 128), 64), strict=False)
    x, plain = weight(4, 128), weight(48, 128)
    before = layer(x), layer.dense_weight()
    kernels = cuda_kernels.installed(monkeypatch)
    assert torch.equal(layer(x), before[0]) and torch.equal(layer.dense_weight(), before[1])
    assert not kernels.seen
    assert float((before[1] - plain).norm() / plain.norm()) < 0.09
    if kernels.refusing:
        with pytest.raises(RuntimeError, match="only supports group_size 256"):
            layer.weight.dequantize()  # as stock does
