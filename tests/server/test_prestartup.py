"""The prestartup script as ComfyUI runs it, with settings files of every kind; no start may fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pack.core.allocator import HOSTS_OWN, MARKER, MOST_SETTINGS_BYTES, VARIABLE, VARIABLES
from pack.demo.server import Server
from pack.tests.conftest import ROOT
from pack.tests.server.restarts import UNREADABLE, started_again

# What main.py has done when it runs the script, and how it runs it (execute_prestartup_script).
START = """
import importlib.util, json, logging, os, sys
sys.path[:0] = [sys.argv.pop(1), os.environ["TEST_TORCH"]]
script, user = sys.argv.pop(1), sys.argv.pop(1)
import comfy.options
comfy.options.enable_args_parsing()
from comfy.cli_args import args
import folder_paths, cuda_malloc
before = args.cuda_malloc = not args.disable_cuda_malloc
for name in filter(None, [os.environ.pop("TEST_TEXT", None)] if before else []):
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = name
folder_paths.set_user_directory(user)
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
spec = importlib.util.spec_from_file_location(os.path.splitext(script)[0], script)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
text = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
print(json.dumps([text, args.cuda_malloc, "torch" in sys.modules, os.environ["QWEN_VRAM_ALLOCATOR"]]))
"""
NATIVE_128 = {"QwenVRAM.Allocator.Backend": "native", "QwenVRAM.Allocator.MaxSplitSizeMB": 128}


class Started(NamedTuple):
    """What a start left: the variable, args.cuda_malloc, the marker, and its lines in the log."""

    text: str | None
    cuda_malloc: bool
    marker: str
    lines: list[str]


class Installation:
    """A user directory, and starts with it."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.comfyui, self.user = comfyui, base
        self.file = base / "default" / "comfy.settings.json"
        self.file.parent.mkdir()
        self.torch = base / "torch"  # as NVIDIA's own builds are called, without +cu
        self.torch.mkdir()
        (self.torch / "__init__.py").touch()
        version = "__version__ = '2.8.0a0+nv25.08'\ncuda: Optional[str] = '13.0'\n"
        (self.torch / "version.py").write_text(f"from typing import Optional\n{version}")

    def start(self, *args: str, outside: str | None = None, **more: str) -> Started:
        """Run the script on NVIDIA's torch, after ComfyUI has appended its own to `outside`."""
        own = [] if "--disable-cuda-malloc" in args else [HOSTS_OWN]
        environment = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, MARKER)}
        text = ",".join([*([] if outside is None else [outside]), *own])
        environment |= {"TEST_TEXT": text, "TEST_TORCH": str(self.user), **more}
        script = str(ROOT / "prestartup_script.py")
        command = [sys.executable, "-c", START, str(self.comfyui), script, str(self.user), *args]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr
        *lines, last = run.stdout.splitlines()
        left, cuda_malloc, torch, marker = json.loads(last)
        assert not torch
        return Started(left, cuda_malloc, marker, [x for x in lines if "qwen_vram" in x])

    def choose(self, settings: Any) -> None:
        """Write the settings file."""
        self.file.write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture
def installation(comfyui: Path, tmp_path: Path) -> Installation:
    """Without a settings file."""
    return Installation(comfyui, tmp_path)


def test_it_is_off_by_default(installation: Installation) -> None:
    for content in (None, {"Comfy.Locale": "zh", "QwenVRAM.Allocator.Backend": "leave as it is"}):
        if content:
            installation.choose(content)
        started = installation.start()
        assert started[:2] == (HOSTS_OWN, True) and started.lines == []


def test_native_also_tells_comfyui(installation: Installation) -> None:
    installation.choose(NATIVE_128)
    started = installation.start()
    assert started[:2] == ("max_split_size_mb:128", False)
    assert len(started.lines) == 1 and "backend native, by ComfyUI's settings" in started.lines[0]
    # A restart in place, by ComfyUI-Manager, with another choice.
    installation.choose({"QwenVRAM.Allocator.Backend": "native"})
    again = installation.start(outside=started.text, **{MARKER: started.marker})
    assert again[:2] == (None, False)


def test_the_command_line_and_the_launcher_win(installation: Installation) -> None:
    installation.choose(NATIVE_128)
    flagged = installation.start("--cuda-malloc")
    assert flagged[:2] == (HOSTS_OWN, True) and "the command line says so" in flagged.lines[0]
    installation.choose({"QwenVRAM.Allocator.Backend": "cudaMallocAsync"})
    flagged = installation.start("--disable-cuda-malloc")
    assert flagged[:2] == (None, False) and len(flagged.lines) == 1
    installation.choose(NATIVE_128)
    kept = installation.start(outside="max_split_size_mb:64,future_option:[a,b]")
    assert kept.text == "max_split_size_mb:64,future_option:[a,b]"
    general = installation.start(PYTORCH_ALLOC_CONF="expandable_segments:True")
    assert general.text == "expandable_segments:True,max_split_size_mb:128"


def test_with_several_users_nobody_chooses_for_all(installation: Installation) -> None:
    installation.choose(NATIVE_128)
    started = installation.start("--multi-user")
    assert started[:2] == (HOSTS_OWN, True) and started.lines == []


HOSTILE = {
    "empty": b"",
    "cut off": b'{"QwenVRAM.Allocator.Backend": "nat',
    "binary": UNREADABLE,
    "no object": b"[1, 2]",
    "nested": b"[" * 200_000 + b"]" * 200_000,
    "10 MB": json.dumps({"x": "y" * 10**7, "QwenVRAM.Allocator.Backend": "rm -rf"}).encode(),
    "an option smuggled in": b'{"QwenVRAM.Allocator.Backend": "native,foo:bar"}',
    "a line smuggled in": b'{"QwenVRAM.Allocator.RoundupPower2Divisions": "8\\nERROR root: x"}',
    "wrong types": b'{"QwenVRAM.Allocator.Backend": [[{}]], "QwenVRAM.Allocator.MaxSplitSizeMB": "9"}',
    "no numbers": b'{"QwenVRAM.Allocator.MaxSplitSizeMB": NaN, "QwenVRAM.Allocator.GarbageCollectionThreshold": 1e999}',
    "the future": b'{"QwenVRAM.Allocator.Version": 9, "QwenVRAM.Allocator.Backend": "quantum"}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gets_one_line_and_nothing_else(
    installation: Installation, name: str
) -> None:
    installation.file.write_bytes(HOSTILE[name])
    started = installation.start()
    assert started[:2] == (HOSTS_OWN, True)
    (line,) = started.lines
    assert "Not applied:" in line and len(line) < 700


def test_a_file_that_is_too_large_or_no_file(installation: Installation) -> None:
    with installation.file.open("wb") as file:
        file.truncate(MOST_SETTINGS_BYTES + 1)
    assert "more than 32 MB" in installation.start().lines[0]
    installation.file.unlink()
    installation.file.mkdir()
    assert "it is no file" in installation.start().lines[0]


def test_a_real_start_with_an_unreadable_file(server: Server) -> None:
    """main.py itself: it starts, loads the pack, and the log has one line of the script."""
    log = started_again(server).log_text()
    assert "startup-script" not in log and "Torch already imported" not in log
    (line,) = [x for x in log.splitlines() if "Memory allocator:" in x]
    assert "comfy.settings.json cannot be read (UnicodeDecodeError" in line
    assert VARIABLE not in line
    assert server.get_json("/qwen_vram/conditioning")["disk"]["bound_bytes"] > 0
