"""The memory report against NVML, at full size: do its parts add up, and what stays unexplained?

Usage: COMFYUI_PATH=... python -m benchmarks.memory_account BASE OUT.json [--steps N] [ARGS]
BASE/models holds the official files or those of full_size_checkpoints. For both allocators, with
dynamic VRAM on and off, a new server: the report before the first run, after it, after a clear of
the models, and the seconds of runs with and without somebody who asks for the report every second.
NVML is asked just before and after each report, so that the difference has its own error beside it.
Needs a CUDA device and nvidia-ml-py. ARGS go to ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
from pathlib import Path
from typing import Any

import pynvml
import torch

from demo.server import Server

from .text_to_image import PROMPT_A, ROOT, graph

CONFIGURATIONS = {
    "native, dynamic VRAM": ("--disable-cuda-malloc",),
    "native, --disable-dynamic-vram": ("--disable-cuda-malloc", "--disable-dynamic-vram"),
    "cudaMallocAsync, dynamic VRAM": ("--cuda-malloc",),
    "cudaMallocAsync, --disable-dynamic-vram": ("--cuda-malloc", "--disable-dynamic-vram"),
}
RUNS = 4
REPORT = "/qwen_vram/report"


def nvml_used() -> int:
    """Bytes of the card in use, without what the driver keeps back for itself."""
    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)


def account(server: Server, when: str) -> dict[str, Any]:
    """One report beside NVML's figures."""
    before = nvml_used()
    told = server.get_json(f"{REPORT}?fragments=true")
    after = nvml_used()
    device = next(d for d in told["devices"] if d["kind"] == "cuda")
    parts = {part["id"]: part["bytes"] for part in device["parts"]}
    used = sum(n for name, n in parts.items() if n is not None and name != "free")
    return {
        "when": when,
        "nvml_bytes": [before, after],
        "parts_bytes": used,
        "sum_is_total": used + (parts["free"] or 0) == device["total_bytes"],
        "unexplained_bytes": parts.get("unexplained"),
        "parts": device["parts"],
        "models": told["models"],
        "not_measurable": device["not_measurable"],
        "findings": [f["text"] for f in told["findings"]],
    }


class Watcher(threading.Thread):
    """Asks for the report once a second, as the panel does."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server, self.done, self.asked = server, threading.Event(), 0
        self.start()

    def run(self) -> None:
        """Until told."""
        while not self.done.wait(1.0):
            self.server.get_json(REPORT)
            self.asked += 1


def timed(server: Server, steps: int) -> dict[str, Any]:
    """Seconds of the sampler, in turns without and with a watcher; no node is served by a cache."""
    seconds: dict[str, list[float]] = {"alone": [], "watched": []}
    asked = 0
    for number in range(2 * RUNS):
        kind = "watched" if number % 2 else "alone"
        watcher = Watcher(server) if kind == "watched" else None
        result = server.submit(graph("ours", PROMPT_A, 100 + number, 1328, steps))
        if watcher is not None:
            watcher.done.set()
            watcher.join()
            asked += watcher.asked
        if result.status != "success":
            raise SystemExit(f"A run ended as {result.status}: {result.error}")
        seconds[kind].append(round(result.seconds["sampler"], 3))
    ratio = statistics.median(seconds["watched"]) / statistics.median(seconds["alone"])
    return {**seconds, "asked": asked, "ratio_of_medians": round(ratio, 4)}


def measure(options: argparse.Namespace, flags: tuple[str, ...]) -> dict[str, Any]:
    """One process."""
    extra = ["--front-end-root", str(options.base / "web"), *flags, *options.args]
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with Server(comfyui, options.base, ROOT, cpu=False, extra_args=extra) as server:
        accounts = [account(server, "before the first run")]
        result = server.submit(graph("ours", PROMPT_A, 1, 1328, options.steps))
        if result.status != "success":
            raise SystemExit(f"The run ended as {result.status}: {result.error}")
        accounts.append(account(server, "after it"))
        watched = timed(server, options.steps)
        cleared = server.post_json("/qwen_vram/clear", {"level": "models", "wait_seconds": 60})
        accounts.append(account(server, "after Clear, models"))
    return {"accounts": accounts, "watched": watched, "cleared": cleared}


def table(found: dict[str, dict[str, Any]]) -> str:
    """As Markdown, in GB."""
    lines = ["| configuration | when | NVML | sum of the parts | unexplained |", "|---" * 5 + "|"]
    for name, one in found.items():
        for row in one["accounts"]:
            rest = row["unexplained_bytes"]
            cells = [name, row["when"], f"{row['nvml_bytes'][1] / 1e9:.3f}"]
            cells += [f"{row['parts_bytes'] / 1e9:.3f}"]
            cells += ["not measurable" if rest is None else f"{rest / 1e9:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Every configuration, then one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    options, options.args = parser.parse_known_args()
    (options.base / "web").mkdir(parents=True, exist_ok=True)
    (options.base / "web" / "index.html").touch()
    found = {}
    for name, flags in CONFIGURATIONS.items():
        found[name] = measure(options, flags)
        print(name, json.dumps(found[name]["watched"]), flush=True)
        options.out.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
