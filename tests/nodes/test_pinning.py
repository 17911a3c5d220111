"""What streams stays pinned: ComfyUI's own bookkeeping of pins, with a CUDA runtime that counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

GIB = 2**30
WIDTH = 3072
# Bytes of a block's layers in fp8, in the order in which they are used.
BLOCK = (*(WIDTH**2,) * 8, *(4 * WIDTH**2,) * 4, *(6 * WIDTH**2,) * 2)
LAYERS = BLOCK * 60
PINNED = {"32 GB, Windows": 12.8, "32 GB, Linux": 14.0}  # GiB that ComfyUI pins at most


class Runtime:
    """Of CUDA what pins memory."""

    def __init__(self) -> None:
        self.registered = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.registered += size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0


class Passes:
    """A patcher whose first layers lie in VRAM, and what a pass over the others pins anew."""

    def __init__(self, host: Any, kind: type, resident: float, monkeypatch: Any) -> None:
        self.mm, self.pins = host.model_management, host.pinned_memory
        self.runtime = Runtime()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self.runtime)
        cuda = torch.device("cuda", 0)
        subsets = (*self.mm.PIN_SUBSETS, *self.mm.LOADED_PIN_SUBSETS)
        self.state: dict[str, Any] = {name: (None, [], [-1], [0], [0], {}) for name in subsets}
        self.state |= {"active": True, "current_prompt": True}
        patcher = object.__new__(kind)
        patcher.model = SimpleNamespace(dynamic_pins={cuda: self.state})
        patcher.load_device = cuda
        patcher.unpin_all_weights = patcher.detach = lambda **kwargs: None  # when it is collected
        loaded = SimpleNamespace(model=patcher)
        monkeypatch.setattr(self.mm, "current_loaded_models", [loaded])
        self.streamed: list[SimpleNamespace] = []
        for size in LAYERS:
            in_vram = resident >= size
            resident -= size if in_vram else 0
            layer = self.first_use(size, "weights-loaded" if in_vram else "weights")
            if not in_vram:
                self.streamed.append(layer)

    def first_use(self, size: int, subset: str) -> SimpleNamespace:
        """As comfy.pinned_memory.pin_memory, which needs a card for the memory itself."""
        assert self.mm.ensure_pin_registerable(size)
        stack, split = self.state[subset][1], self.state[subset][2]
        pin = torch.empty(size, dtype=torch.uint8, device="meta")
        own = {"pin": pin, "registered": True, "stack_index": len(stack)}
        layer = SimpleNamespace(_pin_state=self.state, _pins={subset: own})
        stack.append((layer, 0))
        split[0] = len(stack) - 1
        self.mm.TOTAL_PINNED_MEMORY += size
        self.state[subset][3][0] += size
        return layer

    def run(self) -> int:
        """Bytes that a pass pins anew."""
        self.runtime.registered = 0
        for layer in self.streamed:
            self.pins.get_pin(layer)
        return self.runtime.registered


@pytest.fixture
def comfy(host) -> SimpleNamespace:
    """ComfyUI's modules that keep the books."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.pinned_memory

    return SimpleNamespace(
        model_management=comfy.model_management,
        pinned_memory=comfy.pinned_memory,
        patcher=comfy.model_patcher.ModelPatcherDynamic,
    )


def kinds(host: Any) -> list[type]:
    """This pack's patchers with dynamic VRAM."""
    plain = host.part("nodes.pinning").StreamingPatcher
    return [plain, host.part("nodes.unmerged_patcher").UnmergedDynamicPatcher]


@pytest.mark.parametrize("limit", PINNED)
@pytest.mark.parametrize("kind", [0, 1])
def test_what_streams_stays_pinned(host, comfy, monkeypatch, limit: str, kind: int) -> None:
    """12 GB of VRAM hold 10.6 GB of the fp8 file: the rest fits within what may be pinned."""
    most = PINNED[limit] * GIB
    monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0)
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", most)
    ours = Passes(comfy, kinds(host)[kind], 10.6e9, monkeypatch)
    assert [ours.run() for _ in range(4)] == [0] * 4
    assert most >= comfy.model_management.TOTAL_PINNED_MEMORY


@pytest.mark.parametrize("limit", PINNED)
def test_comfyui_alone_pins_it_anew_in_every_pass(host, comfy, monkeypatch, limit: str) -> None:
    """If this fails, ComfyUI has mended it, and nodes/pinning.py may go."""
    monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0)
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", PINNED[limit] * GIB)
    stock = Passes(comfy, comfy.patcher, 10.6e9, monkeypatch)
    assert all(7e9 < stock.run() < 9e9 for _ in range(4))


def test_where_more_streams_than_may_be_pinned_it_is_less_than_comfyui_alone(
    host, comfy, monkeypatch
) -> None:
    """8 GB of VRAM: 13.9 GB stream."""
    anew = []
    for kind in (comfy.patcher, kinds(host)[0]):
        monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0)
        monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 12.8 * GIB)
        passes = Passes(comfy, kind, 6.5e9, monkeypatch)
        anew.append([passes.run() for _ in range(4)][-1])
    assert anew[1] < 0.5 * anew[0]


def test_the_host_is_asked_as_it_asks_by_default(host, monkeypatch) -> None:
    """Without names, and with some of them: in the order of the host's own default."""
    pinning = host.part("nodes.pinning")
    asked: list[list[str]] = []
    monkeypatch.setattr(
        pinning.ModelPatcherDynamic,
        "unregister_inactive_pins",
        lambda self, size, subsets: asked.append(list(subsets)) or size,
    )
    patcher = object.__new__(pinning.StreamingPatcher)
    patcher.unpin_all_weights = patcher.detach = lambda **kwargs: None
    own = ["weights-loaded", "patches-loaded", "weights", "patches"]
    assert patcher.unregister_inactive_pins(5) == 5
    assert patcher.unregister_inactive_pins(5, [*pinning.PIN_SUBSETS, "weights-loaded"]) == 5
    assert asked == [own, ["weights-loaded", "weights", "patches"]]


def test_models_get_it_where_there_is_dynamic_vram(host, monkeypatch) -> None:
    pinning, around = host.part("nodes.pinning"), host.part("nodes.architectures").patcher_around
    card, cpu, model = torch.device("cuda", 0), torch.device("cpu"), torch.nn.Linear(2, 2)
    assert not pinning.has_dynamic_vram(False)  # without a card
    patchers = pinning.comfy.model_patcher
    monkeypatch.setattr(patchers, "CoreModelPatcher", pinning.ModelPatcherDynamic)
    assert type(around(model, cpu, cpu, False, False)) is pinning.ModelPatcher
    made: list[Any] = []
    monkeypatch.setattr(pinning, "StreamingPatcher", lambda *args, **more: made.append(more))
    around(model, card, cpu, False, False)
    assert made == [{"load_device": card, "offload_device": cpu}]
    assert type(around(model, card, cpu, False, True)) is pinning.ModelPatcher
    assert len(made) == 1
