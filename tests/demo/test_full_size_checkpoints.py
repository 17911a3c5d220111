"""The command that stands in for 30 GB of model files tells about itself without a host."""

from __future__ import annotations

import runpy

import pytest
from pack.tests.conftest import ROOT

MODULE = str(ROOT / "benchmarks" / "full_size_checkpoints.py")


@pytest.mark.parametrize(("arguments", "said"), [(["--help"], "30 GB"), (["BASE"], "COMFYUI_PATH")])
def test_it_says_what_it_writes_and_what_it_needs(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("sys.argv", ["full_size_checkpoints", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(MODULE, run_name="__main__")
    assert said in " ".join((capsys.readouterr().out + str(stopped.value)).split())
