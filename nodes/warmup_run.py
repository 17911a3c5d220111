"""One warm-up on its way through ComfyUI's queue: watched, cancelled, and its traces removed."""

from __future__ import annotations

import logging
import os
import time
import uuid
from typing import Any, NamedTuple

import folder_paths
from comfy.cli_args import args
from server import PromptServer

from ..core.warmup import Form, title
from . import loaded_models
from .provider import STOCK_NODES
from .settings import settings
from .status import CACHE_EVENT

log = logging.getLogger("qwen_vram")

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
NOT_FOLLOWED = "What came of it cannot be told. The log has the reason."
LOST = "Another client listened in its place; what came of it is not known."
_ENDS = {
    "execution_success": DONE,
    "execution_error": FAILED,
    "execution_interrupted": CANCELLED,
}
_OUR_ENCODES = {"QwenVRAMCachedTextEncode", "QwenVRAMCachedImageEditEncode"}


class Resident(NamedTuple):
    """A model that ComfyUI has loaded: what it is, where, and how much of it lies there."""

    name: str
    kind: str
    device: str
    bytes: int


class WarmUp:
    """The listener under the private client id, and what is known of the run.

    ComfyUI sends all that a prompt causes to the client that sent it, and to everybody where that
    is None. So this object stands among the server's sockets under an id that nobody else knows.
    All of it runs in the server's event loop.
    """

    def __init__(self, prompt: dict[str, Any], form: Form) -> None:
        self.id, self.client_id = str(uuid.uuid4()), uuid.uuid4().hex
        self.prompt, self.form = prompt, form
        self.left_out = [title(prompt, node_id) for node_id in form.left_out]
        self.state, self.cancelling = WAITING, False
        self.error, self.code, self.problems = "", "", []  # code: of a fixed sentence
        self.result: dict[str, Any] | None = None
        self._cached: set[str] = set()
        self._spent: dict[str, float] = {}  # node -> seconds in it, in the order of running
        self._current, self._since, self._step = "", 0.0, None
        self._begun, self._seconds = 0.0, 0.0
        self._facts: dict[str, str] = {}  # node -> what the prompt cache did
        self._stored = 0
        self._temporary: list[dict[str, Any]] = []
        self._outcome = ""
        self._in_history = False
        self._queued = False

    # ------------------------------------------------------------------------- the way through
    def queue(self, outputs: list[str], extra: dict[str, Any]) -> None:
        """Put it behind what waits, as ComfyUI's own route does, without a picture on the way."""
        server = PromptServer.instance
        extra = {k: extra[k] for k in ("extra_pnginfo",) if k in extra}
        extra |= {"client_id": self.client_id, "preview_method": "none"}
        extra["create_time"] = int(time.time() * 1000)
        server.sockets[self.client_id], self._queued = self, True
        item = (server.number, self.id, self.form.prompt, extra, outputs, {})
        server.prompt_queue.put(item)

    def cancel(self) -> None:
        """Leave the queue, or stop at the next step or node."""
        if self.state in ENDED:
            return
        self.cancelling = True
        queue = PromptServer.instance.prompt_queue
        if queue.delete_queue_item(lambda item: item[1] == self.id):
            self._finish(CANCELLED)
        else:
            queue.interrupt_if_running(self.id)

    def settle(self) -> None:
        """Notice the end of a run when another client has taken the place under the private id.

        ComfyUI lists the ids of its clients with the queue, and gives a place to who comes last.
        """
        heard = PromptServer.instance.sockets.get(self.client_id) is self
        if self._queued and not heard and self.state not in ENDED:
            self._outcome = FAILED
            self.error, self.code = LOST, "lost"
            self._on_status()

    async def send_json(self, message: dict[str, Any]) -> None:
        """What ComfyUI tells the client of this prompt, and what any pack tells all clients.

        An exception here would end ComfyUI's loop of messages, and the server with it.
        """
        try:
            self._hear(message["type"], message["data"])
        except Exception:
            log.exception("A message to the warm-up cannot be read; it is ignored.")

    def _hear(self, event: str, data: Any) -> None:
        if event == "status":
            self._on_status()
        elif not isinstance(data, dict):
            return  # another pack's
        elif event == CACHE_EVENT:
            self._facts[data["node"]] = data["result"]
            self._stored += str(data.get("kept", "")).startswith("stored")
        elif data.get("prompt_id") != self.id:
            return
        elif event in _ENDS:
            self._outcome = _ENDS[event]
            if event == "execution_error":
                self._on_error(data)
        else:
            self._on_event(event, data)

    async def send_bytes(self, message: bytes | bytearray) -> None:
        """Pictures and texts for nodes: nobody sees them."""

    def _on_event(self, event: str, data: dict[str, Any]) -> None:
        if event == "execution_start":
            self.state, self._begun = RUNNING, time.perf_counter()
            if self.cancelling:  # ComfyUI clears the flag when a prompt starts
                PromptServer.instance.prompt_queue.interrupt_if_running(self.id)
        elif event == "execution_cached":
            self._cached = set(data["nodes"])
        elif event == "executing":
            self._enter(data.get("display_node") or "")
            if data.get("node") is None:  # the last message of a prompt
                self._on_status()
        elif event == "progress":
            self._step = [data["value"], data["max"]]
        elif event == "executed":
            self._note_files(data["node"], data.get("output"))

    def _enter(self, node_id: str) -> None:
        """Count the time since the last node began as that node's."""
        now = time.perf_counter()
        if self._current:
            self._spent[self._current] += now - self._since
        if node_id:
            self._spent.setdefault(node_id, 0.0)
        self._current, self._since, self._step = node_id, now, None

    def _on_error(self, data: dict[str, Any]) -> None:
        why = str(data.get("exception_message", "")).strip().partition("\n")[0]
        self.error = f"{title(self.prompt, str(data.get('node_id')))}: {why}"

    def _on_status(self) -> None:
        """The queue changed. When the prompt is through, its history is there, and goes."""
        queue = PromptServer.instance.prompt_queue
        if any(
            item[1] == self.id for items in queue.get_current_queue_volatile() for item in items
        ):
            return
        if queue.get_history(self.id, map_function=bool):
            queue.delete_history_item(self.id)
            self._in_history = True
        if self._outcome or not self._in_history:  # else its last messages are on their way
            self._finish(self._outcome or CANCELLED)

    def _finish(self, state: str) -> None:
        if self.state in ENDED:
            return
        if PromptServer.instance.sockets.get(self.client_id) is self:
            del PromptServer.instance.sockets[self.client_id]
        try:
            self._enter("")
            self._seconds = time.perf_counter() - self._begun if self._begun else 0.0
            self._remove_files()
            result = self._summary() if state == DONE else None
        except Exception:  # of models of other packs, too; see send_json
            log.exception("The warm-up ended, but its result cannot be told.")
            state, self.error, self.code = FAILED, NOT_FOLLOWED, "not_followed"
        self.state = state
        if state == DONE:
            self.problems += filter(None, [self.error])  # of one node; the others ran
            self.error, self.result = "", result
            log.info("Warmed up in %.1f s.", self._seconds)
        self.prompt, self.form = {}, Form({}, frozenset())  # nobody's prompts stay for nothing

    # ------------------------------------------------------------------------------ its traces
    def _note_files(self, node_id: str, output: Any) -> None:
        """Files that nodes in the middle of a graph wrote to show them.

        Those of a node whose result the real run takes over are left: it will show them.
        """
        if node_id in self.form.kept or not isinstance(output, dict):
            return
        shown = (item for items in output.values() if isinstance(items, list) for item in items)
        self._temporary += [i for i in shown if isinstance(i, dict) and i.get("type") == "temp"]

    def _remove_files(self) -> None:
        folder = os.path.abspath(folder_paths.get_temp_directory())
        for item in self._temporary:
            parts = (str(item.get("subfolder") or ""), str(item.get("filename") or ""))
            path = os.path.abspath(os.path.join(folder, *parts))
            if _is_below(folder, path) and os.path.isfile(path):
                try:
                    os.unlink(path)
                except OSError as error:
                    log.warning("A file of the warm-up stays: %s", error)

    # ---------------------------------------------------------------------------- what to tell
    def report(self) -> dict[str, Any]:
        """For the page: state, progress, and in the end what was done. Seconds, bytes."""
        self.settle()
        running = self.state == RUNNING
        seconds = time.perf_counter() - self._begun if running else self._seconds
        return {
            "id": self.id,
            "state": self.state,
            "cancelling": self.cancelling and self.state not in ENDED,
            "ahead": self._ahead() if self.state == WAITING else 0,
            "percent": self._percent(),
            "node": self._name(self._current) if running and self._current else None,
            "step": self._step if running else None,
            "seconds": seconds,
            "error": self.error or None,
            "code": self.code or None,
            "left_out": self.left_out,
            "problems": self.problems,
            "result": self.result,
        }

    def _name(self, node_id: str) -> str:
        return title(self.form.prompt, node_id).rpartition(" (")[0].strip('"')

    def _ahead(self) -> int:
        """Runs that come first."""
        running, queued = PromptServer.instance.prompt_queue.get_current_queue_volatile()
        own = next((item[:2] for item in queued if item[1] == self.id), None)
        before = [item for item in queued if own and item[:2] < own]
        return len(before) + sum(item[1] != self.id for item in running)

    def _percent(self) -> int:
        """Nodes that are through, of those to run; a node with steps counts by its steps."""
        if self.state != RUNNING:
            return 100 if self.state == DONE else 0
        total = len(self.form.prompt.keys() - self._cached) or 1
        through = len(self._spent) - bool(self._current)
        if self._step and self._step[1]:
            through += self._step[0] / self._step[1]
        return min(99, int(100 * through / total))

    def _summary(self) -> dict[str, Any]:
        nodes = self.form.prompt
        encodes = STOCK_NODES | settings().more_nodes | _OUR_ENCODES
        known = {n for n in self._cached if nodes.get(n, {}).get("class_type") in encodes}
        known |= {n for n, result in self._facts.items() if result == "hit"}
        kept = 0.0 if args.cache_none else sum(self._spent.get(n, 0.0) for n in self.form.kept)
        return {
            "models": [model._asdict() for model in resident_models()],
            "encoded": sum(result != "hit" for result in self._facts.values()),
            "stored": self._stored,
            "known": len(known),
            "seconds": self._seconds,
            "kept_seconds": kept,
            "cache": host_cache(),
        }


def _is_below(folder: str, path: str) -> bool:
    try:
        return os.path.commonpath([folder, path]) == folder
    except ValueError:  # Windows: on another drive
        return False


def host_cache() -> str:
    """How ComfyUI keeps results of nodes: ram (all that fit), lru, classic (one run), none."""
    if args.cache_none:
        return "none"
    if args.cache_classic:
        return "classic"
    return "lru" if args.cache_lru > 0 else "ram"


def resident_models() -> list[Resident]:
    """What ComfyUI has loaded, the largest first."""
    found = [model for _, model in loaded_models.known()]
    found.sort(key=lambda model: -model.bytes)
    return [Resident(m.name, m.kind, m.device, m.bytes) for m in found]


def refusals(prompt: dict[str, Any], error: Any, node_errors: dict[str, Any]) -> list[str]:
    """What ComfyUI's validation says, one sentence per node and complaint."""
    found = []
    for node_id, node in node_errors.items():
        for item in node.get("errors", []):
            details = str(item.get("details") or "").strip()
            said = f"{item.get('message')}: {details}" if details else str(item.get("message"))
            found.append(f"{title(prompt, node_id)}: {said}")
    if not found and isinstance(error, dict):
        found.append(": ".join(filter(None, (error.get("message"), error.get("details")))))
    return found
