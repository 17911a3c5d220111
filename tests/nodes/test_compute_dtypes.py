"""Which types each card computes in, asked of ComfyUI: the table in the loaders' help pages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZE = 20_430_000_000  # parameters
CARDS = {  # name, capability, architecture (AMD) -> computes in bf16
    "RTX 4070": ((8, 9), "", True),
    "RTX 3060": ((8, 6), "", True),
    "RTX 2060": ((7, 5), "", False),
    "GTX 1660": ((7, 5), "", False),
    "GTX 1080": ((6, 1), "", False),
    "Tesla V100": ((7, 0), "", False),
    "RX 7900 XTX": ((11, 0), "gfx1100", True),
    "RX 6800": ((10, 3), "gfx1030", False),
}


@pytest.fixture
def on_card(host, monkeypatch):
    """Let ComfyUI find a card, with 12 GB; tell what a transformer is stored and computed in."""
    import comfy.model_management as mm
    import comfy.supported_models
    import comfy.utils

    architectures = host.part("nodes.architectures")
    monkeypatch.setattr(comfy.utils, "calculate_parameters", lambda sd: SIZE)
    monkeypatch.setattr(mm, "cpu_state", mm.CPUState.GPU)
    monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(mm, "get_total_memory", lambda device=None: 12 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # emulated, says PyTorch

    def dtypes(name: str, options: dict, weight: torch.dtype, quantised: bool) -> tuple:
        (major, minor), architecture, _ = CARDS[name]
        card = SimpleNamespace(major=major, minor=minor, name=name, gcnArchName=architecture)
        monkeypatch.setattr(torch.version, "cuda", None if architecture else "13.0")
        monkeypatch.setattr(torch.version, "hip", "7.0" if architecture else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
        config = comfy.supported_models.QwenImage({"image_model": "qwen_image"})
        config.quant_config = {"mixed_ops": True} if quantised else None
        sd = {"weight": torch.zeros(2, 2, dtype=weight)}
        architectures.set_dtypes(config, sd, options, torch.device("cuda", 0))
        stored, cast = config.unet_config["dtype"], config.manual_cast_dtype
        return stored, cast or stored

    return dtypes


@pytest.mark.parametrize("name", CARDS)
def test_what_is_quantised_computes_in_bf16_where_the_card_has_it_else_in_fp32(on_card, name):
    best = BF16 if CARDS[name][-1] else FP32
    for weight in (torch.uint8, torch.int8, BF16, FP16):
        assert on_card(name, {}, weight, quantised=True)[1] == best


@pytest.mark.parametrize("name", CARDS)
def test_no_file_computes_in_fp16_unless_it_was_chosen(on_card, name) -> None:
    best = BF16 if CARDS[name][-1] else FP32
    for weight in (BF16, FP16, FP32, torch.float8_e4m3fn):
        assert on_card(name, {}, weight, quantised=False)[1] == best
    for option in (BF16, torch.float8_e4m3fn):
        assert on_card(name, {"dtype": option}, BF16, quantised=False) == (option, best)


@pytest.mark.parametrize("name", CARDS)
def test_fp16_that_was_chosen_is_what_most_cards_compute_in(on_card, name) -> None:
    _, computed = on_card(name, {"dtype": FP16}, BF16, quantised=False)
    without = name in ("GTX 1660", "GTX 1080")  # broken there, and slower on Linux: ComfyUI's lists
    assert computed == (FP32 if without else FP16)


def test_a_cpu_computes_in_fp32_whatever_the_weights_are(host) -> None:
    import comfy.model_management as mm

    for weight in (None, BF16, FP16, torch.float8_e4m3fn):
        assert mm.unet_manual_cast(weight, torch.device("cpu"), [BF16, FP32]) == FP32
