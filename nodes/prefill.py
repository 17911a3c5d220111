"""Encode a list of prompts in one go, so that none of them ever needs the encoder again."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..core.prompt_list import lines_of, read_prompts, unique
from . import encoding
from .encoding import CACHE_MODES, Lookup, Made
from .keys import Key, text_key
from .loaders import REGISTRY
from .status import shown
from .store import LISTS, STORE

WAITING = encoding.Waiting()
FULLY_STORED = ("stored", "stored in memory")


class Sought(NamedTuple):
    """One prompt of the list, and what the store knows of it; entries are not held."""

    text: str
    known: bool
    lookup: Lookup


@dataclass
class Tally:
    """What became of the list."""

    prompts: int
    known: int
    encoded: int = 0
    not_stored: int = 0
    seconds: float = 0.0
    reason: str = ""

    def lose(self, reason: str, prompts: int = 1) -> None:
        """Count prompts that are not stored; the first reason is told."""
        self.not_stored += prompts
        self.reason = self.reason or reason

    def line(self) -> str:
        """For the status line."""
        text = f"{self.prompts} prompts: {self.known} known, {self.encoded} encoded in "
        text += f"{self.seconds:.1f} s, {self.not_stored} not stored"
        return f"{text} ({self.reason})" if self.reason else text


class Prefill(io.ComfyNode):
    """Put every prompt of a list into the prompt cache."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMPrefill.md."""
        return io.Schema(
            node_id="QwenVRAMPrefill",
            display_name="Prefill Prompt Cache (Qwen VRAM)",
            category="Qwen VRAM/conditioning",
            description=(
                "Encodes a list of prompts in one go and keeps the results. Cached Text Encode and "
                "CLIP Text Encode then find each of them without a text encoder."
            ),
            search_aliases=["prompt list", "batch encode", "kiosk", "prompt cache", "csv"],
            inputs=[
                io.Clip.Input(
                    "clip", lazy=True, tooltip="The text encoder; used only for new prompts."
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line; lines that begin with # are left out.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    tooltip=(
                        "More prompts from a .txt, .csv or .tsv file: its full path, or its name "
                        "in ComfyUI's input folder."
                    ),
                ),
                io.Combo.Input(
                    "cache",
                    options=list(CACHE_MODES[:2]),
                    default=CACHE_MODES[0],
                    tooltip="Where to keep the encoded prompts: memory ends with ComfyUI.",
                    advanced=True,
                ),
            ],
            outputs=[io.Int.Output(display_name="count")],
            hidden=[io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        """Never the same: the file and the store change beside the graph."""
        return float("nan")

    @classmethod
    def check_lazy_status(
        cls, prompts: str, file: str, cache: str, clip: comfy.sd.CLIP | None = None
    ) -> list[str]:
        """Ask for the encoder only when a prompt is new and may be stored."""
        context = get_executing_context()
        if clip is None:
            WAITING.put(context, cls.search(prompts, file, cache))
        return ["clip"] if any(map(_is_to_do, WAITING.get(context) or [])) else []

    @classmethod
    def search(cls, prompts: str, file: str, cache: str) -> list[Sought]:
        """Look up every prompt of the list."""
        node = encoding.asking_node(cls.hidden.dynprompt)
        found = []
        for text in unique([*lines_of(prompts), *_from_file(file)]):
            comfy.model_management.throw_exception_if_processing_interrupted()
            lookup = encoding.look_up(lambda t=text: cls.current_key(t), cache, node)
            found.append(Sought(text, lookup.hit is not None, lookup._replace(hit=None)))
        return found

    @classmethod
    def current_key(cls, text: str) -> Key:
        """The key of `text` behind what feeds the clip input. Raises NotCacheable."""
        dynprompt = cls.hidden.dynprompt
        return text_key(text, encoding.context_node(dynprompt)["inputs"]["clip"], dynprompt)

    @classmethod
    def execute(
        cls, prompts: str, file: str, cache: str, clip: comfy.sd.CLIP | None = None
    ) -> io.NodeOutput:
        """Encode what is new, one by one, as the encode nodes would."""
        found = WAITING.take(get_executing_context())
        found = cls.search(prompts, file, cache) if found is None else found
        tally = Tally(len(found), sum(sought.known for sought in found))
        if not any(map(_is_to_do, found)):
            REGISTRY.forget_leaving()  # an encoder that was kept, and is not needed now
        elif not isinstance(clip, comfy.sd.CLIP):
            raise ValueError(_no_encoder(clip))
        bar = comfy.utils.ProgressBar(len(found))
        for number, sought in enumerate(found, start=1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if _is_to_do(sought):
                cls.encode(sought, clip, cache, tally)
            elif not sought.known:
                tally.lose(sought.lookup.note)
            bar.update_absolute(number)
        STORE.flush()
        _count_evicted(tally, cache)
        facts = {k: getattr(tally, k) for k in ("prompts", "known", "encoded", "not_stored")}
        facts |= {"seconds": tally.seconds, "reason": tally.reason}
        return shown(len(found), text=tally.line(), **facts)

    @classmethod
    def encode(cls, sought: Sought, clip: comfy.sd.CLIP, cache: str, tally: Tally) -> None:
        """Encode one prompt and store it."""
        start = time.perf_counter()
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(sought.text))
        seconds = time.perf_counter() - start
        tally.encoded += 1
        tally.seconds += seconds
        made = Made(conditioning, seconds, clip.patcher.model, clip.patcher.load_device)
        current_key = lambda: cls.current_key(sought.text)  # noqa: E731
        kept = encoding.keep(sought.lookup.key, current_key, made, cache)
        if kept not in FULLY_STORED:
            tally.lose(kept.removeprefix("not stored: "))


def _is_to_do(sought: Sought) -> bool:
    return not sought.known and sought.lookup.key is not None


def _count_evicted(tally: Tally, cache: str) -> None:
    """Those of the list were used last: fewer entries than prompts means that some are gone."""
    usage = STORE.usage()
    size = usage.disk if cache == CACHE_MODES[0] else usage.memory
    evicted = tally.prompts - tally.not_stored - size.entries if size else 0
    if evicted > 0 and not usage.redis:
        tally.lose("the cache is full: raise its bound in ComfyUI's settings, Qwen VRAM", evicted)


def _no_encoder(clip: object) -> str:
    if clip is None:
        return (
            "The clip input carries no text encoder; this checkpoint has none inside. "
            "Connect Load Text Encoder (Qwen VRAM)."
        )
    return (
        f"The clip input carries {type(clip).__name__}, which is not ComfyUI's kind of text "
        "encoder and cannot be stored. Connect Load Text Encoder (Qwen VRAM)."
    )


def _from_file(file: str) -> list[str]:
    """The prompts of the file that `file` names, if any. Raises PromptListError."""
    file = file.strip().strip('"')  # as Windows copies a path
    if not file:
        return []
    named = file if os.path.isabs(file) else folder_paths.get_annotated_filepath(file)
    path = Path(named)
    if path.parent == Path(folder_paths.get_temp_directory()) / LISTS:
        with suppress(OSError):  # not there: said below. On Windows it changes nothing.
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)  # as ComfyUI's upload left it, all may read it
    return read_prompts(path)


NODES = [Prefill]
