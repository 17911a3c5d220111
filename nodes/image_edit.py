"""Cached edit prompts: text and pictures, with the pictures' latents as references.

What the text encoder makes and what the VAE makes are kept apart: a new instruction needs no VAE,
and another reference size needs no text encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import node_helpers
import nodes as comfy_nodes
import torch
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..core.miss_reason import NEW
from . import encoding
from .encoding import CACHE_MODES, Lookup, Made
from .keys import Key, picture_key
from .loaders import REGISTRY
from .pictures import (
    ONE_MEGAPIXEL,
    REFERENCE_SIZES,
    STEP,
    TEMPLATE,
    VISION_PIXELS,
    Picture,
    Size,
    content_of,
    encode_reference,
    encode_text,
    pictures_of,
)
from .status import announce_hit, announce_miss, announce_partial, result_of, shown

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


class Outcome(NamedTuple):
    """A part of the result: where it was found, or why it was made, and what was done with it."""

    value: Any
    tier: str = ""
    saved: float = 0.0
    why: str = ""
    seconds: float = 0.0
    kept: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """For the history."""
        if self.tier:
            return {"result": "hit", "tier": self.tier, "seconds_saved": self.saved}
        made = {"why": self.why, "seconds": self.seconds, "kept": self.kept}
        return {"result": result_of(self.why), **made}


def taken(found: Lookup) -> Outcome:
    """A part that was found."""
    encoding.settle(found.hit)
    saved = max(0.0, found.hit.entry.seconds - found.seconds)
    return Outcome(found.hit.entry.value, found.hit.tier, saved)


def keep(
    found: Lookup,
    current_key: Callable[[], Key],
    handle: Any,
    kind: type,
    made: Outcome,
    cache: str,
) -> str:
    """Store a fresh value unless it may not belong to the key; say what was done."""
    if found.key is None:
        return ""
    if not isinstance(handle, kind):
        return f"not stored: {type(handle).__name__} is not ComfyUI's {kind.__name__}"
    patcher = handle.patcher
    fresh = Made(made.value, made.seconds, patcher.model, patcher.load_device)
    return encoding.keep(found.key, current_key, fresh, cache)


def told(name: str, outcomes: Sequence[Outcome]) -> str:
    """One part in the status line."""
    hits = [o for o in outcomes if o.tier]
    missed = [o for o in outcomes if not o.tier]
    tiers = _each(o.tier for o in hits)
    if not missed:
        return f"{name}hit, {tiers}"
    some = f"{len(hits)} of {len(outcomes)} hit, {tiers}; " if hits else ""
    seconds, why = sum(o.seconds for o in missed), _each(o.why for o in missed)
    line = f"{name}{some}{result_of(missed[0].why)} ({why}), encoded in {seconds:.2f} s"
    return ", ".join(filter(None, [line, _each(o.kept for o in missed)]))


def _each(words: Iterable[str]) -> str:
    """Different words, each once, in order."""
    return ", ".join(dict.fromkeys(filter(None, words)))


def announce(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Count the run and tell the frontend, once for all parts. Returns the facts."""
    hits = [o for o in outcomes if o.tier]
    missed = [o for o in outcomes if not o.tier]
    saved = sum(o.saved for o in hits)
    if not missed:
        return announce_hit(_each(o.tier for o in hits), saved)
    why, kept = _each(o.why for o in missed), _each(o.kept for o in missed)
    seconds = sum(o.seconds for o in missed)
    if not hits:
        return announce_miss(why, seconds, kept)
    return announce_partial(why, seconds, kept, saved)


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
        node = encoding.asking_node(cls.hidden.dynprompt)
        conditioning = encoding.look_up(lambda: cls.text_key(text, pictures), cache, node)
        references = []
        inputs = encoding.context_node(cls.hidden.dynprompt)["inputs"]
        for picture in pictures if inputs.get("vae") is not None else ():
            found = encoding.look_up(lambda p=picture: cls.reference_key(p), cache, node)
            new = found.note == NEW
            references.append(found._replace(note=f"new image {picture.number}") if new else found)
        return conditioning, references

    @classmethod
    def text_key(cls, text: str, pictures: Sequence[Picture]) -> Key:
        """The key of instruction and pictures behind the clip input. Raises NotCacheable."""
        made = {
            "text": ["edit", VISION_PIXELS, TEMPLATE, text],
            "number of images": [picture.number for picture in pictures],
            **{f"image {p.number}": content_of(p.pixels) for p in pictures},
        }
        return cls._key(made, "clip")

    @classmethod
    def reference_key(cls, picture: Picture) -> Key:
        """The key of the latent of a picture behind the vae input. Raises NotCacheable."""
        made = {
            "text": ["reference latent", content_of(picture.pixels)],
            "reference size": [*picture.size, picture.how],
        }
        return cls._key(made, "vae")

    @classmethod
    def _key(cls, made: dict[str, Any], name: str) -> Key:
        dynprompt = cls.hidden.dynprompt
        return picture_key(made, encoding.context_node(dynprompt)["inputs"][name], name, dynprompt)

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
        # First the references, as in stock.
        references = [
            taken(part) if part.hit else cls.make_reference(part, vae, picture, cache)
            for part, picture in zip(found.references, pictures, strict=False)
        ]
        if known.hit:
            conditioning = taken(known)
        else:
            conditioning = cls.make_conditioning(known, clip, text, pictures, cache)
        return cls.hand_out(conditioning, references, pictures[0].size)

    @classmethod
    def make_reference(cls, found: Lookup, vae: Any, picture: Picture, cache: str) -> Outcome:
        """Encode one picture by the VAE and store it. Raises ValueError."""
        if vae is None:
            raise ValueError(
                "The vae input carries no VAE; this checkpoint has none inside. "
                "Connect Load VAE (Qwen VRAM), or nothing for no reference latents."
            )
        comfy.model_management.throw_exception_if_processing_interrupted()
        start = time.perf_counter()
        latent, tiled = encode_reference(vae, picture)
        made = Outcome(latent, why=found.note, seconds=time.perf_counter() - start)
        if tiled and found.key is not None:
            return made._replace(kept="not stored: too little memory, it was encoded in tiles")
        current = lambda: cls.reference_key(picture)  # noqa: E731
        return made._replace(kept=keep(found, current, vae, comfy.sd.VAE, made, cache))

    @classmethod
    def make_conditioning(
        cls, found: Lookup, clip: Any, text: str, pictures: Sequence[Picture], cache: str
    ) -> Outcome:
        """Encode instruction and pictures by the text encoder and store it. Raises ValueError."""
        if clip is None:
            raise ValueError(
                "The clip input carries no text encoder; this checkpoint has none inside. "
                "Connect Load Text Encoder (Qwen VRAM)."
            )
        comfy.model_management.throw_exception_if_processing_interrupted()
        start = time.perf_counter()
        conditioning = encode_text(clip, text, pictures)
        made = Outcome(conditioning, why=found.note, seconds=time.perf_counter() - start)
        current = lambda: cls.text_key(text, pictures)  # noqa: E731
        return made._replace(kept=keep(found, current, clip, comfy.sd.CLIP, made, cache))

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
