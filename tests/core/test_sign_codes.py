"""The computed vocabulary is the same numbers on every machine, and a usable code."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from pack.core.checkpoint import VOCABULARY
from pack.core.sign_codes import sign_codes

# The first 64 signs of a few rows at width 64, written down once: trained files depend on them.
ROWS = {
    0: "+-+-++++++--++-+---+++-+-++++-++--+++--++-+-+-----+-----+++---+-",
    1: "++++-+---++--+-++-+++--++-+----+-++-+-+-+--++++--++++----++-+++-",
    2: "-+--++++-+---+-+----+--++----------++----+-+++-+++---+-------++-",
    872: "-+-+-++-++++-+---+--+++++-+++++---+++-+------+-+---++-+--+-+--++",
    77091: "----+--+-+-+----+++++--+-+----+--+++-+------++++---+++--++++-+--",
    151644: "+-+-----+++-+-+----+-+---+--+-+--+--++---+-++--+++-+-++--+---+--",
    152063: "+++-+-+-+-+------+-++--++++-++-++--+--+-+--+---+-++++--+++-+-+-+",
}


def splitmix64(number: int) -> int:
    """The `number`th output for the seed 0, in Python's own whole numbers."""
    mask = (1 << 64) - 1
    z = (number + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def row(index: int, width: int) -> list[int]:
    """One row: a word for each 64 columns, its bytes from low to high, their bits from high to low."""
    words = (width + 63) // 64
    octets = b"".join(splitmix64(index * words + i).to_bytes(8, "little") for i in range(words))
    return [1 if octets[i // 8] >> (7 - i % 8) & 1 else -1 for i in range(width)]


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    """The table at the width of the embedded model."""
    return sign_codes(64)


def test_the_generator_here_is_splitmix64() -> None:
    """Its published first outputs for the seed 0."""
    assert [splitmix64(i) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_the_written_rows_are_the_rows(codes: torch.Tensor) -> None:
    for index, signs in ROWS.items():
        assert "".join("+" if x > 0 else "-" for x in codes[index].tolist()) == signs


def test_the_whole_table_is_the_one_that_files_were_trained_with(codes: torch.Tensor) -> None:
    digest = hashlib.sha256(codes.to(torch.int8).numpy().tobytes()).hexdigest()
    assert digest == "f6e2d64473cb7abdc619b408bf7d1d0b100184f59b955c08553f90fd936cc6a4"


@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 128, 130])
def test_every_row_follows_from_its_number_at_any_width(width: int) -> None:
    table = sign_codes(width)
    assert table.shape == (VOCABULARY, width) == (152064, width)
    assert table.dtype == torch.float32 and table.is_contiguous()
    for index in [0, 1, VOCABULARY - 1, *random.Random(width).sample(range(VOCABULARY), 200)]:
        assert table[index].tolist() == row(index, width)


def test_only_signs_balanced_in_every_column_and_row(codes: torch.Tensor) -> None:
    assert (codes.abs() == 1).all()
    assert codes.mean(0).abs().max() < 0.015  # six deviations of 152064 throws of a coin
    assert abs(codes.mean().item()) < 0.002
    assert codes.sum(1).abs().max() < 48


def test_no_two_tokens_share_a_code_or_nearly_do(codes: torch.Tensor) -> None:
    assert len(torch.unique(codes.to(torch.int8), dim=0)) == VOCABULARY
    some = codes[torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[:3000]]
    product = (some @ some.T).fill_diagonal_(0)
    assert product.abs().max() < 52  # of 64


def test_columns_do_not_repeat_each_other(codes: torch.Tensor) -> None:
    correlation = (codes.T @ codes / VOCABULARY).fill_diagonal_(0)
    assert correlation.abs().max() < 0.02


def test_each_call_gives_the_same_numbers_in_its_own_memory(codes: torch.Tensor) -> None:
    again = sign_codes(64)
    assert torch.equal(again, codes) and again.data_ptr() != codes.data_ptr()
    again.zero_()
    assert torch.equal(sign_codes(64), codes)
