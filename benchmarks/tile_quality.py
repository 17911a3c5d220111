"""Seams, shift and colour of tiled edits, on a model whose faults are known; stock beside it.

Usage: COMFYUI_PATH=... python -m benchmarks.tile_quality [--side 768] [--out FOLDER]

The model is the embedded Qwen-Image in ComfyUI's own sampling, but what it predicts is its first
reference with the faults of an edit model: each picture that it is asked for comes moved by parts
of a pixel, in colours that are off, and soft at its border. The VAE is a linear one that gives a
picture back which it has once seen, so a perfect edit is known: the picture itself.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # run as a program, not by the tests
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]
    sys.modules["pack"].__file__ = str(ROOT / "__init__.py")

from pack.benchmarks import tile_pictures as pictures  # noqa: E402
from pack.benchmarks.tile_figures import Figures, measure  # noqa: E402
from pack.core.tiling import TileGrid  # noqa: E402
from pack.demo import embedded, environment, figures  # noqa: E402
from pack.tests.graphs import loader, node  # noqa: E402
from pack.tests.host import Host  # noqa: E402

TILE, OVERLAP = 288, 32


# ------------------------------------------------------------------------------ the model
def cosines() -> Tensor:
    """16 orthonormal functions of an area of 8 x 8 px and its colours, (16, 3 * 64): as JPEG has.

    Ten for the brightness and three for each colour, the widest ones.
    """
    place, order = (torch.arange(8.0) + 0.5) / 8, torch.arange(8.0)
    waves = (
        torch.cos(torch.pi * order[:, None] * place)
        * torch.where(order > 0, 0.5, 0.125**0.5)[:, None]
    )
    both = torch.einsum("iy,jx->ijyx", waves, waves)
    widest = sorted((i + j, i, j) for i in range(8) for j in range(8))
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    return torch.stack(
        [
            torch.einsum("c,yx->cyx", colour, both[i, j]).flatten()
            for colour, count in zip(colours, (10, 3, 3), strict=True)
            for _, i, j in widest[:count]
        ]
    )


class LinearVAE:
    """A node: a VAE of Qwen-Image's shapes that gives back what it can carry, and moves nothing."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "replace", ("VAE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """As ComfyUI asks for it."""
        return {"required": {"vae": ("VAE",)}}

    def replace(self, vae: Any) -> tuple[Any]:
        """The VAE with another model inside."""
        from comfy.ldm.wan.vae import WanVAE
        from comfy.model_patcher import ModelPatcher

        class Linear(WanVAE):
            def __init__(self) -> None:
                torch.nn.Module.__init__(self)
                self.register_buffer("functions", cosines())

            def encode(self, pixels: Tensor) -> Tensor:
                cells = functional.pixel_unshuffle(pixels[:, :, 0], 8)
                return torch.einsum("bchw,kc->bkhw", cells, self.functions / 8)[:, :, None]

            def decode(self, latent: Tensor) -> Tensor:
                cells = torch.einsum("bkhw,kc->bchw", latent[:, :, 0], self.functions * 8)
                return functional.pixel_shuffle(cells, 8)[:, :, None]

        made = copy.copy(vae)
        made.first_stage_model = Linear().to(vae.vae_dtype)
        made.patcher = ModelPatcher(
            made.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device
        )
        return (made,)


@dataclass(frozen=True)
class Faults:
    """Of an edit: pixels of shift, the same for all tiles, and by how much each is `apart`.

    `colour` is of 255 in each channel, `blur` in pixels at a tile's border.
    """

    shift: float = 1.2
    apart: float = 0.3
    colour: float = 6.0
    blur: float = 1.0

    def of(self, picture: Tensor, seed: int) -> Tensor:
        """The picture (1, h, w, 3) with faults."""
        random = torch.Generator().manual_seed(seed)
        down, right, *colour = (2 * torch.rand(5, generator=random) - 1).tolist()
        by = (self.shift + self.apart * down, -self.shift / 2 + self.apart * right)
        made = pictures.moved(picture, *by) + self.colour / 255 * torch.tensor(colour)
        inner = torch.zeros_like(picture[..., :1])
        inner[:, 24:-24, 24:-24] = 1
        inner = functional.avg_pool2d(inner.movedim(-1, 1), 17, 1, 8).movedim(1, -1)
        return (inner * made + (1 - inner) * pictures.blurred(made, self.blur)).clamp(0, 1)


class FaultyEditor:
    """A node that gives a model back which "edits" by repeating its first reference with faults."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """As ComfyUI asks for it."""
        faults = {name: ("FLOAT", {}) for name in ("shift", "apart", "colour", "blur")}
        return {"required": {"model": ("MODEL",), "vae": ("VAE",), **faults}}

    def patch(self, model: Any, vae: Any, **faults: float) -> tuple[Any]:
        """A clone whose network is replaced."""
        space = model.model.latent_format

        def target(reference: Tensor, x: Tensor) -> Tensor:
            """What the model makes of a tile; the noise decides in which way it fails."""
            digest = hashlib.sha256(x.float().numpy().tobytes()).digest()
            picture = vae.decode(space.process_out(reference[None].float()))
            picture = picture.reshape(1, *picture.shape[-3:]).float()
            faulty = Faults(**faults).of(picture, int.from_bytes(digest[:6], "little"))
            return space.process_in(vae.encode(faulty))[0]

        def network(executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            references = args[2] if len(args) > 2 else kwargs["ref_latents"]
            pairs = zip(references[0], x, strict=True)
            clean = torch.stack([target(reference, own) for reference, own in pairs])
            return (x - clean.to(x)) / sigma.reshape(-1, *(1,) * (x.ndim - 1)).to(x)

        clone = model.clone()
        clone.add_wrapper_with_key("diffusion_model", "qwen_vram.faulty", network)
        return (clone,)


def models(faults: Faults | None) -> dict[str, Any]:
    """The faulty model and the linear VAE, or without faults the embedded ones."""
    unet, clip, vae = (
        path.rpartition("/")[2]
        for path in (embedded.TRANSFORMER, embedded.TEXT_ENCODER, embedded.VAE)
    )
    shifted = node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1)
    made = {
        "unet": loader("DiffusionModel", unet),
        "clip": loader("TextEncoder", clip),
        "vae": loader("VAE", vae),
        "model": shifted,
    }
    if faults is None:
        return made
    faulty = node("TestFaultyEditor", model=["shifted", 0], vae=["vae", 0], **vars(faults))
    linear = node("TestLinearVAE", vae=["loaded", 0])
    return {**made, "loaded": made["vae"], "vae": linear, "shifted": shifted, "model": faulty}


SAMPLED = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}


def tiled_edit(file: str, faults: Faults | None, **inputs: Any) -> dict[str, Any]:
    """Tiled Edit of a file of the input folder; "edit" gives the result."""
    given = {
        **{"instruction": "change nothing", "negative": "", **SAMPLED},
        **{"denoise": 0.6, "mode": "together", "tile_size": TILE, "overlap": OVERLAP},
        **{"guide": "start of denoising", "skip_threshold": 0.0, "registration": True},
        **{"colour_match": True, "window": "hann", "cache": "off", **inputs},
    }
    sockets = {name: [name, 0] for name in ("model", "clip", "vae")}
    return {
        **models(faults),
        "picture": node("LoadImage", image=file),
        "edit": node("QwenVRAMTiledEdit", image=["picture", 0], **sockets, **given),
        "out": node("PreviewAny", source=["edit", 3]),
    }


def stock_edit(file: str, faults: Faults, side: int, *, tiles: bool) -> dict[str, Any]:
    """The same with ComfyUI's own nodes: by its tiles, or scaled down by two and enlarged."""
    first = {"upscale_method": "area", "width": side // 2, "height": side // 2, "crop": "disabled"}
    last = {"upscale_method": "bicubic", "width": side, "height": side, "crop": "disabled"}
    cut = {"tile_width": TILE, "tile_height": TILE, "overlap": OVERLAP}
    whole = {"final_width": side, "final_height": side, "overlap": OVERLAP}
    return {
        **models(faults),
        "picture": node("LoadImage", image=file),
        "first": node("SplitImageToTileList", image=["picture", 0], **cut)
        if tiles
        else node("ImageScale", image=["picture", 0], **first),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="change nothing"),
        "latent": node("VAEEncode", pixels=["first", 0], vae=["vae", 0]),
        "positive": node("ReferenceLatent", conditioning=["text", 0], latent=["latent", 0]),
        "sampler": node(
            "KSampler",
            **{"model": ["model", 0], "positive": ["positive", 0], "negative": ["positive", 0]},
            **{"latent_image": ["latent", 0], "denoise": 1.0, **SAMPLED},
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "edit": node("ImageMergeTileList", image_list=["decode", 0], **whole)
        if tiles
        else node("ImageScale", image=["decode", 0], **last),
        "out": node("PreviewImage", images=["edit", 0]),
    }


def edited(host: Host, graph: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result and the original, (1, h, w, 3)."""
    host.run(graph)
    results = (host.executor.caches.outputs.get_local(name) for name in ("edit", "picture"))
    after, before = (result.outputs[0][0] for result in results)
    return after[:1], before[:1]


def drawn(kind: str, side: int) -> Tensor:
    """A picture (1, side, side, 3) that the linear VAE gives back as it is, but for rounding."""
    wide = {"sizes": (30, 44, 60)} if kind == "text" else {}
    picture = pictures.blurred(pictures.PICTURES[kind](side, side, **wide), 1.5)
    cells = functional.pixel_unshuffle(picture.movedim(-1, 1), 8)
    kept = torch.einsum("bchw,kc,kd->bdhw", cells, cosines(), cosines())
    return functional.pixel_shuffle(kept, 8).movedim(1, -1).clamp(0, 1)


def write(host: Host, kind: str, side: int) -> str:
    """A picture as a file of the input folder."""
    pixels = (drawn(kind, side)[0] * 255).round().byte().numpy()
    Image.fromarray(pixels).save(host.base / "input" / f"{kind}.png")
    return f"{kind}.png"


def add_nodes(host: Host) -> None:
    """The faulty model and the linear VAE, as nodes."""
    host.nodes.NODE_CLASS_MAPPINGS |= {
        "TestFaultyEditor": FaultyEditor,
        "TestLinearVAE": LinearVAE,
    }


# ------------------------------------------------------------------------------ the program
def ways(file: str, side: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What is compared: how the tiles of the model differ, who edits, the graph."""
    agreeing, apart = Faults(), Faults(shift=0.3, apart=1.5)
    off = {"registration": False, "colour_match": False}
    for faults, name in ((agreeing, "tiles agree"), (apart, "tiles differ")):
        yield name, "Tiled Edit, together", tiled_edit(file, faults)
        one_by_one = {"mode": "one after another"}
        yield name, "Tiled Edit, one after another", tiled_edit(file, faults, **one_by_one)
        yield name, "the same, uncorrected", tiled_edit(file, faults, **one_by_one, **off)
        yield name, "stock tiles", stock_edit(file, faults, side, tiles=True)
        yield name, "stock, half the size", stock_edit(file, faults, side, tiles=False)


def scenes(host: Host, side: int, count: int) -> Iterator[str]:
    """The embedded model itself, asked to change nothing of the renderer's pictures."""
    asked = [edit[1] for edit in figures.edits_to_judge(400) if edit[0] == "identity"][:count]
    for number, scene in enumerate(asked):
        file = f"scene_{number}.png"
        Image.fromarray(figures.drawn(scene, (side, side))).save(host.base / "input" / file)
        for mode in ("together", "one after another"):
            tiles = {"tile_size": 256, "overlap": 64, "mode": mode, "steps": 8}
            after, before = edited(host, tiled_edit(file, None, **tiles))
            found = measure(after, before, TileGrid.cover(side, side, 256, 64, 32, 16))
            error = float((after - before).abs().mean()) * 255
            yield _row(f"scene {number + 1}", "itself", mode, found, error)


HEADER = """\
| picture | model | way | seam | step, of 255 | shift, px | colour, of 255 | mean error, of 255 |
|---|---|---|---|---|---|---|---|"""


def _row(kind: str, faults: str, way: str, found: Figures, error: float) -> str:
    shift = "nothing to see" if math.isnan(found.shift) else f"{found.shift:.2f}"
    values = f"{found.seam:.3f} | {found.step:.2f} | {shift} | {found.colour:.2f} | {error:.2f}"
    return f"| {kind} | {faults} | {way} | {values} |"


def main() -> None:
    """Print the rows of a table; with --out, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=768)
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    comfyui = environment.required_comfyui()
    with tempfile.TemporaryDirectory() as base, torch.inference_mode():
        host = Host(comfyui, Path(base), ROOT)
        add_nodes(host)
        grid = TileGrid.cover(given.side, given.side, TILE, OVERLAP, 32, 16)
        print(HEADER)
        for kind in pictures.PICTURES:
            file = write(host, kind, given.side)
            for number, (faults, way, graph) in enumerate(ways(file, given.side)):
                after, before = edited(host, graph)
                error = float((after - before).abs().mean()) * 255
                print(_row(kind, faults, way, measure(after, before, grid), error), flush=True)
                if given.out:
                    pixels = (after[0].clamp(0, 1) * 255).round().byte().numpy()
                    given.out.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(given.out / f"{kind}_{number}.png")
        for row in scenes(host, 512, given.scenes):
            print(row, flush=True)


if __name__ == "__main__":
    main()
