"""Imports point one way, and the pack keeps to its own rules."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest
from pack.tests.conftest import ROOT

HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "nodes", "folder_paths", "server"}
HOST |= {"execution", "comfyui_version", "app", "latent_preview", "node_helpers"}
CORE_MAY_USE = set(sys.stdlib_module_names) | {"torch", "safetensors"}
OPTIONAL = {
    "bitsandbytes_formats.py": "bitsandbytes",
    "host_formats.py": "comfy_kitchen",
    "redis_tier.py": "redis",
    "memory_map.py": "PIL",
    "tile_plan.py": "PIL",
    "convergence_plot.py": "PIL",
}  # PIL: ComfyUI itself needs it
# What works on pictures without a model.
PICTURES = {"picture_regions.py", "outlines.py", "line_art.py", "cut_out.py"}
PICTURES_MAY_USE = {"numpy", "scipy", "skimage", "PIL"}
SHIPPED = [p for room in ("core", "nodes") for p in sorted((ROOT / room).rglob("*.py"))]
SHIPPED += [ROOT / "__init__.py", ROOT / "prestartup_script.py"]
SERVING = "from aiohttp import web"  # for routes; the rest of aiohttp can fetch


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """A file's code, parsed once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All that is in a file's code, found once for all tests."""
    return tuple(ast.walk(tree_of(path)))


def import_lines(path: Path) -> list[str]:
    """Every import statement of a file, as written."""
    found = (n for n in nodes_of(path) if isinstance(n, (ast.Import, ast.ImportFrom)))
    return [ast.unparse(node) for node in found]


def imports(path: Path) -> list[tuple[int, str]]:
    """(relative level, module) of every import in a file."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for level, module in imports(path):
        root = module.split(".")[0]
        if room == "core":
            allowed = root in CORE_MAY_USE or root == OPTIONAL.get(path.name)
            allowed |= path.name in PICTURES and root in PICTURES_MAY_USE
            assert level == 1 or (level == 0 and allowed), f"core imports {module}"
        if room == "nodes":
            assert level != 2 or root == "core", f"nodes imports ..{module}"
        assert root not in {"demo", "tests", "benchmarks"}, f"{path.name} imports {module}"


def test_the_host_is_imported_by_nodes_alone() -> None:
    absolute = [(p, m.split(".")[0]) for p in SHIPPED for level, m in imports(p) if level == 0]
    users = {p.relative_to(ROOT).parts[0] for p, root in absolute if root in HOST}
    # The entry point needs ComfyExtension, the script the folders and the command line.
    assert users == {"nodes", "__init__.py", "prestartup_script.py"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_pickled_printed_fetched_or_evaluated(path: Path) -> None:
    banned = {"pickle", "dill", "urllib", "requests", "aiohttp", "httpx", "subprocess"}
    lines = [line for line in import_lines(path) if "aiohttp" in line]
    if path.parent.name == "nodes" and set(lines) == {SERVING}:
        banned.remove("aiohttp")
    modules = [m for level, m in imports(path) if level == 0 and m != "urllib.parse"]
    outside = {m.split(".")[0] for m in modules}
    assert not banned & outside
    for node in nodes_of(path):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in {"print", "eval", "exec"}
            if getattr(node.func, "attr", "") == "load":
                assert ast.unparse(node.func) != "torch.load"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_refers_to_files_that_are_not_in_the_repository(path: Path) -> None:
    named = re.findall(
        r"\b(?:shared|benchmarks|core|nodes)/[\w/.]+\.(?:md|py)\b", path.read_text("utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_function_is_typed_and_short_and_every_public_one_explained(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = node.col_offset > 4
            assert inner or node.name.startswith("_") or ast.get_docstring(node), (
                f"{node.name}: no docstring"
            )
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [
                a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert not untyped and node.returns, f"{node.name} lacks types: {untyped or 'return'}"
            assert node.end_lineno - node.lineno < 45, f"{node.name} is too long"


def test_files_stay_readable() -> None:
    long = {
        p.name: n for p in SHIPPED if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_released_node_ids_never_change() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "nodes").glob("*.py"))
    assert set(re.findall(r'node_id="(\w+)"', source)) >= {
        "QwenVRAMLoadDiffusionModel",
        "QwenVRAMLoadTextEncoder",
        "QwenVRAMLoadVAE",
        "QwenVRAMCachedTextEncode",
        "QwenVRAMCachedImageEditEncode",
        "QwenVRAMPrefill",
        "QwenVRAMPin",
        "QwenVRAMPinned",
        "QwenVRAMAllocator",
        "QwenVRAMClear",
        "QwenVRAMWarmupSink",
        "QwenVRAMReport",
        "QwenVRAMSampler",
        "QwenVRAMFit",
        "QwenVRAMDecode",
        "QwenVRAMEncode",
        "QwenVRAMSplitTiles",
        "QwenVRAMMergeTiles",
        "QwenVRAMTiledEdit",
        "QwenVRAMTiledDiffusion",
        "QwenVRAMAttention",
        "QwenVRAMReferenceCache",
        "QwenVRAMEarlyExit",
        "QwenVRAMSaveQuantized",
        "QwenVRAMColouringPage",
        "QwenVRAMStickerSheet",
        "QwenVRAMKindWords",
        "QwenVRAMCuteAnimalPrompt",
    }
