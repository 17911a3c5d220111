"""Makes sure that a models folder holds the tiny checkpoints, whoever needs them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from .environment import ROOT, say

GENERATOR = Path(__file__).with_name("tiny_checkpoints.py")


class CheckpointsError(RuntimeError):
    """The generator failed; the message ends with its own account."""


def make_checkpoints(comfyui: Path, models: Path) -> None:
    """Writes the tiny checkpoints unless this version of the generator already has."""
    stamp, version = models / "tiny.stamp", hashlib.sha256(GENERATOR.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == version:
        return
    say(f"writing random tiny checkpoints into {models}")
    # In a process of its own, because importing ComfyUI settles the device for good.
    done = subprocess.run(
        [sys.executable, "-m", "demo.tiny_checkpoints", str(models)],
        cwd=ROOT,
        env={**os.environ, "COMFYUI_PATH": str(comfyui)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise CheckpointsError(f"The tiny checkpoints could not be written:\n{done.stderr}")
    stamp.write_text(version)
