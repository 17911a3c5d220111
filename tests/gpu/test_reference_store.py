"""On a card: RAM and GPU give back the same, copies never meet the computation, memory is as told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pack.core.reference_store import FORMATS, KVStore, bytes_of
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CARD = torch.device("cuda", 0)
SHAPE = (1, 24, 4096, 128)  # of one block of Qwen-Image, and a reference of a megapixel
BLOCKS = 12
MIB = 1 << 20


class Pins:
    """Page-locks memory as ComfyUI does."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def pin(self, tensor: Tensor) -> bool:
        """cudaHostRegister."""
        size = tensor.nbytes
        assert torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 1) == 0
        self.pinned[tensor.data_ptr()] = size
        return True

    def unpin(self, tensor: Tensor) -> None:
        """cudaHostUnregister."""
        del self.pinned[tensor.data_ptr()]
        assert torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()) == 0


@pytest.fixture
def pins() -> Iterator[Pins]:
    """All of them end with the test."""
    made = Pins()
    yield made
    assert not made.pinned


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Keys or values of a block."""
    random = torch.Generator(CARD).manual_seed(seed)
    return torch.randn(shape, generator=random, device=CARD, dtype=torch.bfloat16)


def busy(milliseconds: float) -> None:
    """Keep the computing stream busy, so that the host runs far ahead of it."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
def test_ram_gives_back_what_the_gpu_gives_back(format: str, pinned: bool, pins: Pins) -> None:
    own = (pins.pin, pins.unpin) if pinned else (None, None)
    near, far = KVStore(format, "gpu", CARD), KVStore(format, "ram", CARD, *own)
    tail = drawn(99, (1, 24, 300, 128))
    for step in range(3):  # recorded anew each time, and read in order, twice
        busy(100)  # whatever is queued waits: what does not wait for it would be wrong
        for block in range(BLOCKS):
            key, value = drawn(step * 100 + block), drawn(step * 100 + block + 50)
            for store in (near, far):
                store.put(block, key, value)
            key.zero_()  # it was copied
        for _ in range(2):
            busy(50)
            for block in range(BLOCKS):
                for one, other in zip(
                    near.extend(block, tail, tail), far.extend(block, tail, tail), strict=True
                ):
                    assert torch.equal(one, other), (step, block)
    far.release()


@pytest.mark.parametrize("format", FORMATS)
def test_a_host_that_runs_ahead_stages_two_blocks_at_most(format: str, pins: Pins) -> None:
    far = KVStore(format, "ram", CARD, pins.pin, pins.unpin)
    key, tail = drawn(1), drawn(2, (1, 24, 8, 128))
    staged = 2 * 2 * bytes_of(format, SHAPE, key.dtype)
    for block in range(BLOCKS):
        far.put(block, key, key)
    far.extend(BLOCKS - 1, tail, tail)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    busy(300)
    for block in range(BLOCKS):
        far.put(block, key, key)
    busy(300)
    for block in range(BLOCKS):
        far.extend(block, tail, tail)
    peak = torch.cuda.max_memory_allocated() - before
    # Of the tensors that the caller gets, of the arithmetic in float32, one block's at a time.
    assert peak <= staged + 2 * (key.nbytes + tail.nbytes) + 5 * 2 * key.nbytes + MIB
    assert far.bytes_held["gpu"] == 0
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= MIB
    far.release()


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_holds_the_bytes_calculated(format: str) -> None:
    key = drawn(1)
    KVStore(format, "gpu", CARD).put(0, key, key)  # a rotation's matrix stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    near = KVStore(format, "gpu", CARD)
    for block in range(BLOCKS):
        near.put(block, key, key)
    taken = torch.cuda.memory_allocated() - before
    wanted = 2 * BLOCKS * bytes_of(format, SHAPE, key.dtype)
    assert near.bytes_held == {"gpu": wanted, "ram": 0}
    assert taken == pytest.approx(wanted, rel=0.01)
    near.release()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_rounds_as_the_cpu_does(format: str) -> None:
    key, value = drawn(1, (2, 3, 40, 128)), drawn(2, (2, 3, 40, 128))
    card, cpu = KVStore(format, "gpu", CARD), KVStore(format, "gpu", torch.device("cpu"))
    card.put(0, key, value)
    cpu.put(0, key.cpu(), value.cpu())
    for one, other in zip(card.get(0), cpu.get(0), strict=True):
        step = {"model": 0.0, "int8": 0.02, "int4": 0.3}[format]
        assert (one.cpu().float() - other.float()).abs().max() <= step * other.float().abs().max()


@pytest.mark.parametrize("format", ["model", "int8"])
def test_copies_run_beside_the_computation(format: str, pins: Pins) -> None:
    """With work between the blocks that takes longer than a copy, RAM costs next to nothing."""
    near = KVStore(format, "gpu", CARD)
    far = KVStore(format, "ram", CARD, pins.pin, pins.unpin)
    key, tail = drawn(1), drawn(2)
    for store in (near, far):
        for block in range(BLOCKS):
            store.put(block, key, key)

    def seconds(store: KVStore) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for block in range(BLOCKS):
            store.extend(block, tail, tail)
            busy(8)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    for store in (near, far):
        seconds(store)
    times = {store.place: min(seconds(store) for _ in range(3)) for store in (near, far)}
    assert times["ram"] < 1.1 * times["gpu"], times
    far.release()
