"""What is kept for one call of the model: never of another condition, picture, size or batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.reference_store import KVStore
from .region_reuse import Outside
from .token_reuse import Group

Parts = tuple[tuple[str | int, ...], ...]


class Key(NamedTuple):
    """Which slot a call has."""

    device: torch.device
    part: Parts  # of the picture: a tile, an item of the batch
    conditions: tuple[Hashable, ...]  # ComfyUI's ids of them
    shape: tuple[int, ...]  # of what the model sees of the picture


@dataclass(eq=False)
class Slot:
    """Groups with their stores, and what they are good for."""

    content: list[Any]  # what the keys and values depend on, besides the step
    references: Group | None = None
    outside: Outside | None = None
    recorded_at: int | None = None  # the last step that was computed in full
    dirty: bool = False  # a pass that writes into the stores has begun, and not succeeded
    busy: bool = False  # such a pass runs

    def groups(self) -> Iterator[Group]:
        """All there are."""
        if self.references is not None:
            yield self.references
        if self.outside is not None:
            yield self.outside.group

    def forget(self) -> None:
        """What the stores hold is of no use any more."""
        self.recorded_at, self.dirty = None, False
        for group in self.groups():
            group.known = False
        if self.outside is not None:
            self.outside.forget()

    def release(self) -> None:
        """Give the memory back."""
        self.forget()
        for group in self.groups():
            group.store.release()
            group.last = None


@dataclass
class Slots:
    """Of one run of a sampler. Several GPUs' threads come here at a time."""

    _slots: dict[Key, Slot] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, key: Key, content: list[Any], make: Callable[[], Slot]) -> Slot:
        """The slot of a call, empty unless `content` is what it was recorded with."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is not None and same(slot.content, content):
                return slot
            for other in [each for each in self._slots if _supersedes(key, each)]:
                self._slots.pop(other).release()
            slot = self._slots[key] = make()
            slot.content = copied(content)
            return slot

    def bytes_held(self) -> dict[str, int]:
        """By place."""
        held: dict[str, int] = {}
        for store in self.stores():
            for place, count in store.bytes_held.items():
                held[place] = held.get(place, 0) + count
        return held

    def stores(self) -> list[KVStore]:
        """All of them."""
        with self._lock:
            slots = list(self._slots.values())
        return [group.store for slot in slots for group in slot.groups()]

    def clear(self) -> None:
        """Release all that no forward pass uses."""
        with self._lock:
            for key in [key for key, slot in self._slots.items() if not slot.busy]:
                self._slots.pop(key).release()


def _supersedes(new: Key, old: Key) -> bool:
    """Whether a call takes the place of another: the same one with other content, or the same
    condition together with others, or of another size, or cut otherwise."""
    if new.device != old.device or not overlap(new.part, old.part):
        return False
    shared = set(new.conditions) & set(old.conditions)
    return new.conditions == old.conditions or bool(shared)


def overlap(one: Parts, other: Parts) -> bool:
    """Whether two parts (transformer_options.part_of) share anything of the picture or the batch.

    Tiles and items by their numbers; the whole contains its parts, and what is cut in different
    ways is not told apart.
    """
    for (kind, *first), (other_kind, *second) in zip(one, other, strict=False):
        if kind != other_kind:
            return True
        if kind == "items":  # the first one, and how many
            first, second = (range(start, start + count) for start, count in (first, second))
        if not set(first) & set(second):
            return False
    return True


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a call are equal by content, tensors bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def copied(value: Any) -> Any:
    """So that what others write into a tensor later is seen."""
    if isinstance(value, (list, tuple)):
        return [copied(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value
