"""A file written tensor by tensor is the one that safetensors writes at once; or there is none."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import tensor_writer
from pack.core.tensor_writer import DTYPES, TensorWriter
from pack.tests.examples import examples
from safetensors.torch import save_file

METADATA = {"qwen_vram": '{"quantization": {"format": "bnb_nf4"}, "name": "模型"}'}
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tensor_writer.Entry]:
    """What the writer wants to know beforehand."""
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """All of them, in the order given."""
    with TensorWriter(path, described(tensors), metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@settings(max_examples=examples(20))
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=8))
def test_it_is_the_file_that_safetensors_writes(tmp_path_factory, entries) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = {
        name: torch.randint(0, 2, shape, dtype=torch.uint8).to(torch.float32).to(dtype)
        for name, (dtype, shape) in entries.items()
    }
    write(folder / "ours.safetensors", tensors, METADATA)
    save_file(tensors, folder / "theirs.safetensors", METADATA)
    ours, theirs = (folder / f"{w}.safetensors" for w in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    shutil.rmtree(folder)


def test_tensors_may_be_views_and_the_file_is_readable_by_others(tmp_path) -> None:
    path, umask = tmp_path / "a.safetensors", os.umask(0o022)
    try:
        write(path, {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(2.0)}, {})
    finally:
        os.umask(umask)
    from safetensors.torch import load_file

    assert torch.equal(load_file(path)["a"], torch.arange(6.0).view(2, 3).T)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.ones(2)}, "x.safetensors lacks b"),
        ({"c": torch.ones(2)}, "c is no entry of x.safetensors"),
        ({"a": torch.ones(3)}, r"a is torch.float32 \(3,\), and x.safetensors was to hold"),
    ],
)
def test_what_was_not_announced_leaves_nothing_behind(tmp_path, tensors, says) -> None:
    entries = described({"a": torch.ones(2), "b": torch.ones(2)})
    with (
        pytest.raises(ValueError, match=says),
        TensorWriter(tmp_path / "x.safetensors", entries, {}) as writer,
    ):
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path) -> None:
    entries = described({"a": torch.ones(2)})
    with (
        pytest.raises(KeyboardInterrupt),
        TensorWriter(tmp_path / "x.safetensors", entries, {}) as writer,
    ):
        writer.write("a", torch.ones(2))
        assert [p.suffix for p in tmp_path.iterdir()] == [".writing"]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_after_a_day(tmp_path) -> None:
    ends = {"0123abcd.writing": 25, "abcd0123.writing": 23, "mine.writing": 25}
    for end, hours in ends.items():
        left = tmp_path / f"x.safetensors.{end}"
        left.write_bytes(b"half")
        os.utime(left, (time.time() - hours * 3600,) * 2)
    write(tmp_path / "y.safetensors", {"a": torch.ones(2)}, {})
    kept = {"x.safetensors.abcd0123.writing", "x.safetensors.mine.writing", "y.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_nothing_is_overwritten_not_even_what_appeared_meanwhile(tmp_path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"a": torch.ones(2)}
    path.write_text("mine")
    with pytest.raises(ValueError, match="exists and is not overwritten; choose another name"):
        TensorWriter(path, described(tensors), {})
    path.unlink()
    with (
        pytest.raises(ValueError, match="exists and is not overwritten"),
        TensorWriter(path, described(tensors), {}) as writer,
    ):
        writer.write("a", tensors["a"])
        path.write_text("mine")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path) -> None:
    free = shutil.disk_usage(tmp_path).free
    entries = {"a": (torch.uint8, (free + 10**9,))}
    with pytest.raises(
        ValueError, match=r"x.safetensors needs .* GB, and the disk of .* has .* GB"
    ):
        TensorWriter(tmp_path / "x.safetensors", entries, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_disk_that_fills_up_meanwhile_is_said_too(tmp_path, monkeypatch) -> None:
    class FullDisk(TensorWriter):
        def _put(self, offset: int, data: memoryview) -> None:
            self._file.close()
            self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
            super()._put(offset, data)

    with (
        pytest.raises(ValueError, match="could not be written .*; nothing of it is left") as error,
        FullDisk(tmp_path / "x.safetensors", {"a": (torch.uint8, (3,))}, {}) as writer,
    ):
        writer.write("a", torch.zeros(3, dtype=torch.uint8))
    assert error.value.__cause__.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
