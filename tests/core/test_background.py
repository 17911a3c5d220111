"""Background work is done in order, within its bound, and whatever a job does."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from pack.core import background
from pack.core.background import Deadline, Worker


def test_jobs_run_in_order_on_one_thread_that_ends_and_comes_back(monkeypatch) -> None:
    monkeypatch.setattr(background, "IDLE_SECONDS", 0.02)
    worker, done = Worker("test", 10), []
    for round_number in range(3):
        for number in range(5):
            worker.submit(lambda n=number: done.append((n, threading.current_thread())))
        assert worker.flush(5)
        assert [number for number, _ in done] == [0, 1, 2, 3, 4]
        (thread,) = {thread for _, thread in done}
        assert thread.daemon and thread.name == "test"
        thread.join(5)
        assert not thread.is_alive(), round_number
        done.clear()


def test_a_job_that_fails_is_logged_and_the_next_one_runs(caplog) -> None:
    worker, done = Worker("test", 10), []
    with caplog.at_level(logging.ERROR, "qwen_vram"):
        worker.submit(lambda: 1 / 0)
        worker.submit(lambda: done.append(1))
        assert worker.flush(5)
    assert done == [1] and "ZeroDivisionError" in caplog.text


def test_what_waits_is_bounded_and_a_single_large_job_is_taken() -> None:
    worker, gate = Worker("test", 10), threading.Event()
    assert worker.submit(lambda: gate.wait(10), size=100)
    start = time.monotonic()
    assert not worker.submit(lambda: None, size=1, wait_seconds=0.05)
    assert 0.04 < time.monotonic() - start < 2 and not worker.flush(0.01)
    threading.Timer(0.05, gate.set).start()
    assert worker.submit(lambda: None, size=1, wait_seconds=5)
    assert worker.flush(5)


def test_no_thread_left_is_no_error(monkeypatch, caplog) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    worker = Worker("test", 10)
    with monkeypatch.context() as m, caplog.at_level(logging.WARNING, "qwen_vram"):
        m.setattr(threading.Thread, "start", refuse)
        assert not worker.submit(lambda: None) and worker.flush(0)
    assert "can't start new thread" in caplog.text
    assert worker.submit(lambda: None) and worker.flush(5)


def test_a_deadline_never_goes_below_zero() -> None:
    assert Deadline(-1).left() == 0.0 and Deadline(10).left() == pytest.approx(10, abs=1)
