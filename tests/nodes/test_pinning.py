"""What streams stays pinned: ComfyUI's own bookkeeping of pins, with a CUDA runtime that counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

GIB = 2**30
WIDTH, BLOCKS = 3072, 60
# Bytes of a block's layers in fp8 as they are used: modulation, attention, MLP.
BLOCK = (*(6 * WIDTH**2,) * 2, *(WIDTH**2,) * 8, *(4 * WIDTH**2,) * 4)
LAYERS = BLOCK * BLOCKS
PINNED = {"32 GB, Windows": 12.8, "cgroup of 30 GiB": 14.0}  # GiB that ComfyUI pins at most


class Runtime:
    """Of CUDA what pins memory."""

    def __init__(self) -> None:
        self.registered = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.registered += size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0


class Vram:
    """Which layers lie in VRAM, as comfy-aimdo's README has it: the host gives the largest the
    lowest offsets; for a lower one the highest has to go, and what lies there stays out.

    Left out: pages of 32 MiB, and that a pass needs more at its height than at its ends.
    """

    def __init__(self, room: float) -> None:
        names = sorted(range(BLOCKS), key=str)
        rank = {block: place for place, block in enumerate(names)}
        by_size = sorted(
            range(len(LAYERS)),
            key=lambda i: (-LAYERS[i], rank[i // len(BLOCK)], i % len(BLOCK)),
        )
        self.offset = {layer: place for place, layer in enumerate(by_size)}
        self.room, self.watermark = room, len(LAYERS)
        self.resident: set[int] = set()

    def fault(self, layer: int) -> bool:
        """Whether it has a place there."""
        if layer in self.resident:
            return True
        if self.offset[layer] >= self.watermark:
            return False
        self.resident.add(layer)
        self.room -= LAYERS[layer]
        while self.room < 0:
            highest = max(self.resident, key=self.offset.__getitem__)
            self.resident.discard(highest)
            self.room += LAYERS[highest]
            self.watermark = self.offset[highest]
        return layer in self.resident


class Passes:
    """A patcher, and what a pass pins anew: the host's bookkeeping, with as little of a card."""

    def __init__(self, host: Any, kind: type, limit: float, room: float, monkeypatch: Any) -> None:
        self.mm, self.pins, self.runtime = host.model_management, host.pinned_memory, Runtime()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self.runtime)
        monkeypatch.setattr(self.mm, "TOTAL_PINNED_MEMORY", 0)
        monkeypatch.setattr(self.mm, "MAX_PINNED_MEMORY", limit * GIB)
        cuda = torch.device("cuda", 0)
        subsets = (*self.mm.PIN_SUBSETS, *self.mm.LOADED_PIN_SUBSETS)
        self.state: dict[str, Any] = {name: (None, [], [-1], [0], [0], {}) for name in subsets}
        self.state |= {"active": True, "current_prompt": True}
        patcher = object.__new__(kind)
        patcher.model = SimpleNamespace(dynamic_pins={cuda: self.state})
        patcher.load_device = cuda
        patcher.unpin_all_weights = patcher.detach = lambda **kwargs: None  # when it is collected
        monkeypatch.setattr(self.mm, "current_loaded_models", [SimpleNamespace(model=patcher)])
        self.layers = [SimpleNamespace(_pin_state=self.state, _pins={}) for _ in LAYERS]
        self.new_prompt(room)

    def new_prompt(self, room: float) -> None:
        """Something else had the card: nothing lies there any more."""
        self.vram = Vram(room)

    def run(self) -> int:
        """Bytes that a pass pins anew, after the first use of each layer."""
        self.runtime.registered = 0
        for number, layer in enumerate(self.layers):
            was_there = number in self.vram.resident
            layer._v_signature = number if self.vram.fault(number) else None
            if was_there:
                continue
            if layer._pins:
                self.pins.get_pin(layer, next(iter(layer._pins)))
            else:
                loaded = layer._v_signature is not None
                self.first_use(layer, LAYERS[number], "weights-loaded" if loaded else "weights")
            assert self.mm.TOTAL_PINNED_MEMORY <= self.mm.MAX_PINNED_MEMORY
        return self.runtime.registered

    def first_use(self, layer: SimpleNamespace, size: int, subset: str) -> None:
        """As comfy.pinned_memory.pin_memory, which needs a card for the memory itself."""
        assert self.mm.ensure_pin_registerable(size)
        stack, split = self.state[subset][1], self.state[subset][2]
        pin = torch.empty(size, dtype=torch.uint8, device="meta")
        layer._pins[subset] = {"pin": pin, "registered": True, "stack_index": len(stack)}
        stack.append((layer, 0))
        split[0] = len(stack) - 1
        self.mm.TOTAL_PINNED_MEMORY += size
        self.state[subset][3][0] += size


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
    ours = Passes(comfy, kinds(host)[kind], PINNED[limit], 10.6e9, monkeypatch)
    assert [ours.run() for _ in range(6)][2:] == [0] * 4
    ours.new_prompt(10.6e9)
    assert [ours.run() for _ in range(6)][2:] == [0] * 4
    ours.new_prompt(7.6e9)  # a larger picture
    assert [ours.run() for _ in range(6)][2:] == [0] * 4


@pytest.mark.parametrize("limit", PINNED)
def test_comfyui_alone_pins_a_part_anew_in_every_pass(comfy, monkeypatch, limit: str) -> None:
    """If this fails, ComfyUI has mended it, and nodes/pinning.py may go."""
    stock = Passes(comfy, comfy.patcher, PINNED[limit], 10.6e9, monkeypatch)
    assert all(4.5e9 < anew < 7e9 for anew in [stock.run() for _ in range(6)][2:])


def test_where_more_streams_than_may_be_pinned_it_is_less_than_comfyui_alone(
    host, comfy, monkeypatch
) -> None:
    """8 GB of VRAM: 13.9 GB stream, 13.7 may be pinned."""
    anew = []
    for kind in (comfy.patcher, kinds(host)[0]):
        passes = Passes(comfy, kind, 12.8, 6.5e9, monkeypatch)
        anew.append(sum([passes.run() for _ in range(6)][2:]))
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
    nothing = {name: (None, [], [-1], [0], [0], {}) for name in pinning.EVERY}
    patcher.load_device = torch.device("cuda", 0)
    patcher.model = SimpleNamespace(dynamic_pins={patcher.load_device: nothing})
    own = ["weights-loaded", "patches-loaded", "weights", "patches"]
    assert patcher.unregister_inactive_pins(5) == 5
    assert patcher.unregister_inactive_pins(5, ["weights", "patches", "weights-loaded"]) == 5
    assert asked == [own, ["weights-loaded", "weights", "patches"]]


def test_a_pin_that_cuda_does_not_give_up_is_not_counted(host, comfy, monkeypatch) -> None:
    passes = Passes(comfy, kinds(host)[0], 100, 10.6e9, monkeypatch)
    passes.run()
    monkeypatch.setattr(passes.runtime, "cudaHostUnregister", lambda address: 1)
    monkeypatch.setattr(comfy.model_management, "discard_cuda_async_error", lambda: None)
    before = comfy.model_management.TOTAL_PINNED_MEMORY
    (loaded,) = comfy.model_management.current_loaded_models
    assert loaded.model.unregister_inactive_pins(10**9, ["weights"]) == 0
    assert before == comfy.model_management.TOTAL_PINNED_MEMORY


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
    monkeypatch.setattr(patchers, "CoreModelPatcher", lambda *args, **more: "another pack's")
    assert around(model, card, cpu, False, False) == "another pack's"
