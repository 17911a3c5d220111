"""Cached text encoding: a known prompt needs neither the encoder nor its loader."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..core.conditioning_codec import Entry
from ..core.conditioning_store import ConditioningStore, Hit
from ..core.file_identity import FileIdentity
from ..core.graph_identity import NotCacheable, digest, identify_upstream
from . import environment, upstream
from .loaders import REGISTRY
from .status import shown

MEMORY_BYTES = 256 << 20
DISK_BYTES = 2_000_000_000
KEY_VERSION = 1
CACHE_MODES = ("memory and disk", "memory", "off")

STORE = ConditioningStore(
    Path(folder_paths.get_system_user_directory("qwen_vram"), "conditioning"),
    MEMORY_BYTES,
    DISK_BYTES,
)


class Key(NamedTuple):
    """The key of an entry, the digests of its parts, and the files that it stands for."""

    sha256: str
    parts: dict[str, str]
    files: list[FileIdentity]


class Lookup(NamedTuple):
    """What was found: a hit, or a key to store under, or a note why neither."""

    key: Key | None = None
    hit: Hit | None = None
    note: str = ""
    seconds: float = 0.0


class Waiting:
    """Lookups between the lazy check of a node and its execution: nothing changes in between."""

    def __init__(self) -> None:
        self._lookups: dict[Any, Lookup] = {}

    def put(self, context: Any, lookup: Lookup) -> None:
        """Keep a lookup; those of runs that were interrupted are dropped."""
        for stale in [c for c in self._lookups if c.prompt_id != context.prompt_id]:
            del self._lookups[stale]
        self._lookups[context] = lookup

    def has_hit(self, context: Any) -> bool:
        """Whether the lazy check of this very call found its prompt."""
        lookup = self._lookups.get(context)
        return lookup is not None and lookup.hit is not None

    def take(self, context: Any) -> Lookup | None:
        """Hand a lookup over, once."""
        return self._lookups.pop(context, None)


WAITING = Waiting()


def key_of(text: str, link: Any, dynprompt: Any) -> Key:
    """Everything that the conditioning of `text` by the encoder behind `link` depends on."""
    identity = identify_upstream(link, upstream.host_of(dynprompt))
    files = list(identity.files)
    if "embedding:" in text:
        files += upstream.identities(upstream.embedding_folders())
    parts = {
        "text": digest(KEY_VERSION, text),
        "graph before clip": digest(identity.nodes),
        "model file": digest([[f.path, f.size, f.mtime_ns] for f in files]),
        "code version": environment.packages_digest(identity.packages),
        "settings": digest(environment.settings()),
    }
    return Key(digest(parts), parts, files)


@functools.cache
def settle_attention() -> None:
    """Do what encoding does to the process besides encoding, so that a hit gives the same picture.

    On cards where PyTorch prefers cuDNN attention (Hopper and later) it writes that preference
    over the caller's order of backends at the first attention of the process. In stock that is
    the text encoder's; without it, it would be the diffusion model's, in another kernel.
    """
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        query = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.bfloat16)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)


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
        return [] if WAITING.has_hit(context) else ["clip"]

    @classmethod
    def current_key(cls, text: str) -> Key:
        """The key of `text` behind what feeds this node's clip input. Raises NotCacheable."""
        dynprompt = cls.hidden.dynprompt
        node = dynprompt.get_node(get_executing_context().node_id)
        return key_of(text, node["inputs"]["clip"], dynprompt)

    @classmethod
    def look_up(cls, text: str, cache: str) -> Lookup:
        """Search the store for `text`."""
        if cache == "off":
            return Lookup(note="cache is off")
        start = time.perf_counter()
        try:
            key = cls.current_key(text)
        except NotCacheable as reason:
            return Lookup(note=f"cannot be cached: {reason}")
        hit = STORE.lookup(key.sha256, disk=cache == CACHE_MODES[0])
        note = "" if hit else STORE.why_missed(key.sha256, key.parts)
        return Lookup(key, hit, note, time.perf_counter() - start)

    @classmethod
    def execute(cls, text: str, cache: str, clip: comfy.sd.CLIP | None = None) -> io.NodeOutput:
        """Return what the lazy check found, or encode and store."""
        found = WAITING.take(get_executing_context()) or cls.look_up(text, cache)
        if found.hit is not None:
            return cls.hand_out(found.hit, found.seconds)
        if clip is None:
            raise ValueError(
                "The clip input carries no text encoder; this checkpoint has none inside. "
                "Connect Load Text Encoder (Qwen VRAM)."
            )
        start = time.perf_counter()
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        seconds = time.perf_counter() - start
        kept = cls.keep(found.key, clip, conditioning, seconds, text, cache) if found.key else ""
        line = " · ".join(
            filter(None, [f"miss: {found.note}", f"encoded in {seconds:.2f} s", kept])
        )
        facts = {"result": "miss", "why": found.note, "seconds": seconds, "kept": kept}
        return shown(conditioning, text=line, **facts)

    @classmethod
    def hand_out(cls, hit: Hit, seconds: float) -> io.NodeOutput:
        """A stored conditioning, found in `seconds`."""
        REGISTRY.forget_leaving()  # an encoder that was kept, and is neither kept nor needed now
        if hit.entry.device.startswith("cuda"):
            settle_attention()
        saved = max(0.0, hit.entry.seconds - seconds)
        line = f"hit ({hit.tier}) · saved {saved:.2f} s · encoder not needed"
        facts = {"result": "hit", "tier": hit.tier, "seconds_saved": saved}
        return shown(hit.entry.value, text=line, **facts)

    @classmethod
    def keep(
        cls, key: Key, clip: Any, conditioning: Any, seconds: float, text: str, cache: str
    ) -> str:
        """Store a fresh conditioning unless it may not belong to `key`; say what was done."""
        if not isinstance(clip, comfy.sd.CLIP):
            return f"not stored: {type(clip).__name__} is not ComfyUI's kind of text encoder"
        doubt = environment.LOADED.doubt(clip.patcher.model, key.files)
        if doubt is None and not cls.still(key, text):
            doubt = "what it depends on changed while it was encoded"
        if doubt:
            return f"not stored: {doubt}"
        disk = cache == CACHE_MODES[0]
        entry = Entry(conditioning, seconds, key.parts, str(clip.patcher.load_device))
        return STORE.put(key.sha256, entry, disk) or ("stored" if disk else "stored in memory")

    @classmethod
    def still(cls, key: Key, text: str) -> bool:
        """Whether the key is what it was before encoding."""
        try:
            return cls.current_key(text).sha256 == key.sha256
        except NotCacheable:
            return False


NODES = [CachedTextEncode]
