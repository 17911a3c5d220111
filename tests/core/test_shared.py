"""One model per key, held weakly, kept on demand, never twice."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
from pack.core.file_identity import FileIdentity
from pack.core.shared import Loaded, ModelKey, SharedRegistry
from pack.tests.links import symlink


class Model:
    """Stands for a ModelPatcher."""


def key(version: int = 1, options: tuple = (), path: str = "/m") -> ModelKey:
    """A key for a version of a file."""
    return ModelKey(FileIdentity(path, 10, version), options)


@pytest.fixture
def registry() -> SharedRegistry:
    """An empty registry."""
    return SharedRegistry()


def load() -> Loaded:
    """A new model at each call."""
    return Loaded(Model(), {"part": 1})


def test_the_same_key_gives_the_same_model_while_it_lives(registry) -> None:
    first = registry.acquire(key(), load, keeper=None)
    second = registry.acquire(key(), load, keeper=None)
    assert second.model is first.model and second.reused and not first.reused
    assert second.parts == {"part": 1} and second.seconds == first.seconds


def test_options_and_file_versions_are_other_models(registry) -> None:
    models = [
        registry.acquire(k, load, keeper=None).model for k in (key(1), key(2), key(1, ("fp16",)))
    ]
    assert len(set(map(id, models))) == 3


def test_what_nobody_holds_is_gone(registry) -> None:
    registry.acquire(key(), load, keeper=None)
    gc.collect()
    assert not registry.acquire(key(), load, keeper=None).reused


def test_keep_holds_until_the_keeper_lets_go_or_a_release(registry) -> None:
    registry.acquire(key(), load, keeper="1")
    registry.acquire(key(), load, keeper="2")
    registry.acquire(key(), load, keeper=None)  # another loader of the file, which keeps nothing
    registry.let_go("1")
    registry.let_go("2", "/another file")
    gc.collect()
    assert registry.acquire(key(), load, keeper=None).reused
    registry.let_go("2")
    gc.collect()
    assert registry.acquire(key(), load, keeper="2").reused  # it was only about to leave
    registry.let_go("2")
    registry.forget_leaving()
    gc.collect()
    assert not registry.acquire(key(), load, keeper="1").reused
    assert registry.kept() == [key()] and registry.release() == 1 and registry.kept() == []
    gc.collect()
    assert not registry.acquire(key(), load, keeper=None).reused


def test_a_keeper_keeps_one_model_at_a_time(registry) -> None:
    registry.acquire(key(1, ("bf16",)), load, keeper="1")
    registry.acquire(key(1, ("fp8",)), load, keeper="1")
    assert registry.kept() == [key(1, ("fp8",))]


def test_a_new_version_of_a_file_drops_the_kept_old_one(registry) -> None:
    registry.acquire(key(1), load, keeper="1")
    registry.acquire(key(1, (), "/other"), load, keeper="2")
    registry.acquire(key(2), load, keeper="3")
    assert registry.kept() == [key(1, (), "/other"), key(2)]


def test_a_failed_load_leaves_nothing_and_can_be_tried_again(registry) -> None:
    def fail() -> Loaded:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        registry.acquire(key(), fail, keeper="1")
    assert registry.kept() == [] and not registry.acquire(key(), load, keeper=None).reused


def test_threads_that_ask_at_once_load_once(registry) -> None:
    loads: list[int] = []

    def slow() -> Loaded:
        loads.append(1)
        time.sleep(0.05)
        return load()

    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(registry.acquire(key(), slow, None).model))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(set(map(id, found))) == 1


def test_file_identity_follows_links_and_sees_a_replacement(tmp_path: Path) -> None:
    file, link = tmp_path / "a", tmp_path / "b"
    file.write_text("one")
    symlink(link, file)
    before = FileIdentity.of(file)
    assert FileIdentity.of(link) == before
    file.write_text("three")
    assert FileIdentity.of(link) != before
    with pytest.raises(FileNotFoundError):
        FileIdentity.of(tmp_path / "none")
