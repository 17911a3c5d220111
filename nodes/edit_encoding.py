"""What the text encoder and the VAE make of an edit prompt: looked up, else made and stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd

from ..core.miss_reason import NEW
from . import encoding
from .encoding import Lookup, Made
from .keys import Key, picture_key
from .pictures import (
    TEMPLATE,
    VISION_PIXELS,
    Picture,
    Reference,
    content_of,
    encode_reference,
    encode_text,
)
from .status import announce_hit, announce_miss, announce_partial, result_of


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


def _keep(
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


@dataclass(frozen=True)
class EditEncoder:
    """Encodes for one node, whose inputs are called clip and vae; `cache` as in CACHE_MODES."""

    dynprompt: Any
    cache: str

    def look_up_text(self, text: str, pictures: Sequence[Picture]) -> Lookup:
        """Search the store for what the text encoder makes of instruction and pictures."""
        node = encoding.asking_node(self.dynprompt)
        return encoding.look_up(lambda: self._text_key(text, pictures), self.cache, node)

    def look_up_reference(self, picture: Picture) -> Lookup:
        """Search the store for the latent of a picture."""
        node = encoding.asking_node(self.dynprompt)
        found = encoding.look_up(lambda: self._reference_key(picture), self.cache, node)
        new = found.note == NEW
        return found._replace(note=f"new image {picture.number}") if new else found

    def _text_key(self, text: str, pictures: Sequence[Picture]) -> Key:
        """The key of instruction and pictures behind the clip input. Raises NotCacheable."""
        made = {
            "text": ["edit", VISION_PIXELS, TEMPLATE, text],
            "number of images": [picture.number for picture in pictures],
            **{f"image {p.number}": content_of(p.pixels) for p in pictures},
        }
        return self._key(made, "clip")

    def _reference_key(self, picture: Picture) -> Key:
        """The key of the latent of a picture behind the vae input. Raises NotCacheable."""
        made = {
            "text": ["reference latent", content_of(picture.pixels)],
            "reference size": [*picture.size, picture.how],
        }
        return self._key(made, "vae")

    def _key(self, made: dict[str, Any], name: str) -> Key:
        link = encoding.context_node(self.dynprompt)["inputs"][name]
        return picture_key(made, link, name, self.dynprompt)

    def reference(
        self,
        found: Lookup,
        vae: Any,
        picture: Picture,
        encode: Callable[[Any, Picture], Reference] = encode_reference,
    ) -> Outcome:
        """What was found, or the picture encoded by the VAE and stored. Raises ValueError."""
        if found.hit:
            return taken(found)
        if vae is None:
            raise ValueError(
                "The vae input carries no VAE; this checkpoint has none inside. "
                "Connect Load VAE (Qwen VRAM), or nothing for no reference latents."
            )
        comfy.model_management.throw_exception_if_processing_interrupted()
        start = time.perf_counter()
        latent, tiled = encode(vae, picture)
        made = Outcome(latent, why=found.note, seconds=time.perf_counter() - start)
        if tiled and found.key is not None:
            return made._replace(kept="not stored: too little memory, it was encoded in tiles")
        current = lambda: self._reference_key(picture)  # noqa: E731
        return made._replace(kept=_keep(found, current, vae, comfy.sd.VAE, made, self.cache))

    def conditioning(
        self, found: Lookup, clip: Any, text: str, pictures: Sequence[Picture]
    ) -> Outcome:
        """What was found, or instruction and pictures encoded by the text encoder and stored.

        Raises ValueError.
        """
        if found.hit:
            return taken(found)
        if clip is None:
            raise ValueError(
                "The clip input carries no text encoder; this checkpoint has none inside. "
                "Connect Load Text Encoder (Qwen VRAM)."
            )
        comfy.model_management.throw_exception_if_processing_interrupted()
        start = time.perf_counter()
        conditioning = encode_text(clip, text, pictures)
        made = Outcome(conditioning, why=found.note, seconds=time.perf_counter() - start)
        current = lambda: self._text_key(text, pictures)  # noqa: E731
        return made._replace(kept=_keep(found, current, clip, comfy.sd.CLIP, made, self.cache))
