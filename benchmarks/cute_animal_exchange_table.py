"""The table of cute_animal_exchange.py."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from . import cute_animal_graphs as graphs
from .cute_animal import Row

A, B = "A", "B"
CLEAR = "QwenVRAMClear"
LOADERS = frozenset(name for name in graphs.STOCK if name.startswith("QwenVRAMLoad"))
SPENT = ("load_models_gpu", "pin_memory", "reset_cast_buffers")  # functions worth a column
ROLES = {  # what a node does, by either side's class
    **dict.fromkeys((*LOADERS, *(graphs.STOCK[name][0] for name in LOADERS)), "load"),
    **dict.fromkeys(("QwenVRAMCachedTextEncode", "CLIPTextEncode"), "encode"),
    **dict.fromkeys(("QwenVRAMSampler", "KSampler"), "sampler"),
    **dict.fromkeys(("QwenVRAMDecode", "VAEDecode"), "decode"),
    **{"SaveImage": "save", CLEAR: "clear"},
    **dict.fromkeys((graphs.WORDS, graphs.PROMPT), "words"),
}


def middle(values: Iterable[float]) -> float | None:
    """The median, or None of nothing."""
    found = list(values)
    return statistics.median(found) if found else None


def role_of(kind: str) -> str:
    """What a node of this class does."""
    return ROLES.get(kind, "other")


def as_one(nodes: list[Row]) -> Row:
    """The nodes of a picture that do the same, as both encodings, as one."""
    first, last = nodes[0], nodes[-1]
    counts: dict[str, list[float]] = {}
    streamed: dict[str, dict[str, list[int]]] = {}
    for node in nodes:
        _add(counts, node["counts"])
        for model, kinds in node["streamed"].items():
            _add(streamed.setdefault(model, {}), kinds)
    return {
        **last, "before": first["before"], "counts": counts, "streamed": streamed,
        "calls": [call for node in nodes for call in node["calls"]],
        "seconds": sum(node["seconds"] for node in nodes),
        "worker seconds": sum(node["worker seconds"] for node in nodes),
        "peak": max(_known(node.get("peak") for node in nodes), default=None),
    }  # fmt: skip


def _add(to: dict[str, list[Any]], more: dict[str, list[Any]]) -> None:
    for name, values in more.items():
        to[name] = [a + b for a, b in zip(to.get(name, [0] * len(values)), values, strict=True)]


def brought(node: Row, model: str) -> float:
    """Bytes of a model's weights that came from the RAM while a node ran."""
    kinds = node["streamed"].get(model, {})
    return sum(size for kind, (_, size) in kinds.items() if kind != "resident")


def called(node: Row) -> dict[str, int]:
    """How often each function was called while a node ran."""
    found = Counter(call["call"] for call in node["calls"])
    return dict(found) | {name: number for name, (number, _, _) in node["counts"].items()}


def middle_held(nodes: list[Row], when: str, model: str) -> float | None:
    """Bytes of a model on its device "before" or "after" a node; None where it is not loaded."""
    found = _known(node[when]["models"].get(model) for node in nodes)
    return middle(sum(facts["device"] for facts in entries) for entries in found)


def sides(rows: list[Row], settled: bool = False) -> dict[str, list[Row]]:
    """The pictures that count, by side; `settled`: only those behind one of the same side."""
    counted = [r for r in rows if r["counts"] and (r["settled"] or not settled)]
    return {side: [r for r in counted if r["side"] == side] for side in (A, B)}


def compared(rows: list[Row]) -> dict[str, list[Row]]:
    """Those in which nodes are compared: what the other side has left is not to count."""
    settled = sides(rows, settled=True)
    return settled if all(settled.values()) else sides(rows)


def seconds(value: float | None) -> str:
    """Two digits."""
    return "-" if value is None else f"{value:.2f}"


def seconds_line(exchange: str, rows: list[Row]) -> str:
    """Of whole pictures and of the four nodes that take time: A, B."""
    every, settled = sides(rows), sides(rows, settled=True)
    cells = [exchange, " / ".join(str(len(every[side])) for side in (A, B))]
    for group in (every, settled):
        cells.append(" / ".join(seconds(middle(r["seconds"] for r in group[s])) for s in (A, B)))
    for role in ("encode", "sampler", "decode", "words"):
        pairs = [by_role_seconds(found, role) for found in compared(rows).values()]
        cells.append(" / ".join(map(seconds, pairs)))
    return f"| {' | '.join(cells)} |"


def by_role_seconds(rows: list[Row], role: str) -> float | None:
    """Median of the seconds as a client sees them, with what ComfyUI does behind a node."""
    kinds = ({k: role_of(r["classes"].get(k, "")) for k in r["nodes"]} for r in rows)
    ran = [
        [seconds for key, seconds in row["nodes"].items() if kind[key] == role]
        for row, kind in zip(rows, kinds, strict=True)
    ]
    return middle(sum(found) for found in ran if found)


def models_in(rows: list[Row]) -> list[str]:
    """Every model that was loaded."""
    names = {m: None for r in rows for n in r["probe"] for m in n["before"]["models"]}
    return sorted(names)


def node_lines(exchange: str, rows: list[Row]) -> Iterator[str]:
    """Of each kind of node: bytes held before and after, brought in, and calls; medians."""
    for side, pictures in compared(rows).items():
        for role in ("encode", "sampler", "decode", "clear"):
            found = ([n for n in r["probe"] if role_of(n["class"]) == role] for r in pictures)
            nodes = [as_one(each) for each in found if each]
            if not nodes:
                continue
            held_, brought_ = [], []
            for model in models_in(rows):
                ends = (middle_held(nodes, when, model) for when in ("before", "after"))
                held_.append(f"{model} {' to '.join(map(gigabytes, ends))}")
                if size := middle(brought(n, model) for n in nodes):
                    brought_.append(f"{model} {gigabytes(size)}")
            cells = [
                exchange, side, role, seconds(middle(n["seconds"] for n in nodes)),
                seconds(middle(n["worker seconds"] for n in nodes)),
                ", ".join(held_), ", ".join(brought_) or "-",
                gigabytes(middle(_known(n.get("peak") for n in nodes))),
                gigabytes(middle(n["after"]["pinned"] for n in nodes)),
                gigabytes(middle(_known(n["after"].get("reserved") for n in nodes))),
                calls_text(nodes),
                *(spent(nodes, name) for name in SPENT),
            ]  # fmt: skip
            yield f"| {' | '.join(cells)} |"


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def gigabytes(value: float | None) -> str:
    """GB, or that there is nothing."""
    return "-" if value is None else f"{value / 1e9:.2f}"


def spent(nodes: list[Row], name: str) -> str:
    """Median seconds within one function: of calls that are listed, or only counted."""
    listed = [sum(c["seconds"] for c in n["calls"] if c["call"] == name) for n in nodes]
    counted = [n["counts"].get(name, (0, 0, 0.0))[2] for n in nodes]
    return seconds(middle(a + b for a, b in zip(listed, counted, strict=True)))


def calls_text(nodes: list[Row]) -> str:
    """Median number of calls of each function, those of none left out."""
    counts = [called(node) for node in nodes]
    medians = {n: middle(c.get(n, 0) for c in counts) for c in counts for n in c}
    return ", ".join(f"{name} {number:g}" for name, number in sorted(medians.items()) if number)


HEAD = (
    "exchanged", "pictures A / B", "picture, s", "picture behind one of its side, s",
    "encode, s", "sampler, s", "decode, s", "words, s",
)  # fmt: skip
NODE_HEAD = (
    "exchanged", "side", "node", "inside, s", "of it the worker's CPU, s", "on the device, GB",
    "brought in, GB", "torch's peak, GB", "pinned, GB", "torch's reserved, GB", "calls",
    *(f"in {name}, s" for name in SPENT),
)  # fmt: skip


def table(pairs: dict[str, Row]) -> str:
    """Markdown: seconds of each pair, then what lay where and who was called.

    torch's peak counts from the first pass where the sampler is ours, from the node's start
    elsewhere. Calls between two nodes count as the first one's; their seconds do not.
    """
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [seconds_line(name, found["rows"]) for name, found in pairs.items()]
    lines += ["", f"| {' | '.join(NODE_HEAD)} |", "|" + "---|" * len(NODE_HEAD)]
    for name, found in pairs.items():
        lines += node_lines(name, found["rows"])
    lines += [
        "",
        *(f"RAM of {name} by NUMA node: {ram_text(p['RAM'])}." for name, p in pairs.items()),
    ]
    return "\n".join(lines)


def ram_text(found: dict[str, int] | None) -> str:
    """Of each NUMA node."""
    if not found:
        return "not measurable, the system does not tell"
    return ", ".join(f"{node} {gigabytes(size)} GB" for node, size in sorted(found.items()))
