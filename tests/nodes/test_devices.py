"""What NVML says of this process, as it says it on Linux, in containers, on Windows, in MIG slices."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

GB = 10**9
CARD = torch.device("cuda", 0)


class Process(NamedTuple):
    """As pynvml lists one."""

    pid: int
    usedGpuMemory: int | None


class FakeNvml(types.ModuleType):
    """The part of pynvml that is used, with one card of 8 GB."""

    class NVMLError(Exception):
        """As pynvml's."""

    nvmlMemory_v2 = 0x2000028

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.names = {"GPU-1234": 8 * GB}
        self.compute: list[Process] = []
        self.graphics: list[Process] = []
        self.started = 0

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlDeviceGetHandleByUUID(self, name: bytes) -> str:
        if name.decode() not in self.names:
            raise self.NVMLError("Not Found")
        return name.decode()

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int) -> Any:
        total = self.names[handle]
        return types.SimpleNamespace(
            total=total + GB, reserved=GB, used=3 * GB, free=total - 3 * GB
        )

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Process]:
        return self.compute

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[Process]:
        return self.graphics


@pytest.fixture
def fake(host, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """A card, and NVML that knows it."""
    fake = FakeNvml()
    host.part("nodes.nvml")._module.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = types.SimpleNamespace(uuid="1234", total_memory=8 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: True, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB + 7, 8 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    yield fake
    host.part("nodes.nvml")._module.cache_clear()


@pytest.fixture
def measured(host, fake: FakeNvml) -> Any:
    """Asks for the card's figures."""
    return lambda: host.part("nodes.devices").device_memory(CARD)


def test_others_are_what_is_in_use_less_our_own(fake: FakeNvml, measured: Any) -> None:
    fake.compute = [Process(os.getpid(), 2 * GB), Process(1, GB)]
    found = measured()
    assert found[:7] == ("cuda:0", "A card", "cuda", 8 * GB, 3 * GB, 2 * GB, GB) and not found.why
    measured()
    assert fake.started == 1


def test_a_process_that_only_draws_is_found_too(fake: FakeNvml, measured: Any) -> None:
    fake.graphics = [Process(os.getpid(), 2 * GB)]
    assert measured().own_bytes == 2 * GB


def test_the_only_process_is_ours_whatever_its_number(fake: FakeNvml, measured: Any) -> None:
    fake.compute = [Process(999_999, 2 * GB)]
    assert measured().own_bytes == 2 * GB
    fake.compute = [Process(999_999, GB // 2)]  # less than torch has: somebody else's
    assert measured().own_bytes is None


@pytest.mark.parametrize(
    ("listed", "why"),
    [
        ([Process(7, GB), Process(8, GB)], "inside this container"),
        ([], "NVML does not list this process"),
        ([Process(os.getpid(), None)], "Windows"),
    ],
)
def test_without_our_own_figure_the_reason_is_told(
    fake: FakeNvml, measured: Any, listed: list[Process], why: str
) -> None:
    fake.compute = listed
    found = measured()
    assert (found.own_bytes, found.other_bytes, found.used_bytes) == (None, None, 3 * GB)
    assert why in found.why["own_bytes"] and why in found.why["other_bytes"]


def test_without_the_module_the_remedy_is_named(
    fake: FakeNvml, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = measured()
    assert found.total_bytes == 8 * GB and found.used_bytes == 3 * GB - 7
    assert "pip install nvidia-ml-py" in found.why["own_bytes"]


def test_a_slice_of_a_card_is_not_taken_for_the_whole(fake: FakeNvml, measured: Any) -> None:
    fake.names = {"GPU-1234": 80 * GB}
    assert "MIG" in measured().why["own_bytes"]
    fake.names = {"GPU-1234": 80 * GB, "MIG-1234": 8 * GB}
    fake.compute = [Process(os.getpid(), 2 * GB)]
    assert measured().own_bytes == 2 * GB


def test_a_library_that_fails_is_asked_again(fake: FakeNvml, measured: Any) -> None:
    def failing() -> None:
        raise fake.NVMLError("Driver Not Loaded")

    start, fake.nvmlInit = fake.nvmlInit, failing
    assert "Driver Not Loaded" in measured().why["own_bytes"]
    fake.nvmlInit = start
    fake.compute = [Process(os.getpid(), 2 * GB)]
    assert measured().own_bytes == 2 * GB


def test_a_card_that_comfyui_does_not_use_is_asked_without_taking_memory_of_it(
    host, fake: FakeNvml, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: False, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked.append)
    found = measured()
    assert found[3:7] == (8 * GB, 3 * GB, 0, 3 * GB) and not asked
    host.part("nodes.nvml")._module.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = measured()
    assert found[3:7] == (8 * GB, None, 0, None) and not asked
    assert "does not use this card" in found.why["used_bytes"]


def test_a_broken_card_has_no_figures_and_the_pack_loads(
    fake: FakeNvml, measured: Any, host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(device: torch.device) -> Any:
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    monkeypatch.setattr(torch.cuda, "mem_get_info", failing)
    monkeypatch.setattr(torch.cuda, "get_device_name", failing)
    found = measured()
    assert found[1:7] == ("cuda", "cuda", None, None, None, None)
    assert "it fails: RuntimeError: CUDA error: an illegal memory access." in found.why.values()
    sources = host.part("nodes.memory_sources")
    monkeypatch.setattr(sources, "devices", lambda: [CARD, torch.device("cpu")])
    monkeypatch.setattr(torch.cuda, "memory_stats", failing)
    monkeypatch.setattr(sources, "_at_start", {})
    sources.note_start()
    assert sources._at_start == {}
