"""Runs the JavaScript tests with Node's own test runner; nothing is installed for them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pack.tests.conftest import missing


def test_javascript() -> None:
    node = shutil.which("node")
    if node is None:
        missing("Node.js 20 or later")
    tests = sorted(map(str, Path(__file__).parent.glob("*.test.mjs")))
    assert tests
    done = subprocess.run([node, "--test", *tests], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
