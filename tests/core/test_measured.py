"""What earlier runs took corrects predictions: robustly, bounded, whatever happens to the file."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core.budget import Plan
from pack.core.measured import HIGHEST, KEYS, LOWEST, SAMPLES, Measured, key_of

MB = 1_000_000
KEY = key_of("Qwen-Image", "bfloat16", "", "a card", Plan())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "peaks.json"


def test_nothing_known_corrects_nothing(path: Path) -> None:
    assert Measured(path).factor(KEY) == 1
    assert not path.exists()


def test_one_run_is_believed_by_half_and_two_that_agree_decide(path: Path) -> None:
    measured = Measured(path)
    measured.learn(KEY, 1000 * MB, 1400 * MB)
    assert measured.factor(KEY) == pytest.approx(1.2)
    measured.learn(KEY, 500 * MB, 700 * MB)
    assert measured.factor(KEY) == pytest.approx(1.4)
    assert measured.factor(KEY + "another") == 1
    assert Measured(path).factor(KEY) == pytest.approx(1.4)


def test_a_disturbed_run_does_not_move_what_many_agree_on(path: Path) -> None:
    measured = Measured(path)
    for took in (1100, 1110, 1090, 9000, 1100):
        measured.learn(KEY, 1000 * MB, took * MB)
    assert measured.factor(KEY) == pytest.approx(1.1)


def test_the_last_runs_count(path: Path) -> None:
    measured = Measured(path)
    for number in range(3 * SAMPLES):
        measured.learn(KEY, 1000 * MB, (1900 - 20 * number) * MB)
    newest = json.loads(path.read_text())[KEY]
    assert len(newest) == SAMPLES and newest[-1] == 1.9 - 0.02 * (3 * SAMPLES - 1)


def test_what_many_runs_have_said_is_not_written_again(path: Path) -> None:
    measured = Measured(path)
    for took in (1900, 1100, 1100, 1100, 1100, 1100, 1100, 1101, 1109, 1091):
        measured.learn(KEY, 1000 * MB, took * MB)
    assert json.loads(path.read_text())[KEY] == [1.9, 1.1, 1.1, 1.1, 1.1]
    path.unlink()
    measured.learn(KEY, 1000 * MB, 1102 * MB)
    assert not path.exists()
    measured.learn(KEY, 1000 * MB, 1300 * MB)
    assert path.exists()


def test_what_ran_out_is_known_until_a_restart(path: Path) -> None:
    measured = Measured(path)
    assert not measured.fails(KEY, 4000 * MB, 5000 * MB)
    measured.ran_out(KEY, 4000 * MB, 5000 * MB)
    assert measured.fails(KEY, 4000 * MB, 5000 * MB)
    assert measured.fails(KEY, 3900 * MB, 5100 * MB)  # as good as the same
    assert measured.fails(KEY, 8000 * MB, 1000 * MB)
    assert not measured.fails(KEY, 3000 * MB, 5000 * MB)  # a smaller picture
    assert not measured.fails(KEY, 4000 * MB, 6000 * MB)  # more memory
    assert not measured.fails(KEY + "another", 4000 * MB, 5000 * MB)
    assert measured.factor(KEY) == 1  # a prediction may be right where memory is in pieces
    assert not Measured(path).fails(KEY, 4000 * MB, 5000 * MB)
    assert not path.exists()


def test_only_the_last_failures_of_passes_that_are_large_are_kept(path: Path) -> None:
    measured = Measured(path)
    measured.ran_out(KEY, 255_000_000, 700 * MB)
    assert not measured.fails(KEY, 255_000_000, 700 * MB)
    for size in range(1, SAMPLES + 2):
        measured.ran_out(KEY, size * 1000 * MB, size * 100 * MB)
    assert not measured.fails(KEY, 1000 * MB, 100 * MB)
    assert measured.fails(KEY, 2000 * MB, 200 * MB)


def test_small_passes_tell_nothing(path: Path) -> None:
    measured = Measured(path)
    for _ in range(3):
        measured.learn(KEY, 255_000_000, 500_000_000)
    assert measured.factor(KEY) == 1
    assert not path.exists()


@given(st.lists(st.tuples(st.integers(1 << 27, 1 << 40), st.integers(1, 1 << 40)), max_size=20))
def test_the_factor_is_bounded_and_saved(runs: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        measured = Measured(Path(folder) / "peaks.json")
        for predicted, took in runs:
            measured.learn(KEY, predicted, took)
        assert LOWEST <= measured.factor(KEY) <= HIGHEST
        assert Measured(measured.path).factor(KEY) == measured.factor(KEY)


@pytest.mark.parametrize(("predicted", "took"), [(0, 5), (5, 0), (-1, 5), (5, -1)])
def test_what_was_not_measured_is_refused(path: Path, predicted: int, took: int) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Measured(path).learn(KEY, predicted, took)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"a": 1}',
        '{"a": []}',
        '{"a": ["1"]}',
        '{"a": [NaN]}',
        '{"a": [9]}',
        '{"a": [[1]]}',
        "\ud800",
    ],
)
def test_a_damaged_file_is_told_once_and_replaced(
    path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    measured = Measured(path)
    with caplog.at_level(logging.WARNING, "qwen_vram"):
        assert measured.factor(KEY) == measured.factor(KEY) == 1
    assert [record.getMessage().count("is learned anew") for record in caplog.records] == [1]
    measured.learn(KEY, 1000 * MB, 1400 * MB)
    measured.learn(KEY, 1000 * MB, 1400 * MB)
    assert Measured(path).factor(KEY) == pytest.approx(1.4)


def test_a_folder_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")  # where a folder is needed; root may write everywhere else
    measured = Measured(tmp_path / "file" / "peaks.json")
    for _ in range(3):
        measured.learn(KEY, 1000 * MB, 1400 * MB)
    told = [r.getMessage() for r in caplog.records if "cannot be saved" in r.getMessage()]
    assert len(told) == 1
    assert "Make the folder writable." in told[0]
    assert measured.factor(KEY) == pytest.approx(1.4)
    (tmp_path / "file").unlink()
    measured.learn(KEY, 1000 * MB, 1400 * MB)
    assert len(json.loads(measured.path.read_text())[KEY]) == 4


def test_processes_share_one_file(path: Path) -> None:
    one, other = Measured(path), Measured(path)
    assert other.factor(KEY) == 1
    one.learn(KEY, 1000 * MB, 1400 * MB)
    other.learn(KEY, 1000 * MB, 1400 * MB)
    assert other.factor(KEY) == pytest.approx(1.4)


def test_threads_lose_nothing_and_leave_no_halves(path: Path) -> None:
    measured = Measured(path)

    def work(number: int) -> None:
        for _ in range(5):
            measured.learn(f"{KEY} {number}", 1000 * MB, 1400 * MB)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(ratios) for ratios in json.loads(path.read_text()).values()} == {5}
    assert os.listdir(path.parent) == [path.name]


def test_the_file_stays_small(path: Path) -> None:
    measured = Measured(path)
    path.parent.mkdir()
    path.write_text(json.dumps({f"old {number}": [1.5] for number in range(KEYS)}))
    measured.learn("old 0", 1000 * MB, 1500 * MB)  # used again: now the newest
    measured.learn(KEY, 1000 * MB, 1500 * MB)
    known = json.loads(path.read_text())
    assert len(known) == KEYS
    assert {"old 0", KEY} <= known.keys()
    assert "old 1" not in known


def test_keys_tell_apart_what_is_predicted_differently() -> None:
    plans = [
        Plan(),
        Plan(4),
        Plan(16, 16, 16),
        Plan(4, 4, 4, apart=True),
        Plan(apart=True),
        Plan(tiles=2),
    ]
    keys = [key_of("m", "d", "", "c", plan) for plan in plans]
    assert keys[2:] == [keys[2], keys[2], keys[0], keys[0]]
    others = [("n", "d", "", "c"), ("m", "e", "", "c"), ("m", "d", "w", "c"), ("m", "d", "", "e")]
    assert len({*keys, *(key_of(*other, Plan()) for other in others)}) == 3 + len(others)
