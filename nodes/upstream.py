"""The host's answers for core.graph_identity: classes, fingerprints, files that values name."""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import folder_paths
import nodes as comfy_nodes
from comfy_api.internal import _ComfyNodeInternal, first_real_override
from comfy_execution.graph import DynamicPrompt

from ..core.file_identity import FileIdentity, identify
from ..core.graph_identity import ClassFacts, Host, NotCacheable, digest, is_link
from ..core.source_hazards import source_hazard
from . import environment
from .environment import is_trusted, package_of

_WHOLE_WORKFLOW = {"PROMPT", "DYNPROMPT", "EXTRA_PNGINFO"}
_FILE_LIKE = re.compile(
    r"[^\s:<>|\"*?,;]+\.(?:safetensors|sft|gguf|ckpt|pth?|bin|onnx|json|ya?ml|txt)", re.I
)
_LORA_TAG = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:\s*([^:>]+)", re.I)
_LONGEST_FILE_NAME = 1024
_SEEDS = {"seed", "noise_seed"}  # another result at nearly every run, and not for sure the same
_BY_CONTENT = {"LoadImage", "LoadImageMask", "LoadImageOutput", "LoadLatent"}
_PICTURES = {"IMAGE", "MASK", "LATENT", "VIDEO", "AUDIO", "CONDITIONING"}
_TEXTS = {"STRING", "INT", "FLOAT", "BOOLEAN", "*"}
_NO_MODELS = {"custom_nodes", "configs"}


def host_of(dynprompt: DynamicPrompt) -> Host:
    """Answer about the graph that runs now; each question is looked into once."""
    facts = functools.cache(lambda node_id: class_facts(node_id, dynprompt.get_node(node_id)))

    @functools.cache
    def node(node_id: str) -> dict[str, Any]:
        """A node with its links as they count."""
        found = dynprompt.get_node(node_id)
        inputs = {name: origin(value, dynprompt) for name, value in found["inputs"].items()}
        return {**found, "inputs": inputs}

    return Host(node, lambda node_id, _: facts(node_id), functools.cache(files_named))


def origin(link: Any, dynprompt: DynamicPrompt) -> Any:
    """Where a linked value really comes from: past nodes of ours that only hand it on.

    Such a node's other outputs say something else at every run, and class_facts refuses them.
    """
    seen = set()
    while is_link(link) and link[1] == 0 and link[0] not in seen:
        seen.add(link[0])
        node = dynprompt.get_node(link[0])
        cls = comfy_nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        ours = cls.__module__.startswith(f"{__package__}.")
        name = getattr(cls, "HANDS_ON", None) if ours else None
        if name is None or not is_link(node["inputs"].get(name)):
            return link
        link = node["inputs"][name]
    return link


def class_facts(node_id: str, node: dict[str, Any]) -> ClassFacts:
    """Package, fingerprint and traits of a node's class. Raises NotCacheable."""
    name = node["class_type"]
    cls = comfy_nodes.NODE_CLASS_MAPPINGS[name]
    if getattr(cls, "NOT_IDEMPOTENT", False):
        raise NotCacheable(f"{name} gives something else at every run")
    if any(getattr(cls, "OUTPUT_IS_LIST", None) or ()):
        raise NotCacheable(f"{name} gives a list, and each item is worked on alone")
    if _SEEDS & {path.rpartition(".")[2] for path in node["inputs"]}:
        raise NotCacheable(f"{name} has a seed")
    hidden = _hidden_inputs(cls)
    if hidden & _WHOLE_WORKFLOW:
        raise NotCacheable(f"{name} reads the whole workflow")
    package = package_of(getattr(sys.modules.get(cls.__module__), "__file__", None), name)
    choices = frozenset(_choices(cls))
    if package == "qwen-vram":  # the files it names are its whole fingerprint
        neutral = getattr(cls, "NEUTRAL_INPUTS", frozenset())
        return ClassFacts(package, _decided(cls, node), neutral, choices, reads_again=True)
    host = package == "comfyui"
    fingerprint = fingerprint_of(cls, node)
    hazard = None if host else class_hazard(cls)
    if not host and hazard is None and fingerprint is None:
        hazard = own_source(cls, node)
    if hazard:
        raise NotCacheable(f"{name} {hazard}")
    return ClassFacts(
        package,
        [fingerprint, node_id if "UNIQUE_ID" in hidden else None],
        choices=choices,
        files_in_fingerprint=host and name in _BY_CONTENT and fingerprint is not None,
        changed_by=changed_by(cls) if host else frozenset(),
    )


def _decided(cls: type, node: dict[str, Any]) -> Any:
    """What one of our nodes makes of its values on this machine, if that is not in them."""
    inputs = node["inputs"]
    if hasattr(cls, "beside_the_graph"):
        return cls.beside_the_graph()
    if not hasattr(cls, "decided") or any(is_link(value) for value in inputs.values()):
        return None  # a linked choice is refused by core.graph_identity
    try:
        return cls.decided(**inputs) or None
    except (OSError, ValueError) as error:
        raise NotCacheable(f"{node['class_type']} cannot load: {error}") from error


def changed_by(cls: type) -> frozenset[str]:
    """Packs that put code of their own into one of ComfyUI's node classes. Raises NotCacheable."""
    files = {f for method in vars(cls).values() for f in environment.foreign_sources(method)}
    return frozenset(environment.package_of(file, cls.__name__) for file in files)


def own_source(cls: type, node: dict[str, Any]) -> str | None:
    """Why a foreign node without fingerprint may give something that no input names; else None.

    It takes nothing from another node, so what it gives comes from its widgets or from outside.
    """
    if any(is_link(value) for value in node["inputs"].values()):
        return None
    gives = set(getattr(cls, "RETURN_TYPES", ()))
    if gives & _PICTURES:
        return "reads something of its own, and does not say when it changes"
    return class_hazard(cls, reading=True) if gives & _TEXTS else None


def _hidden_inputs(cls: type) -> set[str]:
    declared = cls.INPUT_TYPES().get("hidden", {}).values()
    return {kind[0] if isinstance(kind, (tuple, list)) else kind for kind in declared}


def _choices(cls: type) -> Iterable[str]:
    """Inputs that choose from a list of texts."""
    for group, inputs in cls.INPUT_TYPES().items():
        for name, spec in inputs.items() if group != "hidden" else ():
            if spec and (isinstance(spec[0], list) or spec[0] == "COMBO"):
                yield name


def fingerprint_of(cls: type, node: dict[str, Any]) -> Any:
    """The host's own is-changed value for a node; computed here under --cache-none."""
    name = node["class_type"]
    v3 = issubclass(cls, _ComfyNodeInternal)
    method = "fingerprint_inputs" if v3 else "IS_CHANGED"
    present = first_real_override(cls, method) if v3 else getattr(cls, method, None)
    if present is None:
        return None
    value = node["is_changed"] if "is_changed" in node else _compute_fingerprint(cls, method, node)
    if _contains_nan(value):
        raise NotCacheable(f"{name} asks to run every time")
    try:
        return digest(value)
    except TypeError:
        raise NotCacheable(f"{name} has a fingerprint that cannot be compared") from None


def _compute_fingerprint(cls: type, method: str, node: dict[str, Any]) -> Any:
    function = getattr(cls, method)
    if inspect.iscoroutinefunction(function):
        raise NotCacheable(f"{node['class_type']} computes its fingerprint asynchronously")
    return [function(**{k: None if is_link(v) else v for k, v in node["inputs"].items()})]


def _contains_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    items: Iterable[Any] = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list, tuple, set)) and any(map(_contains_nan, items))


@functools.lru_cache(maxsize=512)
def class_hazard(cls: type, reading: bool = False) -> str | None:
    """What in a foreign class's source, or its base classes', makes its result unpredictable."""
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        file = getattr(module, "__file__", None)
        if file is None or is_trusted(file):  # `object`, the host's and libraries' base classes
            continue
        try:
            hazard = source_hazard(inspect.getsource(module), base.__name__, reading)
        except (OSError, TypeError, SyntaxError):
            return "has no readable source"
        if hazard:
            return hazard
    return None


def files_named(value: str) -> list[FileIdentity]:
    """Every file or model folder that a widget's text names, in any of ComfyUI's folders."""
    tags = {match.group(1).strip() for match in _LORA_TAG.finditer(value)}
    candidates = {value, *tags} | {match.group() for match in _FILE_LIKE.finditer(value)}
    found = {path for name in candidates for path in _paths_of(name)}
    if "embedding:" in value:
        found |= set(embedding_folders())
    return identities(found)


def _paths_of(name: str) -> Iterable[str]:
    if not name.strip(". /\\") or len(name) > _LONGEST_FILE_NAME or "\0" in name or "\n" in name:
        return
    places = {base for paths, _ in folder_paths.folder_names_and_paths.values() for base in paths}
    paths = {os.path.join(base, name) for base in (*places, folder_paths.models_dir)}
    with suppress(ValueError):  # a path out of ComfyUI's folders; it is looked at as it is, above
        paths.add(folder_paths.get_annotated_filepath(name))
    yield from (path for path in sorted(paths) if os.path.isfile(path) or _is_model_folder(path))
    if not os.path.splitext(name)[1]:
        yield from _files_with_stem(name)


def _is_model_folder(path: str) -> bool:
    """A folder that holds one model, as diffusers lays it out."""
    marks = ("model_index.json", "config.json")
    return os.path.isdir(path) and any(os.path.isfile(os.path.join(path, m)) for m in marks)


def _files_with_stem(name: str) -> Iterable[str]:
    """Model files that a name without ending may mean, in subfolders too."""
    names = {name, f"{name}_encoder", f"{name}_decoder"}  # the latter two: tiny autoencoders
    wanted = {n.lower().replace("\\", "/") for n in names} | {os.path.basename(name).lower()}
    for folder in folder_paths.folder_names_and_paths:
        for file in () if folder in _NO_MODELS else folder_paths.get_filename_list(folder):
            stem = os.path.splitext(file)[0].lower().replace("\\", "/")
            if stem in wanted or os.path.basename(stem) in wanted:
                path = folder_paths.get_full_path(folder, file)
                if path:
                    yield path


def embedding_folders() -> list[str]:
    """Folders whose files a text may name by embedding:NAME."""
    return [p for p in folder_paths.get_folder_paths("embeddings") if os.path.isdir(p)]


def identities(paths: Iterable[str]) -> list[FileIdentity]:
    """Identify files and whole folders. Raises NotCacheable."""
    try:
        return sorted({file for path in paths for file in identify(path)})
    except (OSError, ValueError) as error:
        raise NotCacheable(f"a file upstream cannot be identified ({error})") from error
