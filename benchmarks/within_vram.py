"""Large pictures on small cards, stock nodes against ours: who finishes, seconds, peak.

Usage: COMFYUI_PATH=... python -m benchmarks.within_vram matrix BASE OUT.jsonl [--cards 5.6 7.6]
[--vram dynamic legacy] [--cases ...] [--repeats N] [--seconds S] [--tiny]
       python -m benchmarks.within_vram thief BASE OUT.jsonl [--card 7.6] [--prompts N] ...
BASE/models holds the official files or those of full_size_checkpoints. Another process holds the
rest of the GPU. Each prompt adds a line to OUT.jsonl; cells that are there already are not run
again, so a run can be cut into parts. --seconds: begin nothing new after that. `thief`: a third
process takes and returns memory at random while prompts run. --tiny: the rehearsal on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from demo.server import Server

from . import full_size_checkpoints as files
from .text_to_image import NEGATIVE, PROMPT_A, ROOT, Graph, Peak, device_bytes_used, small_card

SIDES = ("stock", "ours")
FLAGS = {
    "dynamic": (),
    "legacy": ("--disable-dynamic-vram",),
    "dynamic, native": ("--disable-cuda-malloc",),
}
TINY_FILES = ("tiny_qwen_image", "tiny_qwen_2.5_vl", "tiny_wan_vae")
REFERENCE_SIDE = 1024
TOUCH_SIDE = 256
TILED = "retrying with tiled VAE"  # what stock logs when a decode did not fit
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A picture to draw."""

    side: int
    batch: int = 1
    references: int = 0
    steps: int = 1


CASES = {
    "4096": Case(4096),
    "3072": Case(3072),
    "edit 3072, 3 references": Case(3072, references=3),
    "1328, batch 4": Case(1328, batch=4, steps=2),
    "1328": Case(1328, steps=4),
}


# ------------------------------------------------------------------------------------- the graphs
def nodes(classes: dict[str, tuple[str, dict[str, Any]]]) -> Graph:
    """In the API's format."""
    return {name: {"class_type": c, "inputs": inputs} for name, (c, inputs) in classes.items()}


def loaders(side: str, tiny: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Stock's or ours; the text encoder is always ours, and asked only for what is new."""
    names = [f.split("/")[1] for f in (files.TRANSFORMER, files.TEXT_ENCODER, files.VAE)]
    if tiny:
        names = [f"{name}.safetensors" for name in TINY_FILES]
    options = {"weight_dtype": "default", "device": "default", "keep_loaded": False}
    own = {
        "unet": ("QwenVRAMLoadDiffusionModel", {"unet_name": names[0], **options}),
        "clip": ("QwenVRAMLoadTextEncoder", {"clip_name": names[1], **options}),
        "vae": ("QwenVRAMLoadVAE", {"vae_name": names[2], **options}),
    }
    if side == "stock":
        own["unet"] = ("UNETLoader", {"unet_name": names[0], "weight_dtype": "default"})
        own["vae"] = ("VAELoader", {"vae_name": names[2]})
    return own


def texts(case: Case) -> dict[str, tuple[str, dict[str, Any]]]:
    """Cached on both sides, so that no run pays for the encoder."""
    common = {"clip": ["clip", 0], "cache": "memory and disk"}
    if not case.references:
        kind, more, made = "QwenVRAMCachedTextEncode", {}, {}
    else:
        size = {"reference_size": "1 megapixel", "width": 1024, "height": 1024}
        kind, more = "QwenVRAMCachedImageEditEncode", {"vae": ["vae", 0], **size}
        made = {
            f"image{n}": ("LoadImage", {"image": f"reference{n}.png"})
            for n in range(1, case.references + 1)
        }
        more |= {name: [name, 0] for name in made}
    for name, text in (("positive", PROMPT_A), ("negative", NEGATIVE)):
        made[name] = (kind, {**common, **more, "text": text})
    return made


def graph(side: str, case: Case, seed: int, tiny: bool, decode: bool = True) -> Graph:
    """The same work with stock's sampler and decoder or with ours."""
    sampler = {
        "model": ["shift", 0], "positive": ["positive", 0], "negative": ["negative", 0],
        "latent_image": ["latent", 0], "seed": seed, "steps": case.steps, "cfg": 4.0,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    own = {"policy": "exact only", "vram_limit": 0.0, "settings": "0: 20, 5, ddim"}
    drawn = {"samples": ["sampler", 0], "vae": ["vae", 0]}
    size = {"width": case.side, "height": case.side, "batch_size": case.batch}
    made = {
        **loaders(side, tiny),
        **texts(case),
        "shift": ("ModelSamplingAuraFlow", {"model": ["unet", 0], "shift": 3.1}),
        "latent": ("EmptySD3LatentImage", size),
        "sampler": ("KSampler", sampler),
        "decode": ("VAEDecode", drawn),
        "show": ("PreviewImage", {"images": ["decode", 0]}),
    }
    if side == "ours":
        made["sampler"] = ("QwenVRAMSampler", {**sampler, **own})
        made["decode"] = ("QwenVRAMDecode", {**drawn, "vram_limit": 0.0})
    if not decode:
        del made["decode"]
        made["show"] = ("PreviewAny", {"source": ["sampler", 0]})
    return nodes(made)


# ---------------------------------------------------------------------------------------- one run
class Watch:
    """Peaks of device memory by node, from the events of a prompt."""

    def __init__(self, peak: Peak, before: int) -> None:
        self.peak, self.before, self.node = peak, before, ""
        self.peaks: dict[str, float] = {}
        peak.take()

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        """At each change of node, book the peak on the one that ran."""
        if event in ("executing", "execution_error"):
            vram, _ = self.peak.take()
            gib = round((vram - self.before) / 2**30, 2)
            self.peaks[self.node] = max(self.peaks.get(self.node, 0.0), gib)
            self.node = data.get("node") or ""


def run_one(server: Server, peak: Peak, before: int, prompt: Graph) -> tuple[Row, list[np.ndarray]]:
    """One prompt: how it ended, seconds and peaks of sampler and decode, what the nodes say."""
    watch, log = Watch(peak, before), len(server.log_text())
    start = time.perf_counter()
    result = server.submit(prompt, watch, timeout=300.0)
    row: Row = {
        "status": result.status,
        "error": result.error.splitlines()[0][:300] if result.error else "",
        "whole error": result.error[:2000],
        "seconds": round(time.perf_counter() - start, 2),
        "encoded": "clip" in result.executed,
    }
    for node in ("sampler", "decode"):
        row[node] = round(result.seconds.get(node, 0.0), 3)
        row[f"{node} peak GiB"] = watch.peaks.get(node)
        row[f"{node} says"] = [x["text"] for x in result.outputs.get(node, {}).get("qwen_vram", ())]
    row["stock's tiles"] = TILED in server.log_text()[log:]
    pictures = [np.asarray(PIL.Image.open(io.BytesIO(i.content))) for i in result.images]
    if pictures:
        row["pixels"] = hashlib.sha256(b"".join(p.tobytes() for p in pictures)).hexdigest()[:16]
    return row, pictures


def difference(one: list[np.ndarray], other: list[np.ndarray]) -> Row:
    """Of two sets of pictures, in steps of 255."""
    if not one or len(one) != len(other) or one[0].shape != other[0].shape:
        return {}
    gaps = [
        np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in zip(one, other, strict=True)
    ]
    worst, mean = max(int(g.max()) for g in gaps), float(np.mean([g.mean() for g in gaps]))
    return {"largest difference to stock": worst, "mean difference to stock": round(mean, 4)}


@contextlib.contextmanager
def running(options: argparse.Namespace, flags: tuple[str, ...]) -> Iterator[tuple[Server, Peak]]:
    """A server on what the ballast left, and the thread that watches it."""
    cpu = not torch.cuda.is_available()
    extra = ["--front-end-root", str(options.base / "web"), "--preview-method", "none", *flags]
    with Server(
        Path(os.environ["COMFYUI_PATH"]), options.base, ROOT, cpu=cpu, extra_args=extra
    ) as server:
        peak = Peak(server.pid)
        try:
            yield server, peak
        finally:
            peak.running = False
            name = f"{'_'.join((*flags, str(time.time_ns())))}.log".lstrip("-")
            shutil.copy(server.log_file, options.base / name)


# ------------------------------------------------------------------------------------- the matrix
def cells(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Case, repeat and side, in the order of a server; who goes first changes with each repeat."""
    return [
        (case, repeat, side)
        for case in options.cases
        for repeat in range(options.repeats)
        for side in (SIDES if repeat % 2 == 0 else SIDES[::-1])
    ]


def seen(out: Path) -> list[Row]:
    """The rows of earlier parts."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def write(out: Path, row: Row) -> None:
    """Add a row, and print what matters of it."""
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "whole error"}), flush=True)


def key(row: Row) -> tuple[Any, ...]:
    """What tells a cell from others."""
    return tuple(row[name] for name in ("card", "vram", "case", "repeat", "side"))


def matrix(options: argparse.Namespace) -> None:
    """Every card and kind of VRAM management: a server each, stock and ours in turns."""
    done = {key(row) for row in seen(options.out)}
    for vram in options.vram:
        for card in options.cards:
            wanted = [c for c in cells(options) if (card, vram, *c) not in done]
            if wanted and time.monotonic() < options.end:
                serve(options, card, vram, wanted)


def serve(
    options: argparse.Namespace, card: float, vram: str, wanted: list[tuple[str, int, str]]
) -> None:
    """The cells of one server. Before each the same side draws a small picture, untimed."""
    with small_card(None if options.tiny else card):
        before = device_bytes_used()
        with running(options, FLAGS[vram]) as (server, peak):
            pictures: dict[tuple[str, int], list[np.ndarray]] = {}
            for name, repeat, side in wanted:
                if time.monotonic() > options.end:
                    return
                case = options.every[name]
                touch = Case(TOUCH_SIDE, references=case.references)
                first = graph(side, touch, repeat, options.tiny, decode=False)
                ready = server.submit(first, timeout=300.0)
                prompt = graph(side, case, 1000 + repeat, options.tiny)
                row, drawn = run_one(server, peak, before, prompt)
                row |= {"touch": ready.status, "touch error": ready.error[:300]}
                row |= difference(pictures.get((name, repeat), []), drawn)
                pictures[(name, repeat)] = drawn
                place = {"card": card, "vram": vram, "case": name, "repeat": repeat, "side": side}
                write(options.out, place | row)


# -------------------------------------------------------------------------------------- the thief
THIEF = """
import random, sys, time, torch
most, seed, pause = float(sys.argv[1]) * 1e9, int(sys.argv[2]), float(sys.argv[3])
draw, held, block = random.Random(seed), [], 1 << 26
torch.empty(1, device="cuda")
print("ready", flush=True)
while True:
    wanted = int(draw.uniform(0, most) / block)
    del held[wanted:]
    torch.cuda.empty_cache()
    while len(held) < wanted:
        try:
            held.append(torch.empty(block, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            break
    time.sleep(pause)
"""


@contextlib.contextmanager
def thief(gigabytes: float, seed: int, pause: float) -> Iterator[None]:
    """While this lasts, another process takes and returns up to so much at random."""
    if not gigabytes or not torch.cuda.is_available():
        yield
        return
    command = [sys.executable, "-c", THIEF, str(gigabytes), str(seed), str(pause)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield
        finally:
            process.terminate()


def steal(options: argparse.Namespace) -> None:
    """Prompts of both sides in turns while memory comes and goes, then a few in peace."""
    done = {(row["thief"], row["n"], row["side"]) for row in seen(options.out)}
    plan = [(options.thief, n) for n in range(options.prompts)]
    plan += [(0.0, n) for n in range(options.peaceful)]
    case = options.every[options.case]
    with small_card(None if options.tiny else options.card):
        before = device_bytes_used()
        with running(options, FLAGS[options.vram[0]]) as (server, peak):
            for side in SIDES:
                server.submit(graph(side, case, 0, options.tiny), timeout=300.0)
            for gigabytes in (options.thief, 0.0):
                with thief(gigabytes, options.seed, options.pause):
                    for taken, n in plan:
                        if taken == gigabytes:
                            steal_once(options, server, peak, before, (taken, n), done)


def steal_once(
    options: argparse.Namespace,
    server: Server,
    peak: Peak,
    before: int,
    place: tuple[float, int],
    done: set[tuple[Any, ...]],
) -> None:
    """One prompt of each side, unless it was run before or the time is up."""
    taken, n = place
    sides = list(SIDES)
    random.Random(n).shuffle(sides)
    for side in sides:
        if (taken, n, side) in done or time.monotonic() > options.end:
            continue
        prompt = graph(side, options.every[options.case], 5000 + n, options.tiny)
        row, _ = run_one(server, peak, before, prompt)
        where = {"card": options.card, "vram": options.vram[0], "case": options.case}
        write(options.out, {"thief": taken, "n": n, "side": side, **where, **row})


# ------------------------------------------------------------------------------------------- main
def prepare(options: argparse.Namespace) -> None:
    """Folders, the references, the node that reports a small card."""
    base = options.base.absolute()
    target = base / "custom_nodes" / "small_card"
    shutil.copytree(ROOT / "benchmarks" / "small_card", target, dirs_exist_ok=True)
    for folder in ("web", "input"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "web" / "index.html").touch()
    side = TOUCH_SIDE if options.tiny else REFERENCE_SIDE
    for n in range(1, 4):
        coarse = np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(coarse).resize((side, side), PIL.Image.Resampling.BICUBIC)
        picture.save(base / "input" / f"reference{n}.png")
    if options.tiny:
        from demo.checkpoints import make_checkpoints

        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), base / "models")
        teach = ROOT / "tests" / "teach_stock"
        shutil.copytree(teach, base / "custom_nodes" / "teach_stock", dirs_exist_ok=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("matrix", "thief"))
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cards", type=float, nargs="+", default=[5.6, 7.6, 11.5])
    parser.add_argument("--vram", choices=tuple(FLAGS), nargs="+", default=["dynamic", "legacy"])
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:4])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--card", type=float, default=7.6, help="of the thief's prompts, GiB")
    parser.add_argument("--case", default="1024", help="of the thief's prompts")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--peaceful", type=int, default=5, help="prompts without a thief")
    parser.add_argument("--thief", type=float, default=4.0, help="most that it takes, GB")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between its moves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.end = time.monotonic() + options.seconds
    options.every = {**CASES, "1024": Case(1024, steps=2)}
    if options.tiny:
        options.every = {
            name: Case(c.side // 16 // 16 * 16, c.batch, c.references, c.steps)
            for name, c in options.every.items()
        }
    return options


def main() -> None:
    """The matrix or the thief."""
    options = parsed()
    prepare(options)
    {"matrix": matrix, "thief": steal}[options.what](options)


if __name__ == "__main__":
    main()
