"""Cached text encoding: a known prompt needs neither the encoder nor its loader."""

from __future__ import annotations

import time

import comfy.sd
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from . import encoding
from .encoding import CACHE_MODES, Lookup, Made
from .keys import Key, text_key
from .loaders import REGISTRY
from .status import announce_hit, announce_miss, result_of, shown

WAITING = encoding.Waiting()


class CachedTextEncode(io.ComfyNode):
    """Encode a prompt once; ever after take the conditioning from memory or disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMCachedTextEncode.md."""
        return io.Schema(
            node_id="QwenVRAMCachedTextEncode",
            display_name="Cached Text Encode (Qwen VRAM)",
            category="Qwen VRAM/conditioning",
            description=(
                "Encodes a prompt once and keeps the result, also over restarts. For a known "
                "prompt neither the text encoder nor its loader runs."
            ),
            search_aliases=["clip text encode", "prompt", "prompt cache", "conditioning cache"],
            inputs=[
                io.Clip.Input(
                    "clip", lazy=True, tooltip="The text encoder; used only for a new prompt."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="A positive or negative prompt.",
                ),
                io.Combo.Input(
                    "cache",
                    options=list(CACHE_MODES),
                    default=CACHE_MODES[0],
                    tooltip=(
                        "Where to keep the encoded prompt: memory ends with ComfyUI, "
                        "off encodes every time and keeps nothing."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[io.Conditioning.Output()],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def check_lazy_status(
        cls, text: str, cache: str, clip: comfy.sd.CLIP | None = None
    ) -> list[str]:
        """Ask for the encoder only when the prompt is not in the store."""
        context = get_executing_context()
        if clip is None:
            WAITING.put(context, cls.look_up(text, cache))
        found = WAITING.get(context)
        return [] if found is not None and found.hit is not None else ["clip"]

    @classmethod
    def current_key(cls, text: str) -> Key:
        """The key of `text` behind what feeds this node's clip input. Raises NotCacheable."""
        dynprompt = cls.hidden.dynprompt
        return text_key(text, encoding.context_node(dynprompt)["inputs"]["clip"], dynprompt)

    @classmethod
    def look_up(cls, text: str, cache: str) -> Lookup:
        """Search the store for `text`."""
        node = encoding.asking_node(cls.hidden.dynprompt)
        return encoding.look_up(lambda: cls.current_key(text), cache, node)

    @classmethod
    def execute(cls, text: str, cache: str, clip: comfy.sd.CLIP | None = None) -> io.NodeOutput:
        """Return what the lazy check found, or encode and store."""
        found = WAITING.take(get_executing_context()) or cls.look_up(text, cache)
        if found.hit is not None:
            return cls.hand_out(found)
        if clip is None:
            raise ValueError(
                "The clip input carries no text encoder; this checkpoint has none inside. "
                "Connect Load Text Encoder (Qwen VRAM)."
            )
        start = time.perf_counter()
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        seconds = time.perf_counter() - start
        kept = cls.keep(found, clip, conditioning, seconds, text, cache)
        result = f"{result_of(found.note)}: {found.note}"
        line = ", ".join(filter(None, [result, f"encoded in {seconds:.2f} s", kept]))
        facts = announce_miss(found.note, seconds, kept)
        return shown(conditioning, text=line, **facts)

    @classmethod
    def hand_out(cls, found: Lookup) -> io.NodeOutput:
        """A stored conditioning."""
        REGISTRY.forget_leaving()  # an encoder that was kept, and is neither kept nor needed now
        encoding.settle(found.hit)
        saved = max(0.0, found.hit.entry.seconds - found.seconds)
        line = f"hit, {found.hit.tier}, found in {found.seconds:.2f} s"
        return shown(found.hit.entry.value, text=line, **announce_hit(found.hit.tier, saved))

    @classmethod
    def keep(
        cls, found: Lookup, clip: object, conditioning: list, seconds: float, text: str, cache: str
    ) -> str:
        """Store a fresh conditioning unless it may not belong to the key; say what was done."""
        if found.key is None:
            return ""
        if not isinstance(clip, comfy.sd.CLIP):
            return f"not stored: {type(clip).__name__} is not ComfyUI's kind of text encoder"
        made = Made(conditioning, seconds, clip.patcher.model, clip.patcher.load_device)
        return encoding.keep(found.key, lambda: cls.current_key(text), made, cache)


NODES = [CachedTextEncode]
