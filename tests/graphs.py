"""API-format graphs that several tests share."""

from __future__ import annotations

from typing import Any

from pack.demo import embedded
from pack.demo.embedded import TEXT_ENCODER, TRANSFORMER

UNET, CLIP, VAE = (
    "tiny_qwen_image.safetensors",
    "tiny_qwen_2.5_vl.safetensors",
    "tiny_wan_vae.safetensors",
)
LORA = "tiny_lightning.safetensors"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a graph."""
    return {"class_type": class_type, "inputs": inputs}


def loader(kind: str, name: str, **inputs: Any) -> dict[str, Any]:
    """One of our loaders: kind is "DiffusionModel", "TextEncoder" or "VAE"."""
    file = {"DiffusionModel": "unet_name", "TextEncoder": "clip_name", "VAE": "vae_name"}[kind]
    options = {"weight_dtype": "default", "device": "default", "keep_loaded": False, **inputs}
    return node(f"QwenVRAMLoad{kind}", **{file: name}, **options)


def encode(text: str, clip: str = "clip", cache: str = "memory and disk") -> dict[str, Any]:
    """Our cached text encoding."""
    return node("QwenVRAMCachedTextEncode", clip=[clip, 0], text=text, cache=cache)


def text_to_image(
    text: str = "a red bunny", seed: int = 1, steps: int = 2, size: int = 64
) -> dict[str, Any]:
    """The nodes of the bundled workflow without its switches."""
    return {
        "unet": loader("DiffusionModel", UNET),
        "clip": loader("TextEncoder", CLIP),
        "vae": loader("VAE", VAE),
        "positive": encode(text),
        "negative": encode("blurry"),
        "shift": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1),
        "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["shift", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=2.5,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def embedded_text_to_image(text: str, seed: int = 1, **latent: int) -> dict[str, Any]:
    """`text_to_image` with the embedded model as it is judged: 8 steps, CFG 2, 256x256."""
    graph = text_to_image(text, seed=seed, steps=8, size=256)
    files = {"DiffusionModel": TRANSFORMER, "TextEncoder": TEXT_ENCODER, "VAE": embedded.VAE}
    for name, (kind, path) in zip(("unet", "clip", "vae"), files.items(), strict=True):
        graph[name] = loader(kind, path.rpartition("/")[2])
    graph["negative"] = encode("")
    graph["sampler"]["inputs"]["cfg"] = 2.0
    graph["latent"]["inputs"].update(latent)
    return graph


def preview(*conditionings: str) -> dict[str, Any]:
    """Output nodes that make ComfyUI execute what feeds them, without a sampler."""
    return {f"out_{c}": node("PreviewAny", source=[c, 0]) for c in conditionings}


def keeping_nothing(graph: dict[str, Any]) -> dict[str, Any]:
    """The same graph, of which nothing is looked up or stored: what stock alone would do."""
    mark = {"_meta": {"qwen_vram": {"keep_nothing": "a test wants it fresh"}}}
    return {node_id: {**item, **mark} for node_id, item in graph.items()}
