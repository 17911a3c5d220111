"""What the user chose in ComfyUI's settings dialog, as the pack reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def module(host, monkeypatch) -> Iterator[Any]:
    """nodes.settings with nothing read yet."""
    found = host.part("nodes.settings")
    monkeypatch.setattr(found, "_read", {})
    monkeypatch.setattr(found, "_complained", set())
    yield found
    for path in (host.base / "user").glob("*/comfy.settings.json"):
        path.unlink()


def choose(host: Any, user: str = "default", **values: Any) -> Path:
    """Write a user's settings file."""
    path = host.base / "user" / user / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({f"QwenVRAM.Conditioning.{k}": v for k, v in values.items()}))
    return path


def test_without_a_file_everything_is_usual(module) -> None:
    assert module.settings() == module.Settings()


def test_numbers_have_units_and_names_are_split(host, module) -> None:
    choose(host, DiskGB=0.5, MemoryMB=10, RedisDays=2, MoreNodes="A, B C", RedisURL=" redis://x ")
    found = module.settings()
    assert (found.disk_bytes, found.memory_bytes) == (500_000_000, 10_000_000)
    assert found.redis_seconds == 172_800 and found.redis_url == "redis://x"
    assert found.more_nodes == {"A", "B", "C"}


@pytest.mark.parametrize("value", [-1, "much", True, float("nan"), 1e12])
def test_a_number_that_makes_no_sense_is_told_once_and_not_used(
    host, module, caplog, value
) -> None:
    choose(host, DiskGB=value)
    assert module.settings().disk_bytes == module.settings().disk_bytes == 2_000_000_000
    assert caplog.text.count("QwenVRAM.Conditioning.DiskGB") == 1


def test_an_unknown_choice_keeps_nothing(host, module) -> None:
    choose(host, Keep="some")
    assert module.settings().keep == module.KEEP_NOTHING


def test_the_warm_up_is_off_unless_chosen(host, module, caplog) -> None:
    path = choose(host)
    for chosen, expected in (("ComfyUI starts", module.WARM_UP_START), ("sometimes", "off")):
        path.write_text(json.dumps({"QwenVRAM.WarmUp.Automatic": chosen}))
        module._read.clear()
        assert module.settings().warm_up == expected
    assert caplog.text.count("QwenVRAM.WarmUp.Automatic") == 1


def test_with_several_users_the_strictest_choice_counts(host, module, monkeypatch) -> None:
    choose(host, Keep="all encode nodes", DiskGB=1)
    choose(host, "ann_1", Keep="nothing", DiskGB=3)
    assert module.settings().keep == module.KEEP_ALL  # one user: the others' files do not count
    monkeypatch.setattr(module.args, "multi_user", True)
    assert module.settings().keep == module.KEEP_NOTHING


@pytest.mark.parametrize(
    ("second", "expected"),
    [({"QwenVRAM.WarmUp.Automatic": "ComfyUI starts"}, "ComfyUI starts"), ({}, "off")],
)
def test_with_several_users_all_must_want_the_warm_up_at_start(
    host, module, monkeypatch, second, expected
) -> None:
    monkeypatch.setattr(module.args, "multi_user", True)
    wanted = {"QwenVRAM.WarmUp.Automatic": "ComfyUI starts"}
    for user, chosen in (("ann_1", wanted), ("bob_2", second)):
        choose(host, user).write_text(json.dumps(chosen))
    assert module.settings().warm_up == expected


def test_a_damaged_file_keeps_what_was_read_last_and_nothing_if_it_never_was(host, module) -> None:
    path = choose(host, Keep="nodes of Qwen VRAM")
    assert module.settings().keep == module.KEEP_OURS
    path.write_text("{")
    assert module.settings().keep == module.KEEP_OURS
    module._read.clear()
    assert module.settings().keep == module.KEEP_NOTHING
