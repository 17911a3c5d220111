"""Run by ComfyUI before torch is imported: the allocator options that the user chose.

They go into the environment, which is all that torch reads. See core/allocator.py for the rules.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

import folder_paths
from comfy.cli_args import args

log = logging.getLogger("qwen_vram")


def _core() -> ModuleType:
    """core/allocator.py, without the package, which would import torch."""
    path = Path(__file__).resolve().parent / "core" / "allocator.py"
    spec = importlib.util.spec_from_file_location("qwen_vram_prestartup_allocator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built_for(core: ModuleType) -> str:
    """What torch is built for, from its file version.py, which ComfyUI reads as well."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "version.py"
        if file.is_file():
            return core.built_for(file.read_text(encoding="utf-8", errors="replace"))
    return ""


def _flag() -> str:
    """The backend that the command line names: ComfyUI sets args.cuda_malloc by itself, too."""
    if args.disable_cuda_malloc:
        return "native"
    return "cudaMallocAsync" if any(a.startswith("--cuda-m") for a in sys.argv[1:]) else ""


def main() -> None:
    """Merge the choice into the environment. ComfyUI logs an exception and goes on."""
    if (
        "cuda_malloc" not in sys.modules
    ):  # something else than ComfyUI's main.py runs it, and decides itself
        return
    core = _core()
    settings, problem = {}, ""
    if not args.multi_user:  # one user must not choose for all
        path = os.path.join(folder_paths.get_user_directory(), "default", "comfy.settings.json")
        settings, problem = core.read_settings(path)
    choice, problems = core.choice_of(settings)
    if problem:
        problems.append(f"comfy.settings.json cannot be read ({problem})")
    machine = core.Machine(_built_for(core), platform.system(), args.cpu)
    found = core.Found(os.environ, bool(args.cuda_malloc), _flag(), machine)
    made = core.plan(choice, found)
    _apply(core, made)
    if line := core.log_line(made, problems):
        log.log(logging.WARNING if problems or made.notes else logging.INFO, line)


def _apply(core: ModuleType, made: tuple) -> None:
    if made.text is None:
        os.environ.pop(core.VARIABLE, None)
    else:
        os.environ[core.VARIABLE] = made.text
    if made.backend is not None:
        args.cuda_malloc = made.backend == core.ASYNC
    os.environ[core.MARKER] = core.marker_of(made)


main()
