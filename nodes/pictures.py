"""The pictures of an edit prompt: their sizes, their content, and what the models make of them."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.sd
import comfy.utils
import torch

ONE_MEGAPIXEL, OWN_SIZE, GIVEN = REFERENCE_SIZES = ("1 megapixel", "own size", "given")
STEP = 32  # sides that the model's patches fit into; others shift the edit (QwenLM/Qwen-Image#160)
MAX_PICTURES = 10

# Both as in ComfyUI's TextEncodeQwenImageEditPlus.
VISION_PIXELS = 384 * 384
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int


def stock_size(picture: Size, pixels: int, step: int) -> Size:
    """About so many pixels in the same shape, each side a multiple of `step`, as stock rounds."""
    scale = math.sqrt(pixels / (picture.width * picture.height))
    return Size(*(max(step, round(side * scale / step) * step) for side in picture))


def aligned(picture: Size, scale: float = 1.0) -> Size:
    """Each side times `scale`, moved to the nearest multiple of 32, and at least 32."""
    return Size(*(max(STEP, math.floor(side * scale / STEP + 0.5) * STEP) for side in picture))


def reference_size(picture: Size, choice: str, given: Size, first: bool) -> Size:
    """How large a picture is as a reference. Only the first one is cut to the given size."""
    if choice == ONE_MEGAPIXEL:
        return stock_size(picture, 1024 * 1024, 8)
    if choice == OWN_SIZE:
        return aligned(picture)
    given = aligned(given)
    if first:
        return given
    pixels = given.width * given.height
    return aligned(picture, math.sqrt(pixels / (picture.width * picture.height)))


class Picture(NamedTuple):
    """A picture, (1, H, W, C), the N of its name "Picture N", and how it becomes a reference."""

    number: int
    pixels: torch.Tensor
    size: Size
    how: str


def pictures_of(images: Sequence[torch.Tensor | None], choice: str, given: Size) -> list[Picture]:
    """Every picture of every input, in order. Raises ValueError.

    As in stock, image3 alone is "Picture 3"; a batch moves what follows.
    """
    found: list[Picture] = []
    for slot, image in enumerate(images, 1):
        if image is None and slot > 1:
            continue
        _require_pictures(f"image{slot}", image)
        for pixels in image.split(1):
            number = max(slot, found[-1].number + 1) if found else slot
            own = Size(pixels.shape[2], pixels.shape[1])
            size = reference_size(own, choice, given, first=not found)
            how = {ONE_MEGAPIXEL: "area", GIVEN: "stretch" if found else "crop"}
            untouched = size == own and choice != ONE_MEGAPIXEL
            kind = "untouched" if untouched else how.get(choice, "stretch")
            found.append(Picture(number, pixels, size, kind))
    if len(found) > MAX_PICTURES:
        raise ValueError(
            f"{len(found)} pictures are connected, {MAX_PICTURES} are the most that this node "
            "takes. Every picture of a batch counts; connect fewer, or take some out of the batch."
        )
    return found


def _require_pictures(name: str, image: torch.Tensor | None) -> None:
    if image is None or image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"{name} carries no picture. Connect an image, for example Load Image.")
    if image.shape[-1] < 3:
        raise ValueError(
            f"{name} has {image.shape[-1]} channel(s) instead of red, green and blue. "
            "Convert a mask with Convert Mask to Image."
        )


def resized(pixels: torch.Tensor, size: Size, how: str) -> torch.Tensor:
    """(1, H, W, C) -> (1, height, width, 3)."""
    samples = pixels.movedim(-1, 1)  # BHWC -> BCHW
    if how == "crop":
        samples = center_crop(samples, size)
    if how == "area":  # as stock
        samples = comfy.utils.common_upscale(samples, *size, "area", "disabled")
    elif how != "untouched":
        # Area blurs by up to a pixel when little is to be changed, as "own size" does; ComfyUI's
        # lanczos rounds colours down to 8 bits, and its bicubic leaves moiré when shrinking.
        scaled = torch.nn.functional.interpolate(
            samples.float(), size=(size.height, size.width), mode="bicubic", antialias=True
        )
        samples = scaled.clamp(0.0, 1.0).to(pixels.dtype)
    return samples.movedim(1, -1)[..., :3]


def center_crop(samples: torch.Tensor, size: Size) -> torch.Tensor:
    """The largest part in the middle that has the shape of `size`; (1, C, H, W)."""
    height, width = samples.shape[-2:]
    kept_height = min(height, max(1, round(width * size.height / size.width)))
    kept_width = min(width, max(1, round(height * size.width / size.height)))
    rows = samples.narrow(-2, (height - kept_height) // 2, kept_height)
    return rows.narrow(-1, (width - kept_width) // 2, kept_width)


def content_of(pixels: torch.Tensor) -> str:
    """Digest of a picture: its values, and what else decides how they are computed with."""
    strides = [s if n > 1 else 0 for s, n in zip(pixels.stride(), pixels.shape, strict=True)]
    facts = [str(pixels.dtype), list(pixels.shape), strides, str(pixels.device)]
    sha = hashlib.sha256(repr(facts).encode())
    flat = pixels.detach().cpu().contiguous().reshape(-1)
    sha.update(memoryview(flat.view(torch.uint8).numpy()))
    return sha.hexdigest()


def encode_text(clip: Any, text: str, pictures: Sequence[Picture]) -> list[Any]:
    """Conditioning without reference latents, as stock makes it. Raises ValueError."""
    images = []
    for picture in pictures:
        own = Size(picture.pixels.shape[2], picture.pixels.shape[1])
        images.append(resized(picture.pixels, stock_size(own, VISION_PIXELS, 1), "area"))
    names = "".join(
        f"Picture {p.number}: <|vision_start|><|image_pad|><|vision_end|>" for p in pictures
    )
    try:
        tokens = clip.tokenize(names + text, images=images, llama_template=TEMPLATE)
    except TypeError as error:
        raise _blind(clip) from error
    if isinstance(clip, comfy.sd.CLIP) and _images_in(tokens) < len(images):
        raise _blind(clip)
    return clip.encode_from_tokens_scheduled(tokens)


def _blind(clip: Any) -> ValueError:
    name = type(getattr(clip, "tokenizer", clip)).__name__
    return ValueError(
        f"The text encoder at the clip input ({name}) does not take pictures. "
        "Load a Qwen2.5-VL encoder with Load Text Encoder (Qwen VRAM)."
    )


def _images_in(tokens: Any) -> int:
    """How many pictures a tokenizer has put among its tokens."""
    if isinstance(tokens, dict):
        return 1 if tokens.get("type") == "image" else sum(map(_images_in, tokens.values()))
    if isinstance(tokens, (list, tuple)):
        return sum(map(_images_in, tokens))
    return 0


_TILED = ("encode_tiled_", "encode_tiled_1d", "encode_tiled_3d", "_encode_tiled_owned")


class Reference(NamedTuple):
    """The latent of a picture; `tiled` if ComfyUI fell back to tiles for want of memory."""

    latent: Any
    tiled: bool


def encode_reference(vae: Any, picture: Picture) -> Reference:
    """Encode one picture. Tiles give another result than the whole, and are not to be kept."""
    pixels = resized(picture.pixels, picture.size, picture.how)
    if not isinstance(vae, comfy.sd.VAE):
        return Reference(vae.encode(pixels), False)
    watched = copy.copy(vae)
    used: list[str] = []

    def _noting(name: str) -> Callable[..., Any]:
        def encode_in_tiles(*args: Any, **kwargs: Any) -> Any:
            used.append(name)
            return getattr(vae, name)(*args, **kwargs)

        return encode_in_tiles

    for name in _TILED:
        setattr(watched, name, _noting(name))
    return Reference(watched.encode(pixels), bool(used))
