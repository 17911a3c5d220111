"""Turns editor-format workflows into API prompts with comfy-cli's own converter."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from comfy_cli.workflow_to_api import convert_ui_to_api

from .substitutions import Prompt

_CONVERTER_LOG = "comfy_cli.workflow_to_api"


class ConversionError(ValueError):
    """A workflow that cannot be run as it is, with the reason in one sentence."""


class _Collector(logging.Handler):
    """Keeps the converter's warnings, which would otherwise silently drop or misread a node."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one message."""
        reason = f": {record.exc_info[1]}" if record.exc_info else ""
        self.lines.append(record.getMessage() + reason)


def _lost_links(workflow: dict[str, Any], prompt: Prompt) -> list[str]:
    """Links out of subgraphs that the converter dropped.

    It does so where one inner output feeds two outputs, or an input goes straight to an output.
    """
    subgraphs = {s["id"] for s in workflow.get("definitions", {}).get("subgraphs", [])}
    active = {
        n["id"]: n for n in workflow["nodes"] if n["type"] in subgraphs and n.get("mode", 0) == 0
    }
    sources = {link[0]: link[1] for link in workflow["links"]}
    return [
        f"{node['type']} {node['id']}: {slot['name']}"
        for node in workflow["nodes"]
        for slot in node.get("inputs", [])
        if str(node["id"]) in prompt and sources.get(slot.get("link")) in active
        if slot["name"] not in prompt[str(node["id"])]["inputs"]
    ]


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """The API prompt of an editor-format workflow, or an error naming what the host lacks."""
    collector, log = _Collector(), logging.getLogger(_CONVERTER_LOG)
    log.addHandler(collector)
    try:
        prompt = convert_ui_to_api(workflow, object_info)
    finally:
        log.removeHandler(collector)
    unknown = sorted({n["class_type"] for n in prompt.values()} - object_info.keys())
    if unknown:
        raise ConversionError(f"This ComfyUI has no node called {', '.join(unknown)}.")
    if collector.lines:
        raise ConversionError(f"comfy-cli could not convert it: {'; '.join(collector.lines)}")
    if lost := _lost_links(workflow, prompt):
        raise ConversionError(f"comfy-cli lost the links into {', '.join(lost)}.")
    if not prompt:
        raise ConversionError("comfy-cli found nothing to run in it.")
    return prompt


def load_workflow(path: Path, object_info: dict[str, Any]) -> Prompt:
    """The API prompt of an editor-format workflow file."""
    if not path.is_file():
        raise ConversionError(f"There is no workflow {path}.")
    try:
        return to_api(json.loads(path.read_text(encoding="utf-8")), object_info)
    except ValueError as error:
        raise ConversionError(f"{path.name}: {error}") from error
