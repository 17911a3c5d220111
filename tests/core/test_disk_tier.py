"""The directory of entries: shared, bounded, and every way in which it can be broken."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from pack.core import conditioning_codec as codec
from pack.core import disk_tier
from pack.core.conditioning_store import ConditioningStore
from pack.core.statistics import Size
from pack.tests.core.test_conditioning_codec import same
from pack.tests.core.test_conditioning_store import (
    PARTS,
    entry,
    first,
    key,
    path_of,
    put,
    reopened,
    value,
)
from pack.tests.examples import examples


@pytest.fixture
def store(tmp_path: Path) -> ConditioningStore:
    """A store with room for everything."""
    return ConditioningStore(tmp_path / "store", 1 << 20, 1 << 20)


def test_what_a_crash_left_behind_is_swept(store) -> None:
    put(store, 1)
    names = ("tmpold.writing", "0123456789abcdef-old.writing", "tmpyoung.writing")
    old, mine, young = paths = [store.directory / name for name in names]
    for path in paths:
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    os.utime(mine, (time.time() - 60,) * 2)
    with open(mine, "r+b") as file:
        disk_tier._lock(file.fileno())  # its writer lives
        put(reopened(store), 2)
        assert (old.exists(), mine.exists(), young.exists()) == (False, True, True)
    put(reopened(store), 3)  # its writer died
    assert not mine.exists() and young.exists()


def test_files_that_are_not_ours_are_neither_counted_nor_deleted(store) -> None:
    store.directory.mkdir()
    names = ("model.safetensors", "notes.unreadable", "x.writing", f"{key(1)}.txt", "README")
    for name in names:
        (store.directory / name).write_bytes(b"mine" * 1000)
    size = len(codec.encode(entry()))
    store.configure(disk_bytes=size)
    put(store, 1, 2)
    assert store.usage().disk == Size(1, size)
    store.clear()
    assert sorted(p.name for p in store.directory.iterdir()) == sorted(names)


def test_damaged_and_oversized_files_go_before_good_ones(store) -> None:
    put(store, 1, 2, 3)
    path_of(store, 3).rename(path_of(store, 3).with_suffix(".unreadable"))
    with open(path_of(store, 4), "wb") as file:
        file.truncate(1 << 40)  # sparse
    size = len(codec.encode(entry()))
    store.configure(disk_bytes=3 * size)
    assert store.flush()
    assert [first(reopened(store), n) for n in (1, 2)] == [1.0, 2.0]
    assert len(list(store.directory.iterdir())) == 2


def test_a_last_use_in_a_future_that_cannot_be_does_not_last_for_ever(store) -> None:
    put(store, 1)
    os.utime(path_of(store, 1), (time.time() + 1e9,) * 2)
    put(reopened(store), 2)
    assert path_of(store, 1).stat().st_mtime < time.time() + 60


@pytest.mark.parametrize("damage", ["half", "garbage", "empty", "other file"])
def test_a_damaged_entry_is_a_miss_set_aside_once_and_written_again(store, damage, caplog) -> None:
    put(store, 1)
    path = path_of(store, 1)
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
    put(fresh, 1)
    assert first(reopened(store), 1) == 1.0


def test_an_entry_of_a_future_version_is_a_miss_and_stays_untouched(store, caplog) -> None:
    put(store, 1)
    path = path_of(store, 1)
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        assert reopened(store).lookup(key(1)) is None
    assert path.exists() and "format 2" in caplog.text


def test_a_directory_that_disappears_is_made_again(store) -> None:
    put(store, 1)
    shutil.rmtree(store.directory)
    assert store.usage().disk == Size(0, 0)
    put(store, 2)
    assert [first(reopened(store), n) for n in (1, 2)] == [None, 2.0]


def test_a_directory_that_disappears_in_the_middle_of_a_write_is_made_again(
    store, monkeypatch
) -> None:
    replace = os.replace

    def gone(source, target) -> None:
        monkeypatch.setattr(os, "replace", replace)
        shutil.rmtree(store.directory)
        replace(source, target)

    monkeypatch.setattr(os, "replace", gone)
    put(store, 1)
    assert first(reopened(store), 1) == 1.0


def test_a_file_that_someone_holds_open_is_replaced_a_little_later(store, monkeypatch) -> None:
    replace, refusals = os.replace, [PermissionError(13, "in use")] * 2

    def busy(source, target) -> None:
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    put(store, 1)
    assert first(reopened(store), 1) == 1.0
    monkeypatch.setattr(disk_tier, "REPLACE_PAUSES", (0.001,))
    refusals += [PermissionError(13, "in use")] * 2
    put(store, 2)
    assert store.put(key(3), entry(3)).endswith("(in use)")


def test_files_that_cannot_be_deleted_do_not_grow_beyond_the_bound(store, monkeypatch) -> None:
    put(store, 1, 2)
    size = len(codec.encode(entry()))
    monkeypatch.setattr(disk_tier, "_delete", lambda file: PermissionError(13, "in use"))
    store.configure(disk_bytes=2 * size)
    put(store, 3)
    assert "cannot be deleted" in store.put(key(4), entry(4))
    assert store.flush() and store.usage().disk == Size(2, 2 * size)


def test_files_deleted_by_another_process_count_as_deleted(store, monkeypatch) -> None:
    put(store, 1, 2, 3)
    unlink = os.unlink

    def slower(path) -> None:
        unlink(path)
        raise FileNotFoundError(2, "gone", path)

    monkeypatch.setattr(os, "unlink", slower)
    store.configure(disk_bytes=len(codec.encode(entry())) * 5 // 2)
    assert store.flush() and store.usage().disk.entries == 2  # not all three


def test_a_huge_directory_is_not_listed_at_each_write(store, monkeypatch) -> None:
    listings, files = [], disk_tier.DiskTier._files
    monkeypatch.setattr(disk_tier.DiskTier, "_files", lambda s: listings.append(1) or files(s))
    size = len(codec.encode(entry()))
    store.configure(disk_bytes=64 * 10 * size)
    put(store, *range(30))
    assert len(listings) == 3  # before the first, and again after each ten


def test_clear_keeps_what_was_used_in_time_and_names_what_it_cannot_delete(
    store, monkeypatch
) -> None:
    put(store, 1, 2, 3)
    for name in (1, 2):
        os.utime(path_of(store, name), (100, 100))
    for name in (2, 3):
        store._memory[key(name)].used -= 1000
    removed = store.clear(unused_seconds=500)  # 1 was just used in memory, 3 on disk
    assert removed.memory.entries == 2 and removed.disk.entries == 1
    assert [first(reopened(store), n) for n in (1, 2, 3)] == [1.0, None, 3.0]
    monkeypatch.setattr(os, "unlink", lambda path: (_ for _ in ()).throw(PermissionError(13, "no")))
    removed = store.clear()
    assert removed.disk == Size(0, 0)
    assert sorted(removed.failed) == sorted(f"{path_of(store, n)}: no" for n in (1, 3))


def test_usage_is_none_where_it_cannot_be_measured(store) -> None:
    assert store.usage() == (Size(0, 0), Size(0, 0), None)
    store.directory.write_text("in the way")
    assert store.usage().disk is None
    assert store.clear().failed


def test_a_key_that_is_no_digest_never_becomes_a_path(store) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        store.lookup("../../etc/passwd")


def test_file_names_and_headers_hold_no_prompt(store) -> None:
    store.put(key("my secret prompt"), entry())
    assert store.flush()
    (path,) = store.directory.iterdir()
    assert b"secret" not in path.read_bytes() and "secret" not in path.name


HOSTILE = ("bit", "cut", "foreign", "huge claim", "deep", "sparse", "longer", "twice", "headers")


def hostile(kind: str, good: bytes, number: int) -> bytes | int:
    """A file that is not what it should be; a number is the size of a sparse one."""
    random = int(hashlib.sha256(f"{kind}{number}".encode()).hexdigest(), 16)
    if kind == "bit":
        data = bytearray(good)
        data[random % len(data)] ^= 1 << (random >> 64) % 8
        return bytes(data)
    if kind == "cut":
        return good[: random % len(good)]
    if kind == "sparse":
        return (1 << 42) + number  # more than there is memory
    if kind == "longer":
        return good + b"\0" * (1 + random % 100)
    if kind == "foreign":
        return hashlib.sha512(str(number).encode()).digest() * (random % 20)
    if kind == "headers":  # a length that is no length of a header
        return struct.pack("<Q", random % 2**64) + good[8:]
    return _hostile_header(kind, number)


def _hostile_header(kind: str, number: int) -> bytes:
    body = {"seconds": 1.0, "parts": PARTS, "device": "cpu"}
    tensors, tensor = [torch.zeros(4)], ["tensor", 0, "torch.float32", [4], "cpu"]
    body["tree"] = ["list", [tensor] * (2 + number % 50)] if kind == "twice" else tensor
    text = json.dumps(body)
    if kind == "deep":
        text = "[" * (50 + 100 * (number % 60)) + "]" * number
    metadata = {"format": "qwen_vram.conditioning", "version": "1", "entry": text}
    metadata["digest"] = codec._digest(text, tensors)
    data = codec.save_tensors({"0": tensors[0]}, metadata)
    if kind == "huge claim":
        data = data.replace(b"[4]", b"[%d]" % (number << 40 | 4))
        data = data.replace(b"[0,16]", b"[0,%d]" % (number << 42 | 16))
        length = len(data) - 16 - 8
        data = struct.pack("<Q", length) + data[8:]
    return data


def test_thousands_of_damaged_files_are_misses(store, caplog, monkeypatch) -> None:
    resource = pytest.importorskip("resource")  # POSIX
    store.configure(memory_bytes=0)
    good = codec.encode(codec.Entry([[torch.arange(8.0), {}]], 1.0, PARTS, "cpu"))
    truth = codec.decode(good).value
    store.directory.mkdir()
    believed, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    caplog.set_level(logging.ERROR, "qwen_vram")
    for number in range(examples(3_000)):
        kind = HOSTILE[number % len(HOSTILE)]
        content = hostile(kind, good, number)
        path = path_of(store, number)
        with open(path, "wb") as file:
            file.truncate(content) if isinstance(content, int) else file.write(content)
        hit = store.lookup(key(number))
        if hit:  # a flipped bit in the white space of the header
            believed += 1
            assert kind == "bit" and same(hit.entry.value, truth)
        else:
            assert path.with_suffix(".unreadable").exists() or codec_of_the_future(path)
        for left in (path, path.with_suffix(".unreadable")):
            left.unlink(missing_ok=True)
    assert believed < examples(6)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10  # kB


def codec_of_the_future(path: Path) -> bool:
    """Whether a flipped bit made another version of it."""
    return b'"version":"1"' not in path.read_bytes()


def test_nothing_larger_than_the_bound_is_read(store) -> None:
    put(store, 1)
    size = path_of(store, 1).stat().st_size
    small = ConditioningStore(store.directory, 1 << 20, size - 1)
    assert small.lookup(key(1)) is None
    assert small.why_missed(key(1), PARTS) == "its stored file was damaged"


@pytest.mark.parametrize("header", [0, 3 << 20, 1 << 39, (1 << 40) - 8, (1 << 64) - 1])
def test_a_sparse_file_within_a_large_bound_is_not_read_either(store, header) -> None:
    store.configure(disk_bytes=1 << 42)
    store.directory.mkdir()
    with open(path_of(store, 1), "wb") as file:
        file.write(struct.pack("<Q", header))
        file.truncate(1 << 40)
    assert store.lookup(key(1)) is None and not path_of(store, 1).exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_no_entry_and_does_not_hang(store, kind) -> None:
    store.directory.mkdir()
    path = path_of(store, 1)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert store.lookup(key(1)) is None and not path.exists()
    assert store.why_missed(key(1), PARTS) == "its stored file was damaged"


def test_an_entry_for_a_device_that_is_not_here_is_a_miss_and_stays(store, caplog) -> None:
    put(store, 1)
    path = path_of(store, 1)
    tensors: list[torch.Tensor] = []
    body = {"tree": codec.flatten(value(1), tensors), "seconds": 0.0, "parts": PARTS}
    text = json.dumps({**body, "device": "cpu"}).replace('"cpu"]', '"cuda:77"]')
    metadata = {"format": "qwen_vram.conditioning", "version": "1", "entry": text}
    metadata["digest"] = codec._digest(text, tensors)
    path.write_bytes(codec.save_tensors({"0": tensors[0]}, metadata))
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        assert reopened(store).lookup(key(1)) is None
    assert path.exists() and "cuda:77" in caplog.text
