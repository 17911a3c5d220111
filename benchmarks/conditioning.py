"""Time to conditioning: stock nodes without the pack's cache, and the same workflow with it.

Usage: COMFYUI_PATH=... python -m benchmarks.conditioning BASE OUT.json [--tiny] [ARGS]
BASE/models holds the official files or those of full_size_checkpoints; --tiny makes the demo's
small ones instead, for machines without a card. Each side gets a new server process for each of:
"first" (nothing known), "restart" (files in the page cache; three times, the sides in turns),
"cold" (the text encoder's file dropped from the page cache before). `encoder_pages` is how much of
that file lies in the page cache then, less what the drop left; `storage_read` is what the server
process fetched from storage. ARGS go to ComfyUI.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from demo.checkpoints import make_checkpoints
from demo.server import Server

from . import full_size_checkpoints as files

ROOT = Path(__file__).resolve().parents[1]
TINY = ("text_encoders/tiny_qwen_2.5_vl.safetensors", "vae/tiny_animals_vae.safetensors")
TEN_TOKENS = "a red fox reading a book on the beach"
FIVE_HUNDRED = " ".join(f"{TEN_TOKENS}, number {n}," for n in range(40))
FRESH = "a small blue bunny in a dress is dancing in the snow"
Graph = dict[str, dict[str, Any]]
KEEP_NOTHING = {"qwen_vram": {"keep_nothing": "stock, without the cache"}}


def graph(side: str, case: str, names: tuple[str, str]) -> Graph:
    """Loader, encode and an output that only wants the conditioning; stock nodes on both sides."""
    clip = {"clip_name": names[0].rpartition("/")[2], "type": "qwen_image", "device": "default"}
    nodes = {
        "clip": ("CLIPLoader", clip),
        "out": ("PreviewAny", {"source": ["e", 0]}),
    }
    if case == "edit, 3 pictures":
        links = {"clip": ["clip", 0], "vae": ["vae", 0], "prompt": TEN_TOKENS}
        for i, colour in enumerate((0x804020, 0x208040, 0x402080), 1):
            size = {"width": 1024, "height": 1024, "batch_size": 1, "color": colour}
            nodes[f"picture{i}"] = ("EmptyImage", size)
            links[f"image{i}"] = [f"picture{i}", 0]
        nodes["vae"] = ("VAELoader", {"vae_name": names[1].rpartition("/")[2]})
        nodes["e"] = ("TextEncodeQwenImageEditPlus", links)
    else:
        text = {"10 tokens": TEN_TOKENS, "500 tokens": FIVE_HUNDRED, "a new one": FRESH}[case]
        nodes["e"] = ("CLIPTextEncode", {"clip": ["clip", 0], "text": text})
    meta = {"_meta": KEEP_NOTHING} if side == "stock" else {}
    return {k: {"class_type": c, "inputs": i, **meta} for k, (c, i) in nodes.items()}


CASES = ("10 tokens", "500 tokens", "edit, 3 pictures")


def resident_bytes(path: Path) -> int:
    """How much of a file lies in the page cache (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        view = np.frombuffer(mapped, dtype=np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
        if libc.mincore(address, length, seen):
            raise OSError(ctypes.get_errno(), "mincore")
        del view  # or the mapping cannot be closed
        return int(np.frombuffer(seen, dtype=np.uint8).__and__(1).sum()) * mmap.PAGESIZE


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_one(server: Server, side: str, case: str, names: tuple[str, str]) -> dict[str, Any]:
    """One prompt: seconds until its end, and what the cache told of it."""
    told: list[dict[str, Any]] = []

    def listen(event: str, data: dict[str, Any]) -> None:
        if event == "qwen_vram.cache":
            told.append(data)

    start = time.perf_counter()
    result = server.submit(graph(side, case, names), listen)
    seconds = time.perf_counter() - start
    row = {"side": side, "case": case, "status": result.status, "error": result.error}
    row.update(seconds=round(seconds, 4), ran=sorted(set(result.executed)))
    row["ram_gb"] = round(psutil.Process(server.pid).memory_info().rss / 1e9, 2)
    return {**row, "told": told}


def session(options: argparse.Namespace, side: str, state: str) -> list[dict[str, Any]]:
    """One server process with all cases, and at the end a prompt that nobody knows."""
    encoder = options.base / "models" / options.names[0]
    if state == "cold":
        forget(encoder)
        before = resident_bytes(encoder)
    rows = []
    with Server(
        Path(os.environ["COMFYUI_PATH"]), options.base, ROOT, cpu=not torch.cuda.is_available(),
        extra_args=["--front-end-root", str(options.base / "web"), *options.args],
    ) as server:  # fmt: skip
        cases = CASES if state != "restart" or side == "ours" else (*CASES, "a new one")
        for case in cases:
            rows.append({"state": state, **run_one(server, side, case, options.names)})
            if state == "cold":
                rows[-1].update(left_by_the_drop=before)
                rows[-1]["encoder_pages"] = resident_bytes(encoder) - before
                rows[-1]["storage_read"] = psutil.Process(server.pid).io_counters().read_bytes
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "told"}), flush=True)
            print("   ", [{k: v for k, v in t.items() if k != "node"} for t in rows[-1]["told"]])
    return rows


def main() -> None:
    """Both sides in all states."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options, options.args = parser.parse_known_args()
    options.base.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), options.base / "models")
        teach = options.base / "custom_nodes" / "teach_stock"
        shutil.copytree(ROOT / "tests" / "teach_stock", teach, dirs_exist_ok=True)
    options.names = TINY if options.tiny else (files.TEXT_ENCODER, files.VAE)
    (options.base / "web").mkdir(exist_ok=True)
    (options.base / "web" / "index.html").touch()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(options.base / "user" / "__qwen_vram")
    rows = []
    sides = ("stock", "ours")
    for turn, state in enumerate(("first", "restart", "restart", "restart", "cold")):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            rows += session(options, side, state)
    options.out.write_text(json.dumps({"args": options.args, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
