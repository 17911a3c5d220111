"""The demo as a user runs it: two ComfyUI processes, the second one without the text encoder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pack.demo import classifier
from pack.demo.environment import inside_venv
from pack.tests.conftest import ROOT
from pack.tests.server.test_demo import DRAWN, seen
from PIL import Image


def test_make_demo_draws_what_it_is_asked_and_reuses_the_prompt(comfyui: Path) -> None:
    if not inside_venv():
        pytest.skip("the demo runs inside .venv, where `make test` runs the tests")
    command = [sys.executable, "-m", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "events in the first process: the text encoder's loader was executed",
        "events in the second process: the text encoder's loader was not executed",
        "The two pictures are identical, pixel by pixel.",
        "miss: new text",
        "hit, disk",
    ):
        assert line in done.stdout, done.stdout
    judge = classifier.load()
    for name, asked in DRAWN.items():
        with Image.open(ROOT / ".demo" / "output" / name) as image:
            found = seen(judge, image)
        assert {k: found[k] for k in asked} == asked, name
    with Image.open(ROOT / ".demo" / "output" / "demo.png") as sheet:
        assert sheet.mode == "RGB"
