"""Free memory: a node for any wire, and a route for scripts, the button and the commands."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from aiohttp import web
from comfy_api.latest import io
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import ExecutionContext, get_executing_context
from server import PromptServer

from ..core.clearing import (
    EVERYTHING,
    FIELDS,
    KINDS,
    LEVELS,
    MODELS,
    Wish,
    names_in,
    wait_of,
    wish_of,
)
from . import freeing
from .boundary import AT_END, AT_ONCE, BETWEEN, BOUNDARY, FLAG, is_quiet
from .requests import json_body, refused
from .status import shown

log = logging.getLogger("qwen_vram")

PATH = "/qwen_vram/clear"
EVENT = "qwen_vram.cleared"
AT_NODE = "at this node"
NOT_YET = "another node still runs: memory is freed as soon as it ends"


class Clear(io.ComfyNode):
    """Free memory at this point of the graph, and hand on what came in."""

    HANDS_ON = "value"  # as its output: the prompt cache looks through it

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMClear.md."""
        wire = io.MatchType.Template("wire")
        return io.Schema(
            node_id="QwenVRAMClear",
            display_name="Clear VRAM (Qwen VRAM)",
            category="Qwen VRAM/memory",
            description=(
                "Frees memory at this point of the graph and hands on its input unchanged. It runs "
                "when its input was computed anew."
            ),
            search_aliases=["free memory", "unload models", "clean vram", "purge", "empty cache"],
            inputs=[
                io.MatchType.Input(
                    "value", template=wire, tooltip="Anything; it is handed on unchanged."
                ),
                io.Combo.Input(
                    "level",
                    options=list(LEVELS),
                    default=MODELS,
                    tooltip=(
                        "cache: garbage and what torch keeps for later. models: also takes models "
                        "out of VRAM. everything: also forgets all node outputs, when the prompt "
                        "ends."
                    ),
                ),
                *cls.choices(),
            ],
            outputs=[io.MatchType.Output(template=wire, display_name="value")],
        )

    @classmethod
    def choices(cls) -> list[io.Input]:
        """What the level models unloads."""
        return [
            io.Boolean.Input(
                "diffusion_models",
                default=True,
                tooltip="At the level models: unload diffusion models.",
                advanced=True,
            ),
            io.Boolean.Input(
                "text_encoders",
                default=True,
                tooltip="At the level models: unload text encoders.",
                advanced=True,
            ),
            io.Boolean.Input(
                "vaes",
                default=True,
                tooltip="At the level models: unload VAEs.",
                advanced=True,
            ),
            io.Boolean.Input(
                "other_models",
                default=True,
                tooltip="At the level models: unload all other models, as ControlNets.",
                advanced=True,
            ),
            io.Boolean.Input(
                "keep_needed",
                default=False,
                tooltip="At the level models: leave those alone whose files this graph names.",
                advanced=True,
            ),
        ]

    @classmethod
    def execute(
        cls,
        value: Any,
        level: str,
        diffusion_models: bool,
        text_encoders: bool,
        vaes: bool,
        other_models: bool,
        keep_needed: bool,
    ) -> io.NodeOutput:
        """Free, in the worker thread, once for all items of a list."""
        context = get_executing_context()
        if _is_next_item(context):
            return io.NodeOutput(value)
        if level == EVERYTHING:
            PromptServer.instance.prompt_queue.set_flag(FLAG, True)
            return shown(value, text="everything goes when this prompt ends", level=level)
        chosen = zip(KINDS, (diffusion_models, text_encoders, vaes, other_models), strict=True)
        wish = Wish(level, frozenset(kind for kind, on in chosen if on), keep_needed)
        work = freeing.free(wish, running_names())
        if not is_quiet(context.node_id):
            BOUNDARY.submit(work).add_done_callback(_log)
            return shown(value, text=NOT_YET, level=level)
        return shown(value, **work(AT_NODE))


_acted: tuple[str, str] | None = None  # the prompt and the node that last freed


def _is_next_item(context: ExecutionContext) -> bool:
    """ComfyUI calls a node once per item of a list, and skips items that are blocked."""
    global _acted
    last, _acted = _acted, (context.prompt_id, context.node_id)
    return bool(context.list_index) and _acted == last


def running_names() -> frozenset[str]:
    """What the prompt that runs, or ran last, names."""
    return names_in(get_progress_state().dynprompt.get_original_prompt())


# ---------------------------------------------------------------------------------------- the route
Done = asyncio.Task[dict[str, Any]] | Future[dict[str, Any]]


class _Clearing(NamedTuple):
    """One that is under way, and the clients that are told when it is done."""

    task: asyncio.Task[dict[str, Any]]
    clients: set[str]


_under_way: dict[tuple[Wish, frozenset[str]], _Clearing] = {}


async def post_clear(request: web.Request) -> web.Response:
    """POST: free memory; see js/docs/QwenVRAMClear.md for the fields and the answer."""
    if (refusal := refused(request)) is not None:
        return refusal
    try:
        fields = await json_body(request, FIELDS)
        wish, names = wish_of(fields), names_in(fields.get("prompt", {}))
    except (ValueError, RecursionError) as error:
        return web.json_response({"error": str(error)}, status=400)
    clearing = _begin(wish, names if wish.keep_needed else frozenset())
    await asyncio.wait({clearing.task}, timeout=wait_of(fields))
    if not clearing.task.done():
        clearing.clients.update({fields.get("client_id")} - {None})
        return web.json_response(_later(wish), status=202)
    answer = _answer(clearing.task)
    return web.json_response(answer, status=500 if "error" in answer else 200)


async def get_clear(request: web.Request) -> web.Response:
    """GET: 405. Without it ComfyUI would look for a file of that name, and answer 404."""
    sentence = "Freeing memory takes a POST, see the help of the node Clear VRAM."
    return web.json_response({"error": sentence}, status=405, headers={"Allow": "POST"})


def _begin(wish: Wish, names: frozenset[str]) -> _Clearing:
    """Begin it, or find the same one that still waits: a button may be pressed many times."""
    key = wish, names
    if key not in _under_way:
        work = _everything(wish) if wish.level == EVERYTHING else _free(wish, names)
        clearing = _under_way[key] = _Clearing(asyncio.create_task(work), set())
        clearing.task.add_done_callback(lambda _: _end(key))
    return _under_way[key]


def _end(key: tuple[Wish, frozenset[str]]) -> None:
    """Tell those who did not get an answer in time."""
    task, clients = _under_way.pop(key)
    if task.cancelled():  # ComfyUI ends
        return
    _log(task)
    for client in clients:
        PromptServer.instance.send_sync(EVENT, _answer(task), client)


def _log(task: Done) -> None:
    answer = _answer(task)
    if "error" in answer:
        log.error(answer["error"], exc_info=task.exception())
    else:
        log.info("Cleared (%s): %s", answer["level"], answer["text"])


def _answer(task: Done) -> dict[str, Any]:
    if (error := task.exception()) is None:
        return task.result()
    return {"error": f"Memory was not freed: {type(error).__name__}: {error}"}


def _later(wish: Wish) -> dict[str, Any]:
    """The answer to somebody who does not wait any longer."""
    moment, text = AT_ONCE, "Memory is being freed. This takes a while."
    if BOUNDARY.busy:
        moment = AT_END if wish.level == EVERYTHING else BETWEEN
        what = "prompt" if wish.level == EVERYTHING else "node"
        text = f"ComfyUI is running a prompt. Memory is freed as soon as the running {what} ends."
    return {"done": False, "level": wish.level, "when": moment, "text": text}


async def _free(wish: Wish, names: frozenset[str]) -> dict[str, Any]:
    """The levels cache and models, when no node runs."""

    def work(moment: str) -> dict[str, Any]:
        """Models of a prompt that runs are needed as well."""
        more = frozenset() if moment == AT_ONCE else running_names()
        return freeing.free(wish, names | more)(moment)

    return await BOUNDARY.done(work)


async def _everything(wish: Wish) -> dict[str, Any]:
    """By the flag of ComfyUI's queue, which its worker looks at between two prompts."""

    def before(moment: str) -> Callable[[], dict[str, Any]]:
        """Figures, and how to tell what became of them."""
        return functools.partial(freeing.told, freeing.Freeing.of(wish, frozenset()), moment)

    return await BOUNDARY.everything_forgotten(before)


def register() -> None:
    """Add the routes; called when the pack is loaded."""
    PromptServer.instance.routes.post(PATH)(post_clear)
    PromptServer.instance.routes.get(PATH)(get_clear)


NODES = [Clear]
