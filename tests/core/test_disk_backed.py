"""A picture whose memory is a file: as any other tensor, gone with it, and no burden on the RAM."""

from __future__ import annotations

import errno
import gc
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import disk_backed
from pack.core.disk_backed import DiskFullError, empty, reduced
from pack.core.tiling import PIXEL_PATCH, PIXEL_STEP, TileBlender, TileGrid, crop
from pack.tests.examples import examples
from torch.nn import functional as F

MB = 1 << 20


def used(folder: Path) -> int:
    """Bytes that this process keeps in files of a folder, also in those without a name."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(descriptor).startswith(str(folder)):
                found += os.stat(descriptor).st_blocks * 512
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def anonymous() -> int:
    """Bytes of RAM that no file stands for."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@contextmanager
def watched() -> Iterator[list[int]]:
    """By how much `anonymous` grows meanwhile, looked at all the time."""
    before, grown, done = anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            grown.append(anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield grown
    finally:
        done.set()
        thread.join()


linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="*** SKIPPED: only Linux tells which memory a process holds ***",
)


RESERVED, NO_CALL, REFUSED = HOW = (
    "reserved",
    "without a call that reserves, as on macOS",
    "on a file system that cannot reserve",
)


@pytest.fixture(params=[*HOW, "extended, as on Windows"])
def how(request, monkeypatch) -> str:
    """The ways to take room on the disk."""

    def refused(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if request.param == NO_CALL:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif request.param == REFUSED:
        monkeypatch.setattr(os, "posix_fallocate", refused, raising=False)
    elif request.param != RESERVED:
        monkeypatch.setattr(disk_backed, "WINDOWS", True)
    return request.param


def test_it_is_a_tensor_as_any_other(tmp_path, how) -> None:
    picture = empty((2, 50, 70, 3), tmp_path / "made")
    assert picture.dtype == torch.float32 and picture.shape == (2, 50, 70, 3)
    assert not picture.any()
    values = torch.rand(2, 50, 70, 3)
    with torch.inference_mode():  # as ComfyUI runs nodes
        picture.copy_(values).mul_(2)
    assert torch.equal(picture, values * 2)
    assert not empty((2, 50, 70, 3), tmp_path).any()  # another one has a file of its own


@linux
@pytest.mark.parametrize("how", HOW, indirect=True)  # extended, a file is a hole on this system
def test_the_room_on_the_disk_is_taken_at_once_and_given_back_with_the_last_view(
    tmp_path, monkeypatch, how
) -> None:
    monkeypatch.setattr(disk_backed, "CHUNK", 1_000_000)  # of which the size is no multiple
    picture = empty((1, 512, 512, 3), tmp_path)
    assert used(tmp_path) >= 3 * MB
    assert not picture.any() and picture.untyped_storage().nbytes() == 3 * MB
    part = picture[:, :10]
    del picture
    gc.collect()
    part.fill_(1)
    assert used(tmp_path) >= 3 * MB and part.sum() == 10 * 512 * 3
    del part
    gc.collect()
    assert used(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_bytes_and_the_folder(tmp_path, monkeypatch) -> None:
    told = rf"A picture needs 12\.0 MB on the disk, but in {re.escape(str(tmp_path))} only 5\.0 MB"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5_000_000))
    with pytest.raises(DiskFullError, match=told):
        empty((1, 1000, 1000, 3), tmp_path)
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_disk_that_fills_up_in_between_is_told_too(tmp_path, monkeypatch) -> None:
    """As a quota does it, which nobody counts among what is free."""

    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match="needs 12.0 MB"):
        empty((1, 1000, 1000, 3), tmp_path)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFullError, match="needs 12.0 MB"):
        empty((1, 1000, 1000, 3), tmp_path)


def test_a_picture_of_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no picture of \(0, 5, 5, 3\)"):
        empty((0, 5, 5, 3), tmp_path)


@settings(max_examples=examples(40))
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    smaller=st.tuples(st.integers(1, 220), st.integers(1, 220)),
    channels=st.integers(1, 4),
)
def test_reduced_as_pytorch_does_it(size, smaller, channels) -> None:
    picture = torch.rand(2, *size, channels, generator=torch.Generator().manual_seed(1))
    exact = picture.movedim(-1, 1).double()  # PyTorch's own sums are off by more in float32
    expected = F.interpolate(exact, smaller, mode="area").movedim(1, -1).float()
    torch.testing.assert_close(reduced(picture, *smaller), expected, rtol=0, atol=1e-6)


@linux
def test_64_megapixels_are_blended_and_reduced_within_a_few_tiles_of_ram(tmp_path) -> None:
    side, allowed = 8192, 64 * MB  # a picture takes 256 MB, a tile of 1024 px takes 4
    source, merged = (empty((1, side, side, 1), tmp_path) for _ in range(2))
    ramp = torch.linspace(0, 1, side)
    for row in range(0, side, 1024):
        source[0, row : row + 1024, :, 0] = ramp[row : row + 1024, None] * ramp[None, :]
    grid = TileGrid.cover(side, side, 1024, 128, PIXEL_STEP, PIXEL_PATCH)
    gc.collect()
    with watched() as grown:
        blender = TileBlender(grid, source.shape, dim=-3, base=source, into=merged)
        for index, tile in enumerate(grid.tiles()):
            blender.add(index, crop(source, tile, -3) * 0.5)
        result = blender.result()
        small = reduced(result, 512, 512)
    assert len(grown) > 50 and max(grown) < allowed
    expected = F.interpolate(ramp[None, None], 512, mode="area")[0, 0]
    expected = 0.5 * expected[:, None] * expected[None, :]
    torch.testing.assert_close(small[0, :, :, 0], expected, rtol=0, atol=1e-5)
    for row in (0, 1000, 8191):
        torch.testing.assert_close(result[0, row], source[0, row] * 0.5, rtol=0, atol=1e-6)
