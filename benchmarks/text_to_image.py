"""Text to image at full size, stock nodes against ours: seconds, memory, and the same picture.

Usage: COMFYUI_PATH=... python -m benchmarks.text_to_image BASE OUT.json [--card GIB] [ARGS]
BASE/models holds the official files or those of full_size_checkpoints. For each side: a server
with an empty prompt cache runs prompt A, A with a new seed, prompt B, A again; then a new server
process runs A with another seed (--cold-files: with the files no longer in the page cache). ARGS
that are not ours (--steps, --size, --card, --cold-files) go to ComfyUI.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import psutil
import torch

from demo.server import Server

from . import full_size_checkpoints as files

ROOT = Path(__file__).resolve().parents[1]
PROMPT_A = "A lighthouse on a cliff above a stormy sea, oil painting, thick brush strokes"
PROMPT_B = "Three cups of green tea on a wooden table by a window, morning light, photograph"
NEGATIVE = "blurry, low quality"
Graph = dict[str, dict[str, Any]]


def graph(side: str, text: str, seed: int, size: int, steps: int) -> Graph:
    """The same work with stock loaders and encoders or with ours."""
    names = [name.split("/")[1] for name in (files.TRANSFORMER, files.TEXT_ENCODER, files.VAE)]
    loaders = {
        "unet": ("UNETLoader", {"unet_name": names[0], "weight_dtype": "default"}),
        "clip": ("CLIPLoader", {"clip_name": names[1], "type": "qwen_image", "device": "default"}),
        "vae": ("VAELoader", {"vae_name": names[2]}),
        "positive": ("CLIPTextEncode", {"clip": ["clip", 0], "text": text}),
        "negative": ("CLIPTextEncode", {"clip": ["clip", 0], "text": NEGATIVE}),
    }
    if side == "ours":
        options = {"weight_dtype": "default", "device": "default", "keep_loaded": False}
        for key, name in (("unet", "DiffusionModel"), ("clip", "TextEncoder"), ("vae", "VAE")):
            inputs = {k: v for k, v in loaders[key][1].items() if k.endswith("_name")}
            loaders[key] = (f"QwenVRAMLoad{name}", {**inputs, **options})
        for key in ("positive", "negative"):
            inputs = {**loaders[key][1], "cache": "memory and disk"}
            loaders[key] = ("QwenVRAMCachedTextEncode", inputs)
    sampler = {
        "model": ["shift", 0], "positive": ["positive", 0], "negative": ["negative", 0],
        "latent_image": ["latent", 0], "seed": seed, "steps": steps, "cfg": 4.0,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    rest = {
        "shift": ("ModelSamplingAuraFlow", {"model": ["unet", 0], "shift": 3.1}),
        "latent": ("EmptySD3LatentImage", {"width": size, "height": size, "batch_size": 1}),
        "sampler": ("KSampler", sampler),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "bench"}),
    }
    meta = {"qwen_vram": {"keep_nothing": "stock, without the cache"}} if side == "stock" else {}
    every = {**loaders, **rest}.items()
    return {k: {"class_type": c, "inputs": i, "_meta": meta} for k, (c, i) in every}


class Peak(threading.Thread):
    """Polls the device memory in use and the process's resident memory, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.running = psutil.Process(pid), True
        self.vram = self.ram = 0
        self.start()

    def run(self) -> None:
        """Until stopped, every 20 ms."""
        while self.running:
            self.vram = max(self.vram, device_bytes_used())
            with contextlib.suppress(psutil.Error):
                self.ram = max(self.ram, self.process.memory_info().rss)
            time.sleep(0.02)

    def take(self) -> tuple[int, int]:
        """The peaks since the last call."""
        found, self.vram, self.ram = (self.vram, self.ram), 0, 0
        return found


def device_bytes_used() -> int:
    """By NVML, so that every allocator's memory counts; 0 without an NVIDIA card."""
    if not torch.cuda.is_available():
        return 0
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


BALLAST = """
import sys, torch
keep, held = int(float(sys.argv[1]) * 2**30), []
while (free := torch.cuda.mem_get_info()[0]) - keep > 2**26:
    held.append(torch.empty(min(free - keep, 2**33), dtype=torch.uint8, device="cuda"))
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def small_card(gib: float | None) -> Iterator[None]:
    """While this lasts, only `gib` of the card are free: another process holds the rest."""
    if gib is None:
        yield
        return
    os.environ["QWEN_VRAM_CARD_GIB"] = str(gib)
    command = [sys.executable, "-c", BALLAST, str(gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ballast:
        assert ballast.stdin and ballast.stdout
        ballast.stdout.readline()
        try:
            yield
        finally:
            ballast.stdin.close()


def run_one(
    server: Server, peak: Peak, used_before: int, name: str, prompt: Graph
) -> dict[str, Any]:
    """One prompt: seconds, seconds of the sampler, peaks, and a digest of the pixels."""
    peak.take()
    start = time.perf_counter()
    result = server.submit(prompt)
    seconds = time.perf_counter() - start
    vram, ram = peak.take()
    row = {
        "run": name, "status": result.status, "error": result.error, "seconds": round(seconds, 2),
        "sampler": round(result.seconds.get("sampler", 0.0), 2),
        "clip_ran": "clip" in result.executed,
        "vram_gib": round((vram - used_before) / 2**30, 2), "ram_gb": round(ram / 1e9, 2),
        "nodes": {k: round(v, 3) for k, v in result.seconds.items()},
    }  # fmt: skip
    if result.images:
        pixels = PIL.Image.open(io.BytesIO(result.images[0].content)).tobytes()
        row["pixels"] = hashlib.sha256(pixels).hexdigest()[:16]
    return row


def session(
    options: argparse.Namespace, side: str, runs: list[tuple[str, str, int]]
) -> list[dict[str, Any]]:
    """One server process, its prompts one after another."""
    used_before = device_bytes_used()
    rows = []
    with Server(
        Path(os.environ["COMFYUI_PATH"]), options.base, ROOT, cpu=not torch.cuda.is_available(),
        extra_args=["--front-end-root", str(options.base / "web"), *options.args],
    ) as server:  # fmt: skip
        peak = Peak(server.pid)
        for name, text, seed in runs:
            prompt = graph(side, text, seed, options.size, options.steps)
            rows.append({"side": side, **run_one(server, peak, used_before, name, prompt)})
            shown = {k: v for k, v in rows[-1].items() if k != "nodes"}
            print(json.dumps(shown), flush=True)
        peak.running = False
    return rows


def forget_files(models: Path) -> None:
    """Drop the checkpoints from the page cache, as after a reboot."""
    for name in (files.TRANSFORMER, files.TEXT_ENCODER, files.VAE):
        with (models / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Both sides, cold and after a restart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--card", type=float)
    parser.add_argument("--cold-files", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1328)
    options, options.args = parser.parse_known_args()
    shutil.copytree(
        ROOT / "benchmarks" / "small_card",
        options.base / "custom_nodes" / "small_card",
        dirs_exist_ok=True,
    )
    (options.base / "web").mkdir(exist_ok=True)
    (options.base / "web" / "index.html").touch()
    shutil.rmtree(options.base / "user" / "__qwen_vram", ignore_errors=True)
    first = [("A, cold", PROMPT_A, 1), ("A, new seed", PROMPT_A, 2), ("B, new prompt", PROMPT_B, 2)]
    first.append(("back to A", PROMPT_A, 3))
    rows = []
    with small_card(options.card):
        for side in ("stock", "ours"):
            rows += session(options, side, first)
            if options.cold_files:
                forget_files(options.base / "models")
            rows += session(options, side, [("A after a restart", PROMPT_A, 4)])
    options.out.write_text(
        json.dumps({"card": options.card, "args": options.args, "rows": rows}, indent=1)
    )
    pixels = [
        {r["run"]: r.get("pixels") for r in rows if r["side"] == s} for s in ("stock", "ours")
    ]
    print("same pictures:", pixels[0] == pixels[1], flush=True)


if __name__ == "__main__":
    main()
