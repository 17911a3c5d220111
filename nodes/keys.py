"""The key of a conditioning: everything that it depends on, in parts that explain a miss."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths

from ..core.file_identity import FileIdentity
from ..core.graph_identity import (
    GraphIdentity,
    canonical,
    digest,
    identify_node,
    identify_upstream,
    is_link,
    strings_in,
)
from . import environment, upstream

KEY_VERSION = 2
# Folders of ComfyUI by what a file in them is called in "... changed".
_KINDS = {
    "loras": "LoRA file",
    "text_encoders": "text encoder file",
    "vae": "VAE file",
    "embeddings": "embedding file",
    "checkpoints": "checkpoint file",
    "diffusion_models": "diffusion model file",
}


# As first seen by this process: where the system does not tell when a file was replaced.
_first_seen: dict[str, FileIdentity] = {}


class Key(NamedTuple):
    """The key of an entry, the digests of its parts, and the files behind it.

    `watched` files count by content, in a node's fingerprint; `held` are paths of which a stock
    loader may still hold an older version.
    """

    sha256: str
    parts: dict[str, str]
    files: list[FileIdentity]
    watched: list[FileIdentity]
    held: frozenset[str]

    def doubt(self) -> str | None:
        """Why a result may come from other versions of the files than these; else None."""
        for file in self.files:
            if file.path in self.held:
                seen = _first_seen.setdefault(file.path, file)
                if file.changed_ns > environment.STARTED_NS or seen != file:
                    return f"{Path(file.path).name} changed after ComfyUI started"
        return None

    def changed_since(self, moment_ns: int) -> str | None:
        """The name of a file that changed after that time, or None."""
        files = (f for f in (*self.files, *self.watched) if f.changed_ns > moment_ns)
        return next((Path(f.path).name for f in files), None)


def text_key(text: str, link: Any, dynprompt: Any) -> Key:
    """The key of `text`, encoded by the text encoder behind `link`. Raises NotCacheable."""
    host = upstream.host_of(dynprompt)
    identity = identify_upstream(upstream.origin(link, dynprompt), host)
    _note_embeddings(identity, [text])
    parts = {"text": digest(KEY_VERSION, text), **_parts_of("clip", identity)}
    return _key(parts, identity)


def picture_key(made: dict[str, Any], link: Any, name: str, dynprompt: Any) -> Key:
    """The key of what the model behind `link` makes of `made`: digests of pictures, texts, sizes.

    `made` has the names that explain a miss; a miss is explained by entries of the same "text".
    `name` is the input that `link` belongs to. Raises NotCacheable.
    """
    link = upstream.origin(link, dynprompt)
    identity = identify_upstream(link, upstream.host_of(dynprompt))
    _note_embeddings(identity, strings_in(made))
    own = {part: digest(KEY_VERSION, value) for part, value in made.items()}
    return _key({**own, **_parts_of(name, identity)}, identity)


def _note_embeddings(identity: GraphIdentity, texts: Iterable[str]) -> None:
    """The files that a text may name."""
    if any("embedding:" in text for text in texts):
        folders = upstream.identities(upstream.embedding_folders())
        identity.files += folders
        identity.held |= {file.path for file in folders}


def node_key(node_id: str, dynprompt: Any) -> Key:
    """The key of what a node gives, by the graph alone. Raises NotCacheable.

    A stock text encode has the same key as Cached Text Encode: they give the same.
    """
    host = upstream.host_of(dynprompt)
    node = dynprompt.get_node(node_id)
    facts, inputs = host.facts(node_id, node), node["inputs"]
    stock = (node["class_type"], facts.package) == ("CLIPTextEncode", "comfyui")
    if stock and not facts.changed_by and isinstance(inputs["text"], str):
        return text_key(inputs["text"], inputs["clip"], dynprompt)
    widgets = {n: canonical(v, n) for n, v in inputs.items() if not is_link(v)}
    own = [node["class_type"], facts.package, facts.fingerprint, widgets]
    parts = {"text": digest(KEY_VERSION, own)}
    links = {n: upstream.origin(v, dynprompt) for n, v in inputs.items() if is_link(v)}
    for name in sorted(links, key=lambda n: (n in _MODELS, n)):
        identity = identify_upstream(links[name], host)
        taken = name in _TAKEN or name.startswith(_TAKEN_BEGINNINGS)
        parts.update(_parts_of(f"linked {name}" if taken else name, identity))
    return _key(parts, identify_node(node_id, host))


# Names of other parts, which an input could have, too.
_TAKEN = {"text", "file", "code version", "ComfyUI's version", "start options"}
_TAKEN |= {"environment variables", "libraries", "hardware", "precision", *_KINDS.values()}
_TAKEN_BEGINNINGS = ("linked ", "LoRA before ", "nodes before ")
_MODELS = ("clip", "vae", "model")  # what they are fed by comes last in the explanation


def _parts_of(name: str, identity: GraphIdentity) -> dict[str, str]:
    """What feeds one input, as digests."""
    if name not in _MODELS:
        return {name: digest(identity.nodes)}
    if name == "vae":
        return {"nodes before vae": digest(identity.nodes)}
    loras = [_values(row) for row in identity.nodes if "lora" in str(row[1]).lower()]
    return {f"LoRA before {name}": digest(loras), f"nodes before {name}": digest(identity.nodes)}


def _values(row: list[Any]) -> list[Any]:
    """A node's class and widgets: its place in the graph is no change of the node."""
    return [row[1], *(item for item in row[2:] if not (isinstance(item, list) and "link" in item))]


def _key(parts: dict[str, str], identity: GraphIdentity) -> Key:
    files: dict[str, list[Any]] = {}
    for file in sorted(set(identity.files)):
        files.setdefault(kind_of(file.path), []).append([file.path, file.size, file.mtime_ns])
    parts.update({kind: digest(rows) for kind, rows in sorted(files.items())})
    parts["code version"] = environment.packages_digest(identity.packages)
    parts.update({name: digest(value) for name, value in environment.surroundings().items()})
    held = frozenset(identity.held)
    return Key(digest(parts), parts, sorted(identity.files), sorted(identity.watched), held)


def kind_of(path: str) -> str:
    """What a file is called to its user, by the folder that it lies in."""
    for kind, name in _KINDS.items():
        if any(path.startswith(folder + os.sep) for folder in _real(*_folders(kind))):
            return name
    return "file"


def _folders(kind: str) -> Iterable[str]:
    return folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]


@cache
def _real(*folders: str) -> list[str]:
    return [os.path.realpath(folder) for folder in folders]
