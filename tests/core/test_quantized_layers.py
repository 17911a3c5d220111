"""The codec of quantised layers against bitsandbytes' and comfy-kitchen's own numbers."""

from __future__ import annotations

import json
import logging
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import (
    bitsandbytes_formats,
    bitsandbytes_int8,
    checkpoint,
    host_formats,
    quantized_layers,
)
from pack.core.quantization import FORMATS, bytes_of, fits
from pack.core.quantized_layers import (
    QuantizedFileError,
    decode,
    encode,
    format_of,
    layers_of,
    missing_package,
    shape_of,
)
from pack.core.tensor_writer import DTYPES as DTYPES_BY_NAME
from pack.tests.conftest import missing
from pack.tests.examples import examples
from safetensors.torch import load_file, save_file

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FOUR_BIT = ("bnb_nf4", "bnb_fp4")
STATE = "weight.quant_state.bitsandbytes__"
# The largest relative error on normally distributed weights, measured and rounded up.
ERRORS = {"bnb_int8": 0.01, "bnb_nf4": 0.1, "bnb_fp4": 0.13, "int8": 0.01, "w4a8": 0.08}
ERRORS["w4a4"] = 0.15
widths = st.sampled_from([16, 48, 64, 96, 128, 192, 256, 320])


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    lacking = [problem for name in FORMATS if (problem := missing_package(name))]
    if lacking:
        missing(lacking[0])


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def by_hand(entries: dict[str, torch.Tensor]) -> torch.Tensor:
    """NF4 and FP4 as the papers say: the map's numbers times the scales of their blocks, fp32."""
    name = next(key for key in entries if key.startswith(STATE))
    state = json.loads(bytes(entries[name].tolist()))
    numbers = state["shape"][0] * state["shape"][1]
    scale = entries["weight.absmax"]
    if "nested_blocksize" in state:
        nested = entries["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
        scale = entries["weight.nested_quant_map"][scale.long()] * nested[: len(scale)]
        scale = scale + state["nested_offset"]
    packed = entries["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:numbers].long()
    scales = scale.repeat_interleave(state["blocksize"])[:numbers]
    return (entries["weight.quant_map"][codes] * scales).view(state["shape"])


# ----------------------------------------------------------------------------------- round trips
@given(st.sampled_from(list(FORMATS)), st.integers(1, 40), widths, st.sampled_from(DTYPES))
@settings(max_examples=examples(60))
def test_every_format_gives_back_shape_dtype_and_nearly_the_weight(format, rows, width, dtype):
    if not fits(format, (rows, width)):
        return
    w = weight(rows, width, dtype)
    before = w.clone()
    entries = encode(w, format)
    back = decode(entries, dtype)
    assert torch.equal(w, before)
    assert format_of(entries) == format and shape_of(entries) == (rows, width)
    assert back.shape == w.shape and back.dtype == dtype
    error = (back - w).float().norm() / w.float().norm()
    assert error < ERRORS[format] * (1 if rows * width > 4000 else 1.6)
    details = ("quant_state", "comfy_quant", "_format")  # JSON, and the order of the rows
    size = sum(e.nbytes for name, e in entries.items() if not any(d in name for d in details))
    assert 0 <= size - bytes_of(format, (rows, width)) <= 4 * (16 + 256)  # maps of codes


@given(
    st.sampled_from(["nf4", "fp4"]),
    st.integers(1, 33),
    st.integers(1, 130),
    st.sampled_from(bitsandbytes_formats.BLOCKS),
    st.booleans(),
    st.sampled_from(DTYPES),
)
@settings(max_examples=examples(80))
def test_four_bits_are_decoded_exactly_whatever_the_shape_and_block(
    kind, rows, columns, block, nested, dtype
):
    columns += rows * columns % 2
    quantized = bitsandbytes_formats.quantize_4bit(weight(rows, columns), kind, block, nested)
    entries = bitsandbytes_formats.entries_4bit(quantized, torch.bfloat16)
    assert torch.equal(decode(entries, dtype), by_hand(entries).to(dtype))


@pytest.mark.parametrize(("shape", "block"), [((6, 33), 64), ((2, 4096), 2048), ((3, 4096), 4096)])
def test_nothing_is_compiled_on_a_cpu(monkeypatch, shape, block) -> None:
    """bitsandbytes would, for odd rows and for large blocks: it takes a compiler and seconds."""
    from bitsandbytes.backends.default import ops

    def compiled(*args: object) -> None:
        raise AssertionError("torch.compile is used")

    monkeypatch.setattr(ops, "_dequantize_4bit_compute", compiled)
    quantized = bitsandbytes_formats.quantize_4bit(weight(*shape), "nf4", block, nested=False)
    entries = bitsandbytes_formats.entries_4bit(quantized, torch.bfloat16)
    assert torch.equal(decode(entries, torch.float32), by_hand(entries))


@pytest.mark.parametrize("format", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bit_entries_are_what_bitsandbytes_writes(format, dtype) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    w = weight(96, 192, dtype)
    packed, state = quantize_4bit(w, quant_type=format[4:], compress_statistics=True)
    theirs = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    theirs["weight"] = packed
    ours = encode(w, format)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert torch.equal(decode(ours, dtype), dequantize_4bit(packed, state))
    read = QuantState.from_dict(
        {n: t for n, t in ours.items() if n != "weight"}, torch.device("cpu")
    )
    assert torch.equal(dequantize_4bit(ours["weight"], read), dequantize_4bit(packed, state))


def test_large_layers_are_quantised_in_pieces_to_the_same_entries(monkeypatch) -> None:
    w = weight(70, 256)
    whole = {name: encode(w, name) for name in FORMATS}
    for module in (bitsandbytes_formats, bitsandbytes_int8, host_formats):
        monkeypatch.setattr(module, "PIECE", 4096)
    for name, entries in whole.items():
        pieces = encode(w, name)
        assert all(torch.equal(pieces[key], entries[key]) for key in entries)


def test_int8_is_bitsandbytes_own_but_also_beyond_the_range_of_fp16() -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    w = weight(32, 100, torch.float16)
    codes, largest, _ = int8_vectorwise_quant(w.clone())
    entries = encode(w, "bnb_int8")
    assert torch.equal(entries["SCB"], largest)
    # Theirs rounds the factor of a row to fp16 on a CPU; ours may then be nearer by one.
    assert (entries["weight"] - codes).abs().max() <= 1
    exact = w.double() * 127 / largest.double()[:, None]
    assert (entries["weight"] - exact).abs().max() <= 0.5001
    theirs = int8_vectorwise_dequant(entries["weight"], entries["SCB"])
    torch.testing.assert_close(decode(entries, torch.float32), theirs, rtol=3e-7, atol=0)
    big = torch.tensor([[1e6, -2e6], [0, 0]], dtype=torch.float32)
    assert decode(encode(big, "bnb_int8"), torch.float32).tolist()[1] == [0, 0]
    assert decode(encode(big, "bnb_int8"), torch.float32)[0, 1].item() == pytest.approx(-2e6)


@pytest.mark.parametrize(("format", "rotation"), [("int8", 64), ("w4a8", 256), ("w4a4", 64)])
def test_host_entries_decode_to_what_the_host_makes_of_them(format, rotation) -> None:
    from comfy_kitchen import tensor as kitchen

    w = weight(48, 2 * rotation)
    layout = getattr(kitchen, host_formats.LAYOUTS[format])
    options = {"convrot": True, "per_channel": True} if format == "int8" else {}
    codes, params = layout.quantize(w, convrot_groupsize=rotation, **options)
    entries = encode(w, format)
    assert torch.equal(entries["weight"], codes)
    assert torch.equal(decode(entries, torch.bfloat16), layout.dequantize(codes, params))


def test_scaled_fp8_is_decoded_and_nvfp4_is_not() -> None:
    w = weight(8, 16).to(torch.float8_e4m3fn)
    settings = host_formats.pack_json({"format": "float8_e4m3fn"})
    entries = {"weight": w, "weight_scale": torch.tensor(2.0), "comfy_quant": settings}
    assert format_of(entries) == "float8_e4m3fn"
    assert torch.equal(decode(entries, torch.bfloat16), w.to(torch.bfloat16) * 2)
    entries["comfy_quant"] = host_formats.pack_json({"format": "nvfp4"})
    with pytest.raises(QuantizedFileError, match="nvfp4 cannot be turned into other formats"):
        decode(entries, torch.bfloat16)


# --------------------------------------------------------------------------- files of all makers
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_files_of_bitsandbytes_modules_open(
    tmp_path: Path, nested: bool, storage: torch.dtype
) -> None:
    """diffusers and transformers replace layers by these modules and save their state dicts."""
    from bitsandbytes import nn

    state, plain = {}, {}
    for name, kind in {"a.nf": "nf4", "a.fp": "fp4", "a.eight": ""}.items():
        w = weight(48, 128)
        if kind:
            given = {"quant_type": kind, "compress_statistics": nested, "quant_storage": storage}
            layer = nn.Linear4bit(128, 48, bias=True, **given)
            layer.weight.data = w.clone()
        else:
            layer = nn.Linear8bitLt(128, 48, bias=True, has_fp16_weights=False)
            layer.weight = nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
        state |= {f"{name}.{key}": t for key, t in layer.to("cpu").state_dict().items()}
        plain[name] = w
    save_file(state, tmp_path / "theirs.safetensors")
    header = checkpoint.read_header(str(tmp_path / "theirs.safetensors"))
    assert layers_of(header) == {"a.nf": "bnb_nf4", "a.fp": "bnb_fp4", "a.eight": "bnb_int8"}
    read = load_file(tmp_path / "theirs.safetensors")
    for name, format in layers_of(header).items():
        own = {k[len(name) + 1 :]: t for k, t in read.items() if k.startswith(f"{name}.")}
        error = (decode(own, torch.float32) - plain[name]).norm() / plain[name].float().norm()
        assert shape_of(own) == (48, 128) and error < ERRORS[format]


def test_bitsandbytes_module_opens_our_int8() -> None:
    from bitsandbytes import nn

    entries = encode(weight(48, 128), "bnb_int8")
    layer = nn.Linear8bitLt(128, 48, bias=False, has_fp16_weights=False).to("cpu")
    layer.load_state_dict(dict(entries))
    x = weight(5, 128, torch.float16)
    exact = x.float() @ decode(entries, torch.float32).t()
    assert (layer(x) - exact).norm() / exact.norm() < 0.02  # it quantises the input as well


def four_bit(**changes: object) -> dict[str, torch.Tensor]:
    """Entries with changes: None leaves one out; a dict changes what quant_state says."""
    entries = encode(weight(16, 64), "bnb_nf4")
    for name, value in changes.items():
        key = (
            f"{STATE}nf4" if name == "state" else "weight" if name == "weight" else f"weight.{name}"
        )
        if value is None:
            del entries[key]
        elif isinstance(value, dict):
            state = json.loads(bytes(entries[key].tolist())) | value
            entries[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        else:
            entries[key] = value
    return entries


def test_packed_weights_of_other_storage_dtypes_and_shapes_are_read() -> None:
    entries = four_bit()
    expected = decode(entries, torch.float32)
    flat = entries["weight"]
    for stored in (
        flat.view(1, -1),
        flat.view(-1).view(torch.bfloat16),
        flat.view(-1, 4).view(torch.float32),
    ):
        assert torch.equal(decode({**entries, "weight": stored}, torch.float32), expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"absmax": None}, "weight.absmax is missing"),
        ({"quant_map": None}, "weight.quant_map is missing"),
        ({"nested_absmax": None}, "weight.nested_absmax is missing"),
        ({"nested_quant_map": None}, "weight.nested_quant_map is missing"),
        ({"state": None}, "quant_state.bitsandbytes__* is missing"),
        ({"weight": None}, "weight is missing"),
        (
            {"weight": torch.zeros(511, 1, dtype=torch.uint8)},
            "511 bytes, and one of 16 x 64 in 4 bit has 512",
        ),
        (
            {"absmax": torch.zeros(15, dtype=torch.uint8)},
            "15 numbers, and the weight has 16 blocks",
        ),
        ({"absmax": torch.zeros(16, dtype=torch.int32)}, "weight.absmax is int32"),
        ({"nested_absmax": torch.zeros(2)}, "nested_absmax has 2 numbers"),
        ({"nested_quant_map": torch.zeros(16)}, "nested_quant_map has 16 numbers, expected 256"),
        ({"quant_map": torch.zeros(16)}, "quant_map is not nf4's"),
        ({"state": {"quant_type": "fp4"}}, "format fp4 (its entry is named nf4)"),
        ({"state": {"blocksize": 60}}, "blocks of 60 weights"),
        ({"state": {"shape": [4, 4, 64]}}, "shape [4, 4, 64]"),
        ({"state": {"nested_offset": None}}, "nested_offset None"),
        ({"state": {"nested_offset": float("nan")}}, "nested_offset nan"),
        ({"state": {"shape": [True, 1024]}}, "shape [True, 1024]"),
        ({"state": torch.ones(3)}, "cannot be read; the file is damaged"),
        ({"nested_absmax": torch.full((1,), float("nan"))}, "nested_absmax holds values that are"),
        ({"nested_quant_map": torch.full((256,), float("inf"))}, "nested_quant_map holds values"),
        ({"absmax": torch.full((16,), float("nan"))}, "weight.absmax holds values that are not"),
        ({"state": torch.zeros(9, dtype=torch.uint8)}, "cannot be read; the file is damaged"),
    ],
)
def test_damaged_four_bit_layers_are_told_in_a_sentence(changes, sentence) -> None:
    with pytest.raises(QuantizedFileError) as told:
        decode(four_bit(**changes), torch.bfloat16)
    assert sentence in str(told.value) and str(told.value).endswith(".")


def test_an_odd_number_of_weights_is_read_and_not_written() -> None:
    entries = encode(weight(1, 16), "bnb_nf4")
    state = json.loads(bytes(entries[f"{STATE}nf4"].tolist())) | {"shape": [3, 5]}
    odd = {
        **entries,
        f"{STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    assert torch.equal(decode(odd, torch.float32).flatten(), decode(entries, torch.float32)[0, :15])
    with pytest.raises(ValueError, match="two to a byte"):
        encode(weight(3, 5), "bnb_nf4")


def test_an_unknown_bit_width_is_told_in_a_sentence() -> None:
    entries = four_bit()
    entries[f"{STATE}int3"] = entries.pop(f"{STATE}nf4")
    assert format_of(entries) == "bnb_int3"
    with pytest.raises(QuantizedFileError, match="only nf4 and fp4"):
        decode(entries, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SCB": None}, "SCB is missing"),
        ({"weight": None}, "weight is missing"),
        ({"SCB": torch.zeros(7)}, "SCB has 7 numbers in float32, and the weight has 16 rows"),
        ({"weight": torch.zeros(16, 64)}, "its weight is float32"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "tile order of an old GPU"),
        ({"weight_format": torch.tensor(float("nan"))}, "weight_format has 1 numbers in float32"),
        ({"SCB": torch.full((16,), float("inf"))}, "SCB holds values that are not numbers"),
    ],
)
def test_damaged_int8_layers_are_told_in_a_sentence(changes, sentence) -> None:
    entries = {**encode(weight(16, 64), "bnb_int8"), **changes}
    entries = {name: e for name, e in entries.items() if e is not None}
    with pytest.raises(QuantizedFileError) as told:
        decode(entries, torch.bfloat16)
    assert sentence in str(told.value) and str(told.value).endswith(".")


def test_old_int8_files_without_a_weight_format_are_read() -> None:
    entries = encode(weight(16, 64), "bnb_int8")
    old = {"weight": entries["weight"], "SCB": entries["SCB"].half().view(1, -1)}
    assert (decode(old, torch.float32) - decode(entries, torch.float32)).abs().max() < 1e-4


@pytest.mark.parametrize("format", ["int8", "w4a8", "w4a4"])
def test_damaged_host_layers_are_told_in_a_sentence(format) -> None:
    entries = encode(weight(16, 256), format)
    scale = "weight_s_rel" if format == "w4a8" else "weight_scale"
    with pytest.raises(QuantizedFileError, match=f"{scale} is missing"):
        decode({name: e for name, e in entries.items() if name != scale}, torch.bfloat16)
    with pytest.raises(QuantizedFileError, match="comfy_quant cannot be read"):
        decode({**entries, "comfy_quant": torch.zeros(3, dtype=torch.uint8)}, torch.bfloat16)


def saying(entries: dict[str, torch.Tensor], **settings: object) -> dict[str, torch.Tensor]:
    """The same, with other settings in `comfy_quant`; None leaves one out."""
    said = json.loads(bytes(entries["comfy_quant"].tolist())) | settings
    left = {name: value for name, value in said.items() if value is not None}
    return {**entries, "comfy_quant": host_formats.pack_json(left)}


NAN = float("nan")
SETTINGS = [
    *(("int8", {"convrot_groupsize": value}) for value in ("abc", 7, 0, 2, 1024, [64], True)),
    *(("w4a4", {"convrot_groupsize": value}) for value in ("abc", 0, None)),  # None: 256
    *(("w4a8", {"group_size": value}) for value in (8, 0, "16", 32)),
    ("w4a4", {"linear_dtype": ["int4"]}),
]


@pytest.mark.parametrize(("format", "settings"), SETTINGS)
def test_settings_that_fail_in_the_product_are_told_at_once(format, settings) -> None:
    entries = encode(weight(16, 256 if format == "w4a8" else 64), format)
    host_formats.check(entries, format)
    with pytest.raises(QuantizedFileError, match=f"comfy_quant says {next(iter(settings))} .*aga"):
        host_formats.check(saying(entries, **settings), format)


@pytest.mark.parametrize("said", [None, ["int8_tensorwise"], 8])
def test_a_format_that_is_no_name_is_told(said) -> None:
    with pytest.raises(QuantizedFileError, match="comfy_quant says the format .* is no name"):
        format_of(saying(encode(weight(16, 64), "int8"), format=said))
    with pytest.raises(QuantizedFileError, match="comfy_quant cannot be read"):
        format_of({**encode(weight(16, 64), "int8"), "comfy_quant": torch.ones(3)})


@pytest.mark.parametrize(
    ("format", "name"),
    [
        *(("int8", "weight_scale"), ("w4a4", "weight_scale"), ("w4a8", "weight_s_channel")),
        *(("w4a8", "weight_s_rel"), ("w4a8", "weight_codebook")),
    ],
)
def test_scales_of_the_host_that_are_no_numbers_are_told(format, name) -> None:
    entries = encode(weight(16, 256), format)
    bad = entries[name].float().clone()
    bad.view(-1)[-1] = NAN
    with pytest.raises(QuantizedFileError, match=f"{name} holds values that are not numbers"):
        host_formats.check({**entries, name: bad.to(entries[name].dtype)}, format)


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(format, bad) -> None:
    w = weight(16, 64)
    w[3, 5] = bad
    with pytest.raises(QuantizedFileError, match="not numbers"):
        encode(w, format)


def test_only_matrices_of_floats_are_quantised() -> None:
    for w in (torch.zeros(4, 4, 4), torch.zeros(4, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="Only 2-D weights"):
            encode(w, "bnb_nf4")
    with pytest.raises(QuantizedFileError, match="is not quantised"):
        decode({"weight": torch.zeros(4, 4)}, torch.bfloat16)


# ------------------------------------------------------------------------------------- a header
def test_a_header_tells_the_formats_that_the_tensors_tell(tmp_path: Path) -> None:
    tensors = {
        f"a.{name}.{key}": e for name in FORMATS for key, e in encode(weight(16, 256), name).items()
    }
    tensors["a.plain.weight"] = weight(4, 4)
    tensors["a.fp8.weight"] = weight(4, 4).to(torch.float8_e4m3fn)
    tensors["a.norm.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "all.safetensors")
    header = checkpoint.read_header(str(tmp_path / "all.safetensors"))
    assert layers_of(header) == {f"a.{name}": name for name in FORMATS}
    read = load_file(tmp_path / "all.safetensors")
    for name in FORMATS:
        entries = {
            key.removeprefix(f"a.{name}."): e
            for key, e in read.items()
            if key.startswith(f"a.{name}.")
        }
        assert format_of(entries) == name
        assert torch.equal(
            decode(entries, torch.float32), decode(encode(weight(16, 256), name), torch.float32)
        )


def header_of(
    metadata: dict[str, str] | None = None, **tensors: tuple[str, tuple[int, ...]]
) -> checkpoint.Header:
    rows = {name.replace("__", "."): checkpoint.Tensor(*t) for name, t in tensors.items()}
    return checkpoint.Header("/models/some.safetensors", rows, metadata or {})


def test_a_header_with_a_missing_entry_names_file_and_layer() -> None:
    header = header_of(block__weight=("I8", (4, 4)), block__bias=("F32", (4,)))
    with pytest.raises(
        QuantizedFileError, match=r"some\.safetensors, layer block: .* has no scale"
    ):
        layers_of(header)


@pytest.mark.parametrize("format", ["int8", "w4a8", "w4a4"])
def test_a_header_with_damaged_host_layers_names_file_and_layer(format) -> None:
    whole = {
        f"{layer}.{name}": checkpoint.Tensor(DTYPES_BY_NAME[e.dtype], tuple(e.shape))
        for layer in ("a", "b")
        for name, e in encode(weight(16, 256), format).items()
    }
    assert layers_of(checkpoint.Header("some.safetensors", whole)) == dict.fromkeys("ab", format)
    for name in (n for n in whole if n.startswith("b.")):
        first, *others = whole[name].shape
        short = checkpoint.Tensor(whole[name].dtype, (first - 1, *others))
        for change in ({}, {name: short}):
            if change and name == "b.comfy_quant":
                continue  # which a header does not show
            rows = {n: t for n, t in whole.items() if n != name} | change
            with pytest.raises(QuantizedFileError, match=r"^some\.safetensors, layer b: "):
                layers_of(checkpoint.Header("some.safetensors", rows))


def test_what_only_looks_like_an_entry_is_left_alone() -> None:
    rows = {
        "a__parametrizations__weight__original0": ("F32", (4, 1)),
        "a__weight": ("BF16", (4, 4)),
    }
    assert layers_of(header_of(**rows, weight=("BF16", (4, 4)), SCB=("F32", (4,)))) == {}


def test_hosts_other_formats_are_named_by_their_header() -> None:
    fp8, scale = ("F8_E4M3", (64, 64)), ("F32", ())
    assert layers_of(header_of(a__weight=fp8, a__scale_weight=scale)) == {"a": "float8_e4m3fn"}
    assert layers_of(header_of(a__weight=fp8, a__weight_scale=("U8", (128, 4)))) == {"a": "mxfp8"}
    by_rows = {"a__weight": fp8, "a__weight_scale": ("BF16", (64, 1))}
    assert layers_of(header_of(**by_rows)) == {"a": "float8_e4m3fn"}
    packed = {"a__weight": ("U8", (64, 32)), "a__weight_scale": ("F8_E4M3", (64, 4))}
    assert layers_of(header_of(**packed, a__weight_scale_2=scale)) == {"a": "nvfp4"}
    e5m2 = {"a__weight": ("F8_E5M2", (4, 4)), "a__weight_scale": scale}
    assert layers_of(header_of(**e5m2)) == {"a": "float8_e5m2"}
    told = json.dumps({"layers": {"a": {"format": "convrot_w4a4"}}})
    rows = {"a__weight": ("I8", (4, 32)), "a__weight_scale": ("F32", (4, 1))}
    assert layers_of(header_of({"_quantization_metadata": told}, **rows)) == {"a": "w4a4"}


# ------------------------------------------------------------------------------------ packages
def test_a_missing_or_old_package_is_told_with_the_way_to_get_it(monkeypatch) -> None:
    def lacking(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lacking)
    told = missing_package("bnb_nf4")
    assert (
        "bnb_nf4 cannot be used: bitsandbytes 0.49 or newer is needed and is not installed" in told
    )
    assert "pip install -U bitsandbytes" in told and told.endswith("restart it.")
    assert missing_package("bnb_int8") == missing_package("w4a8") == ""
    for old in ("0.48.2", "0.9"):
        monkeypatch.setattr(metadata, "version", lambda name, old=old: old)
        assert f"0.49 or newer is needed, and {old} is installed" in missing_package("bnb_fp4")
    for new in ("0.49.0", "0.50.2.dev1", "1.0"):
        monkeypatch.setattr(metadata, "version", lambda name, new=new: new)
        assert missing_package("bnb_nf4") == ""


def test_a_package_without_a_build_for_this_gpu_is_told(monkeypatch) -> None:
    import bitsandbytes

    class ErrorHandlerMockBNBNativeLibrary:
        pass

    monkeypatch.setattr(bitsandbytes.cextension, "lib", ErrorHandlerMockBNBNativeLibrary())
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert "has no build for CUDA 99.0 that torch uses" in missing_package("bnb_nf4")


def test_importing_bitsandbytes_fetches_nothing(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(*names, **options): raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    with bitsandbytes_formats._without_downloads(), pytest.raises(ImportError):
        from kernels import get_kernel
    from kernels import get_kernel  # noqa: F401

    monkeypatch.delitem(sys.modules, "kernels")


def test_advice_to_install_what_is_not_needed_is_not_shown(monkeypatch, caplog) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "bitsandbytes")
        with bitsandbytes_formats._without_advice():
            logger.warning("pip install kernels")
    logger.warning("heard")
    assert caplog.messages == ["heard"]


def test_an_old_comfy_kitchen_is_told(monkeypatch) -> None:
    import comfy_kitchen.tensor

    monkeypatch.delattr(comfy_kitchen.tensor, "AsymW4A8Int8Layout")
    assert "too old for w4a8" in missing_package("int8")
    assert quantized_layers.missing_package("bnb_nf4") == ""


# ------------------------------------------------------------------------------------- product
@given(
    st.sampled_from(["nf4", "fp4"]),
    st.integers(1, 33),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([1, 5]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=examples(30))
def test_the_fused_product_is_asked_for_the_same(kind, outputs, inputs, rows, nested, bias) -> None:
    """bitsandbytes' operator for cards has code for CPUs too: it shows what it was told."""
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        missing("bitsandbytes 0.50 or newer")
    w = bitsandbytes_formats.quantize_4bit(weight(outputs, inputs), kind, 64, nested)
    x, b = weight(rows, inputs)[None], weight(1, outputs)[0] if bias else None
    plain = bitsandbytes_formats.linear_4bit(x, w, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes_formats, "_fusible", lambda x, weight: True)
        fused = bitsandbytes_formats.linear_4bit(x, w, b)
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 256, 257])
def test_int8_products_are_as_exact_as_their_dtype_and_never_overflow(dtype, rows) -> None:
    w, x = weight(64, 512, torch.float32) * 100, weight(rows, 512, torch.float32) * 20
    codes, largest = bitsandbytes_int8.quantize_int8(w)
    bias = weight(1, 64, dtype)[0]
    exact = (
        x.to(dtype).double() @ (codes.double() * largest.double()[:, None] / 127).t()
        + bias.double()
    )
    out = bitsandbytes_int8.linear_int8(x.to(dtype), codes, largest, bias)
    assert out.dtype == dtype and out.isfinite().all()
    assert (x.to(dtype) @ codes.to(dtype).t()).abs().max() > 1000
    assert (out.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


def test_fp16_is_dequantised_where_sums_of_codes_overflow() -> None:
    x, w = torch.full((1, 512), 10.0, dtype=torch.float16), torch.full((4, 512), 0.01)
    out = bitsandbytes_int8.linear_int8(x, *bitsandbytes_int8.quantize_int8(w))
    assert torch.allclose(out.float(), torch.full((1, 4), 51.2), rtol=2e-3)


def test_only_few_whole_rows_on_a_card_are_fused() -> None:
    w = bitsandbytes_formats.quantize_4bit(weight(8, 64), "nf4")
    ragged = bitsandbytes_formats.quantize_4bit(weight(8, 96), "nf4")
    fusible = bitsandbytes_formats._fusible
    assert not fusible(torch.zeros(1, 64), w)

    class OnACard:
        device = torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def numel(self) -> int:
            return torch.Size(self.shape).numel()

    newest = hasattr(torch.ops.bitsandbytes, "gemm_4bit")  # bitsandbytes 0.50
    assert fusible(OnACard(2, 3, 64), w) is newest
    assert not fusible(OnACard(1, 513, 64), w)
    assert not fusible(OnACard(1, 0, 64), w)
    assert not fusible(OnACard(1, 96), ragged)
