"""A layer of which one entry is missing or cut off is refused by a sentence, never computed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from pack.tests.conftest import missing
from pack.tests.nodes.quantized_models import parts

OPTIONAL = {"weight_format", "weight_codebook"}  # without the last a layer alone can be whole
FORMATS = ("bnb_nf4", "bnb_int8", "int8", "w4a8", "w4a4")
INPUTS = 256  # which all of them can have


@pytest.fixture(scope="module")
def it(host) -> SimpleNamespace:
    """The modules under test."""
    it = parts(host)
    if problem := it.layers.missing_package("bnb_nf4"):
        missing(problem)
    return it


def entries(it, format: str, shape: tuple[int, int] = (16, INPUTS)) -> dict[str, torch.Tensor]:
    """Of a layer with a bias."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"bias": torch.ones(shape[0]), **it.layers.encode(weight, format)}


def opened(it, found: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model's layer of INPUTS inputs and 16 outputs with these entries."""
    linear = it.ops.operations(torch.float32, False, torch.device("cpu")).Linear
    model = torch.nn.ModuleDict({"block": linear(INPUTS, 16, device="cpu", dtype=torch.float32)})
    model.load_state_dict({f"block.{name}": t.clone() for name, t in found.items()}, strict=False)
    return model["block"]


def refusal(it, found: dict[str, torch.Tensor]) -> str:
    with pytest.raises(it.layers.QuantizedFileError, match=r"^Layer block: ") as error:
        opened(it, found)
    return str(error.value)


@pytest.mark.parametrize("format", FORMATS)
def test_every_entry_is_needed_whole(it, format) -> None:
    whole = entries(it, format)
    assert opened(it, whole)(torch.ones(1, INPUTS)).isfinite().all()
    for name, entry in whole.items():
        if name not in OPTIONAL:
            assert refusal(it, {n: e for n, e in whole.items() if n != name})
        if entry.dim():
            assert refusal(it, {**whole, name: entry[: len(entry) // 2]})
        if entry.dim() == 2 and entry.shape[1] > 1:
            assert refusal(it, {**whole, name: entry[:, : entry.shape[1] // 2]})


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_of_another_shape(it, format) -> None:
    found = entries(it, format, (32, 512)) | {"bias": torch.ones(16)}
    assert "The file has 32 x 512 numbers where the model has 16 x 256" in refusal(it, found)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"format": "int3"}, "says the format int3, which this ComfyUI does not know"),
        ({}, "says the format None, which is no name"),
    ],
)
def test_an_unknown_format(it, settings, sentence) -> None:
    told = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    assert sentence in refusal(it, {**entries(it, "int8"), "comfy_quant": told})


def test_weights_that_say_nothing_of_their_format(it) -> None:
    fp8 = {"weight": torch.ones(16, INPUTS).to(torch.float8_e4m3fn), "weight_scale": torch.ones(())}
    for found in ({"weight": torch.ones(16, INPUTS, dtype=torch.uint8)}, fp8):
        assert "comfy_quant is missing" in refusal(it, found)
    assert "weight is missing" in refusal(it, {"bias": torch.ones(16)})
    assert "16 x 32 numbers" in refusal(it, {"weight": torch.ones(16, 32)})
