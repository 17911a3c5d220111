"""What a run really did: for the node, its report and the metadata of the picture."""

from __future__ import annotations

import functools
import re
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfyui_version
import folder_paths
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from ..core.budget import (
    AS_ASKED,
    CHANGED,
    EXACT,
    ORDER,
    ROUNDING,
    SETTINGS,
    SETTINGS_TEXT,
    Rung,
)
from ..core.units import size_text

METADATA = "qwen_vram"
NOT_COUNTED = "not measurable: torch counts the allocations of NVIDIA and AMD cards only"
NOT_AGAIN = "not in the picture's metadata: ComfyUI did not run this node again"
NOT_KNOWN = "not known"  # how the picture relates to the one that was asked for
NO_WORKFLOW = "not in the picture's metadata: the client sent no workflow"
NO_PROMPT = "not in the picture's metadata: ComfyUI runs no prompt"
FAILED, CANCELLED = "failed", "cancelled"
NO_PICTURE = "the curve is not shown: {}"


@dataclass
class Record:
    """What happened in one run of a sampler; several GPUs' threads add to it under a lock."""

    policy: str
    limit: int = 0  # bytes, 0 without
    rung: Rung | None = None  # the worst that was used
    position: int = -1  # of it on its ladder
    need: int = 0  # bytes that it was predicted to need
    peak: int | None = None  # bytes that a pass on it took, where torch counts them
    steps: int = 0  # of the sampler
    step: int = 0  # how many of them are done
    repeated_at: list[int] = field(default_factory=list)  # steps of passes that were, from 1
    calculated_again: int = 0  # steps' calculations, for something else than a forward pass
    restarts: int = 0  # of the whole run
    waited: float = 0.0  # seconds
    previews_skipped: int = 0
    asked: dict[str, Any] = field(default_factory=dict)  # settings
    used: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ended: str = ""  # FAILED or CANCELLED, where no picture was made
    before: list[Record] = field(default_factory=list)  # runs of the same node that did not fit
    doubtful: bool = False  # whether something else may have changed the picture
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def note(self, sentence: str) -> None:
        """Say something once."""
        with self._lock:
            if sentence and sentence not in self.notes:
                self.notes.append(sentence)

    def doubt(self, sentence: str) -> None:
        """Say why nobody knows whether the picture is the one that was asked for."""
        self.note(sentence)
        self.doubtful = True

    def use(self, position: int, rung: Rung, need: int) -> None:
        """A forward pass runs on this rung. Ladders differ: what it does to the picture counts
        first, and its place on its ladder then."""
        worse = ORDER.index(rung.exactness), position
        with self._lock:
            if self.rung is None or worse > (ORDER.index(self.rung.exactness), self.position):
                self.position, self.rung, self.need, self.peak = position, rung, need, None

    def took(self, rung: Rung, peak: int) -> None:
        """The bytes of a pass on a rung, as measured."""
        with self._lock:
            if rung == self.rung:
                self.peak = max(peak, self.peak or 0)

    def repeat(self) -> None:
        """A forward pass of this step is repeated."""
        with self._lock:
            self.repeated_at.append(min(self.step + 1, self.steps))

    def wait(self, seconds: float) -> None:
        """It waited so long for memory."""
        with self._lock:
            self.waited += seconds

    @property
    def repeated(self) -> int:
        """How many forward passes were, in all runs."""
        return len(self.repeated_at) + sum(len(record.repeated_at) for record in self.before)

    def _in_all(self, name: str) -> Any:
        """A number, over all runs."""
        return getattr(self, name) + sum(getattr(record, name) for record in self.before)

    def _repeated(self) -> str:
        if self.before:
            return f"forward passes repeated: {self.repeated} in {len(self.before) + 1} runs"
        first, last = min(self.repeated_at), max(self.repeated_at)
        where = f"(step {first}" if first == last else f"(steps {first} to {last}"
        return f"forward passes repeated: {self.repeated} {where} of {self.steps})"

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not what was asked: name -> (asked, used)."""
        pairs = ((name, (value, self.used.get(name))) for name, value in self.asked.items())
        return {name: pair for name, pair in pairs if pair[0] != pair[1]}

    def exactness(self) -> str:
        """How the picture relates to the one that was asked for."""
        if self.changed():
            return CHANGED
        known = self.rung.exactness if self.rung else EXACT
        return NOT_KNOWN if self.doubtful and known in (EXACT, ROUNDING) else known

    def done(self) -> str:
        """What was done, in words."""
        if self.rung is None:
            return "nothing was sampled"
        if not self.changed():
            return self.rung.text
        besides = self.rung.text.removeprefix(AS_ASKED).removeprefix(", ")
        return ", ".join(filter(None, [SETTINGS_TEXT, besides]))

    def _rung_id(self) -> str | None:
        if self.rung is None:
            return None
        return SETTINGS if self.changed() else self.rung.id

    def line(self) -> str:
        """For the node and the report."""
        done = f"{self.done()} ({self.exactness()})" if self.rung else self.done()
        parts = [self.ended or done]
        parts += [f"{n} {pair[1]} instead of {pair[0]}" for n, pair in self.changed().items()]
        if self.repeated:
            parts.append(self._repeated())
        if count := self._in_all("calculated_again"):
            parts.append(f"steps' calculations repeated: {count}")
        if count := self._in_all("restarts"):
            parts.append(f"started again from the first step: {count}")
        if seconds := self._in_all("waited"):
            parts.append(f"waited {seconds:.1f} s for memory")
        if count := self._in_all("previews_skipped"):
            parts.append(f"previews skipped: {count}")
        if self.peak and not self.ended:
            parts.append(f"peak {size_text(self.peak)}, predicted {size_text(self.need)}")
        if self.limit:
            parts.append(f"limit {size_text(self.limit)}{self._above()}")
        return " · ".join([*parts, *self.notes])

    def _above(self) -> str:
        """Where even the last way that was allowed is predicted to need more than the limit."""
        return f", needs about {size_text(self.need)}" if self.need > self.limit else ""

    def facts(self) -> dict[str, Any]:
        """The same as data. Sizes in bytes, times in seconds."""
        return {
            "done": self.done() if self.rung else None,
            "rung": self._rung_id(),
            "exactness": self.exactness(),
            "policy": self.policy,
            "need_bytes": self.need,
            "peak_bytes": self.peak,
            "peak_is": "measured" if self.peak else NOT_COUNTED,
            "limit_bytes": self.limit or None,
            "forward_passes_repeated": self.repeated,
            "repeated_at_steps": sorted(set(self.repeated_at)),
            "runs_that_did_not_fit": len(self.before),
            "calculations_repeated": self._in_all("calculated_again"),
            "restarts": self._in_all("restarts"),
            "waited_seconds": round(self._in_all("waited"), 1),
            "previews_skipped": self._in_all("previews_skipped"),
            "settings_asked": self.asked,
            "settings_used": self.used,
            "notes": self.notes,
            "versions": versions(),
        }


@functools.cache
def versions() -> dict[str, str]:
    """Of this pack, ComfyUI and torch."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    own = re.search(r'^version = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "qwen_vram": own[1] if own else "unknown",
        "comfyui": comfyui_version.__version__,
        "torch": str(torch.__version__),
    }


class _Info:
    """ComfyUI's extra_pnginfo, the very object, of the newest prompt alone: a model patch that
    stays in ComfyUI's cache would keep the whole workflow of its own."""

    prompt_id: str | None = None
    info: dict[str, Any] | None = None


@dataclass(frozen=True)
class Metadata:
    """What SaveImage will write into the pictures of one prompt, if the client sent a workflow."""

    prompt_id: str | None  # None where nothing runs in ComfyUI's executor

    @classmethod
    def of(cls, info: dict[str, Any] | None) -> Metadata:
        """Of the prompt that runs; `info` from a node's hidden input."""
        context = get_executing_context()
        if context is None:
            return cls(None)
        _Info.prompt_id, _Info.info = context.prompt_id, info
        return cls(context.prompt_id)

    def write(self, node_id: str | None, facts: dict[str, Any]) -> str:
        """Put the facts beside the workflow; returns why not, or "".

        A node that samples several times in a prompt has a list of them, in their order. A model
        patch that ComfyUI did not run again knows the metadata of the prompt from another node of
        this pack that has run in it, as Sampler within VRAM; or not at all.
        """
        context = get_executing_context()
        if context is None or node_id is None:
            return NO_PROMPT
        if _Info.prompt_id != context.prompt_id:
            return NOT_AGAIN
        if not _Info.info or not _Info.info.get("workflow"):
            return NO_WORKFLOW
        every = _Info.info.setdefault(METADATA, {})
        before = every.get(node_id)
        if before is None:
            every[node_id] = facts
        else:
            every[node_id] = [*before, facts] if isinstance(before, list) else [before, facts]
        return ""


def tell(text: str, *node_ids: str | None) -> None:
    """Show a text on nodes while the prompt runs."""
    server = PromptServer.instance
    if server.client_id is not None:
        for node_id in dict.fromkeys(filter(None, node_ids)):
            server.send_progress_text(text, node_id, server.client_id)


def tell_picture(picture: Image.Image, text: str, node_id: str | None) -> str:
    """Show a picture and a text on a node that has run long before, until it runs again.

    ComfyUI's own message for what a node has to show; the frontend keeps it with the workflow.
    Returns why it could not be, or "": a full disk is no reason to lose what was sampled.
    """
    server, context = PromptServer.instance, get_executing_context()
    if server.client_id is None or context is None or node_id is None:
        return ""
    folder = Path(folder_paths.get_temp_directory())
    name = f"qwen_vram_{uuid.uuid4().hex}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    except OSError as error:
        return NO_PICTURE.format(error.strerror or error)
    image = {"filename": name, "subfolder": "", "type": "temp"}
    output = {"images": [image], METADATA: [{"text": text}]}
    message = {"node": node_id, "display_node": node_id, "output": output}
    server.send_sync("executed", {**message, "prompt_id": context.prompt_id}, server.client_id)
    return ""


def running_node() -> str | None:
    """The id of the node that runs in this thread."""
    context = get_executing_context()
    return context.node_id if context is not None else None
