"""The first real run after a silent warm-up, against the tenth, and against a cold first run.

Usage: COMFYUI_PATH=... python -m benchmarks.warm_up BASE OUT.json [--tiny] [--runs N] [--alternate]
       [ARGS]
BASE/models holds the official files or those of full_size_checkpoints; --tiny makes the demo's
small ones instead, for machines without a card. For each side a new server process and an empty
prompt cache: "warmed" first warms up by POST /qwen_vram/warmup, "cold" does not; both then run the
same prompt with N new seeds (10). Workflow: stock nodes, 1328x1328, 4 steps (--size, --steps).
The files are read once before, so that both sides have them in the page cache. The machine may
still change from the first server to the second (clocks, page cache, files compiled on the way):
--alternate measures cold, warmed, warmed, cold, so that a steady drift weighs on both sides alike,
and adds a table of the means of each side; it takes twice the time. Goal: the first run
after a warm-up takes at most 5 % more than the tenth. ARGS go to ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from demo.checkpoints import make_checkpoints
from demo.server import Server

from .text_to_image import PROMPT_A, Graph, graph

ROOT = Path(__file__).resolve().parents[1]
ROUTE = "/qwen_vram/warmup"
TINY = {
    "unet": ("unet_name", "tiny_qwen_image.safetensors"),
    "clip": ("clip_name", "tiny_qwen_2.5_vl.safetensors"),
    "vae": ("vae_name", "tiny_wan_vae.safetensors"),
}
POLL_SECONDS = 0.02
ONCE = ("cold", "warmed")
ALTERNATE = ("cold", "warmed", "warmed", "cold")


def prompt(options: argparse.Namespace, seed: int) -> Graph:
    """The workflow with one seed."""
    made = graph("plain", PROMPT_A, seed, options.size, options.steps)
    for name, (field, file) in TINY.items() if options.tiny else ():
        made[name]["inputs"][field] = file
    return made


def warm_up(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Warm up to the end: seconds from the request to the answer that it is done."""
    start = time.perf_counter()
    server.post_json(ROUTE, {"prompt": prompt(options, 1)})
    while True:
        report = server.get_json(ROUTE)
        if report["state"] not in ("waiting", "running"):
            break
        time.sleep(POLL_SECONDS)
    if report["state"] != "done":
        raise SystemExit(f"The warm-up ended as {report['state']}: {report['error']}")
    return {"seconds": time.perf_counter() - start, **report["result"]}


def session(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """One server process: its warm-up, if any, and its runs."""
    shutil.rmtree(options.base / "user" / "__qwen_vram", ignore_errors=True)
    found: dict[str, Any] = {"side": side, "runs": []}
    with Server(
        Path(os.environ["COMFYUI_PATH"]), options.base, ROOT, cpu=not torch.cuda.is_available(),
        extra_args=["--front-end-root", str(options.base / "web"), *options.args],
    ) as server:  # fmt: skip
        if side == "warmed":
            found["warm_up"] = warm_up(server, options)
            print(json.dumps(found["warm_up"]), flush=True)
        for number in range(1, options.runs + 1):
            start = time.perf_counter()
            result = server.submit(prompt(options, 1000 + number))
            seconds = time.perf_counter() - start
            if result.status != "success":
                raise SystemExit(f"Run {number} ended as {result.status}: {result.error}")
            found["runs"].append({"seconds": seconds, "nodes": result.seconds})
            print(f"{side} run {number}: {seconds:.3f} s", flush=True)
        found["history"] = len(server.get_json("/history"))
    return found


def read_once(models: Path) -> None:
    """Bring the files into the page cache, for both sides alike."""
    for path in sorted(models.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(64 << 20):
                pass


def row(found: dict[str, Any]) -> dict[str, Any]:
    """One server's line; the second half of the runs tell how much runs differ by themselves."""
    seconds = [run["seconds"] for run in found["runs"]]
    late = seconds[len(seconds) // 2 :]
    return {
        "side": found["side"],
        "warm-up s": round(found["warm_up"]["seconds"], 2) if "warm_up" in found else None,
        "first run s": round(seconds[0], 3),
        "last run s": round(seconds[-1], 3),
        "first / last": round(seconds[0] / seconds[-1], 3),
        "first / median of the second half": round(seconds[0] / statistics.median(late), 3),
        "spread of the second half": round(max(late) / min(late), 3),
        "history entries": found["history"],
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per side, the mean of what its servers measured, and how far they lie apart."""
    found = []
    for side in ONCE:
        own = [r for r in rows if r["side"] == side]
        line: dict[str, Any] = {"side": side, "servers": len(own)}
        for name in ("warm-up s", "first run s", "last run s", "first / last"):
            values = [r[name] for r in own if r[name] is not None]
            line[name] = round(statistics.mean(values), 3) if values else None
        firsts = [r["first run s"] for r in own]
        line["first runs, largest / smallest"] = round(max(firsts) / min(firsts), 3)
        found.append(line)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = list(rows[0])
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join("" if r[h] is None else str(r[h]) for h in head) for r in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Both sides, and one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--alternate", action="store_true")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1328)
    options, options.args = parser.parse_known_args()
    options.base.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), options.base / "models")
        teach = options.base / "custom_nodes" / "teach_stock"
        shutil.copytree(ROOT / "tests" / "teach_stock", teach, dirs_exist_ok=True)
    (options.base / "web").mkdir(exist_ok=True)
    (options.base / "web" / "index.html").touch()
    read_once(options.base / "models")
    order = ALTERNATE if options.alternate else ONCE
    found = [session(options, side) for side in order]
    rows = [row(one) for one in found]
    print(table(rows), flush=True)
    sides = means(rows)
    if options.alternate:
        print(table(sides), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    content = {"device": device, "args": options.args, "table": rows, "means": sides}
    content["sessions"] = found
    options.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
