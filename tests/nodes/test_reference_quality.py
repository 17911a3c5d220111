"""What the reference cache does to a picture, by the benchmark's own measure."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pack.benchmarks import reference_quality as quality
from pack.tests.host import Host
from torch import Tensor

SIDE = 128
TWO = quality.Cell("embedded", "2511", 1, 8, "model", 2)


@pytest.fixture(scope="module")
def full(host: Host) -> tuple[str, Tensor]:
    """An instruction, and the picture that the full computation makes."""
    (instruction,) = quality.asked(host, 1, SIDE)
    with torch.inference_mode():
        graph = quality.edit_graph(TWO, 0, instruction, cached=False)
        return instruction, quality.picture_of(host, graph)


def psnr(host: Host, full: tuple[str, Tensor], cell: quality.Cell) -> float:
    """Of the same edit with the cache."""
    with torch.inference_mode():
        picture = quality.picture_of(host, quality.edit_graph(cell, 0, full[0], cached=True))
    return quality.psnr(picture, full[1])


def test_int8_is_within_half_a_decibel_of_the_models_dtype(host: Host, full) -> None:
    exact = psnr(host, full, TWO)
    assert 30 < exact < math.inf  # something was reused, and it is the same picture
    assert abs(psnr(host, full, replace(TWO, format="int8")) - exact) < 0.5


def test_fewer_full_steps_cost_quality_and_none_saved_costs_nothing(host: Host, full) -> None:
    assert psnr(host, full, replace(TWO, interval=1)) == math.inf
    first = replace(TWO, interval=quality.ONLY_FIRST)
    assert psnr(host, full, first) < psnr(host, full, TWO)


def test_the_table_names_what_was_measured_and_the_worst_loss(tmp_path) -> None:
    rows = [
        vars(replace(TWO, format=kind, interval=interval)) | {"psnr": [value, value + 2]}
        for kind, value in (("model", 40.0), ("int8", 39.5))
        for interval in (1, 2, quality.AUTO)
    ]
    table = quality.table(rows).splitlines()
    assert table[0].endswith("| every 20 | first step only | auto |")
    assert "| embedded | 2511 | 1 | 8 | int8 | 40.5 | 40.5 |  |  |  |  | 40.5 |" in table
    loss, where = quality.worst_loss(rows, "int8")
    assert loss == pytest.approx(0.5) and where.format == "int8"
    quality.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
