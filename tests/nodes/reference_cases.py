"""Edits with the reference cache, as graphs; and what a process that has run nothing else makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pack.tests.graphs import CLIP, LORA, UNET, VAE, encode, loader, node
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

START = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
from pack.tests.nodes.reference_cases import write_expected
write_expected(*map(Path, sys.argv[2:]))
"""
PICTURES = ("first.png", "second.png")
SAMPLERS = ("sampler", "second")  # nodes whose latents are compared
SETTINGS = {
    "refresh": "every n steps",
    "refresh_every": 3,
    "drift_threshold": 0.1,
    "full_last_steps": 0,
    "store_format": "int8",
    "store_place": "auto",
    "causal": False,
    "region": False,
    "region_margin": 64,
    "region_threshold": 0.05,
}


def graph(
    text: str = "make it blue",
    seed: int = 1,
    picture: str = PICTURES[0],
    size: int = 64,
    batch: int = 1,
    lora: float = 0.0,
    sampler_name: str = "euler",
    more: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """One edit; the LoRA lies behind the cache, so that its strength leaves the cache's node.

    `more`: one more picture, which the negative side does not see.
    """
    made = {
        "unet": loader("DiffusionModel", UNET),
        "clip": loader("TextEncoder", CLIP),
        "vae": loader("VAE", VAE),
        "picture": node("LoadImage", image=picture),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "cache": node("QwenVRAMReferenceCache", model=["unet", 0], **{**SETTINGS, **settings}),
        "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=batch),
        "out": node("PreviewAny", source=["sampler", 0]),
    }
    if lora:
        options = {"lora_name": LORA, "strength_model": lora}
        made["lora"] = node("LoraLoaderModelOnly", model=["cache", 0], **options)
    made.update(sides(text))
    if more:
        made["more picture"] = node("LoadImage", image=more)
        made["more encoded"] = node("VAEEncode", pixels=["more picture", 0], vae=["vae", 0])
        made["alone"], own = made["positive"], {"conditioning": ["alone", 0]}
        made["positive"] = node("ReferenceLatent", latent=["more encoded", 0], **own)
    model = "lora" if lora else "cache"
    made["sampler"] = sampler(model, seed=seed, sampler_name=sampler_name)
    return made


def sides(text: str, name: str = "") -> dict[str, Any]:
    """Both sides of CFG, with the picture as their reference."""
    made = {}
    for side, words in (("positive", text), ("negative", "blurry")):
        made[f"{name}{side} text"] = encode(words, cache="memory")
        inputs = {"conditioning": [f"{name}{side} text", 0], "latent": ["encoded", 0]}
        made[name + side] = node("ReferenceLatent", **inputs)
    return made


def sampler(model: str, name: str = "", latent: str = "latent", **inputs: Any) -> dict[str, Any]:
    """Five steps, of which the first and the fourth are computed in full."""
    wires = {"positive": [f"{name}positive", 0], "negative": [f"{name}negative", 0]}
    options = {"steps": 5, "cfg": 2.5, "scheduler": "simple", "denoise": 1.0, **inputs}
    return node("KSampler", model=[model, 0], latent_image=[latent, 0], **wires, **options)


def masked(**settings: Any) -> dict[str, Any]:
    """An edit of the upper half of its picture. With `region`, the lower one is left out of steps
    2 and 4."""
    made = graph(**settings)
    made["whole"] = node("SolidMask", value=0.0, width=64, height=64)
    made["half"] = node("SolidMask", value=1.0, width=64, height=32)
    joined = {"destination": ["whole", 0], "source": ["half", 0]}
    made["mask"] = node("MaskComposite", **joined, x=0, y=0, operation="add")
    made["masked"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0])
    made["sampler"] = sampler("cache", latent="masked", seed=1, sampler_name="euler")
    return made


def two_samplers() -> dict[str, Any]:
    """Of one model in one graph, with other texts and seeds."""
    made = {**graph(seed=3), **sides("make it red", "other ")}
    made["second"] = sampler("cache", "other ", seed=2, sampler_name="euler")
    made["out2"] = node("PreviewAny", source=["second", 0])
    return made


def two_sizes() -> dict[str, Any]:
    """A first pass, and a second one of a larger picture."""
    made = graph(seed=4)
    larger = {"samples": ["sampler", 0], "upscale_method": "bislerp", "width": 96, "height": 80}
    made["larger"] = node("LatentUpscale", **larger, crop="disabled")
    made["second"] = sampler("cache", latent="larger", seed=2, sampler_name="euler", denoise=0.8)
    made["out2"] = node("PreviewAny", source=["second", 0])
    return made


def area() -> dict[str, Any]:
    """A prompt for a part of the picture; ComfyUI computes the negative one there, too."""
    made = graph(size=96, text="make this corner red")
    made["area"] = node(
        "ConditioningSetArea",
        conditioning=["positive", 0],
        width=64,
        height=64,
        x=32,
        y=16,
        strength=1.0,
    )
    made["sampler"]["inputs"]["positive"] = ["area", 0]
    return made


CASES = {
    "as it is": graph(),
    "another prompt": graph("make it red"),
    "another seed": graph(seed=2),
    "another picture": graph(picture=PICTURES[1]),
    "another size": graph(size=96),
    "a batch": graph(batch=2),
    "a LoRA": graph(lora=1.0),
    "a weaker LoRA": graph(lora=0.5),
    "two calls a step": graph(sampler_name="heun"),
    "another format": graph(store_format="int4"),
    "an area": area(),
    "a mask": masked(),
    "a region": masked(region=True, region_margin=0, region_threshold=9.0),
    "causal": graph(causal=True),
    "causal, and another picture": graph(picture=PICTURES[1], causal=True),
    "causal, and one more picture": graph(more=PICTURES[1], causal=True),
    "two samplers": two_samplers(),
    "two sizes": two_sizes(),
}


def write_pictures(base: Path) -> None:
    """Of one size, so that only what is on them differs."""
    for seed, name in enumerate(PICTURES):
        pixels = np.random.default_rng(seed).integers(0, 256, (56, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "input" / name)


def latents(run: Any) -> dict[str, Tensor]:
    """What the samplers of a graph made, by their nodes."""
    return {name: run.outputs[name][0][0]["samples"] for name in SAMPLERS if name in run.outputs}


@contextmanager
def fresh_process(
    comfyui: Path, base: Path, pack: Path
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Begins at once, beside other tests; to ask for its latents waits for its end."""
    arguments = [str(path) for path in (pack / "tests", comfyui, base, pack)]
    found: dict[str, Tensor] = {}
    with (base / "log.txt").open("w+") as log:
        command = [sys.executable, "-c", START, *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=base)

        def read() -> dict[str, Tensor]:
            if not found:
                code = process.wait(timeout=120)
                assert code == 0, (base / "log.txt").read_text()[-3000:]
                found.update(load_file(base / "expected.safetensors"))
            return found

        try:
            yield read
        finally:
            process.kill()
            process.wait()


def write_expected(comfyui: Path, base: Path, pack: Path) -> None:
    """Each case on a model that was just loaded, in a ComfyUI that was just started."""
    from pack.tests.host import Host

    host = Host(comfyui, base, pack)
    write_pictures(base)
    found = {}
    for case, made in CASES.items():
        host.forget_everything()
        for name, latent in latents(host.run(made)).items():
            found[f"{case}/{name}"] = latent.contiguous()
    save_file(found, base / "expected.safetensors")
    assert all(torch.isfinite(latent).all() for latent in found.values())
