"""The demo: the bundled workflow and an edit, then again in a process that shares only the disk."""

from __future__ import annotations

import copy
import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from .checkpoints import make_checkpoints
from .conversion import load_workflow
from .edit_graph import edit_graph
from .environment import ROOT, say
from .figures import contact_sheet
from .progress import ProgressLine, table
from .scenes import ANIMALS
from .server import Result, Server
from .substitutions import Prompt, substitute
from .vocabulary import names_animal

BASE = ROOT / ".demo"
USER = BASE / "demo"  # its own: the prompt cache of `make run` is in the usual place
WORKFLOW = ROOT / "workflows" / "qwen_image_2512.json"
ENCODER_LOADER = "QwenVRAMLoadTextEncoder"
CACHED_ENCODE = "QwenVRAMCachedTextEncode"
PROMPTS = (
    "a small blue bunny with glasses in the snow",
    "a red fox reading a book on the beach",
    "一只戴帽子的小熊",
)
EDIT = "change the background to a meadow, with flowers"


class DemoError(RuntimeError):
    """The demo did not show what it is there to show; the message says what was missing."""


@dataclass
class Run:
    """One finished run of a graph."""

    result: Result
    png: bytes
    path: Path


# -------------------------------------------------------------------------------------- preparing
def has_accelerator() -> bool:
    """Whether torch sees a CUDA or MPS device."""
    import torch  # a second of import time that only this question is worth

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def new_server(
    comfyui: Path, cpu: bool, name: str, extra: Sequence[str] = (), preferred_port: int = 0
) -> Server:
    """A ComfyUI on the demo's folder, not yet started; its log has that name."""
    # ComfyUI's default attention takes seconds for the first prompt on a CPU.
    attention = ["--use-pytorch-cross-attention"] if cpu else []
    return Server(
        *(comfyui, BASE, ROOT),
        cpu=cpu,
        extra_args=[*attention, *extra],
        preferred_port=preferred_port,
        log_name=f"{name}.log",
    )


def _demo_server(comfyui: Path, cpu: bool) -> Server:
    """One that leaves alone what `make run` has stored, and its temporary files."""
    USER.mkdir(parents=True, exist_ok=True)
    folders = ["--user-directory", str(USER), "--temp-directory", str(USER)]
    return new_server(comfyui, cpu, "demo", folders)


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
    """Replaces the text of the positive prompt, and empties the others.

    The embedded model has learnt no other negative prompt than the empty one.
    """
    encoders = positive_encoders(prompt)
    if not encoders:
        raise DemoError(f"{WORKFLOW.name} has no {CACHED_ENCODE} on a sampler's positive input.")
    for node_id, node in prompt.items():
        if node["class_type"] == CACHED_ENCODE:
            node["inputs"]["text"] = text if node_id in encoders else ""


# ---------------------------------------------------------------------------------------- running
def _run_once(server: Server, prompt: Prompt, name: str, text: str) -> Run:
    print(f"\n{name}: {text}")
    line, start = ProgressLine(prompt), time.perf_counter()
    result = server.submit(prompt, line.on_event)
    seconds = time.perf_counter() - start
    line.finish()
    if result.status != "success":
        raise DemoError(f"ComfyUI ended the prompt with {result.status}: {result.error}")
    saved = [image.content for image in result.images if image.kind == "output"]
    if not saved:
        raise DemoError("The workflow ended without a saved picture.")
    path = BASE / "output" / f"demo_{name}.png"
    path.write_bytes(saved[0])
    print(f"{seconds:.1f} s, picture {path}\n\n{table(prompt, result)}")
    return Run(result, saved[0], path)


def _pixels(png: bytes) -> tuple[tuple[int, int], bytes]:
    with PIL.Image.open(io.BytesIO(png)) as image:
        return image.size, image.convert("RGBA").tobytes()


def _verdict(prompt: Prompt, first: Run, again: Run, fresh: bool) -> None:
    """Says what the host's events and the pictures prove, or raises with what they do not."""
    loaders = [i for i, node in prompt.items() if node["class_type"] == ENCODER_LOADER]
    if not loaders:
        raise DemoError(f"{WORKFLOW.name} has no {ENCODER_LOADER}.")
    runs = [any(i in run.result.executed for i in loaders) for run in (first, again)]
    print()
    for name, ran in zip(("first", "second"), runs, strict=True):
        count = "executed" if ran else "not executed"
        print(f"ComfyUI's events in the {name} process: the text encoder's loader was {count}.")
    if runs[1]:
        raise DemoError("The second process loaded the text encoder; nothing was reused.")
    if fresh and not runs[0]:
        raise DemoError("The first run did not load the text encoder although its cache was empty.")
    if _pixels(first.png) != _pixels(again.png):
        raise DemoError("The two pictures differ.")
    print("The two pictures are identical, pixel by pixel.")
    print(
        "The text encoder here is tiny, so that a hit saves next to no time; the real one is 9 GB."
    )


def _edited(server: Server, picture: Run) -> Run:
    """Changes a picture that this demo has drawn."""
    folder = BASE / "input"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / picture.path.name).write_bytes(picture.png)
    prompt = edit_graph(picture.path.name, EDIT)
    return _run_once(server, prompt, "edit", f"{EDIT} ({picture.path.name})")


def _drawn(server: Server, texts: Sequence[str]) -> tuple[Prompt, list[Run]]:
    """The bundled workflow with each text; also the graph of the first."""
    graph = substitute(load_workflow(WORKFLOW, server.get_json("/object_info")))
    prompts, runs = [], []
    for number, text in enumerate(texts, 1):
        prompt = copy.deepcopy(graph)
        set_text(prompt, text)
        runs.append(_run_once(server, prompt, str(number), text))
        prompts.append(prompt)
    return prompts[0], runs


def run(comfyui: Path, text: str | None = None, keep_cache: bool = False) -> None:
    """Draws and edits, repeats the first prompt in a new process; raises if that was not spared."""
    if text is not None and not names_animal(text):
        say(f"the prompt names no animal that the model knows ({', '.join(ANIMALS)}): it draws any")
    make_checkpoints(comfyui, BASE / "models")
    for old in (BASE / "output").glob("demo*.png"):
        old.unlink()
    if not keep_cache:
        shutil.rmtree(USER / "__qwen_vram", ignore_errors=True)
    cpu = not has_accelerator()
    texts = PROMPTS if text is None else (text,)
    say(f"starting ComfyUI from {comfyui} {'on the CPU' if cpu else 'on the GPU'}")
    with _demo_server(comfyui, cpu) as server:
        prompt, runs = _drawn(server, texts)
        edited = _edited(server, runs[-1])
    say("stopped it; starting a new ComfyUI process for the first prompt again")
    with _demo_server(comfyui, cpu) as server:
        again = _run_once(server, prompt, "again", texts[0])
    _verdict(prompt, runs[0], again, fresh=not keep_cache)
    sheet = BASE / "output" / "demo.png"
    pictures = [PIL.Image.open(io.BytesIO(r.png)).convert("RGB") for r in (*runs, edited)]
    contact_sheet([np.asarray(p) for p in pictures], len(pictures), sheet, side=256)
    print(f"All pictures side by side: {sheet}")
