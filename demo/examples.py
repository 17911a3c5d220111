"""The example on every help page, as a graph in API form; example_blocks.py writes them there."""

from __future__ import annotations

from typing import Any

from .substitutions import Prompt

DRAWING_MODEL = "qwen_image_2512_fp8_e4m3fn.safetensors"
EDITING_MODEL = "qwen_image_edit_2511_fp8mixed.safetensors"
TEXT_ENCODER = "qwen_2.5_vl_7b_fp8_scaled.safetensors"
VAE = "qwen_image_vae.safetensors"
# Words that the embedded model knows too, so that the pictures show what is asked for.
DRAW = "A red fox with a green scarf sits in the snow, watercolour, soft morning light."
AVOID = "blurry, low resolution, deformed"
EDIT = "Change the background to a meadow, with flowers. Keep the animal exactly as it is."
PICTURE = "example.png"  # every ComfyUI has it


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node; what is not given takes the node's default."""
    return {"class_type": class_type, "inputs": inputs}


def link(node_id: int, output: int = 0) -> list[Any]:
    """A wire from an output of a node."""
    return [str(node_id), output]


def _numbered(*nodes: dict[str, Any]) -> Prompt:
    return {str(number): each for number, each in enumerate(nodes, 1)}


def _loaders(model: str) -> list[dict[str, Any]]:
    return [
        node("QwenVRAMLoadDiffusionModel", unet_name=model),
        node("QwenVRAMLoadTextEncoder", clip_name=TEXT_ENCODER),
        node("QwenVRAMLoadVAE", vae_name=VAE),
    ]


def _sampler(class_type: str, **inputs: Any) -> dict[str, Any]:
    wires = {"positive": link(4), "negative": link(5), "latent_image": link(6)}
    usual = {"seed": 7, "steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}
    return node(class_type, **{"model": link(1), **wires, **usual, **inputs})


def draw(
    patch: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
    decode: str = "VAEDecode",
    side: int = 1024,
) -> Prompt:
    """Text to picture, with a node between the model and the sampler or another sampler."""
    sampler = sampler or _sampler("KSampler")
    if patch is not None:
        sampler = {**sampler, "inputs": {**sampler["inputs"], "model": link(10)}}
    graph = _numbered(
        *_loaders(DRAWING_MODEL),
        node("QwenVRAMCachedTextEncode", clip=link(2), text=DRAW),
        node("QwenVRAMCachedTextEncode", clip=link(2), text=AVOID),
        node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        sampler,
        node(decode, samples=link(7), vae=link(3)),
        node("PreviewImage", images=link(8)),
    )
    return graph if patch is None else {**graph, "10": patch}


def edit(patch: dict[str, Any] | None = None) -> Prompt:
    """A changed picture, with a node between the model and the sampler."""
    encode = {"clip": link(2), "vae": link(3), "image1": link(9)}
    graph = _numbered(
        *_loaders(EDITING_MODEL),
        node("QwenVRAMCachedImageEditEncode", **encode, text=EDIT),
        node("QwenVRAMCachedImageEditEncode", **encode, text=""),
        node("EmptySD3LatentImage", width=link(4, 1), height=link(4, 2), batch_size=1),
        _sampler("KSampler", model=link(11 if patch else 1)),
        node("VAEDecode", samples=link(7), vae=link(3)),
        node("LoadImage", image=PICTURE),
        node("PreviewImage", images=link(8)),
    )
    return graph if patch is None else {**graph, "11": patch}


def there_and_back(*more: dict[str, Any]) -> Prompt:
    """A picture through the VAE; `more` begins as node 5, with the picture from node 4."""
    return _numbered(
        node("LoadImage", image=PICTURE),
        node("QwenVRAMLoadVAE", vae_name=VAE),
        node("QwenVRAMEncode", pixels=link(1), vae=link(2)),
        node("QwenVRAMDecode", samples=link(3), vae=link(2)),
        *(more or [node("PreviewImage", images=link(4))]),
    )


def _tiles() -> Prompt:
    return _numbered(
        node("LoadImage", image=PICTURE),
        node("QwenVRAMSplitTiles", image=link(1), tile_size=256, overlap=64),
        node("ImageSharpen", image=link(2, 0), sharpen_radius=1, sigma=1.0, alpha=1.0),
        node("QwenVRAMMergeTiles", tiles=link(3), grid=link(2, 2)),
        node("PreviewImage", images=link(4)),
        node("PreviewImage", images=link(2, 3)),
    )


def _tiled_edit() -> Prompt:
    wires = {"image": link(4), "model": link(1), "clip": link(2), "vae": link(3)}
    return _numbered(
        *_loaders(EDITING_MODEL),
        node("LoadImage", image=PICTURE),
        node("QwenVRAMTiledEdit", **wires, instruction=EDIT),
        node("PreviewImage", images=link(5)),
    )


def _report() -> Prompt:
    return _numbered(
        node("LoadImage", image=PICTURE),
        node("QwenVRAMLoadVAE", vae_name=VAE),
        node("QwenVRAMEncode", pixels=link(1), vae=link(2)),
        node("QwenVRAMReport", value=link(3), theme="dark"),
        node("QwenVRAMDecode", samples=link(4), vae=link(2)),
        node("PreviewImage", images=link(5)),
        node("PreviewImage", images=link(4, 3)),
    )


def _prefill() -> Prompt:
    prompts = "a red fox in the snow\na blue bunny on the beach\n一只戴帽子的小熊"
    return _numbered(
        node("QwenVRAMLoadTextEncoder", clip_name=TEXT_ENCODER),
        node("QwenVRAMPrefill", clip=link(1), prompts=prompts),
    )


def _allocator() -> Prompt:
    return _numbered(node("QwenVRAMAllocator"), node("PreviewAny", source=link(1)))


def _save_quantized() -> Prompt:
    return _numbered(
        node("QwenVRAMLoadDiffusionModel", unet_name=DRAWING_MODEL, weight_dtype="int4"),
        node("QwenVRAMSaveQuantized", model=link(1)),
    )


def _to_be_pinned() -> Prompt:
    return _numbered(
        node("LoadImage", image=PICTURE),
        node("ImageScaleBy", image=link(1), upscale_method="lanczos", scale_by=2.0),
        node("ImageBlur", image=link(2), blur_radius=8, sigma=4.0),
        node("PreviewImage", images=link(3)),
    )


def _clear() -> Prompt:
    clear = node("QwenVRAMClear", value=link(4), level="models")
    return there_and_back(clear, node("PreviewImage", images=link(5)))


def _kind_words() -> Prompt:
    return _numbered(
        node("QwenVRAMKindWords", words="a bear with a gun"),
        node("PreviewAny", source=link(1, 0)),
        node("PreviewAny", source=link(1, 1)),
    )


def _cute_animal() -> Prompt:
    graph = draw(node("QwenVRAMCuteAnimalPrompt", words="a little bear with a hat"))
    graph["4"]["inputs"]["text"], graph["5"]["inputs"]["text"] = link(10, 0), link(10, 1)
    graph["7"]["inputs"]["model"] = link(1)
    return graph


def _colouring_page() -> Prompt:
    return _numbered(
        node("LoadImage", image=PICTURE),
        node("QwenVRAMColouringPage", image=link(1)),
        node("PreviewImage", images=link(2)),
    )


def _sticker_sheet() -> Prompt:
    return _numbered(
        node("LoadImage", image=PICTURE),
        node("QwenVRAMStickerSheet", image=link(1)),
        node("PreviewImage", images=link(2, 0)),
        node("JoinImageWithAlpha", image=link(2, 1), alpha=link(2, 2)),
        node("PreviewImage", images=link(4)),
    )


def _on_model(class_type: str, **inputs: Any) -> dict[str, Any]:
    return node(class_type, model=link(1), **inputs)


EXAMPLES: dict[str, Prompt] = {
    "QwenVRAMLoadDiffusionModel": draw(),
    "QwenVRAMLoadTextEncoder": draw(),
    "QwenVRAMLoadVAE": there_and_back(),
    "QwenVRAMCachedTextEncode": draw(),
    "QwenVRAMCachedImageEditEncode": edit(),
    "QwenVRAMPrefill": _prefill(),
    "QwenVRAMPin": _to_be_pinned(),
    "QwenVRAMPinned": _to_be_pinned(),
    "QwenVRAMAllocator": _allocator(),
    "QwenVRAMClear": _clear(),
    "QwenVRAMWarmupSink": draw(),
    "QwenVRAMReport": _report(),
    "QwenVRAMSampler": draw(sampler=_sampler("QwenVRAMSampler"), decode="QwenVRAMDecode"),
    "QwenVRAMFit": draw(_on_model("QwenVRAMFit")),
    "QwenVRAMDecode": there_and_back(),
    "QwenVRAMEncode": there_and_back(),
    "QwenVRAMSplitTiles": _tiles(),
    "QwenVRAMMergeTiles": _tiles(),
    "QwenVRAMTiledEdit": _tiled_edit(),
    "QwenVRAMTiledDiffusion": draw(_on_model("QwenVRAMTiledDiffusion"), side=2048),
    "QwenVRAMAttention": draw(_on_model("QwenVRAMAttention")),
    "QwenVRAMEarlyExit": draw(_on_model("QwenVRAMEarlyExit"), _sampler("KSampler", steps=50)),
    "QwenVRAMReferenceCache": edit(_on_model("QwenVRAMReferenceCache")),
    "QwenVRAMSaveQuantized": _save_quantized(),
    "QwenVRAMKindWords": _kind_words(),
    "QwenVRAMCuteAnimalPrompt": _cute_animal(),
    "QwenVRAMColouringPage": _colouring_page(),
    "QwenVRAMStickerSheet": _sticker_sheet(),
}
# What cannot be seen in its own example: such a node is not added by hand.
BY_MENU = ("QwenVRAMPin", "QwenVRAMPinned", "QwenVRAMWarmupSink")
