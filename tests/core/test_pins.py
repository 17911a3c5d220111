"""Pinned values on disk: exact, named by their content, and never believed when altered."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from pack.core.pins import PinLost, PinStore, Unpinnable, content_of

COND = [[torch.arange(12.0).reshape(1, 3, 4), {"pooled_output": None, "strength": 0.1}]]
LATENT = {"samples": torch.full((1, 16, 1, 8, 8), 0.25, dtype=torch.bfloat16)}


@pytest.fixture
def store(tmp_path: Path) -> PinStore:
    """An empty one."""
    return PinStore(tmp_path / "pins")


def put(store: PinStore) -> str:
    """Pin two outputs; their name."""
    return store.put([COND, LATENT], ["CONDITIONING", "LATENT"], "cpu").content


def file_of(store: PinStore, content: str) -> Path:
    """Where a pin lies."""
    return store.directory / f"{content}.safetensors"


def test_values_come_back_exactly_and_fresh(store) -> None:
    content = put(store)
    first, again = store.get(content).value, PinStore(store.directory).get(content).value
    for value in (first, again):
        assert torch.equal(value[0][0][0], COND[0][0])
        assert value[0][0][1] == COND[0][1]
        assert torch.equal(value[1]["samples"], LATENT["samples"])
        assert value[1]["samples"].dtype == torch.bfloat16
    first[0][0][0].zero_()
    assert torch.equal(store.get(content).value[0][0][0], COND[0][0])


def test_the_name_is_that_of_the_content_alone(store) -> None:
    copy = [[[COND[0][0].clone(), dict(COND[0][1])]], {"samples": LATENT["samples"].clone()}]
    assert content_of(copy) == put(store)
    names = {
        content_of(values)
        for values in (
            [COND, LATENT],
            [LATENT, COND],
            [[COND, LATENT]],
            [COND],
            [COND, {"samples": LATENT["samples"] + 1}],
            [COND, {"samples": LATENT["samples"].reshape(1, 16, 8, 8)}],
            [COND, {"samples": LATENT["samples"].to(torch.float16)}],
            [torch.zeros(2), torch.zeros(1)],
            [torch.zeros(1), torch.zeros(2)],
            ["ab", "c"],
            ["a", "bc"],
            ["", "abc"],
            [[97, 98], "c"],
        )
    }
    assert len(names) == 13


def test_what_cannot_be_kept_exactly_is_refused_with_its_output(store) -> None:
    with pytest.raises(Unpinnable, match=r"value\[0\]\[1\]\['hooks'\] is a builtins.object") as why:
        store.put([LATENT, [[COND[0][0], {"hooks": object()}]]], ["LATENT", "CONDITIONING"], "cpu")
    assert why.value.index == 1
    assert not store.directory.exists()


@pytest.mark.parametrize("position", [12, 400, -3])
def test_an_altered_byte_is_never_believed(store, position: int) -> None:
    content = put(store)
    path = file_of(store, content)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(PinLost, match=r"has a damaged file \(.*Unpin output"):
        store.get(content)
    assert put(store) == content  # pinned again, it is mended
    assert torch.equal(store.get(content).value[1]["samples"], LATENT["samples"])


def test_a_file_under_the_name_of_another_is_not_believed(store) -> None:
    content = put(store)
    other = store.put([LATENT], ["LATENT"], "cpu").content
    os.replace(file_of(store, other), file_of(store, content))
    with pytest.raises(PinLost, match="holds another one"):
        store.get(content)


def test_a_missing_file_names_the_remedy(store) -> None:
    content = put(store)
    assert store.delete(content) is True
    assert store.delete(content) is False
    for ask in (store.get, store.check):
        with pytest.raises(PinLost, match="not on this machine.*Unpin output") as lost:
            ask(content)
        assert content in str(lost.value)


@pytest.mark.parametrize("name", ["../secret", "", "A" * 64, "a" * 63, None, 3])
def test_a_name_never_becomes_a_path(store, name: object) -> None:
    for ask in (store.get, store.check, store.delete):
        with pytest.raises(PinLost, match="not the SHA-256"):
            ask(name)


def test_the_list_says_what_there_is(store) -> None:
    assert store.listed() == []
    old, new = put(store), store.put([LATENT], ["LATENT"], "cpu").content
    os.utime(file_of(store, old), (1e9, 1e9))
    (store.directory / "notes.txt").write_text("not ours")
    first, second = store.listed()
    assert (first.content, first.types) == (new, ["LATENT"])
    assert (second.content, second.types) == (old, ["CONDITIONING", "LATENT"])
    assert second.bytes == file_of(store, old).stat().st_size
    assert second.last_used == 1e9
    assert second.created > 1.7e9
    store.get(old)
    assert store.listed()[0].content == old


def test_the_list_shows_a_damaged_file_too(store) -> None:
    content = put(store)
    file_of(store, content).write_bytes(b"short")
    (pin,) = store.listed()
    assert (pin.content, pin.bytes, pin.types) == (content, 5, [])
    assert store.delete(content)


def test_names_and_headers_say_nothing_of_what_it_is(store) -> None:
    content = put(store)
    assert re.fullmatch(r"[0-9a-f]{64}", content)
    assert [path.name for path in store.directory.iterdir()] == [f"{content}.safetensors"]


def test_a_text_comes_back_and_stands_in_no_header(store) -> None:
    content = store.put(["a secret fox"], ["STRING"], "cpu").content
    assert store.get(content).value == ["a secret fox"]
    data = file_of(store, content).read_bytes()
    assert b"secret" not in data[: 8 + int.from_bytes(data[:8], "little")]
    assert b"secret" in data  # as a pinned picture is: README, Privacy
