"""The demo: one bundled workflow, twice, in two ComfyUI processes that share only the disk."""

from __future__ import annotations

import io
import json
import shutil
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from .checkpoints import make_checkpoints
from .conversion import load_workflow
from .environment import ROOT, say
from .progress import ProgressLine, table
from .server import Result, Server
from .substitutions import MODEL_FILES, NUMBERS, Prompt, substitute

BASE = ROOT / ".demo"
WORKFLOW = ROOT / "workflows" / "qwen_image_2512.json"
ENCODER_LOADER = "QwenVRAMLoadTextEncoder"
CACHED_ENCODE = "QwenVRAMCachedTextEncode"
BROWSER_PORT = 8188


class DemoError(RuntimeError):
    """The demo did not show what it is there to show; the message says what was missing."""


@dataclass
class Run:
    """One finished run of the workflow in a server process of its own."""

    result: Result
    png: bytes


# -------------------------------------------------------------------------------------- preparing
def has_accelerator() -> bool:
    """Whether torch sees a CUDA or MPS device."""
    import torch  # a second of import time that only this question is worth

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _server(comfyui: Path, cpu: bool, preferred_port: int = 0) -> Server:
    # ComfyUI's default attention takes seconds for the first prompt on a CPU.
    extra = ["--use-pytorch-cross-attention"] if cpu else []
    return Server(comfyui, BASE, ROOT, cpu=cpu, extra_args=extra, preferred_port=preferred_port)


# ---------------------------------------------------------------------------------------- prompts
def _upstream(prompt: Prompt, node_id: str) -> list[str]:
    return [
        value[0]
        for value in prompt[node_id]["inputs"].values()
        if isinstance(value, list) and value and value[0] in prompt
    ]


def positive_encoders(prompt: Prompt) -> set[str]:
    """The cached text encoders that feed the `positive` input of a sampler."""
    found: set[str] = set()
    starts = [n["inputs"].get("positive") for n in prompt.values()]
    waiting = [link[0] for link in starts if isinstance(link, list) and link[0] in prompt]
    seen: set[str] = set()
    while waiting:
        node_id = waiting.pop()
        if node_id in seen:
            continue
        seen.add(node_id)
        if prompt[node_id]["class_type"] == CACHED_ENCODE:
            found.add(node_id)
        else:
            waiting += _upstream(prompt, node_id)
    return found


def set_text(prompt: Prompt, text: str) -> None:
    """Replaces the text of the positive prompt."""
    encoders = positive_encoders(prompt)
    if not encoders:
        raise DemoError(f"{WORKFLOW.name} has no {CACHED_ENCODE} on a sampler's positive input.")
    for node_id in encoders:
        prompt[node_id]["inputs"]["text"] = text


# ---------------------------------------------------------------------------------------- running
def _run_once(server: Server, prompt: Prompt, number: int) -> Run:
    line, start = ProgressLine(prompt), time.perf_counter()
    result = server.submit(prompt, line.on_event)
    seconds = time.perf_counter() - start
    line.finish()
    if result.status != "success":
        raise DemoError(f"ComfyUI ended the prompt with {result.status}: {result.error}")
    saved = [image.content for image in result.images if image.kind == "output"]
    if not saved:
        raise DemoError("The workflow ended without a saved picture.")
    path = BASE / "output" / f"demo_{number}.png"
    path.write_bytes(saved[0])
    print(f"\nRun {number}: {seconds:.1f} s, picture {path}\n\n{table(prompt, result)}\n")
    return Run(result, saved[0])


def _pixels(png: bytes) -> tuple[tuple[int, int], bytes]:
    with PIL.Image.open(io.BytesIO(png)) as image:
        return image.size, image.convert("RGBA").tobytes()


def _verdict(prompt: Prompt, first: Run, second: Run, fresh: bool) -> None:
    """Says what the host's events and the pictures prove, or raises with what they do not."""
    loaders = [i for i, node in prompt.items() if node["class_type"] == ENCODER_LOADER]
    if not loaders:
        raise DemoError(f"{WORKFLOW.name} has no {ENCODER_LOADER}.")
    runs = [any(i in run.result.executed for i in loaders) for run in (first, second)]
    for number, ran in enumerate(runs, 1):
        count = "executed" if ran else "not executed"
        print(f"ComfyUI's events of run {number}: the text encoder's loader was {count}.")
    if runs[1]:
        raise DemoError("The second run loaded the text encoder; its conditioning was not reused.")
    if fresh and not runs[0]:
        raise DemoError("The first run did not load the text encoder although its cache was empty.")
    if _pixels(first.png) != _pixels(second.png):
        raise DemoError("The two pictures differ.")
    print("The two pictures are identical, pixel by pixel.")


def run(comfyui: Path, text: str | None = None, keep_cache: bool = False) -> None:
    """Runs the bundled workflow in two processes and raises if the second one was not spared."""
    make_checkpoints(comfyui, BASE / "models")
    if not keep_cache:
        shutil.rmtree(BASE / "user" / "__qwen_vram", ignore_errors=True)
    cpu = not has_accelerator()
    say(f"starting ComfyUI from {comfyui} {'on the CPU' if cpu else 'on the GPU'}")
    with _server(comfyui, cpu) as server:
        prompt = substitute(load_workflow(WORKFLOW, server.get_json("/object_info")))
        if text is not None:
            set_text(prompt, text)
        first = _run_once(server, prompt, 1)
    say("stopped it; starting a new ComfyUI process for the same prompt")
    with _server(comfyui, cpu) as server:
        second = _run_once(server, prompt, 2)
    _verdict(prompt, first, second, fresh=not keep_cache)


def _shrink(node: dict[str, Any]) -> None:
    """Sets size and steps of an editor-format node as the table says."""
    values, named = node.get("widgets_values"), node.get("widgets_values_named", {})
    if node["type"] == "EmptySD3LatentImage":
        values[:2] = [NUMBERS["width"], NUMBERS["height"]]
        named.update(width=NUMBERS["width"], height=NUMBERS["height"])
    elif node["type"] == "PrimitiveInt" and "steps" in node.get("title", "").lower():
        values[0] = named["value"] = NUMBERS["steps"]


def _offer_workflows() -> None:
    """Puts the bundled workflows, with tiny files and sizes in them, into the Workflows panel."""
    folder = BASE / "user" / "default" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    for file in WORKFLOW.parent.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        for official, tiny in MODEL_FILES.items():
            text = text.replace(official, tiny)
        workflow = json.loads(text)
        for node in workflow["nodes"]:
            _shrink(node)
        target = folder / f"{file.stem}_tiny.json"
        target.write_text(json.dumps(workflow, indent=2, ensure_ascii=False), encoding="utf-8")


def serve(comfyui: Path) -> None:
    """Opens ComfyUI with the pack and the tiny checkpoints in the browser until Ctrl-C."""
    make_checkpoints(comfyui, BASE / "models")
    _offer_workflows()
    say("starting ComfyUI")
    with _server(comfyui, not has_accelerator(), BROWSER_PORT) as server:
        say(f"ComfyUI is at {server.url} (log: {server.log_file}); Ctrl-C ends it")
        webbrowser.open(server.url)
        try:
            server.wait()
        except KeyboardInterrupt:
            say("stopping ComfyUI")
            return
        raise DemoError(f"ComfyUI ended by itself.\n{server.log_tail()}")
