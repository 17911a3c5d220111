"""Silent warm-up: the route, the node that stands for output nodes, and the one at start."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import execution
import nodes as comfy_nodes
from aiohttp import web
from comfy_api.internal import _ComfyNodeInternal
from comfy_api.latest import _io, io
from server import PromptServer

from ..core.warmup import (
    SINK,
    EmptyPrompt,
    Input,
    NodeFacts,
    NothingToWarm,
    check,
    title,
    warm_up_form,
)
from .requests import json_body, refusal, refused
from .settings import KEEP_NOTHING, WARM_UP_START, settings
from .store import FOLDER, reason_to_keep_nothing
from .warmup_run import CANCELLED, ENDED, FAILED, WarmUp, refusals

log = logging.getLogger("qwen_vram")

PATH = "/qwen_vram/warmup"
SAVED = FOLDER / "warm_up.json"
BODY = {"prompt": dict, "extra_data": dict}
BUSY = (
    "A warm-up is already waiting or running. Wait for its end, or cancel it with DELETE "
    "/qwen_vram/warmup."
)
ANOTHER = "Another warm-up waits or runs now; it was left alone. Yours is over."


class WarmupSink(io.ComfyNode):
    """Takes what an output node would have saved or shown. The editor never has it in a graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMWarmupSink.md."""
        return io.Schema(
            node_id="QwenVRAMWarmupSink",
            display_name="Warm-up Sink (Qwen VRAM)",
            category="Qwen VRAM/internal",
            description=(
                "Stands for nodes that save or show something while a workflow is warmed up. It "
                "does nothing; it is not meant to be added to a graph."
            ),
            search_aliases=["warm up", "discard"],
            inputs=[io.AnyType.Input("value", tooltip="What is computed and then dropped.")],
            outputs=[],
            is_output_node=True,
            is_input_list=True,
            is_dev_only=True,
        )

    @classmethod
    def execute(cls, value: list[Any]) -> io.NodeOutput:
        """Drop it."""
        return io.NodeOutput()


class Latest:
    """The warm-up that waits or runs, or else the last one: one at a time on a server."""

    run: WarmUp | None = None

    @classmethod
    def active(cls) -> bool:
        """Whether one waits or runs."""
        if cls.run is not None:
            cls.run.settle()
        return cls.run is not None and cls.run.state not in ENDED


async def begin(request: dict[str, Any]) -> tuple[WarmUp, dict[str, Any]]:
    """Queue the warm-up of a request that could be sent to /prompt, too.

    Returns it, and the prompt as other parts and packs have prepared it. Raises ValueError with
    sentences for the user.
    """
    server = PromptServer.instance
    request = server.trigger_on_prompt(request)
    prompt, extra = request.get("prompt"), request.get("extra_data")
    check(prompt)
    server.node_replace_manager.apply_replacements(prompt)
    facts = {node_id: facts_of(prompt, node_id) for node_id in prompt}
    run = Latest.run = WarmUp(prompt, warm_up_form(prompt, facts))
    try:
        await _validate_and_queue(run, extra if isinstance(extra, dict) else {})
    except BaseException as error:
        run.state, run.error = FAILED, str(error)  # else it would stand in the way of the next one
        raise
    return run, prompt


async def _validate_and_queue(run: WarmUp, extra: dict[str, Any]) -> None:
    prompt = run.form.prompt
    sinks = [name for name, node in prompt.items() if node["class_type"] == SINK]
    valid, error, outputs, node_errors = await execution.validate_prompt(run.id, prompt, sinks)
    run.problems = refusals(prompt, None, node_errors)
    if not valid:
        raise ValueError(" ".join(run.problems or refusals(prompt, error, {})))
    if run.cancelling:  # a real run came meanwhile
        run.state = CANCELLED
    else:
        run.queue(outputs, extra)


def facts_of(prompt: Mapping[str, Any], node_id: str) -> NodeFacts:
    """What a node's class declares. Raises ValueError if it is not installed, or cannot tell."""
    node = prompt[node_id]
    kind = comfy_nodes.NODE_CLASS_MAPPINGS.get(node["class_type"])
    if kind is None:
        raise ValueError(
            f"{title(prompt, node_id)}: there is no node {node['class_type']}. "
            "Install the custom node that it belongs to."
        )
    try:
        declared = kind.INPUT_TYPES()
        if issubclass(kind, _ComfyNodeInternal):  # whose inputs may depend on each other's values
            declared, _, _ = _io.get_finalized_class_inputs(declared, node["inputs"])
    except Exception as error:  # of another pack's code
        sentence = f"{title(prompt, node_id)}: it cannot tell its inputs ({type(error).__name__})."
        raise ValueError(sentence) from error
    inputs = {
        name: _input(spec)
        for group in ("required", "optional")
        for name, spec in (declared.get(group) or {}).items()
    }
    return NodeFacts(
        inputs,
        tuple(map(str, kind.RETURN_TYPES)),
        bool(getattr(kind, "OUTPUT_NODE", False)),
        bool(getattr(kind, "API_NODE", False)),
    )


def _input(spec: Any) -> Input:
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    minimum = options.get("min")
    kind = spec[0] if isinstance(spec[0], str) else "COMBO"
    return Input(
        str(kind),
        bool(options.get("lazy")),
        minimum if isinstance(minimum, (int, float)) else None,
    )


# ----------------------------------------------------------------------------------- the routes
async def post_warmup(request: web.Request) -> web.Response:
    """POST {"prompt": API prompt, "extra_data": as for /prompt}: warm it up, and say where it is.

    Its state is then found by GET. 400 with sentences where it cannot run, 409 while another
    warm-up waits or runs. Fixed sentences have a `code` of their own, the others "invalid".
    """
    if (foreign := refused(request)) is not None:
        return foreign
    try:
        body = await json_body(request, BODY)
        if Latest.active():
            return refusal(409, "busy", BUSY)
        run, prompt = await begin(body)
        await asyncio.to_thread(keep, prompt)
    except (EmptyPrompt, NothingToWarm) as error:
        return refusal(400, error.code, str(error))
    except ValueError as error:
        return refusal(400, "invalid", str(error))
    return web.json_response(run.report())


async def get_warmup(request: web.Request) -> web.Response:
    """GET: the state of the last warm-up, or {"state": "none"}."""
    if (foreign := refused(request)) is not None:
        return foreign
    return web.json_response(Latest.run.report() if Latest.run else {"state": "none"})


async def delete_warmup(request: web.Request) -> web.Response:
    """DELETE: cancel the warm-up that waits or runs; {"cancelled": whether there was one}.

    With ?id= that one alone: 409 while another waits or runs.
    """
    if (foreign := refused(request)) is not None:
        return foreign
    if unknown := sorted(request.query.keys() - {"id"}):
        return refusal(400, "invalid", f"{unknown[0][:80]} is not known: use id, or nothing.")
    active = Latest.active()
    if active and request.query.get("id", Latest.run.id) != Latest.run.id:
        return refusal(409, "another", ANOTHER)
    if active:
        Latest.run.cancel()
    return web.json_response({"cancelled": active})


def on_prompt(request: Any) -> Any:
    """Whoever queues a real run has it run now: the warm-up gives way."""
    if Latest.active():
        Latest.run.cancel()
    return request


# ----------------------------------------------------------------- the one when ComfyUI starts
def keep(prompt: dict[str, Any]) -> None:
    """Save the prompt for the next start, if the user wants that and nothing of it is private."""
    wanted = settings()
    if wanted.warm_up != WARM_UP_START or wanted.keep == KEEP_NOTHING:
        return
    if any(reason_to_keep_nothing(node, ours=True) for node in prompt.values()):
        return
    partial = SAVED.with_suffix(".partial")
    try:
        SAVED.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        partial.touch(0o600, exist_ok=False)  # before the prompts are in it
        partial.write_text(json.dumps({"version": 1, "prompt": prompt}), encoding="utf-8")
        os.replace(partial, SAVED)
    except OSError as error:
        log.warning("The workflow is not kept for the next start: %s", error)


def forget() -> list[str]:
    """Delete the saved prompt; return what could not be deleted, with the reason."""
    failed = []
    for path in (SAVED, SAVED.with_suffix(".partial")):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            failed.append(f"{path.name} ({error.strerror or error})")
    return failed


async def warm_up_saved() -> None:
    """Warm up what was saved, if that is wanted; else it is not kept any longer."""
    wanted = settings()
    if wanted.warm_up != WARM_UP_START or wanted.keep == KEEP_NOTHING:
        for failure in forget():
            log.warning("Not deleted: %s", failure)
        return
    try:
        saved = json.loads(SAVED.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or saved.get("version") != 1:
            raise ValueError(f"{SAVED.name} was not written by this version of the pack.")
        await begin({"prompt": saved.get("prompt"), "extra_data": {}})
    except FileNotFoundError:
        log.info("Nothing to warm up at start: press Warm up once in the editor.")
    except (OSError, ValueError) as error:
        log.warning("The saved workflow is not warmed up: %s", error)


_tasks: set[asyncio.Task[None]] = set()


async def _on_startup(app: web.Application) -> None:
    """All packs are loaded now; the server does not wait for it."""
    task = asyncio.get_running_loop().create_task(warm_up_saved())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def register() -> None:
    """Add the routes; called when the pack is loaded, before the server starts."""
    server = PromptServer.instance
    server.routes.post(PATH)(post_warmup)
    server.routes.get(PATH)(get_warmup)
    server.routes.delete(PATH)(delete_warmup)
    server.add_on_prompt_handler(on_prompt)
    server.app.on_startup.append(_on_startup)


NODES = [WarmupSink]
