"""Makes sure that a models folder holds the embedded model and the random files beside it."""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import embedded
from .environment import ROOT, say

GENERATOR = Path(__file__).with_name("tiny_checkpoints.py")


class CheckpointsError(RuntimeError):
    """The generator failed; the message ends with its own account."""


def make_checkpoints(comfyui: Path, models: Path) -> None:
    """Copies the embedded model, and writes the LoRA and the tests' files unless that is done."""
    place_embedded(models)
    stamp, version = models / "tiny.stamp", hashlib.sha256(GENERATOR.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == version:
        return
    say(f"preparing {models}: the embedded model, a stand-in for the LoRA, files for the tests")
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


def place_embedded(models: Path) -> None:
    """Copies the embedded model into a models folder, unless the same files are there already."""
    for name in (embedded.TRANSFORMER, embedded.TEXT_ENCODER, embedded.VAE):
        source, target = embedded.FOLDER / name, models / name
        if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
            shutil.copyfile(source, partial)
            os.replace(partial, target)
