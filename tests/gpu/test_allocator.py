"""On a card: the doctor's claims about PyTorch's allocator, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from pack.core.allocator import MARKER, VARIABLE, VARIABLES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# A large block is freed, then a smaller one asked for: is the large one split for it?
PROBE = """
import json, sys, torch
def grown(first, second):
    torch.cuda.empty_cache()
    tensor = torch.empty(first << 20, dtype=torch.uint8, device="cuda")
    del tensor
    before = torch.cuda.memory_reserved()
    tensor = torch.empty(second << 20, dtype=torch.uint8, device="cuda")
    return torch.cuda.memory_reserved() - before >> 20
told = {"start": grown(400, 100)}
if len(sys.argv) > 1:
    torch._C._accelerator_setAllocatorSettings(sys.argv[1])
    told["changed"] = grown(400, 100)
told["backend"] = torch.cuda.get_allocator_backend()
if told["backend"] == "native":
    told["read"] = torch.cuda.memory._snapshot()["allocator_settings"]["max_split_size"]
    told["fraction"] = torch.cuda.get_per_process_memory_fraction()
print(json.dumps(told))
"""


def probe(text: str, change: str | None = None) -> dict[str, Any]:
    """What PROBE prints with that allocator string, changed on the way."""
    environment = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, MARKER)}
    command = [sys.executable, "-c", PROBE, *([] if change is None else [change])]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**environment, VARIABLE: text}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_max_split_size_keeps_large_blocks_whole_and_can_be_changed_while_running() -> None:
    usual = probe("backend:native", "max_split_size_mb:200")
    assert usual["start"] == 0 and usual["changed"] >= 100  # the 400 MB block stays whole
    assert usual["read"] == 200 << 20 and usual["fraction"] == 1.0
    assert probe("max_split_size_mb:200")["start"] >= 100
    assert probe("max_split_size_mb:200", "")["changed"] == 0


def test_cudamallocasync_ignores_it() -> None:
    told = probe("backend:cudaMallocAsync,max_split_size_mb:200")
    assert told["backend"] == "cudaMallocAsync" and told["start"] == 0
