"""What else decides the numbers of a conditioning: code, options, libraries, hardware, switches."""

from __future__ import annotations

import functools
import operator
import os
import site
import sys
import sysconfig
import time
import types
import weakref
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import comfy.model_management
import comfyui_version
import folder_paths
import nodes as comfy_nodes
import torch
from comfy.cli_args import args

from ..core.graph_identity import LoadedFiles, NotCacheable, digest, source_digest

STARTED_NS = time.time_ns()
LOADED = LoadedFiles(STARTED_NS)
HOST_ROOT = Path(comfy_nodes.__file__).resolve().parent
HOST_FOLDERS = ("comfy", "comfy_api", "comfy_execution", "comfy_extras")
PACK_ROOT = Path(__file__).resolve().parents[1]
# Of this pack, the code that has a part in the numbers; an update of the rest keeps the cache.
PACK_SOURCES = (
    *("core/checkpoint.py", "core/conditioning_codec.py", "core/sign_codes.py"),
    *("nodes/architectures.py", "nodes/conditioning.py", "nodes/encoding.py", "nodes/loaders.py"),
    *("nodes/image_edit.py", "nodes/edit_encoding.py", "nodes/pictures.py", "nodes/prefill.py"),
    *("core/quantization.py", "core/quantized_layers.py", "core/layer_source.py"),
    *("core/tensor_reader.py", "nodes/quantized_loading.py", "nodes/weight_choice.py"),
    *("nodes/quantized_layouts.py", "nodes/quantized_ops.py", "nodes/shared_loader.py"),
    *("core/bitsandbytes_formats.py", "core/host_formats.py", "core/quantized_entries.py"),
    *("core/bitsandbytes_int8.py", "nodes/low_rank.py", "nodes/unmerged_patcher.py"),
    "nodes/unmerged_linear.py",
)

# Options that cannot change a number in a conditioning. Whatever is not listed is part of the key.
_HARMLESS_ARGS = frozenset(
    """
    listen port tls_keyfile tls_certfile enable_cors_header max_upload_size base_directory
    extra_model_paths_config output_directory temp_directory input_directory user_directory
    models_directory auto_launch disable_auto_launch preview_method preview_size cache_ram
    cache_classic cache_lru cache_none enable_manager disable_manager_ui
    enable_manager_legacy_ui dont_print_server quick_test_for_ci windows_standalone_build
    disable_metadata disable_all_custom_nodes whitelist_custom_nodes disable_api_nodes
    multi_user verbose log_stdout front_end_version front_end_root comfy_api_base
    enable_compress_response_body database_url enable_assets enable_asset_hashing feature_flag
    list_feature_flags debug_hang
    """.split()  # noqa: SIM905
)
_ENVIRONMENT = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("CUDNN_DETERMINISTIC", "PYTORCH_MIOPEN_SUGGEST_NHWC", "HSA_OVERRIDE_GFX_VERSION"),
)
_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "comfy-kitchen", "comfy-aimdo", "triton"),
    *("sageattention", "xformers", "flash-attn", "safetensors", "gguf"),
    "bitsandbytes",
    *("av", "pillow", "numpy", "torchvision", "kornia", "spandrel"),  # what pictures go through
)
# The host's code between a checkpoint or a picture and a conditioning, as far as it is loaded.
_ENCODING_MODULES = frozenset(
    """
    nodes node_helpers comfy.sd comfy.sd1_clip comfy.sdxl_clip comfy.clip_model comfy.clip_vision
    comfy.ops comfy.float comfy.quant_ops comfy.lora comfy.lora_convert comfy.model_patcher
    comfy.model_management comfy.utils comfy.taesd.taesd comfy.ldm.modules.attention
    comfy.ldm.modules.diffusionmodules.model comfy.ldm.models.autoencoder comfy.ldm.wan.vae
    """.split()  # noqa: SIM905
)
_ENCODING_PACKAGES = ("comfy.text_encoders.", "comfy.weight_adapter.")
_CALLABLES = (types.FunctionType, types.MethodType, staticmethod, classmethod, functools.partial)
_foreign: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


@functools.cache
def is_host_file(path: str) -> bool:
    """Whether a file is ComfyUI's own source, not something installed inside its folder."""
    real = Path(path).resolve()
    if not real.is_relative_to(HOST_ROOT):
        return False
    first, *rest = real.relative_to(HOST_ROOT).parts
    return not rest or first in HOST_FOLDERS


@functools.cache
def custom_packages() -> dict[str, Path]:
    """The installed packs by real folder, links resolved."""
    folders = [Path(f) for f in folder_paths.get_folder_paths("custom_nodes")]
    return {str(e.resolve()): e.resolve() for f in folders if f.is_dir() for e in f.iterdir()}


def package_of(file: str | None, what: str) -> str:
    """The package that a source file belongs to. Raises NotCacheable."""
    if file is not None:
        path = Path(file).resolve()
        if path.is_relative_to(PACK_ROOT):
            return "qwen-vram"
        for name, root in custom_packages().items():
            if path.is_relative_to(root):
                return name
        if is_host_file(file):
            return "comfyui"
    raise NotCacheable(f"the source of {what} cannot be found")


@functools.lru_cache(maxsize=128)
def _source_of(package: str) -> tuple[str, float]:
    if package == "qwen-vram":
        return source_digest([PACK_ROOT / name for name in PACK_SOURCES], PACK_ROOT)
    if package == "comfyui":
        roots = [HOST_ROOT / folder for folder in HOST_FOLDERS]
        return source_digest(
            [*roots, HOST_ROOT / "nodes.py", HOST_ROOT / "node_helpers.py"], HOST_ROOT
        )
    root = custom_packages()[package]
    return source_digest([root], root.parent)


def read_sources() -> None:
    """Digest the code that is always in a key, before the first prompt waits for it."""
    for package in ("comfyui", "qwen-vram"):
        _source_of(package)


def packages_digest(packages: Iterable[str]) -> str:
    """Versions of the code that runs: ComfyUI, this pack, every pack upstream or in the way."""
    rows = []
    for name in sorted({"comfyui", "qwen-vram", *packages, *intruders()}):
        sha, newest = _source_of(name)
        if STARTED_NS / 1e9 < newest <= time.time():
            told = Path(name).name
            raise NotCacheable(f"the code of {told} changed after ComfyUI started; restart it")
        rows.append([Path(name).name, sha])
    return digest(rows)


def intruders() -> set[str]:
    """Packs that have put code of their own in place of the host's encoding. Raises NotCacheable.

    What such code depends on beside its own source is not seen.
    """
    found = set()
    for module_name, module in list(sys.modules.items()):
        if module_name in _ENCODING_MODULES or module_name.startswith(_ENCODING_PACKAGES):
            found.update(_intruder(file, place) for file, place in _foreign_in(module))
    return found


# Of a module by name: its functions and classes when it was looked at, and what was foreign. Each
# key asks for all of them again, some 2,000, of which hardly ever one is another than before. One
# that was replaced lives until the next look.
_looked_at: dict[str, tuple[tuple[Any, ...], frozenset[tuple[str, str]]]] = {}


def _foreign_in(module: types.ModuleType) -> frozenset[tuple[str, str]]:
    """(source file, name) of every function of a module that is no host's and no library's."""
    name, members = module.__name__, _members_of(module)
    before, found = _looked_at.get(name, ((), frozenset()))
    if len(before) != len(members) or not all(map(operator.is_, before, members)):
        found = frozenset(
            (file, f"{name}.{place}")
            for place, function in _functions_of(module)
            for file in foreign_sources(function)
        )
        _looked_at[name] = members, found
    return found


def _members_of(module: types.ModuleType) -> tuple[Any, ...]:
    """The functions and classes of a module, and the functions of the classes that it defines."""
    every = list(vars(module).values())  # another thread may be importing it
    own = [member for member in every if isinstance(member, (*_CALLABLES, type))]
    classes = (c for c in own if isinstance(c, type) and c.__module__ == module.__name__)
    inner = (m for c in classes for m in list(vars(c).values()) if isinstance(m, _CALLABLES))
    return (*own, *inner)


def foreign_sources(function: Any) -> frozenset[str]:
    """Source files of a function, and of all that it wraps, that are no host's and no library's."""
    function = getattr(function, "__func__", function)
    function = getattr(function, "func", function)  # functools.partial
    if not isinstance(function, types.FunctionType):
        return frozenset()
    if function not in _foreign:
        files = {code.co_filename for code in _codes_of(function)}
        foreign = (f for f in files if not f.startswith("<") and not is_trusted(f))
        _foreign[function] = frozenset(foreign)
    return _foreign[function]


def _intruder(file: str, place: str) -> str:
    package = package_of(file, place)
    if package == "qwen-vram":  # this pack replaces nothing: whoever did used its folder
        raise NotCacheable(f"{place} was replaced by {Path(file).name}")
    return package


@functools.cache
def is_trusted(path: str) -> bool:
    """Whether a source file is the host's or a library's, and no custom node's."""
    real = Path(path).resolve()
    return is_host_file(path) or any(real.is_relative_to(root) for root in _libraries())


@functools.cache
def _libraries() -> set[Path]:
    """Where Python keeps its own modules and what pip installed, also beside it (PYTHONPATH)."""
    named = (sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
    places = [Path(p) for p in (*named, *site.getsitepackages(), site.getusersitepackages())]
    packs = custom_packages().values()
    for place in (Path(p).resolve() for p in sys.path if p):
        installed = next(place.glob("*.dist-info"), None) is not None
        inside = any(place.is_relative_to(pack) for pack in packs)
        # A place that holds packs, as pip install --target custom_nodes makes, is no library.
        around = any(root.is_relative_to(place) for root in (*packs, HOST_ROOT))
        if installed and not inside and not around:
            places.append(place)
    return {place.resolve() for place in places}


def _functions_of(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Every function of a module, and every method of the classes that it defines."""
    for name, member in list(vars(module).items()):
        if isinstance(member, type) and member.__module__ == module.__name__:
            for method_name, method in list(vars(member).items()):
                if isinstance(method, _CALLABLES):
                    yield f"{name}.{method_name}", method
        elif isinstance(member, _CALLABLES):
            yield name, member


def _codes_of(function: Any) -> Iterator[types.CodeType]:
    while isinstance(function, types.FunctionType):
        yield function.__code__
        function = vars(function).get("__wrapped__")


def surroundings() -> dict[str, Any]:
    """Everything beside graph, files and code, by names that follow "... changed"."""
    mm = comfy.model_management
    options = {k: _stable(v) for k, v in sorted(vars(args).items()) if k not in _HARMLESS_ARGS}
    host = (mm.intermediate_dtype(), mm.text_encoder_device(), mm.text_encoder_dtype())
    return {
        "ComfyUI's version": comfyui_version.__version__,
        "start options": options,
        "environment variables": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "libraries": [sys.version, {name: _version(name) for name in _LIBRARIES}],
        "hardware": _hardware(),
        "precision": [*_precision(), *map(str, host)],
    }


def _stable(value: Any) -> str:
    """A text that is the same in every process: sets have no order of their own."""
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(repr, value)))
    return repr(value)


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> list[Any]:
    devices = comfy.model_management.get_all_torch_devices()
    names = [comfy.model_management.get_torch_device_name(d) for d in devices]
    return [names, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def _precision() -> list[Any]:
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    return [
        *(torch.get_float32_matmul_precision(), matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        *(matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_accumulation),
        *(matmul.allow_fp16_reduced_precision_reduction, cuda.flash_sdp_enabled()),
        *(cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        *(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        *(torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    ]
