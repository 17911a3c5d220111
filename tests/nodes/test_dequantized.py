"""What a pass of a quantised model is predicted to need: a plain weight beside the activations."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pack.core.budget import Plan, need
from pack.tests.graphs import UNET
from pack.tests.host import Host
from pack.tests.live_bytes import LiveBytes
from pack.tests.nodes.faults import small, within
from pack.tests.nodes.quantized_models import WIDTH, draw, model_of, quantized, state_of

MODULATION, WIDE = 6 * WIDTH * WIDTH, 4 * WIDTH * WIDTH  # numbers of the two largest weights
SIZE = 4  # bytes: on a CPU it computes in fp32
FP8, FORMATS = torch.float8_e4m3fn, ("bnb_nf4", "int8")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def workload(host: Host) -> ModuleType:
    return importlib.import_module(f"{host.pack.__name__}.nodes.workload")


def fp32(host: Host, format: str) -> Any:
    """A small transformer in one format."""
    return quantized(host, UNET, format, dtype=torch.float32)


# ---------------------------------------------------------------------------- which layers
@pytest.mark.parametrize(
    ("format", "cpu", "cuda"),
    [
        ("bnb_int8", (MODULATION, MODULATION), (MODULATION, MODULATION)),
        ("bnb_nf4", (MODULATION, MODULATION), (WIDE, MODULATION)),  # one row has a kernel
        ("bnb_fp4", (MODULATION, MODULATION), (WIDE, MODULATION)),
        ("int8", (0, 0), (0, 0)),
        ("w4a8", (0, 0), (0, 0)),
    ],
)
def test_weights_are_dequantised_where_no_kernel_reads_them(
    host: Host, workload: ModuleType, format: str, cpu: Any, cuda: Any
) -> None:
    model = fp32(host, format).model
    for device, numbers in ((CPU, cpu), (CUDA, cuda)):
        assert workload.dequantized_of(model, device) == tuple(SIZE * n for n in numbers)


@pytest.mark.parametrize("why", ["_full_precision_mm", "comfy_force_cast_weights", "patched"])
def test_a_format_with_kernels_is_dequantised_in_full_precision(
    host: Host, workload: ModuleType, why: str
) -> None:
    model = fp32(host, "int8").model
    layer = model.get_submodule("diffusion_model.transformer_blocks.1.img_mlp.net.2")
    if why == "patched":
        layer.weight_function = [lambda weight: weight]
    else:
        setattr(layer, why, True)
    assert workload.dequantized_of(model, CUDA) == (SIZE * WIDE, SIZE * WIDE)


def test_a_model_that_is_not_quantised_takes_no_more(host: Host, workload: ModuleType) -> None:
    plain = state_of(host, UNET)
    model = model_of(host, plain, plain)
    assert workload.dequantized_of(model.model, CUDA) == (0, 0)


# ------------------------------------------------------------ what a correction is kept by
@pytest.mark.parametrize(
    ("format", "weights"),
    [
        ("bnb_nf4", "bnb_nf4"),
        ("int8", "int8_tensorwise"),
        ("w4a8", "asym_w4a8_int8, int8_tensorwise"),  # narrow layers have no w4a8
    ],
)
def test_corrections_of_a_quantised_model_are_its_own(
    host: Host, workload: ModuleType, format: str, weights: str
) -> None:
    assert workload.weights_of(fp32(host, format).model) == weights


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_corrections_tell_weights_that_are_cast(
    host: Host, workload: ModuleType, stored: torch.dtype
) -> None:
    plain = state_of(host, UNET)
    model = model_of(host, plain, plain).model.to(torch.float32)
    for layer in model.diffusion_model.modules():
        if getattr(layer, "weight", None) is not None and layer.weight.dim() == 2:
            layer.weight.data = layer.weight.data.to(stored)
    model.manual_cast_dtype = torch.float32
    expected = "" if stored == torch.float32 else str(stored)
    assert workload.weights_of(model) == expected


def test_with_dynamic_vram_it_counts_what_a_weight_is_held_in(
    host: Host, workload: ModuleType
) -> None:
    plain = state_of(host, UNET)
    model = model_of(host, plain, plain).model
    for layer in model.diffusion_model.modules():
        layer.weight_comfy_model_dtype = FP8  # as ComfyUI notes it; the parameter is the file's
    assert workload.weights_of(model) == str(FP8)


def test_what_one_format_took_says_nothing_of_another(host: Host, monkeypatch, tmp_path) -> None:
    place = importlib.import_module(f"{host.pack.__name__}.nodes.place")
    monkeypatch.setattr(place, "MEASURED", place.Measured(tmp_path / "passes.json"))
    one, other = (place.Place(m, m.model, False) for m in (fp32(host, f) for f in FORMATS))
    for _ in range(3):
        place.MEASURED.learn(one.key(Plan()), 10**9, 2 * 10**9)
    assert one.factor(Plan()) == 2
    assert other.factor(Plan()) == 1


def test_a_modulation_sees_a_row_for_each_item_and_for_references(workload: ModuleType) -> None:
    of = workload.Dequantized(3, 5).of
    works = [
        SimpleNamespace(batch=b, timestep_zero=z) for b, z in ((1, False), (2, False), (1, True))
    ]
    assert [of(work) for work in works] == [3, 5, 5]


# --------------------------------------------------------------------- what is really taken
@pytest.mark.parametrize("format", ["bnb_int8", "bnb_nf4"])
def test_a_small_pass_holds_what_is_predicted(
    host: Host, workload: ModuleType, format: str
) -> None:
    """A picture so small that the weight is the larger part of it."""
    model, seen = fp32(host, format), []

    def watch(apply: Any, options: dict[str, Any]) -> Any:
        x, more = options["input"], options["c"]
        with LiveBytes() as live:
            out = apply(x, options["timestep"], **more)
        work = workload.work_of(model.model, True, x, more["c_crossattn"], more)
        seen.append((live.peak, work))
        return out

    model.set_model_unet_function_wrapper(watch)
    draw(host, model)
    weight = workload.dequantized_of(model.model, CPU)
    for peak, work in seen:
        without = need(work, Plan())
        with_it = need(replace(work, fixed=work.fixed + weight.of(work)), Plan())
        assert without < peak <= with_it < 2 * peak, (without, peak, with_it)


def test_the_sampler_counts_it(host: Host) -> None:
    needs = {}
    for format in ("bf16", "int8", "bnb_int8"):
        graph = within(small())
        graph["unet"]["inputs"] |= {"weight_dtype": format, "preset": "smallest"}
        needs[format] = host.run(graph).status("sampler")["need_bytes"]
    assert needs["bnb_int8"] - needs["int8"] == MODULATION * SIZE
    assert needs["int8"] == needs["bf16"]
