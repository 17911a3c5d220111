"""Cached edit prompts: text and pictures, with the pictures' latents as references.

What the text encoder makes and what the VAE makes are kept apart: a new instruction needs no VAE,
and another reference size needs no text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import comfy.sd
import node_helpers
import nodes as comfy_nodes
import torch
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from . import encoding
from .edit_encoding import EditEncoder, Outcome, announce, told
from .encoding import CACHE_MODES, Lookup
from .loaders import REGISTRY
from .pictures import ONE_MEGAPIXEL, REFERENCE_SIZES, STEP, Picture, Size, pictures_of
from .status import shown

WAITING = encoding.Waiting()


class Found(NamedTuple):
    """What the store has of the two parts: one lookup, and one for each reference latent."""

    text: str
    images: list[torch.Tensor | None]
    conditioning: Lookup
    references: list[Lookup]

    def answers(self, text: str, images: list[torch.Tensor | None]) -> bool:
        """Whether this was asked; ComfyUI may make an input anew between two lazy checks."""
        same = (a is b for a, b in zip(self.images, images, strict=True))
        return self.text == text and all(same)


class CachedImageEditEncode(io.ComfyNode):
    """Encode an edit prompt and its pictures once; ever after take both from memory or disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMCachedImageEditEncode.md."""
        return io.Schema(
            node_id="QwenVRAMCachedImageEditEncode",
            display_name="Cached Image Edit Encode (Qwen VRAM)",
            category="Qwen VRAM/conditioning",
            description=(
                "Encodes an edit instruction and its pictures once and keeps the result, also "
                "over restarts. A new instruction needs no VAE; what is known needs no model."
            ),
            search_aliases=[
                *("text encode qwen image edit plus", "qwen edit", "reference latent"),
                *("edit prompt", "conditioning cache"),
            ],
            inputs=[
                io.Clip.Input(
                    "clip", lazy=True, tooltip="The text encoder; used only for what is new."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The instruction. It can speak of Picture 1, Picture 2 and so on.",
                ),
                *cls.picture_inputs(),
                *cls.size_inputs(),
                io.Combo.Input(
                    "cache",
                    options=list(CACHE_MODES),
                    default=CACHE_MODES[0],
                    tooltip=(
                        "Where to keep what was encoded: memory ends with ComfyUI, "
                        "off encodes every time and keeps nothing."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
            ],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def picture_inputs(cls) -> list[io.Input]:
        """Pictures, and what makes latents of them."""
        return [
            io.Image.Input(
                "image1",
                tooltip="The picture to edit. Each picture of a batch is a reference.",
            ),
            io.Image.Input("image2", optional=True, tooltip="Another reference."),
            io.Image.Input("image3", optional=True, tooltip="Another reference."),
            io.Vae.Input(
                "vae",
                optional=True,
                lazy=True,
                tooltip="For the reference latents. Not connected: the model is given none.",
            ),
        ]

    @classmethod
    def size_inputs(cls) -> list[io.Input]:
        """How large the latents are."""
        return [
            io.Combo.Input(
                "reference_size",
                options=list(REFERENCE_SIZES),
                default=ONE_MEGAPIXEL,
                tooltip=(
                    "1 megapixel: as ComfyUI's own node; its rounding to 8 is a known cause of "
                    "shifted edits. own size: the nearest multiples of 32, which avoids that "
                    "cause; memory and time grow with the picture. given: width x height."
                ),
            ),
            io.Int.Input(
                "width",
                default=1024,
                min=STEP,
                max=comfy_nodes.MAX_RESOLUTION,
                step=STEP,
                tooltip=(
                    "With given: image 1 fills width x height, and what sticks out is cut "
                    "off evenly; the others keep their shape, at about as many pixels."
                ),
                advanced=True,
            ),
            io.Int.Input(
                "height",
                default=1024,
                min=STEP,
                max=comfy_nodes.MAX_RESOLUTION,
                step=STEP,
                tooltip="With given: see width.",
                advanced=True,
            ),
        ]

    @classmethod
    def check_lazy_status(
        cls,
        text: str,
        image1: torch.Tensor,
        reference_size: str,
        width: int,
        height: int,
        cache: str,
        clip: comfy.sd.CLIP | None = None,
        image2: torch.Tensor | None = None,
        image3: torch.Tensor | None = None,
        vae: comfy.sd.VAE | None = None,
    ) -> list[str]:
        """Ask for the models of those parts that are not in the store."""
        context = get_executing_context()
        images = [image1, image2, image3]
        found = WAITING.get(context)
        if found is None or not found.answers(text, images):
            pictures = pictures_of(images, reference_size, Size(width, height))
            found = Found(text, images, *cls.look_up(text, pictures, cache))
            WAITING.put(context, found)
        missing = [] if found.conditioning.hit else ["clip"]
        return missing if all(f.hit for f in found.references) else [*missing, "vae"]

    @classmethod
    def look_up(
        cls, text: str, pictures: Sequence[Picture], cache: str
    ) -> tuple[Lookup, list[Lookup]]:
        """Search the store for both parts."""
        encoder = EditEncoder(cls.hidden.dynprompt, cache)
        inputs = encoding.context_node(cls.hidden.dynprompt)["inputs"]
        encoded = pictures if inputs.get("vae") is not None else ()
        references = [encoder.look_up_reference(picture) for picture in encoded]
        return encoder.look_up_text(text, pictures), references

    @classmethod
    def execute(
        cls,
        text: str,
        image1: torch.Tensor,
        reference_size: str,
        width: int,
        height: int,
        cache: str,
        clip: comfy.sd.CLIP | None = None,
        image2: torch.Tensor | None = None,
        image3: torch.Tensor | None = None,
        vae: comfy.sd.VAE | None = None,
    ) -> io.NodeOutput:
        """Return what the lazy check found; encode and store the rest."""
        images = [image1, image2, image3]
        pictures = pictures_of(images, reference_size, Size(width, height))
        found = WAITING.take(get_executing_context())
        if found is None or not found.answers(text, images):
            found = Found(text, images, *cls.look_up(text, pictures, cache))
        known = found.conditioning
        if any(part.hit for part in (known, *found.references)):
            REGISTRY.forget_leaving()  # a model that was kept, and is neither kept nor needed now
        encoder = EditEncoder(cls.hidden.dynprompt, cache)
        # First the references, as in stock.
        references = [
            encoder.reference(part, vae, picture)
            for part, picture in zip(found.references, pictures, strict=False)
        ]
        conditioning = encoder.conditioning(known, clip, text, pictures)
        return cls.hand_out(conditioning, references, pictures[0].size)

    @classmethod
    def hand_out(
        cls, conditioning: Outcome, references: Sequence[Outcome], size: Size
    ) -> io.NodeOutput:
        """Both parts as one conditioning, and the size of the first reference."""
        value = conditioning.value
        if references:
            latents = {"reference_latents": [r.value for r in references]}
            value = node_helpers.conditioning_set_values(value, latents, append=True)
        outcomes = [conditioning, *references]
        line = [told("conditioning: ", [conditioning])]
        line.append(
            told("reference latents: ", references) if references else "no reference latents"
        )
        saved = sum(o.saved for o in outcomes)
        if saved >= 0.005:
            line.append(f"saved {saved:.2f} s")
        parts = {"conditioning": conditioning.facts, "references": [r.facts for r in references]}
        text = " · ".join(line)
        return shown(value, *size, text=text, **announce(outcomes), **parts)


NODES = [CachedImageEditEncode]
