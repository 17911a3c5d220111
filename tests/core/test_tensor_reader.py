"""Tensors are read one at a time, of one file or of several, and a short file gets a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.core import tensor_reader
from pack.core.checkpoint import CheckpointError, read_header, usual_name
from pack.core.file_identity import identify
from pack.core.shards import shards_of
from pack.core.tensor_reader import DTYPES, TensorReader, own_memory
from pack.tests.conftest import ROOT
from pack.tests.live_bytes import LiveBytes
from safetensors.torch import load_file, save_file

SHAPES = ((), (0,), (3,), (5, 7), (2, 1, 4))


def written(path: Path, name: str = "model.safetensors") -> Path:
    """A file with a tensor of every dtype and of several shapes."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in DTYPES.values():
        for i, shape in enumerate(SHAPES):
            data = torch.randint(0, 255, (*shape, dtype.itemsize), generator=generator)
            if dtype is torch.bool:
                data %= 2
            tensors[f"{dtype}.{i}"] = data.to(torch.uint8).view(dtype).reshape(shape)
    save_file(tensors, path / name)
    return path / name


def test_every_dtype_and_shape_comes_as_it_was_written(tmp_path, monkeypatch) -> None:
    path = written(tmp_path)
    expected = load_file(path)
    for drops in (False, True):  # the pages from the cache, too
        monkeypatch.setattr(tensor_reader, "_crowds_memory", lambda _, drops=drops: drops)
        reader = TensorReader(read_header(str(path)))
        for name, tensor in expected.items():
            read = reader.read(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert as_bytes(read) == as_bytes(tensor)


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor: NaN is not equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_read_holds_the_bytes_of_its_tensor_and_no_more(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensor_reader, "LEAST_OWN", 1 << 40)  # else torch does not make the memory
    path = tmp_path / "two.safetensors"
    save_file({n: torch.ones(1000, 1000) for n in "ab"}, path)
    reader = TensorReader(read_header(str(path)))
    with LiveBytes() as live:
        for name in "ab":
            read = reader.read(name)
            size = read.untyped_storage().nbytes()
            assert live.now == size == 4_000_000
            del read
    assert live.peak == 4_000_000


def test_a_file_that_lost_its_end_after_the_header_was_read_gets_a_sentence(tmp_path) -> None:
    path = tmp_path / "short.safetensors"
    save_file({"a": torch.ones(100)}, path)
    header = read_header(str(path))
    os.truncate(path, path.stat().st_size - 8)
    says = r"short.safetensors ends within a: 392 of 400 bytes are there; download it again."
    with pytest.raises(CheckpointError, match=says):
        TensorReader(header).read("a")


def test_bytes_that_do_not_fit_the_shape_and_unknown_dtypes_get_a_sentence(tmp_path) -> None:
    rows = {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        "b": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]},
    }
    raw = json.dumps(rows).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    reader = TensorReader(read_header(str(path)))
    with pytest.raises(CheckpointError, match=r"odd.safetensors is damaged: a has 8 bytes"):
        reader.read("a")
    with pytest.raises(CheckpointError, match="holds b as F4, which this version cannot read"):
        reader.read("b")


# ------------------------------------------------------------------------------------------ shards
@given(st.integers(1, 20), st.data())
def test_any_shard_stands_for_all(total: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, total))
    found = shards_of(os.path.join("folder", f"m.b-{number:05}-of-{total:05}.safetensors"))
    assert len(found) == total and found == sorted(set(found))
    assert {os.path.dirname(path) for path in found} == {"folder"}
    assert shards_of(found[-1]) == found


@pytest.mark.parametrize("name", ["m.safetensors", "m-00004-of-00003.sft", "m-1-of-2.safetensors"])
def test_other_names_stand_for_themselves(name: str) -> None:
    assert shards_of(name) == [name]


def test_the_shards_of_a_model_are_one_header_and_a_missing_one_is_named(tmp_path) -> None:
    names = [tmp_path / f"m-{i:05}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": torch.ones(2)}, names[0], {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.safetensors is not beside it"):
        read_header(str(names[0]))
    save_file({"b": torch.full((3,), 7.0)}, names[1])
    for picked in names:
        header = read_header(str(picked))
        assert header.path == str(names[0]) and header.paths() == list(map(str, names))
        assert header.metadata == {"format": "pt"}
        assert TensorReader(header).read("b").tolist() == [7.0, 7.0, 7.0]
        assert {file.path for file in identify(picked)} == set(map(os.path.realpath, names))


def test_names_of_newer_transformers_become_the_usual_ones() -> None:
    assert usual_name("model.language_model.layers.0.x") == "model.layers.0.x"
    assert usual_name("model.visual.blocks.0.x") == "visual.blocks.0.x"
    assert usual_name("model.layers.0.x") == "model.layers.0.x"
    assert usual_name("lm_head.weight") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_goes_back_to_the_system_with_the_tensor() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    torch.empty(31 << 20, dtype=torch.uint8)  # the C library keeps smaller pieces from now on
    before = resident()
    held = [own_memory(4 << 20).fill_(1) for _ in range(32)]
    assert resident() - before > 100 << 20
    del held[:-1]  # the last one lives on above the others
    assert resident() - before < 24 << 20


def test_without_another_map_the_memory_is_torchs(monkeypatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(tensor_reader.mmap, "mmap", refuses)
    assert own_memory(1 << 20).fill_(7).sum() == 7 << 20


def test_what_is_read_into_a_buffer_is_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    tensors = {"a": torch.randn(7, 5).bfloat16(), "b": torch.arange(3)}
    save_file(tensors, path)
    buffer = torch.full((100,), 9, dtype=torch.uint8)
    reader = TensorReader(read_header(str(path)))
    for name, tensor in tensors.items():
        found = reader.read(name, buffer)
        assert found.equal(tensor) and found.data_ptr() == buffer.data_ptr()
        assert reader.read(name).equal(tensor)


FREED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from core.tensor_reader import trim
def taken():
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(r.split()[1]) * 1024 for r in rows if r.startswith("RssAnon"))
before = taken()
held = [torch.ones(25_000) for _ in range(2_000)]  # 100 KB each: the C library's own
last = held.pop()  # lies above them, so that they cannot go by themselves
del held
kept = taken() - before
trim()
print(kept, taken() - before)
"""


@pytest.mark.skipif(not hasattr(os, "confstr"), reason="which C library it is cannot be asked")
def test_what_was_freed_goes_back_to_the_system() -> None:
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names or not os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("only glibc can be asked")
    command = [sys.executable, "-c", FREED, str(ROOT)]
    kept, left = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert kept > 150e6 > 30e6 > left
