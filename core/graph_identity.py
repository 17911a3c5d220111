"""What feeds a socket: the upstream graph with its values, files and code, as comparable data.

Everything that the result depends on is in the identity, or `NotCacheable` says why it cannot be.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .file_identity import FileIdentity

MAX_NODES = 200  # visited by recursion, well within Python's limit


class NotCacheable(Exception):
    """The result may differ the next time; the message says which node and why."""


class ClassFacts(NamedTuple):
    """What the host knows of a node: where its code lies, and its own fingerprint, if any."""

    package: str
    fingerprint: Any = None
    neutral: frozenset[str] = frozenset()  # inputs that do not change what comes out
    choices: frozenset[str] = frozenset()  # inputs that choose from a list, of files perhaps
    files_in_fingerprint: bool = False  # by content: name and date of the files do not matter
    reads_again: bool = False  # runs again when a file that it names was replaced
    changed_by: frozenset[str] = frozenset()  # packages that put code of their own into it


@dataclass
class GraphIdentity:
    """A graph in canonical form, with the files and the packages that it names.

    `watched` files are in the fingerprint of their node by content; they must only stay the same
    while the graph runs. `held` are paths of which a node may still hold an older version.
    """

    nodes: list[Any] = field(default_factory=list)
    files: list[FileIdentity] = field(default_factory=list)
    packages: set[str] = field(default_factory=set)
    watched: list[FileIdentity] = field(default_factory=list)
    held: set[str] = field(default_factory=set)

    def name(self, files: Iterable[FileIdentity], facts: ClassFacts) -> None:
        """Note files that a node names."""
        if facts.files_in_fingerprint:
            self.watched += files
            return
        self.files += files
        if not facts.reads_again:
            self.held |= {file.path for file in files}


class Host(NamedTuple):
    """The questions that only the host can answer."""

    node: Callable[[str], dict[str, Any]]
    facts: Callable[[str, dict[str, Any]], ClassFacts]
    files: Callable[[str], list[FileIdentity]]


def is_link(value: Any) -> bool:
    """A link of an API-format graph: [node id, output index], as the host tells it."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], (int, float))
    )


def identify_upstream(link: Any, host: Host) -> GraphIdentity:
    """Everything upstream of `link`. Raises NotCacheable."""
    if not is_link(link):
        raise NotCacheable("an input is handed over by a node that builds a graph of its own")
    walk = _Walk(host)
    walk.identity.nodes.append(["socket", walk.visit(link[0]), link[1]])
    return walk.identity


def identify_node(node_id: str, host: Host) -> GraphIdentity:
    """A node and everything upstream of it. Raises NotCacheable."""
    walk = _Walk(host)
    walk.visit(node_id)
    return walk.identity


class _Walk:
    """One walk upstream. Nodes are numbered by the first visit: ids differ between equal graphs."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.identity = GraphIdentity()
        self.numbers: dict[str, int] = {}

    def visit(self, node_id: str) -> int:
        """Note a node and all that feeds it; return its number."""
        if node_id in self.numbers:
            return self.numbers[node_id]
        if len(self.numbers) >= MAX_NODES:
            raise NotCacheable(f"more than {MAX_NODES} nodes lie upstream")
        number = self.numbers[node_id] = len(self.numbers)
        node = self.host.node(node_id)
        facts = self.host.facts(node_id, node)
        row: list[Any] = [number, node["class_type"], facts.package, facts.fingerprint]
        self.identity.nodes.append(row)
        self.identity.packages |= {facts.package, *facts.changed_by}
        for name, value in sorted(node["inputs"].items()):
            if name not in facts.neutral:
                row.append(self._input(node["class_type"], facts, name, value))
        return number

    def _input(self, class_type: str, facts: ClassFacts, name: str, value: Any) -> list[Any]:
        if not is_link(value):
            for text in strings_in(value):
                self.identity.name(self.host.files(text), facts)
            return [name, "value", canonical(value, f"{name} of {class_type}")]
        row = [name, "link", self.visit(value[0]), value[1]]
        if name in facts.choices and not self._names_a_file(value[0]):
            raise NotCacheable(f"{name} of {class_type} is computed by another node")
        return row

    def _names_a_file(self, node_id: str) -> bool:
        texts = (t for v in self.host.node(node_id)["inputs"].values() for t in strings_in(v))
        return any(self.host.files(text) for text in texts)


def canonical(value: Any, where: str) -> str:
    """JSON with sorted keys that tells 1 from 1.0 and True. Raises NotCacheable for the rest."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise NotCacheable(f"{where} has a value that cannot be compared ({error})") from error


def strings_in(value: Any) -> Iterable[str]:
    """Every string inside a widget value, which may hold lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)


def digest(*values: Any) -> str:
    """SHA-256, in hexadecimal, of JSON-compatible values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def source_digest(roots: Iterable[Path], base: Path) -> tuple[str, float]:
    """SHA-256 over all Python files in or below `roots`, and when the newest of them changed.

    Their paths count relative to `base`. The time is that of the last write, rename or copy.
    """
    sha = hashlib.sha256()
    newest = 0.0
    for path in sorted(file for root in roots for file in _sources(root)):
        sha.update(f"{path.relative_to(base).as_posix()}\0".encode())
        sha.update(path.read_bytes())
        stat = path.stat()
        newest = max(newest, stat.st_mtime, stat.st_ctime)
    return sha.hexdigest(), newest


def _sources(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s[0] != "." and s not in _NO_SOURCE]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


_NO_SOURCE = {"__pycache__", "node_modules", "site-packages"}


class LoadedFiles:
    """Which version of a file a live model was made from.

    A stock loader keeps its model when the file behind it is replaced. Encoding with that model
    must not be stored under the new file's identity, or a restart would serve a stale result.
    Our own loaders `record` the version that they read; others are trusted only when the file is
    older than the process.
    """

    def __init__(self, started_ns: int) -> None:
        self.started_ns = started_ns
        self._seen: weakref.WeakKeyDictionary[Any, dict[str, FileIdentity]]
        self._seen = weakref.WeakKeyDictionary()

    def record(self, model: Any, file: FileIdentity) -> None:
        """Note that `model` was made from this version of `file`."""
        self._seen.setdefault(model, {})[file.path] = file

    def files_of(self, model: Any) -> list[str]:
        """Paths of the files that `model` is known to depend on."""
        return list(self._seen.get(model, ()))

    def doubt(self, model: Any, files: Iterable[FileIdentity]) -> str | None:
        """Why it is uncertain that `model` was made from these versions of `files`; else None."""
        seen = self._seen.setdefault(model, {})
        for file in files:
            if file.path not in seen and file.changed_ns > self.started_ns:
                return f"{Path(file.path).name} changed after ComfyUI started"
            if seen.setdefault(file.path, file) != file:
                return f"{Path(file.path).name} changed after it was loaded"
        return None
