"""Two tiers, two bounds, and every way in which a cache directory can be broken."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path

import pytest
import torch
from pack.core import conditioning_codec as codec
from pack.core.conditioning_store import ConditioningStore

PARTS = {"text": "t", "graph before clip": "g", "model file": "f"}


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
    return ConditioningStore(store.directory, store.memory_bytes, store.disk_bytes)


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
    store.disk_bytes = size * 2 + size // 2
    for age, name in enumerate((1, 2)):
        store.put(key(name), entry(name, 0))
        os.utime(store._path(key(name)), (100 + age, 100 + age))
    assert reopened(store).lookup(key(1)).tier == "disk"  # the older one is used again
    store.put(key(3), entry(3, 0))
    assert [first(reopened(store), n) for n in (1, 2, 3)] == [1.0, None, 3.0]
    store.disk_bytes = 1
    store.put(key(4), entry(4, 0))
    assert [p.name for p in store.directory.iterdir()] == [f"{key(4)}.safetensors"]


def test_what_a_crash_left_behind_is_swept(store) -> None:
    store.put(key(1), entry(1, 0))
    old, young = store.directory / "old.writing", store.directory / "young.writing"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.put(key(2), entry(2, 0))
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("damage", ["half", "garbage", "empty", "other file"])
def test_a_damaged_entry_is_a_miss_set_aside_once_and_written_again(store, damage, caplog) -> None:
    store.put(key(1), entry(1, 0))
    path = store._path(key(1))
    data = path.read_bytes()
    other = codec.encode(entry(9))[:-1] + b"\xff"
    path.write_bytes(
        {"half": data[: len(data) // 2], "garbage": b"\0" * 500, "empty": b"", "other file": other}[
            damage
        ]
    )
    fresh = reopened(store)
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        assert fresh.lookup(key(1)) is None and fresh.lookup(key(1)) is None
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    assert fresh.why_missed(key(1), PARTS) == "its stored file was damaged"
    assert path.with_suffix(".unreadable").exists() and not path.exists()
    fresh.put(key(1), entry(1, 0))
    assert first(reopened(store), 1) == 1.0


def test_an_entry_of_a_future_version_is_a_miss_and_stays_untouched(store, caplog) -> None:
    store.put(key(1), entry(1, 0))
    path = store._path(key(1))
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        assert reopened(store).lookup(key(1)) is None
    assert path.exists() and "format 2" in caplog.text


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


def test_a_full_disk_leaves_no_half_written_file(store) -> None:
    resource = pytest.importorskip("resource")  # POSIX
    store.put(key(1), entry(1, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writing more fails, as on a full disk
    try:
        reason = store.put(key(2), entry(2, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in reason
    assert [p.name for p in store.directory.iterdir()] == [f"{key(1)}.safetensors"]
    assert first(store, 2) == 2.0


def test_what_cannot_be_stored_says_why(store) -> None:
    reason = store.put(key(1), codec.Entry([[torch.ones(1), {"hooks": object()}]], 0, PARTS, "cpu"))
    assert reason == "not stored: value[0][1]['hooks'] is a builtins.object"
    assert store.lookup(key(1)) is None


def test_the_reason_of_a_miss_names_the_part_that_changed(store) -> None:
    def why(store: ConditioningStore, **changed: str) -> str:
        return store.why_missed(key(2), {**PARTS, **changed})

    assert why(store) == "new text"
    store.put(key(1), entry(1, 0))
    again = reopened(store)
    assert why(again, text="u") == "new text"
    assert why(again, **{"model file": "g"}) == "model file changed"
    assert (
        why(again, **{"model file": "g", "graph before clip": "h"}) == "graph before clip changed"
    )
    assert why(again) == "evicted"


def test_a_key_that_is_no_digest_never_becomes_a_path(store) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        store.lookup("../../etc/passwd")


def test_file_names_and_headers_hold_no_prompt(store) -> None:
    store.put(key("my secret prompt"), entry())
    (path,) = store.directory.iterdir()
    assert b"secret" not in path.read_bytes() and "secret" not in path.name
