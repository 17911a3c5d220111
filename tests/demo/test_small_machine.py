"""The benchmark reads memory when ComfyUI has let go of a model, not while it is asked to."""

from __future__ import annotations

import pytest
from pack.benchmarks import small_machine

MODEL, REST = 400_000_000, 1_000_000_000


class Server:
    """Its worker misses the first `deaf` requests, and lets go some readings after the next."""

    def __init__(self, deaf: int, late: int) -> None:
        self.deaf, self.late, self.asked = deaf, late, 0

    def post_json(self, path: str, body: dict[str, bool]) -> None:
        assert path == "/free" and body == {"unload_models": True, "free_memory": True}
        self.asked += 1

    def now(self) -> dict[str, int]:
        held = self.asked <= self.deaf + self.late
        return {"VRAM": REST + held * MODEL, "RssAnon": REST + self.asked * 4096 + held * MODEL}


@pytest.mark.parametrize(("deaf", "late"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_model_that_goes_late_is_not_counted(monkeypatch, deaf, late) -> None:
    monkeypatch.setattr(small_machine, "PAUSE", 0)
    server = Server(deaf, late)
    found = small_machine.let_go(server, server)
    assert found["VRAM"] == REST and found["RssAnon"] - REST < MODEL / 100


def test_memory_that_never_comes_to_rest_ends_all_the_same(monkeypatch, capsys) -> None:
    monkeypatch.setattr(small_machine, "PAUSE", 0)
    monkeypatch.setattr(Server, "now", lambda self: {"RssAnon": self.asked * 10**8})
    assert small_machine.let_go(server := Server(0, 0), server)["RssAnon"] == (
        small_machine.MOST_ASKED * 10**8
    )
    assert "did not come to rest" in capsys.readouterr().out
