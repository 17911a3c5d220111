"""Pinned outputs: a node's values are kept, and it stands in the graph without being run."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import comfy.model_management
import nodes as comfy_nodes
from aiohttp import web
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..core.graph_identity import is_link
from ..core.pins import PinLost, PinStore, Unpinnable
from . import encoding
from .loaders import REGISTRY
from .requests import refused
from .store import FOLDER

PATH = "/qwen_vram/pins"
PINS = PinStore(FOLDER / "pins")
# Types of which no exact copy can be kept: refused before anything runs for them.
LIVE_TYPES = frozenset(
    {
        *("MODEL", "CLIP", "VAE", "CONTROL_NET", "CLIP_VISION", "STYLE_MODEL", "GLIGEN", "HOOKS"),
        *("UPSCALE_MODEL", "MODEL_PATCH", "AUDIO_ENCODER", "GUIDER", "SAMPLER", "NOISE"),
    }
)
ADVICE = "Pin a node behind it instead: conditioning, latents, images and masks can be kept."
HOW_TO_DELETE = f"Use DELETE {PATH}/<content> for one pin, {PATH}?everything=true for all."
VALUE_TOOLTIP = "One output of the node to pin: value_0 is its first."


class Source(NamedTuple):
    """An output to pin: the name of the input that it feeds, its type, and the node's title."""

    name: str
    type: str
    title: str

    def refused(self, why: str) -> ValueError:
        """The sentence for somebody who wanted to pin it."""
        return ValueError(f'The output {self.type} of "{self.title}" cannot be pinned: {why}')


class Pin(io.ComfyNode):
    """Keep what a node gives. The editor puts it into a request of its own, never into a graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMPin.md."""
        return io.Schema(
            node_id="QwenVRAMPin",
            display_name="Pin Values (Qwen VRAM)",
            category="Qwen VRAM/internal",
            description=(
                "Keeps all outputs of one node in a file. Pin output in the menu of a node uses "
                "it; it is not meant to be added to a graph."
            ),
            search_aliases=["freeze node", "pin output"],
            inputs=[
                io.AnyType.Input("value_0", optional=True, tooltip=VALUE_TOOLTIP),
                io.AnyType.Input("value_1", optional=True, tooltip=VALUE_TOOLTIP),
                io.AnyType.Input("value_2", optional=True, tooltip=VALUE_TOOLTIP),
                io.AnyType.Input("value_3", optional=True, tooltip=VALUE_TOOLTIP),
                io.AnyType.Input("value_4", optional=True, tooltip=VALUE_TOOLTIP),
                io.AnyType.Input("value_5", optional=True, tooltip=VALUE_TOOLTIP),
                io.AnyType.Input("value_6", optional=True, tooltip=VALUE_TOOLTIP),
                io.AnyType.Input("value_7", optional=True, tooltip=VALUE_TOOLTIP),
            ],
            outputs=[],
            hidden=[io.Hidden.dynprompt],
            is_output_node=True,
            is_input_list=True,
            is_dev_only=True,
        )

    @classmethod
    def validate_inputs(cls, input_types: Any) -> bool | str:
        """Refuse what can never be kept before anything runs for it."""
        types = input_types[0] if isinstance(input_types, list) else input_types
        live = [kind for _, kind in sorted(types.items()) if kind in LIVE_TYPES]
        if not live:
            return True
        return f"The output {live[0]} cannot be pinned: no exact copy of it can be kept. {ADVICE}"

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> float:
        """Run whenever asked: the file may have been deleted since."""
        return float("nan")

    @classmethod
    def execute(cls, **values: list[Any] | None) -> io.NodeOutput:
        """Write one file with all values, and tell its name."""
        sources = _sources(cls.hidden.dynprompt)
        given = [values[source.name] for source in sources]
        for source, items in zip(sources, given, strict=True):
            if items is None or len(items) != 1:
                raise source.refused(f"it is a list of {len(items or [])} values. {ADVICE}")
        types = [source.type for source in sources]
        device = str(comfy.model_management.get_torch_device())
        try:
            pin = PINS.put([items[0] for items in given], types, device)
        except Unpinnable as why:
            raise sources[why.index].refused(f"{why}, of which no exact copy is kept") from why
        except OSError as error:
            raise OSError(f"The pin cannot be written to {PINS.directory}: {error}.") from error
        facts = {"content": pin.content, "bytes": pin.bytes, "types": types}
        return io.NodeOutput(ui={"qwen_vram_pin": [facts]})


def _sources(dynprompt: Any) -> list[Source]:
    """Which outputs feed this node, in their order."""
    inputs = dynprompt.get_node(get_executing_context().node_id)["inputs"]
    links = [(f"value_{i}", inputs.get(f"value_{i}")) for i in range(len(inputs))]
    if not links or any(
        not is_link(link) or link != [links[0][1][0], i] for i, (_, link) in enumerate(links)
    ):
        raise ValueError("value_0, value_1 ... must be the outputs of one node, from its first on.")
    node = dynprompt.get_node(links[0][1][0])
    types = comfy_nodes.NODE_CLASS_MAPPINGS[node["class_type"]].RETURN_TYPES
    title = node.get("_meta", {}).get("title") or node["class_type"]
    return [Source(name, str(types[link[1]]), title) for name, link in links]


class Pinned(io.ComfyNode):
    """Stand in for a node whose outputs are pinned; queue_time puts it there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See js/docs/QwenVRAMPinned.md."""
        return io.Schema(
            node_id="QwenVRAMPinned",
            display_name="Pinned Values (Qwen VRAM)",
            category="Qwen VRAM/internal",
            description=(
                "Gives what was pinned. It takes the place of a pinned node when a graph is "
                "queued; it is not meant to be added to a graph."
            ),
            search_aliases=["frozen node", "pinned output"],
            inputs=[
                io.String.Input(
                    "content", optional=True, tooltip="The SHA-256 of the pinned values."
                ),
                io.String.Input(
                    "problem", optional=True, tooltip="Why the pin is refused, if it is."
                ),
            ],
            outputs=[
                io.AnyType.Output(display_name="value_0"),
                io.AnyType.Output(display_name="value_1"),
                io.AnyType.Output(display_name="value_2"),
                io.AnyType.Output(display_name="value_3"),
                io.AnyType.Output(display_name="value_4"),
                io.AnyType.Output(display_name="value_5"),
                io.AnyType.Output(display_name="value_6"),
                io.AnyType.Output(display_name="value_7"),
            ],
            is_dev_only=True,
        )

    @classmethod
    def validate_inputs(cls, content: str | None = None, problem: str | None = None) -> bool | str:
        """Say before anything runs that the value is not there."""
        if problem:
            return problem
        try:
            PINS.check(content)
        except PinLost as lost:
            return str(lost)
        return True

    @classmethod
    def execute(cls, content: str | None = None, problem: str | None = None) -> io.NodeOutput:
        """Load the values. An output that the node did not have when it was pinned is blocked."""
        entry = PINS.get(content)
        REGISTRY.forget_leaving()
        if entry.device.startswith("cuda"):
            encoding.settle_attention()
        more = len(cls.SCHEMA.outputs) - len(entry.value)
        absent = ExecutionBlocker(
            "This output was not there when the node was pinned. Unpin the node, and pin it again."
        )
        return io.NodeOutput(*entry.value, *[absent] * more)


async def list_pins(request: web.Request) -> web.Response:
    """Every pin, the last used first, with its bytes."""
    if (refusal := refused(request)) is not None:
        return refusal
    try:
        pins = await asyncio.to_thread(PINS.listed)
    except OSError as error:
        return web.json_response({"error": str(error)}, status=500)
    return web.json_response([pin._asdict() for pin in pins])


async def delete_pin(request: web.Request) -> web.Response:
    """Delete the pin that the address names."""
    if (refusal := refused(request)) is not None:
        return refusal
    if request.query:
        return _bad(f"{min(request.query)} is not known: the address names the pin to delete.")
    return await _deleted([request.match_info["content"]])


async def delete_pins(request: web.Request) -> web.Response:
    """Delete all pins, if the request says that it means all."""
    if (refusal := refused(request)) is not None:
        return refusal
    unknown = request.query.keys() - {"everything"}
    if unknown:
        return _bad(f"{min(unknown)} is not known. {HOW_TO_DELETE}")
    if request.query.get("everything", "").lower() not in ("true", "1"):
        return _bad(f"This would delete every pin. {HOW_TO_DELETE}")
    return await _deleted(None)


def _bad(sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=400)


async def _deleted(contents: list[str] | None) -> web.Response:
    """Delete these pins, or all, and answer how many there were."""
    try:
        return web.json_response({"deleted": await asyncio.to_thread(_delete, contents)})
    except PinLost as error:
        return _bad(str(error))
    except OSError as error:
        return web.json_response({"error": str(error)}, status=500)


def _delete(contents: list[str] | None) -> int:
    if contents is None:
        contents = [pin.content for pin in PINS.listed()]
    return sum(map(PINS.delete, contents))


def register() -> None:
    """Serve the list of pins; called when the pack is loaded."""
    table = PromptServer.instance.routes
    table.get(PATH)(list_pins)
    table.delete(PATH + "/{content}")(delete_pin)
    table.delete(PATH)(delete_pins)


NODES = [Pin, Pinned]
