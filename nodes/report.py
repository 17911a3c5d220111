"""Memory Report: who holds the memory of every device, as a node and as GET /qwen_vram/report."""

from __future__ import annotations

import asyncio
import io as streams
import json
import threading
import time as clock
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from aiohttp import web
from comfy_api.latest import io, ui
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..core import memory_map, memory_report, memory_text
from ..core.graph_identity import is_link
from .boundary import AT_ONCE, BOUNDARY
from .devices import devices
from .memory_models import note_used
from .memory_sources import gather, note_start
from .requests import json_body, refused
from .status import shown

PATH = "/qwen_vram/report"
FORMATS = ("json", "text", "png")
THEMES = tuple(memory_map.THEMES)
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
NO_STORE = {"Cache-Control": "no-store"}
BUSY = "Not tried: a prompt runs, and it needs the memory. Ask again when nothing runs."
ANY = io.MatchType.Template("value")


class Report(io.ComfyNode):
    """Say who holds the memory, at this point of the graph."""

    HANDS_ON = "value"  # as its first output: the prompt cache looks through it

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMReport.md."""
        return io.Schema(
            node_id="QwenVRAMReport",
            display_name="Memory Report (Qwen VRAM)",
            category="Qwen VRAM/memory",
            description=(
                "Shows who holds the memory of every device: other programs, each model, the "
                "allocator, and what nobody accounts for. What cannot be measured is said."
            ),
            search_aliases=["vram usage", "memory map", "vram debug", "fragmentation", "who holds"],
            inputs=[
                io.MatchType.Input(
                    "value",
                    ANY,
                    optional=True,
                    tooltip=(
                        "Anything: it is passed on unchanged, so that the report is made at this "
                        "point of the graph."
                    ),
                ),
                io.Boolean.Input(
                    "probe",
                    default=False,
                    tooltip=(
                        "Also find the largest allocation that would succeed now, by trying. "
                        "Gives the allocator's cache back to the driver."
                    ),
                    advanced=True,
                ),
                io.Combo.Input(
                    "theme",
                    options=list(THEMES),
                    tooltip="The colours of the picture.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.MatchType.Output(ANY, display_name="value"),
                io.String.Output(display_name="text"),
                io.String.Output(display_name="json"),
                io.Image.Output(display_name="picture"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float | str:
        """Report at every run, unless that would make what follows on the wire run again.

        What ComfyUI knows of a node is part of the signature of every node behind it, so a node
        that always runs has all of them run. With `value` connected to another node this one runs
        when its input was computed anew, as any other.
        """
        context, graph = get_executing_context(), get_progress_state().dynprompt
        followed = [context.node_id, 0] if context is not None else None
        for node_id in graph.all_node_ids():
            links = graph.get_node(node_id)["inputs"].values()
            if any(is_link(link) and list(link) == followed for link in links):
                return "on a wire"
        return float("nan")

    @classmethod
    def execute(cls, probe: bool, theme: str, value: Any = None) -> io.NodeOutput:
        """Gather, draw, and pass `value` on."""
        told = gather(thorough=True, probe=probe)
        picture = as_image(memory_map.draw(told, theme))
        result = shown(
            value, memory_text.text(told), json.dumps(told), picture, text=headline(told)
        )
        result.ui = {**result.ui, **ui.PreviewImage(picture, cls=cls).as_dict()}
        return result


def as_image(picture: Any) -> torch.Tensor:
    """A PIL picture as ComfyUI's IMAGE."""
    pixels = np.asarray(picture, dtype=np.float32) / 255.0  # (H, W, 3)
    return torch.from_numpy(pixels)[None]  # HWC -> BHWC


def headline(told: Mapping[str, Any]) -> str:
    """What is shown on the node as text: free memory, and the first finding."""
    amount = memory_text.amount
    words = [
        f"{d['name'] if d['kind'] == 'cpu' else d['device']}: "
        f"{amount(d['free_bytes'])} free of {amount(d['total_bytes'])}"
        for d in told["devices"]
    ]
    if told["findings"]:
        first = told["findings"][0]
        words.append(f"{first['text']} {first['action']}")
    return " · ".join(words)


# -------------------------------------------------------------------------------------- the route
class Wish(NamedTuple):
    """What a request asks for."""

    format: str = "json"
    theme: str = THEMES[0]
    device: str | None = None
    fragments: bool = False


def wish_of(query: Mapping[str, str]) -> Wish:
    """Read the query of a request. Raises ValueError with a sentence."""
    if "probe" in query:
        raise ValueError(f"probe is no part of a GET, since it allocates: POST {PATH} with {{}}.")
    unknown = query.keys() - set(Wish._fields)
    if unknown:
        known = ", ".join(Wish._fields)
        raise ValueError(f"{min(unknown)[:80]} is not known: use {known}, or nothing.")
    wish = Wish(
        _one_of(query, "format", FORMATS, FORMATS[0]),
        _one_of(query, "theme", THEMES, THEMES[0]),
        _one_of(query, "device", [str(device) for device in devices()], None),
        _flag(query, "fragments"),
    )
    if "theme" in query and wish.format != "png":
        raise ValueError("theme is only for format=png.")
    return wish


def _one_of(query: Mapping[str, str], name: str, known: Any, usual: Any) -> Any:
    value = query.get(name, usual)
    if value is not usual and value not in known:
        raise ValueError(f"{name} must be one of: {', '.join(known)}.")
    return value


def _flag(query: Mapping[str, str], name: str) -> bool:
    found = _FLAGS.get(query.get(name, "false").lower())
    if found is None:
        raise ValueError(f"{name} must be true or false.")
    return found


class _Shared:
    """One report at a time; all who wait for it share the next one. None is older than its wish."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[Wish, tuple[float, dict[str, Any]]] = {}

    def report(self, wish: Wish) -> dict[str, Any]:
        """The report for this wish, begun after it came."""
        wish = wish._replace(format=FORMATS[0], theme=THEMES[0])
        came = clock.perf_counter()
        with self._lock:
            began, told = self._last.get(wish, (came, {}))
            if began <= came:
                began = clock.perf_counter()
                told = gather(wish.fragments, False, wish.device)
                self._last = {wish: (began, told)}
        return told


_shared = _Shared()


async def probed(only: str | None = None) -> dict[str, Any]:
    """The report with a probe, which is only tried while no prompt runs.

    ComfyUI's worker tries it, so that a prompt that comes meanwhile waits, and the server goes on.
    Raises RuntimeError where the worker does not answer.
    """

    def _unless_running(moment: str) -> dict[str, Any] | None:
        return gather(False, True, only) if moment == AT_ONCE else None

    if not BOUNDARY.busy and (told := await BOUNDARY.done(_unless_running)):
        return told
    told = await asyncio.to_thread(gather, False, False, only)
    for device in told["devices"]:
        device["largest_allocation"] = memory_report.Probe(None, BUSY)._asdict()
    return told


def _png(told: dict[str, Any], theme: str) -> bytes:
    stream = streams.BytesIO()
    memory_map.draw(told, theme).save(stream, "PNG")
    return stream.getvalue()


async def get_report(request: web.Request) -> web.Response:
    """GET: the report as JSON, text or picture."""
    refusal = refused(request)
    if refusal is not None:
        return refusal
    try:
        wish = wish_of(request.query)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    told = await asyncio.to_thread(_shared.report, wish)
    if wish.format == "png":
        body = await asyncio.to_thread(_png, told, wish.theme)
        return web.Response(body=body, content_type="image/png", headers=NO_STORE)
    if wish.format == "text":
        return web.Response(text=memory_text.text(told), headers=NO_STORE)
    return web.json_response(told, headers=NO_STORE)


async def post_probe(request: web.Request) -> web.Response:
    """POST {"device": "cuda:0"}, or {} for all: the report as JSON, with a probe."""
    refusal = refused(request)
    if refusal is not None:
        return refusal
    try:
        body = await json_body(request, {"device": str})
        only = _one_of(body, "device", [str(device) for device in devices()], None)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    try:
        return web.json_response(await probed(only), headers=NO_STORE)
    except RuntimeError as error:
        return web.json_response({"error": f"Nothing was probed: {error}"}, status=503)


def register() -> None:
    """Serve the report, and note what CUDA itself takes; called when the pack is loaded."""
    note_start()
    BOUNDARY.after_nodes.append(note_used)
    PromptServer.instance.routes.get(PATH)(get_report)
    PromptServer.instance.routes.post(PATH)(post_probe)


NODES = [Report]
