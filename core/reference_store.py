"""Keys and values of reference tokens, kept from one step to the next: on the GPU or in RAM."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .kv_formats import TABLE, pack, parts_of, unpack

FORMATS = tuple(TABLE)  # "model": the model's own type, exact
PLACES = ("gpu", "ram")
ALIGNED = 16  # bytes: where a part may begin
STREAMING = ("cuda", "xpu")  # devices that copy while they compute
Pin = Callable[[Tensor], bool]  # page-locks a CPU tensor; False where it was not
Unpin = Callable[[Tensor], object]


def bytes_of(format: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that one tensor (batch, heads, tokens, width of a head) takes in a store: its numbers
    and their scales. Raises ValueError for what a store cannot hold."""
    sizes = [math.prod(size) * kind.itemsize for kind, size in parts_of(format, shape, dtype)]
    return sum(-(-size // ALIGNED) * ALIGNED for size in sizes)


@dataclass
class _Block:
    """Keys and values of a block, one behind the other in one buffer of bytes."""

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    buffer: Tensor  # uint8

    def parts(self, buffer: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of keys and of values within such a buffer."""
        found, start = [], 0
        each = parts_of(self.format, self.shape, self.dtype)
        for kind, size in (*each, *each):
            length = math.prod(size) * kind.itemsize
            found.append(buffer[start : start + length].view(kind).view(size))
            start += -(-length // ALIGNED) * ALIGNED
        return found[: len(each)], found[len(each) :]


class KVStore:
    """Keys and values, after RoPE, of some tokens for every block of one model call.

    It belongs to one thread at a time. `pin` and `unpin` page-lock its RAM, so that copies run
    beside the computation. A `put` that fails leaves its block undefined: what counts as recorded
    is the caller's to know. Raises ValueError for a format or place that there is not.
    """

    def __init__(
        self,
        format: str,
        place: str,
        device: torch.device,
        pin: Pin | None = None,
        unpin: Unpin | None = None,
    ) -> None:
        if format not in FORMATS or place not in PLACES:
            wanted = f"{FORMATS} and a place of {PLACES}, not {format} and {place}"
            raise ValueError(f"A store has a format of {wanted}.")
        self.format, self.place, self.device = format, place, torch.device(device)
        self._blocks: dict[int, _Block] = {}
        self._away = place == "ram" and self.device.type != "cpu"
        self._ring = _Ring(self.device) if self._away else None
        self._memory = _Memory(self.device if not self._away else torch.device("cpu"), pin, unpin)
        # Pinned memory that is only dropped would stay pinned, and in ComfyUI's account of it.
        weakref.finalize(self, _release, self._ring, self._memory).atexit = False

    @torch.no_grad()
    def put(self, block: int, key: Tensor, value: Tensor) -> None:
        """Record a block's keys and values (batch, heads, tokens, width); they are copied.

        In place of what the block had where the shapes agree; otherwise that goes first.
        """
        if key.shape != value.shape or key.dtype != value.dtype:
            raise ValueError("Keys and values of a block have one shape and one type.")
        entry = self._entry(block, key)
        if self._ring is None:
            self._pack(entry, entry.buffer, key, value)
            return
        with self._ring.to_fill(block, entry.buffer) as staged:
            self._pack(entry, staged, key, value)

    @torch.no_grad()
    def get(self, block: int) -> tuple[Tensor, Tensor]:
        """A block's keys and values, on the device, in the type that was put. KeyError: not put."""
        entry = self._blocks[block]
        key, value = (
            torch.empty(entry.shape, dtype=entry.dtype, device=self.device) for _ in range(2)
        )
        self._unpack(block, key, value)
        return key, value

    @torch.no_grad()
    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`key` and `value` (batch, heads, tokens, width) with the stored ones behind them.

        One allocation for each, which is read into directly. From RAM, the next block is fetched
        meanwhile. KeyError: the block was not put.
        """
        added, length = self._blocks[block].shape[2], key.shape[2]
        batch, heads, _, width = key.shape
        longer = [t.new_empty((batch, heads, length + added, width)) for t in (key, value)]
        for tensor, own in zip(longer, (key, value), strict=True):
            tensor[:, :, :length].copy_(own)
        self._unpack(block, *(tensor[:, :, length:] for tensor in longer))
        return longer[0], longer[1]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those that were put, in their order."""
        return tuple(sorted(self._blocks))

    @property
    def bytes_held(self) -> dict[str, int]:
        """By place: what is kept, and on the GPU what copies go through."""
        held = dict.fromkeys(PLACES, 0)
        held[self.place] = sum(entry.buffer.nbytes for entry in list(self._blocks.values()))
        if self._ring is not None:
            held["gpu"] += self._ring.nbytes
        return held

    def unstage(self) -> None:
        """Let go of what lies on the GPU beside a store in RAM: no pass is under way."""
        if self._ring is not None:
            self._ring.drop()

    def release(self) -> None:
        """Empty again."""
        self._blocks.clear()
        _release(self._ring, self._memory)

    # ----------------------------------------------------------------------------------- inside
    def _entry(self, block: int, like: Tensor) -> _Block:
        shape, dtype = tuple(like.shape), like.dtype
        entry = self._blocks.get(block)
        if entry is not None and (entry.shape, entry.dtype) == (shape, dtype):
            return entry
        if entry is not None:
            self._drop(block)
        buffer = self._memory.take(2 * bytes_of(self.format, shape, dtype))
        self._blocks[block] = _Block(self.format, shape, dtype, buffer)
        return self._blocks[block]

    def _drop(self, block: int) -> None:
        if self._ring is not None:
            self._ring.drop(wait=True)
        self._memory.give_back(self._blocks.pop(block).buffer)

    def _pack(self, entry: _Block, buffer: Tensor, key: Tensor, value: Tensor) -> None:
        for tensor, parts in zip((key, value), entry.parts(buffer), strict=True):
            pack(self.format, tensor, parts)

    def _unpack(self, block: int, key: Tensor, value: Tensor) -> None:
        entry = self._blocks[block]
        if self._ring is None:
            self._read(entry, entry.buffer, key, value)
            return
        with self._ring.to_read(block, entry.buffer) as staged:
            self._read(entry, staged, key, value)
        following = min((other for other in self._blocks if other > block), default=None)
        if following is None:
            self._ring.drop()  # it was the last one that is read in a pass
        else:
            self._ring.fetch(following, self._blocks[following].buffer)

    def _read(self, entry: _Block, buffer: Tensor, key: Tensor, value: Tensor) -> None:
        for out, parts in zip((key, value), entry.parts(buffer), strict=True):
            unpack(self.format, parts, out)


def _release(ring: _Ring | None, memory: _Memory) -> None:
    if ring is not None:
        ring.drop(wait=True)
    memory.release()


class _Memory:
    """The buffers of a store, and which of them are pinned."""

    def __init__(self, device: torch.device, pin: Pin | None, unpin: Unpin | None) -> None:
        self._device, self._pin, self._unpin = device, pin, unpin
        self._pinned: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """A new buffer."""
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._pin is not None and self._pin(buffer):
            self._pinned.append(buffer)
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """One that no copy reads or writes any more."""
        for index, pinned in enumerate(self._pinned):
            if pinned is buffer:
                self._unpin(self._pinned.pop(index))
                return

    def release(self) -> None:
        """All of them."""
        while self._pinned:
            self._unpin(self._pinned.pop())


@dataclass
class _Slot:
    """A buffer on the device that copies go through, and who is done with it."""

    buffer: Tensor
    block: int | None = None  # whose data it holds, as it is in RAM
    copied: Any = None  # events of torch: of the stream that copies,
    used: Any = None  # and of the one that computes
    recent: int = 0


@dataclass
class _Ring:
    """Two buffers on a device, through which blocks go to RAM and come back beside the computation.

    They stay the same ones. A buffer for each copy would wait for its event before the allocator
    gave it out again: the host runs ahead, and soon the whole store would lie on the device.
    """

    device: torch.device
    slots: list[_Slot] = field(default_factory=list)
    _stream: Any = None
    _time: int = 0

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(slot.buffer.nbytes for slot in self.slots)

    def to_fill(self, block: int, target: Tensor) -> _Filling:
        """A buffer to write a block into; it is copied to `target` behind that."""
        slot = self._slot(block, target)
        slot.block = None
        return _Filling(self, slot, block, target)

    def to_read(self, block: int, source: Tensor) -> _Reading:
        """A block's data on the device."""
        return _Reading(self, self.fetch(block, source))

    def fetch(self, block: int, source: Tensor) -> _Slot:
        """Start to copy a block to the device, if it is not there."""
        slot = self._slot(block, source)
        if slot.block != block:
            slot.block = None
            self.copy(slot, slot.buffer, source)
            slot.block = block
        return slot

    def copy(self, slot: _Slot, target: Tensor, source: Tensor) -> None:
        """Beside the computation, once that is done with the slot."""
        if self.device.type not in STREAMING:
            target.copy_(source)
            return
        module = torch.get_device_module(self.device)
        if self._stream is None:
            self._stream = module.Stream(self.device)
        self._stream.wait_event(slot.used)
        with module.stream(self._stream):
            target.copy_(source, non_blocking=True)
        slot.copied = self._stream.record_event()

    def begin(self, slot: _Slot) -> None:
        """The computation is about to use a slot."""
        if slot.copied is not None:
            self._computing().wait_event(slot.copied)

    def done(self, slot: _Slot) -> None:
        """The computation has used a slot: what was queued so far."""
        if self.device.type in STREAMING:
            slot.used = self._computing().record_event()

    def drop(self, wait: bool = False) -> None:
        """Let go of the buffers; `wait` for all copies, before their RAM goes too."""
        if wait and self._stream is not None:
            self._stream.synchronize()
        for slot in self.slots:
            self.begin(slot)  # what gets this memory next must not meet a copy
        self.slots.clear()

    def _computing(self) -> Any:
        return torch.get_device_module(self.device).current_stream(self.device)

    def _slot(self, block: int, like: Tensor) -> _Slot:
        """The one that has this block, or the one used longest ago."""
        self._time += 1
        fitting = [slot for slot in self.slots if slot.buffer.nbytes == like.nbytes]
        if len(fitting) < len(self.slots):
            self.drop()
        slot = next((slot for slot in self.slots if slot.block == block), None)
        if slot is None and len(self.slots) < 2:
            slot = _Slot(torch.empty(like.nbytes, dtype=torch.uint8, device=self.device))
            self.done(slot)  # its memory may be in use by what was queued before
            self.slots.append(slot)
        slot = slot or min(self.slots, key=lambda each: each.recent)
        slot.recent = self._time
        return slot


@dataclass
class _Filling:
    ring: _Ring
    slot: _Slot
    block: int
    target: Tensor

    def __enter__(self) -> Tensor:
        self.ring.begin(self.slot)
        return self.slot.buffer

    def __exit__(self, kind: object, *error: object) -> None:
        self.ring.done(self.slot)
        if kind is None:
            self.ring.copy(self.slot, self.target, self.slot.buffer)
            self.slot.block = self.block


@dataclass
class _Reading:
    ring: _Ring
    slot: _Slot

    def __enter__(self) -> Tensor:
        self.ring.begin(self.slot)
        return self.slot.buffer

    def __exit__(self, *error: object) -> None:
        self.ring.done(self.slot)
