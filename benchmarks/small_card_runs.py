"""One prompt of stock or ours on a small card: the graph, its seconds, its peaks, its pictures."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import shutil
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
from .text_to_image import NEGATIVE, PROMPT_A, ROOT, Graph, Peak

SIDES = ("stock", "ours")
FLAGS = {
    "dynamic": (),
    "legacy": ("--disable-dynamic-vram",),
    "dynamic, native": ("--disable-cuda-malloc",),
}
TINY_FILES = ("tiny_qwen_image", "tiny_qwen_2.5_vl", "tiny_wan_vae")
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
    "1024": Case(1024, steps=2),
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
