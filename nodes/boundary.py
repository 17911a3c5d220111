"""Has work done by ComfyUI's worker when no node runs, so that models can be moved safely.

ComfyUI runs nodes in one thread, the worker, which also unloads models between prompts; its model
management is not made for a second one. Three of ComfyUI's own interfaces call us in that thread:
the progress handlers when a node starts or ends, the cache providers when a prompt does, and the
queue's flags between prompts. There, and as soon as a flag is set while nothing runs, the worker
asks whether "free_memory" is true (main.py, prompt_worker), and our flag works when it is asked.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from comfy_api.latest import Caching, ComfyAPI
from comfy_execution.progress import (
    NodeProgressState,
    NodeState,
    ProgressHandler,
    add_progress_handler,
    get_progress_state,
)
from server import PromptServer

AT_ONCE, BETWEEN, AT_END = "at once", "between two nodes", "at the end of the prompt"
FLAG = "free_memory"
POLL_SECONDS = 0.05
SILENT_SECONDS, DEAD_SECONDS = 120.0, 5.0
GONE = (
    "nothing runs, and ComfyUI's worker did not answer. It may have ended by an error: see "
    "ComfyUI's log, and start ComfyUI again."
)
Work = Callable[[str], Any]


class _Waiting(NamedTuple):
    """Work, and whether a prompt ran when it was asked for."""

    work: Work
    answer: Future[Any]
    busy: bool

    @property
    def between_prompts(self) -> str:
        """The moment, when it is done there."""
        return AT_END if self.busy else AT_ONCE


class _Flag:
    """What stands in the queue as "free_memory": the worker works when it asks if it is true."""

    def __init__(self, boundary: Boundary, forget: bool) -> None:
        self._boundary, self._forget = boundary, forget
        self._taken = False

    def __bool__(self) -> bool:
        """Whether ComfyUI is to forget everything; the worker asks up to twice."""
        waits = PromptServer.instance.prompt_queue.get_flags(reset=False).get(FLAG) is self
        if not waits and not self._taken:  # else somebody only looks
            self._taken = True
            self._forget |= self._boundary.between_prompts()
        return self._forget


class Boundary(Caching.CacheProvider):
    """Tells when no node runs. As a cache provider it keeps nothing and finds nothing."""

    def __init__(self) -> None:
        self._worker: threading.Thread | None = None  # where known
        self._running: set[str] = set()
        self._waiting: list[_Waiting] = []
        self.after_nodes: list[Callable[[], None]] = []  # called by the worker; must not raise
        self._forgetting: list[_Waiting] = []
        self._forgotten: list[tuple[Callable[[], Any], Future[Any]]] = []

    @property
    def busy(self) -> bool:
        """Whether a prompt runs."""
        return bool(self._running)

    def submit(self, work: Work) -> Future[Any]:
        """Have the worker call `work` with the kind of moment. What it raises is in the answer."""
        return self._submit(work, self._waiting)

    async def done(self, work: Work) -> Any:
        """What `work` gave, when it is done. Raises what it raised, RuntimeError without worker."""
        return await self._wait(self.submit(work))

    async def everything_forgotten(self, before: Work) -> Any:
        """Have ComfyUI forget everything between two prompts.

        `before` is called just before that, and what it returns just behind it: that is the answer.
        """
        return await self._wait(self._submit(before, self._forgetting))

    def _submit(self, work: Work, to: list[_Waiting]) -> Future[Any]:
        answer: Future[Any] = Future()
        to.append(_Waiting(work, answer, self.busy))
        self._ask()
        return answer

    def _ask(self) -> None:
        """Set the flag, and wake the worker."""
        queue = PromptServer.instance.prompt_queue
        with queue.mutex:
            there = queue.get_flags(reset=False).get(FLAG)
            flag = there if isinstance(there, _Flag) else _Flag(self, bool(there))
            queue.set_flag(FLAG, flag)

    async def _wait(self, answer: Future[Any]) -> Any:
        """Ask again and again: the worker misses a flag that is set just before it falls asleep."""
        since = time.monotonic()
        while not answer.done():
            patience = self._patience(answer)
            if patience is None:
                since = time.monotonic()
            elif time.monotonic() - since > patience:
                answer.cancel()  # so that it is not done after all
                raise RuntimeError(GONE)
            self._ask()
            await asyncio.sleep(POLL_SECONDS)
        return answer.result()

    def _patience(self, answer: Future[Any]) -> float | None:
        """Seconds that the worker may be silent; None while it is known to be at work."""
        if self._worker is not None and not self._worker.is_alive():
            return DEAD_SECONDS
        return None if self.busy or answer.running() else SILENT_SECONDS

    # ------------------------------------------------------------------------------ in the worker
    def between_prompts(self) -> bool:
        """Do what waits. Returns whether ComfyUI is to forget everything now."""
        self._worker = threading.current_thread()
        self._finish()
        while self._waiting:
            waiting = self._waiting.pop(0)
            _call(waiting, waiting.between_prompts, waiting.answer.set_result)
        forget = bool(self._forgetting)
        while self._forgetting:
            waiting = self._forgetting.pop(0)
            _call(
                waiting,
                waiting.between_prompts,
                lambda after, answer=waiting.answer: self._forgotten.append((after, answer)),
            )
        return forget

    def _finish(self) -> None:
        """ComfyUI is through with forgetting."""
        while self._forgotten:
            after, answer = self._forgotten.pop(0)
            try:
                answer.set_result(after())
            except Exception as error:
                answer.set_exception(error)

    def reached(self, moment: str, starting: str = "") -> None:
        """Do what waits, at a moment within a prompt; the node `starting` does not run yet."""
        if self._waiting and threading.current_thread() is self._worker and is_quiet(starting):
            while self._waiting:
                waiting = self._waiting.pop(0)
                _call(waiting, moment, waiting.answer.set_result)

    def on_prompt_start(self, prompt_id: str) -> None:
        """Called in the worker. ComfyUI makes the progress state of the prompt after this."""
        self._worker = threading.current_thread()
        self._finish()
        self._running.add(prompt_id)
        # The executor first waits for something when the state is there and no node has run yet.
        asyncio.get_running_loop().call_soon(self._listen, prompt_id)

    def on_prompt_end(self, prompt_id: str) -> None:
        """Called in the worker, also after an error or an interruption."""
        self._running.discard(prompt_id)
        self.reached(AT_END)

    def _listen(self, prompt_id: str) -> None:
        if get_progress_state().prompt_id == prompt_id:
            add_progress_handler(_Nodes(self))

    def should_cache(
        self, context: Caching.CacheContext, value: Caching.CacheValue | None = None
    ) -> bool:
        """Never."""
        return False

    async def on_lookup(self, context: Caching.CacheContext) -> Caching.CacheValue | None:
        """Never called: see `should_cache`."""

    async def on_store(self, context: Caching.CacheContext, value: Caching.CacheValue) -> None:
        """Never called."""


def _call(waiting: _Waiting, moment: str, then: Callable[[Any], None]) -> None:
    """Nothing that it raises is to fail the prompt, or to end the worker."""
    if waiting.answer.set_running_or_notify_cancel():
        try:
            then(waiting.work(moment))
        except Exception as error:
            waiting.answer.set_exception(error)


def is_quiet(node_id: str) -> bool:
    """Whether no node but this one is at work. Asked in the worker, within a prompt.

    An asynchronous node runs on as a task while others start and end. A node that waits for its
    inputs, or for nodes that it made, counts as running too, but has no task.
    """
    states = get_progress_state().nodes.items()
    others = any(s["state"] is NodeState.Running for other, s in states if other != node_id)
    return not (others and asyncio.all_tasks() - {asyncio.current_task()})


class _Nodes(ProgressHandler):
    """Hears, in the worker, that a node is about to start or has ended."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__("qwen_vram.boundary")
        self._boundary = boundary

    def start_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        """Before the node's inputs are gathered."""
        self._boundary.reached(BETWEEN, node_id)

    def finish_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        """After its outputs were kept."""
        for act in self._boundary.after_nodes:
            act()
        self._boundary.reached(BETWEEN)


BOUNDARY = Boundary()


async def register() -> None:
    """Tell ComfyUI of it; called when the pack is loaded."""
    await ComfyAPI().caching.register_provider(BOUNDARY)
