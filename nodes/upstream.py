"""The host's answers for core.graph_identity: classes, fingerprints, files, versions, settings."""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfyui_version
import folder_paths
import nodes as comfy_nodes
import torch
from comfy import sd1_clip
from comfy.cli_args import args
from comfy.text_encoders import llama, qwen_image
from comfy_api.internal import _ComfyNodeInternal, first_real_override
from comfy_execution.graph import DynamicPrompt

from ..core.file_identity import FileIdentity, identify
from ..core.graph_identity import (
    ClassFacts,
    Host,
    LoadedFiles,
    NotCacheable,
    digest,
    source_digest,
    source_hazard,
)

STARTED_NS = time.time_ns()
LOADED = LoadedFiles(STARTED_NS)
HOST_ROOT = Path(comfy_nodes.__file__).resolve().parent
PACK_ROOT = Path(__file__).resolve().parents[1]
# Of this pack, the code that has a part in the numbers; an update of the rest keeps the cache.
PACK_SOURCES = ("core/checkpoint.py", "nodes/architectures.py", "nodes/conditioning.py")

# Options that cannot change a number in a conditioning. Whatever is not listed is part of the key.
_HARMLESS_ARGS = frozenset(
    [
        "listen",
        "port",
        "tls_keyfile",
        "tls_certfile",
        "enable_cors_header",
        "max_upload_size",
        "base_directory",
        "extra_model_paths_config",
        "output_directory",
        "temp_directory",
        "input_directory",
        "user_directory",
        "models_directory",
        "auto_launch",
        "disable_auto_launch",
        "preview_method",
        "preview_size",
        "cache_ram",
        "cache_classic",
        "cache_lru",
        "cache_none",
        "enable_manager",
        "disable_manager_ui",
        "enable_manager_legacy_ui",
        "dont_print_server",
        "quick_test_for_ci",
        "windows_standalone_build",
        "disable_metadata",
        "disable_all_custom_nodes",
        "whitelist_custom_nodes",
        "disable_api_nodes",
        "multi_user",
        "verbose",
        "log_stdout",
        "front_end_version",
        "front_end_root",
        "comfy_api_base",
        "enable_compress_response_body",
        "database_url",
        "enable_assets",
        "enable_asset_hashing",
        "feature_flag",
        "list_feature_flags",
        "debug_hang",
    ]
)
_WHOLE_WORKFLOW = {"PROMPT", "DYNPROMPT", "EXTRA_PNGINFO"}
_FILE_LIKE = re.compile(
    r"[^\s:<>|\"*?,;]+\.(?:safetensors|sft|gguf|ckpt|pth?|bin|onnx|json|ya?ml|txt)", re.I
)
_LORA_TAG = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:\s*([^:>]+)", re.I)
_LONGEST_FILE_NAME = 1024
_ENCODING_CLASSES = (
    *(comfy.sd.CLIP, sd1_clip.SDClipModel, sd1_clip.SD1ClipModel, sd1_clip.ClipTokenWeightEncoder),
    *(sd1_clip.SDTokenizer, sd1_clip.SD1Tokenizer, llama.BaseLlama, llama.Llama2_, llama.Attention),
    *(llama.Qwen25_7BVLI, qwen_image.QwenImageTokenizer, qwen_image.QwenImageTEModel),
)


def host_of(dynprompt: DynamicPrompt) -> Host:
    """Answer about the graph that runs now."""
    return Host(dynprompt.get_node, class_facts, files_named)


def class_facts(node_id: str, node: dict[str, Any]) -> ClassFacts:
    """Package, fingerprint and traits of a node's class. Raises NotCacheable."""
    name = node["class_type"]
    cls = comfy_nodes.NODE_CLASS_MAPPINGS[name]
    if getattr(cls, "NOT_IDEMPOTENT", False):
        raise NotCacheable(f"{name} gives something else at every run")
    hidden = _hidden_inputs(cls)
    if hidden & _WHOLE_WORKFLOW:
        raise NotCacheable(f"{name} reads the whole workflow")
    package = package_of(cls)
    if package == "qwen-vram":  # the files it names are its whole fingerprint
        return ClassFacts(package, None, getattr(cls, "NEUTRAL_INPUTS", frozenset()))
    hazard = None if package == "comfyui" else class_hazard(cls)
    if hazard:
        raise NotCacheable(f"{name} {hazard}")
    own_id = node_id if "UNIQUE_ID" in hidden else None
    return ClassFacts(package, [fingerprint_of(cls, node), own_id])


def _hidden_inputs(cls: type) -> set[str]:
    declared = cls.INPUT_TYPES().get("hidden", {}).values()
    return {kind[0] if isinstance(kind, (tuple, list)) else kind for kind in declared}


def fingerprint_of(cls: type, node: dict[str, Any]) -> Any:
    """The host's own is-changed value for a node; computed here under --cache-none."""
    name = node["class_type"]
    v3 = issubclass(cls, _ComfyNodeInternal)
    method = "fingerprint_inputs" if v3 else "IS_CHANGED"
    present = first_real_override(cls, method) if v3 else getattr(cls, method, None)
    if present is None:
        return None
    value = node["is_changed"] if "is_changed" in node else _compute_fingerprint(cls, method, node)
    try:
        if _contains_nan(value):
            raise NotCacheable(f"{name} asks to run every time")
        return digest(value)
    except TypeError:  # not JSON: only its text can be compared, and an address must not pass
        text = repr(value)
        if " at 0x" in text:
            raise NotCacheable(f"{name} has a fingerprint that cannot be compared") from None
        return text


def _compute_fingerprint(cls: type, method: str, node: dict[str, Any]) -> Any:
    function = getattr(cls, method)
    if inspect.iscoroutinefunction(function):
        raise NotCacheable(f"{node['class_type']} computes its fingerprint asynchronously")
    values = {
        k: None if isinstance(v, list) and len(v) == 2 else v for k, v in node["inputs"].items()
    }
    return [function(**values)]


def _contains_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    items: Iterable[Any] = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list, tuple, set)) and any(
        _contains_nan(item) for item in items
    )


def package_of(cls: type) -> str:
    """Name of the package that defines a node: its folder or file. Raises NotCacheable."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is not None:
        path = Path(file).resolve()
        if path.is_relative_to(PACK_ROOT):
            return "qwen-vram"
        for name, root in _custom_packages().items():
            if path.is_relative_to(root):
                return name
        if path.is_relative_to(HOST_ROOT):
            return "comfyui"
    raise NotCacheable(f"the source of {cls.__name__} cannot be found")


@functools.lru_cache(maxsize=1)
def _custom_packages() -> dict[str, Path]:
    """The installed packs, links resolved."""
    folders = [Path(f) for f in folder_paths.get_folder_paths("custom_nodes")]
    return {entry.name: entry.resolve() for f in folders if f.is_dir() for entry in f.iterdir()}


@functools.lru_cache(maxsize=512)
def class_hazard(cls: type) -> str | None:
    """What in a foreign class's source, or its base classes', makes its result unpredictable."""
    for base in cls.__mro__:
        if base is object or package_of(base) == "comfyui":
            continue
        try:
            hazard = source_hazard(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return "has no readable source"
        if hazard:
            return hazard
    return None


def files_named(value: str) -> list[FileIdentity]:
    """Every file or folder that a widget's text names, in any of ComfyUI's folders."""
    candidates = {value} | {match.group() for match in _FILE_LIKE.finditer(value)}
    for match in _LORA_TAG.finditer(value):
        name = match.group(1).strip()
        candidates |= {name, *(f"{name}{ext}" for ext in folder_paths.supported_pt_extensions)}
    found = {path for name in candidates for path in _paths_of(name)}
    if "embedding:" in value:
        found |= set(embedding_folders())
    return identities(found)


def _paths_of(name: str) -> list[str]:
    if not name.strip(". /\\") or len(name) > _LONGEST_FILE_NAME or "\0" in name or "\n" in name:
        return []
    places = [base for paths, _ in folder_paths.folder_names_and_paths.values() for base in paths]
    paths = {os.path.join(base, name) for base in places}
    paths.add(os.path.join(folder_paths.models_dir, name))
    paths.add(folder_paths.get_annotated_filepath(name))
    return sorted(path for path in paths if os.path.exists(path))


def embedding_folders() -> list[str]:
    """Folders whose files a text may name by embedding:NAME."""
    return [p for p in folder_paths.get_folder_paths("embeddings") if os.path.isdir(p)]


def identities(paths: Iterable[str]) -> list[FileIdentity]:
    """Identify files and whole folders. Raises NotCacheable."""
    try:
        return sorted({file for path in paths for file in identify(path)})
    except (OSError, ValueError) as error:
        raise NotCacheable(f"a file upstream cannot be identified ({error})") from error


@functools.lru_cache(maxsize=128)
def _source_of(package: str) -> tuple[str, float]:
    if package == "qwen-vram":
        found = [source_digest(PACK_ROOT / name) for name in PACK_SOURCES]
        return digest([sha for sha, _ in found]), max(newest for _, newest in found)
    return source_digest(HOST_ROOT if package == "comfyui" else _custom_packages()[package])


def packages_digest(packages: Iterable[str]) -> str:
    """Versions of the code that runs: ComfyUI, this pack and every pack upstream."""
    rows = []
    for name in sorted({"comfyui", "qwen-vram", *packages}):
        sha, newest = _source_of(name)
        if STARTED_NS / 1e9 < newest <= time.time():
            raise NotCacheable(f"the code of {name} changed after ComfyUI started; restart it")
        rows.append([name, sha])
    return digest(rows)


def settings() -> dict[str, Any]:
    """What else may change the numbers: options, libraries, hardware, precision switches."""
    options = {k: repr(v) for k, v in sorted(vars(args).items()) if k not in _HARMLESS_ARGS}
    return {
        "comfyui": comfyui_version.__version__,
        "options": options,
        "libraries": {
            n: _version(n) for n in ("torch", "transformers", "tokenizers", "comfy-kitchen")
        },
        "hardware": _hardware(),
        "precision": [
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
        ],
        "intermediates": str(comfy.model_management.intermediate_dtype()),
        "replaced": _replaced_host_code(),
    }


def _replaced_host_code() -> list[list[str]]:
    """Functions between text and conditioning that some pack has put in place of the host's."""
    rows = []
    for cls in _ENCODING_CLASSES:
        for name, member in vars(cls).items():
            code = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
            if code and not Path(code.co_filename).resolve().is_relative_to(HOST_ROOT):
                rows.append(
                    [f"{cls.__qualname__}.{name}", digest(list(code.co_code), code.co_names)]
                )
    return sorted(rows)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> list[Any]:
    devices = comfy.model_management.get_all_torch_devices()
    names = [comfy.model_management.get_torch_device_name(d) for d in devices]
    return [names, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
