"""A quantised model that is only partly on its card: everything that meets is on the same device.

The card is pretended: tensors without numbers that say they are on one, by torch's own fake mode,
which refuses to compute with two devices. So this tells of devices and bytes, not of pictures;
those are in test_quantized_patcher.py (on the CPU) and tests/gpu.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pack.tests.graphs import UNET
from pack.tests.nodes.quantized_models import (
    lora_on,
    model_of,
    quantized_state,
    state_of,
    write_lora,
)
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

CARD = torch.device("cuda:0")
Q, MLP, MOD = (
    f"transformer_blocks.0.{name}" for name in ("attn.to_q", "img_mlp.net.0.proj", "img_mod.1")
)
SHAPES = {Q: (128, 128), MLP: (512, 128), MOD: (768, 128)}
# One of each layout, and by turns what can lie beside it (nothing, factors, weight functions) and
# how weights come: each into memory of its own, or through the host's cast buffers.
CASES = [
    ("bnb_nf4", "balanced", "lora", "buffers"),
    ("bnb_nf4", "smallest", "loha", "own"),
    ("bnb_int8", "smallest", "lora", "own"),
    ("int8", "balanced", "plain", "buffers"),
    ("w4a8", "smallest", "lora", "buffers"),
    ("w4a4", "smallest", "plain", "buffers"),
    ("fp8_e4m3fn", "", "lora", "buffers"),
    ("fp8_e4m3fn", "", "lora", "own"),
]


class Stream:
    """What the host asks of a stream beside torch's own."""

    as_context = staticmethod(lambda stream: contextlib.nullcontext())

    def wait_stream(self, other: object) -> None:
        """Nothing runs here that could be waited for."""


def faked(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """The same without numbers; of a packed weight every part."""
    from comfy.quant_ops import QuantizedTensor

    if not isinstance(tensor, QuantizedTensor):
        return mode.from_tensor(tensor.detach())
    names, context = tensor.__tensor_flatten__()
    parts = {name: mode.from_tensor(getattr(tensor, name)) for name in names}
    return QuantizedTensor.__tensor_unflatten__(parts, context, 0, 0)


def fake_model(model: Any, mode: FakeTensorMode) -> None:
    """Put fake weights into a model that is in RAM, and fake factors into its LoRAs."""
    for module in model.model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                fake = faked(weight, mode)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    for layer in model.run_time_patches.layers.values():
        layer._factors = [
            (mode.from_tensor(up), mode.from_tensor(down), s) for up, down, s in layer._factors
        ]


@contextlib.contextmanager
def pretended_card(monkeypatch: pytest.MonkeyPatch, streams: bool) -> Iterator[FakeTensorMode]:
    """Fake tensors in this block; `streams`: weights come through the host's cast buffers."""
    import comfy.model_management as mm
    import comfy.ops

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    # torch swaps fake weights, which fails where anything refers to them; the host's own way
    # for its quantised layers puts new ones in their place.
    monkeypatch.setattr(torch.nn.Module, "_apply", comfy.ops._quantized_apply)
    if streams:
        monkeypatch.setattr(mm, "STREAM_CAST_BUFFERS", {})
        monkeypatch.setattr(mm, "LARGEST_CASTED_WEIGHT", (None, 0))
        monkeypatch.setattr(mm, "synchronize", lambda: None)
        monkeypatch.setattr(mm, "soft_empty_cache", lambda *_: None)
        turns = itertools.cycle([Stream(), Stream()])
        monkeypatch.setattr(mm, "get_offload_stream", lambda _: next(turns))
        monkeypatch.setattr(mm, "current_stream", lambda _: Stream())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


def with_patches(host: Any, model: Any, kind: str) -> Any:
    """The model with nothing, a LoRA, or patches that are computed on dequantised weights."""
    if kind == "plain":
        return model
    write_lora(host, "devices.safetensors", SHAPES)
    if kind == "loha":
        parts = {f"hada_w{i}_{n}": s for i in "12" for n, s in (("a", (128, 4)), ("b", (4, 128)))}
        tensors = {f"{Q}.{name}": torch.ones(shape) for name, shape in parts.items()}
        save_file(tensors, host.models / "loras" / "devices.safetensors")
    return lora_on(host, model, "devices.safetensors", 0.7)


def weights_on_the_card(model: Any) -> int:
    """Bytes, by what is there and not by what the host has counted."""
    modules = [m for m in model.model.modules() if any(True for _ in m.parameters(recurse=False))]
    state = [t for m in modules for t in m.state_dict().values()]
    return sum(t.nbytes for t in state if t.device == CARD)


def passes(model: Any) -> None:
    """One forward pass, on the card. Raises where two devices meet."""
    where = {"device": CARD, "dtype": torch.bfloat16}
    x, text, time = (torch.empty(s, **where) for s in ((1, 16, 1, 8, 8), (1, 8, 64), (1,)))
    made = model.model.diffusion_model(x, time, context=text)
    assert made.device == CARD


@pytest.mark.parametrize(("format", "preset", "kind", "way"), CASES)
def test_nothing_is_on_the_wrong_device(
    host: Any, monkeypatch: pytest.MonkeyPatch, format: str, preset: str, kind: str, way: str
) -> None:
    # One block is enough, and to compute with fake tensors takes much longer than with real ones.
    plain = {k: t for k, t in state_of(host, UNET).items() if "blocks.1." not in k}
    bare = model_of(host, plain, quantized_state(host, plain, format, preset), torch.bfloat16)
    bare.load_device = CARD
    model = with_patches(host, bare, kind)
    size, layers = model.model_size(), model.run_time_patches.layers.values()
    with pretended_card(monkeypatch, way == "buffers") as mode:
        fake_model(model, mode)
        found = []
        for room in (size // 2, 1e32):  # a part, all
            model.partially_load(CARD, room)
            passes(model)
            found.append(weights_on_the_card(model))
            # ComfyUI counts the descriptions of packed weights too, which lie in RAM: of such small
            # layers they are 7 %.
            assert abs(found[-1] - model.loaded_size()) < 0.08 * size
        assert 0 < found[0] < found[1]
        assert sum(layer.resident_bytes(CARD) for layer in layers) == sum(
            layer.bytes_of(torch.bfloat16) for layer in layers
        )
        freed = model.partially_unload(model.offload_device, size // 2)
        passes(model)
        assert size // 2 <= freed and weights_on_the_card(model) <= size - freed + 0.05 * size
        model.partially_unload(model.offload_device, 1e32)
        assert weights_on_the_card(model) == 0
        assert sum(layer.resident_bytes(CARD) for layer in layers) == 0
        passes(model)  # everything is streamed
        model.detach()
        assert weights_on_the_card(model) == 0


@pytest.mark.parametrize("format", ["bnb_nf4", "fp8_e4m3fn"])
def test_loras_and_weights_share_a_full_card(
    host: Any, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Prompts one after another, by ComfyUI's own plan for a card that does not hold the model.

    What a pass needs beside the weights stays free, though LoRAs come to a card that is full.
    """
    import comfy.model_management as mm

    plain = {k: t for k, t in state_of(host, UNET).items() if "blocks.1." not in k}
    bare = model_of(host, plain, quantized_state(host, plain, format, "smallest"), torch.bfloat16)
    bare.load_device = CARD
    patched = []
    for name in ("first", "second"):
        write_lora(host, f"{name}.safetensors", SHAPES, rank=32)
        patched.append(lora_on(host, bare, f"{name}.safetensors"))
    size, models = bare.model_size(), (bare, *patched)
    total, work, little = round(1.2 * size), round(0.5 * size), round(0.3 * size)
    layers = [layer for one in patched for layer in one.run_time_patches.layers.values()]

    def taken() -> int:
        return weights_on_the_card(bare) + sum(layer.resident_bytes(CARD) for layer in layers)

    def free(device: object = None, torch_free_too: bool = False) -> Any:
        return (total - taken(),) * 2 if torch_free_too else total - taken()

    with pretended_card(monkeypatch, True) as mode:
        for one in models:
            fake_model(one, mode)
        monkeypatch.setattr(mm, "get_free_memory", free)
        monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(mm, "extra_reserved_memory", lambda: 0)
        monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
        monkeypatch.setattr(mm, "current_loaded_models", [])
        for turn, beside in ((0, work), (0, little), (1, work), (1, work), (2, work), (0, work)):
            mm.load_models_gpu([models[turn]], memory_required=beside)
            passes(models[turn])
            assert weights_on_the_card(bare) > 0 and taken() + beside <= total, (turn, beside)
        assert sum(layer.resident_bytes(CARD) for layer in layers) == 0
        bare.detach()
        assert taken() == 0
