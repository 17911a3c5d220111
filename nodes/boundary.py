"""Runs a piece of work at a moment when no node runs, so that models can be moved safely.

ComfyUI runs nodes in one worker thread, and its model management is not made for a second one.
While a prompt runs, the work is therefore done by the worker itself: two of its own interfaces call
us there, the progress handlers when a node starts or ends, and the cache providers when a prompt
does. Between prompts the worker only waits (or collects garbage), so whoever asks does the work;
a prompt that starts meanwhile is held up at its start until that is done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from comfy_api.latest import Caching, ComfyAPI
from comfy_execution.progress import (
    NodeProgressState,
    ProgressHandler,
    add_progress_handler,
    get_progress_state,
)

AT_ONCE, BETWEEN, AT_END = "at once", "between two nodes", "at the end of the prompt"
Work = Callable[[str], Any]


class _Waiting(NamedTuple):
    work: Work
    answer: Future[Any]


class Boundary(Caching.CacheProvider):
    """Tells when no node runs. As a cache provider it keeps nothing and finds nothing."""

    def __init__(self) -> None:
        self._gate = threading.RLock()
        self._running: set[str] = set()
        self._waiting: list[_Waiting] = []
        self.after_nodes: list[Callable[[], None]] = []  # called by the worker; must not raise

    @property
    def busy(self) -> bool:
        """Whether a prompt runs."""
        return bool(self._running)

    def submit(self, work: Work) -> Future[Any]:
        """Have `work` called with the kind of moment, at once if no prompt runs.

        It may take as long as the work: call it off the event loop. What the work raises is in
        the answer.
        """
        answer: Future[Any] = Future()
        with self._gate:
            self._waiting.append(_Waiting(work, answer))
            if not self._running:
                self._do(AT_ONCE)
        return answer

    def reached(self, moment: str) -> None:
        """Do what waits. Called by the worker, at such a moment."""
        if self._waiting:
            with self._gate:
                self._do(moment)

    def _do(self, moment: str) -> None:
        while self._waiting:
            work, answer = self._waiting.pop(0)
            try:
                answer.set_result(work(moment))
            except Exception as error:  # the prompt that happens to run is not to fail by it
                answer.set_exception(error)

    def on_prompt_start(self, prompt_id: str) -> None:
        """Called in the worker. ComfyUI makes the progress state of the prompt after this."""
        with self._gate:
            self._running.add(prompt_id)
        # The executor first waits for something when the state is there and no node has run yet.
        asyncio.get_running_loop().call_soon(self._listen, prompt_id)

    def on_prompt_end(self, prompt_id: str) -> None:
        """Called in the worker, also after an error or an interruption."""
        with self._gate:
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


class _Nodes(ProgressHandler):
    """Hears, in the worker, that a node is about to start or has ended."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__("qwen_vram.boundary")
        self._boundary = boundary

    def start_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        """Before the node's inputs are gathered."""
        self._boundary.reached(BETWEEN)

    def finish_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        """After its outputs were kept."""
        for act in self._boundary.after_nodes:
            act()
        self._boundary.reached(BETWEEN)


BOUNDARY = Boundary()


async def register() -> None:
    """Tell ComfyUI of it; called when the pack is loaded."""
    await ComfyAPI().caching.register_provider(BOUNDARY)
