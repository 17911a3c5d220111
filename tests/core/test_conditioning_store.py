"""Memory and disk, their bounds, and every way in which a cache directory can be broken."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from pack.core import conditioning_codec as codec
from pack.core import conditioning_store, disk_tier
from pack.core.conditioning_store import ConditioningStore
from pack.core.statistics import Size
from pack.tests.core.test_conditioning_codec import same, values
from pack.tests.examples import examples

PARTS = {"text": "t", "nodes before clip": "g", "model file": "f"}


def key(name: object) -> str:
    """A key as the node makes it."""
    return hashlib.sha256(str(name).encode()).hexdigest()


def value(seed: int = 0, floats: int = 1000) -> list:
    """A conditioning of about 4 kB."""
    return [[torch.full((1, floats), float(seed)), {"pooled_output": None}]]


@pytest.fixture
def store(tmp_path: Path) -> ConditioningStore:
    """A store with room for everything."""
    return ConditioningStore(tmp_path / "store", 1 << 20, 1 << 20)


def entry(seed: int = 0, seconds: float = 0.0) -> codec.Entry:
    """The same as an entry of the store."""
    return codec.Entry(value(seed), seconds, PARTS, "cpu")


def reopened(store: ConditioningStore) -> ConditioningStore:
    """The same directory in a new process."""
    assert store.flush()
    return ConditioningStore(store.directory, store.memory_bytes, store.disk_bytes)


def put(store: ConditioningStore, *names: object) -> list[str | None]:
    """Entries filled with their numbers, on disk when this returns."""
    reasons = [store.put(key(name), entry(name)) for name in names]
    assert store.flush()
    return reasons


def path_of(store: ConditioningStore, name: object) -> Path:
    """The file of an entry."""
    return store.directory / f"{key(name)}.safetensors"


def first(store: ConditioningStore, name: object) -> float | None:
    """The number that the entry was filled with."""
    hit = store.lookup(key(name))
    return hit.entry.value[0][0][0, 0].item() if hit else None


def test_a_stored_value_is_found_in_memory_and_after_a_restart_on_disk(store) -> None:
    assert store.lookup(key(1)) is None
    assert store.put(key(1), entry(1, 2.5)) is None
    assert store.lookup(key(1)).tier == "memory"
    again = reopened(store)
    hit = again.lookup(key(1))
    assert (hit.tier, hit.entry.seconds) == ("disk", 2.5)
    assert torch.equal(hit.entry.value[0][0], value(1)[0][0])
    assert again.lookup(key(1)).tier == "memory"


def test_changing_what_a_hit_gave_changes_no_later_hit(store) -> None:
    store.put(key(1), entry(1, 0))
    store.lookup(key(1)).entry.value[0][0].zero_()
    assert first(store, 1) == 1.0


def test_memory_mode_writes_nothing(store) -> None:
    store.put(key(1), entry(1, 0), disk=False)
    assert store.lookup(key(1), disk=False).tier == "memory"
    assert not store.directory.exists()


def test_a_value_kept_in_memory_only_reaches_the_disk_when_it_is_asked_for_again(store) -> None:
    store.put(key(1), entry(1, 0), disk=False)
    assert store.lookup(key(1)).tier == "memory"
    assert first(reopened(store), 1) == 1.0


@given(values)
@settings(max_examples=examples(40), deadline=None)
def test_any_structure_goes_through_memory_and_disk_unchanged(tmp_path_factory, value) -> None:
    store = ConditioningStore(tmp_path_factory.mktemp("any"), 1 << 20, 1 << 20)
    assert store.put(key(1), codec.Entry(value, 1.5, PARTS, "cpu")) is None
    for again, tier in ((store, "memory"), (reopened(store), "disk")):
        hit = again.lookup(key(1))
        assert hit.tier == tier and same(hit.entry.value, value)
        assert (hit.entry.seconds, hit.entry.parts, hit.entry.device) == (1.5, PARTS, "cpu")


def test_the_caller_may_change_a_value_as_soon_as_it_is_put(store) -> None:
    mine = entry(1)
    store.put(key(1), mine)
    mine.value[0][0].zero_()
    mine.value[0][1]["pooled_output"] = "changed"
    assert same(store.lookup(key(1)).entry.value, value(1))
    assert same(reopened(store).lookup(key(1)).entry.value, value(1))


def test_put_does_not_wait_for_a_slow_disk_and_lookup_finds_what_waits(store, held_disk) -> None:
    store.configure(memory_bytes=0)
    start = time.monotonic()
    assert store.put(key(1), entry(1)) is None and store.put(key(2), entry(2)) is None
    assert time.monotonic() - start < 5  # a disk that is waited for takes 20
    assert [first(store, n) for n in (1, 2)] == [1.0, 2.0]
    assert not store.flush(timeout=0.05)
    held_disk.set()
    assert [first(reopened(store), n) for n in (1, 2)] == [1.0, 2.0]


def test_a_queue_that_is_full_costs_a_moment_and_is_said(store, held_disk, monkeypatch, caplog):
    monkeypatch.setattr(store._writer, "max_bytes", len(codec.encode(entry())) + 10)
    assert store.put(key(1), entry(1)) is None
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        reasons = [store.put(key(n), entry(n)) for n in (2, 3)]
    assert time.monotonic() - start < 5  # the same
    assert all(r.startswith("kept in memory only: writing to ") for r in reasons)
    assert len(caplog.records) == 1 and first(store, 2) == 2.0
    store.configure(memory_bytes=0)
    assert store.put(key(4), entry(4)).startswith("not stored: writing to ")
    held_disk.set()


@pytest.fixture
def held_disk(monkeypatch) -> threading.Event:
    """A disk that writes nothing until the event is set."""
    event, write = threading.Event(), disk_tier.DiskTier.write

    def wait(*args: object) -> None:
        event.wait(20)
        write(*args)

    monkeypatch.setattr(disk_tier.DiskTier, "write", wait)
    yield event
    event.set()


def test_many_threads_put_and_find_their_own(store) -> None:
    wrong = []

    def work(number: int) -> None:
        for n in range(number * 20, number * 20 + 20):
            store.put(key(n), entry(n))
            if first(store, n) != float(n):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert [first(reopened(store), n) for n in range(0, 80, 9)] == [*map(float, range(0, 80, 9))]


def test_memory_keeps_the_most_recently_used(tmp_path: Path) -> None:
    size = len(codec.encode(entry()))
    store = ConditioningStore(tmp_path, size * 2 + size // 2, 0)
    for name in (1, 2):
        store.put(key(name), entry(name, 0), disk=False)
    store.lookup(key(1), disk=False)
    store.put(key(3), entry(3, 0), disk=False)
    assert [store.lookup(key(n), disk=False) is not None for n in (1, 2, 3)] == [True, False, True]


def test_disk_evicts_the_least_recently_used_and_keeps_the_newest(store) -> None:
    size = len(codec.encode(entry()))
    store.configure(disk_bytes=size * 2 + size // 2)
    put(store, 1, 2)
    for age, name in enumerate((1, 2)):
        os.utime(path_of(store, name), (100 + age, 100 + age))
    again = reopened(store)
    assert again.lookup(key(1)).tier == "disk" and again.flush()  # the older one is used again
    put(again, 3)
    assert [first(reopened(store), n) for n in (1, 2, 3)] == [1.0, None, 3.0]


def test_use_in_memory_counts_on_disk_too_but_not_every_time(store, monkeypatch) -> None:
    put(store, 1)
    path = path_of(store, 1)
    os.utime(path, (100, 100))
    assert first(store, 1) == 1.0 and store.flush()
    assert path.stat().st_mtime == 100  # just put
    monkeypatch.setattr(conditioning_store, "TOUCH_SECONDS", 0.0)
    assert first(store, 1) == 1.0 and store.flush()
    assert path.stat().st_mtime > time.time() - 60


def test_a_lower_bound_takes_effect_at_once(store) -> None:
    put(store, *range(10))
    size = len(codec.encode(entry()))
    store.configure(memory_bytes=size, disk_bytes=3 * size)
    assert store.flush() and store.usage().memory == Size(1, size)
    assert store.usage().disk == Size(2, 2 * size)  # some room is left for other processes
    store.configure(disk_bytes=0)
    assert store.flush() and store.usage().disk == Size(0, 0)
    assert store.put(key(1), entry(1)).startswith("kept in memory only: its ")


def test_what_is_larger_than_the_bounds_is_not_kept_and_says_so(store) -> None:
    size = len(codec.encode(entry()))
    store.configure(disk_bytes=size - 1)
    assert put(store, 1)[0] == (
        f"kept in memory only: its {size} bytes are more than the disk cache may hold"
    )
    store.configure(memory_bytes=size - 1)
    assert put(store, 2)[0].startswith("not stored: its ")
    reason = store.put(key(3), entry(3), disk=False)
    assert reason == f"not stored: its {size} bytes are more than the memory cache may hold"
    assert not list(store.directory.glob("*")) and first(store, 3) is None


def test_a_directory_that_cannot_be_made_costs_speed_only(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ConditioningStore(tmp_path / "file" / "store", 1 << 20, 1 << 20)
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        for name in (1, 2):
            reason = store.put(key(name), entry(name, 0))
            assert reason.startswith("kept in memory only: cannot write")
    assert len(caplog.records) == 1 and "make it writable" in caplog.text
    assert first(store, 1) == 1.0
    assert reopened(store).lookup(key(1)) is None


def test_a_full_disk_is_reported_by_the_next_put_and_leaves_no_half_written_file(store, caplog):
    resource = pytest.importorskip("resource")  # POSIX
    put(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writing more fails, as on a full disk
    try:
        with caplog.at_level(logging.WARNING, "qwen_vram"):
            assert put(store, 2) == [None]
            (reason,) = put(store, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reason.startswith("kept in memory only: cannot write to ")
    assert len(caplog.records) == 1 and "Free space there" in caplog.text
    assert [p.name for p in store.directory.iterdir()] == [path_of(store, 1).name]
    assert first(store, 2) == 2.0  # which writes it: there is room again
    assert first(reopened(store), 2) == 2.0 and store.put(key(4), entry(4)) is None


def test_clear_removes_everything_of_every_kind_and_counts_it(store, held_disk) -> None:
    held_disk.set()
    put(store, 1, 2)
    size = len(codec.encode(entry()))
    for name in (f"{key(3)}.unreadable", "tmpabc.writing"):
        (store.directory / name).write_bytes(b"x" * 10)
    removed = store.clear()
    assert (removed.memory, removed.disk) == (Size(2, 2 * size), Size(4, 2 * size + 20))
    assert removed.redis is None and removed.failed == ()
    assert not list(store.directory.iterdir()) and first(store, 1) is None
    assert store.why_missed(key(1), PARTS) == "new text"


def test_clear_drops_what_still_waits_to_be_written(store, held_disk, monkeypatch) -> None:
    monkeypatch.setattr(conditioning_store, "CLEAR_WAIT_SECONDS", 0.05)
    for name in range(3):
        store.put(key(name), entry(name))
    time.sleep(0.05)  # the first is being written
    store.clear()
    held_disk.set()
    assert store.flush() and store.usage()[:2] == (Size(0, 0), Size(0, 0))


def test_a_process_that_ends_right_after_a_prompt_still_writes_it(tmp_path: Path) -> None:
    root = Path(conditioning_store.__file__).parents[1]
    program = f"""
import sys, torch; sys.path.insert(0, {str(root)!r})
from pathlib import Path
from core.conditioning_codec import Entry
from core.conditioning_store import ConditioningStore
store = ConditioningStore(Path({str(tmp_path)!r}), 1 << 20, 1 << 20)
store.put({key(1)!r}, Entry([[torch.full((1, 1000), 1.0), {{}}]], 0.0, {{}}, "cpu"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert first(ConditioningStore(tmp_path, 1 << 20, 1 << 20), 1) == 1.0


def test_what_cannot_be_stored_says_why(store) -> None:
    reason = store.put(key(1), codec.Entry([[torch.ones(1), {"hooks": object()}]], 0, PARTS, "cpu"))
    assert reason == "not stored: value[0][1]['hooks'] is a builtins.object"
    assert store.lookup(key(1)) is None


def test_no_memory_for_the_copy_is_a_reason_and_no_error(store, monkeypatch) -> None:
    def refuse(value: codec.Entry) -> bytes:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(codec, "encode", refuse)
    assert store.put(key(1), entry(1)) == "not stored: CUDA out of memory"


def test_a_write_that_fails_in_an_unforeseen_way_is_logged_and_holds_nothing(
    store, monkeypatch, caplog
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(disk_tier.DiskTier, "write", fail)
    store.configure(memory_bytes=0)
    put(store, 1)
    assert "ZeroDivisionError" in caplog.text and store.lookup(key(1)) is None


def test_the_reason_of_a_miss_names_the_part_that_changed(store) -> None:
    def why(store: ConditioningStore, **changed: str) -> str:
        return store.why_missed(key(2), {**PARTS, **changed})

    assert why(store) == "new text"
    put(store, 1)
    again = reopened(store)
    assert why(again, text="u") == "new text"
    assert why(again, **{"model file": "g"}) == "model file changed"
    assert (
        why(again, **{"model file": "g", "nodes before clip": "h"}) == "nodes before clip changed"
    )
    assert why(again) == "evicted"
    fewer = {name: PARTS[name] for name in ("text", "nodes before clip")}
    assert again.why_missed(key(2), fewer) == "model file is gone"


def test_a_picture_that_was_never_seen_is_new_and_not_changed(store) -> None:
    parts = {"text": "t", "image1": "a", "image2": "b", "pixels": "c"}
    store.put(key(1), codec.Entry([[torch.ones(1), {}]], 0.0, parts, "cpu"))

    def why(**changed: str) -> str:
        return store.why_missed(key(2), {**parts, **changed})

    assert why(image2="z") == "new image2"
    assert why(image2="a") == "image2 changed"
    assert why(pixels="z") == "new image"
    assert why(text="u") == "new image"  # VAE Encode at its first run: it has no text
    assert why(text="u", **{"nodes before clip": "d"}) == "new text"
    fewer = {name: value for name, value in parts.items() if name != "pixels"}
    assert store.why_missed(key(2), fewer) == "image is gone"


def test_headers_are_read_only_to_explain_a_miss(store, monkeypatch) -> None:
    put(store, 1, 2)
    again = reopened(store)
    monkeypatch.setattr(disk_tier, "_parts_of", lambda path: pytest.fail("read a header"))
    assert first(again, 1) == 1.0 and again.put(key(3), entry(3)) is None
    monkeypatch.undo()
    assert again.why_missed(key(9), PARTS) == "evicted"


@pytest.mark.parametrize("place", [(disk_tier.DiskTier, "read"), (codec, "decode")])
def test_too_little_memory_to_read_is_a_miss(store, monkeypatch, caplog, place) -> None:
    put(store, 1)
    again = reopened(store)

    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(*place, refuse)
        assert again.lookup(key(1)) is None
        assert again.lookup(key(1)) is None
    assert [record.message.count("not enough memory") for record in caplog.records] == [1]
    assert first(again, 1) == 1.0
