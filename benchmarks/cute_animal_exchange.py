"""Which node makes a new prompt of Cute_Animal_For_Kids slower than stock's, one at a time.

    COMFYUI_PATH=... python -m benchmarks.cute_animal files BASE/models
    COMFYUI_PATH=... python -m benchmarks.cute_animal_exchange run BASE out.json
    python -m benchmarks.cute_animal_exchange table out.json

A is the graph from stock nodes, B the same with one thing exchanged for ours. Each pair has a
server process of its own and draws A A B B A A B B, every picture from another new prompt; the
first of the process does not count. Where the loaders are exchanged, the models of both sides
would push each other out: there it is A A A A B B B B, and the first of each does not count.

exchange_probe writes down around each node what lies where, what was streamed again, and which
functions of ComfyUI were called with which numbers of bytes.

Expected on 24 GB, on either side: encoding brings in all of the encoder that text needs (7.6 GB),
since the decode's memory has pushed it out; sampling brings in what the encoder pushed out of the
transformer, both models together less the card, 4.4 to 4.8 GB, whatever sampler and decode take.
If both sides bring in the same bytes in other times, and those differ between pairs but not within
one, it is the process and where its RAM lies, not a node.

`run` goes on where it was stopped: a pair that is in the file is not run again, and with --seconds
none is begun that would not end by then. On a card a pair takes 60 to 75 s: all of them 8 minutes.
--rehearse draws on the CPU with the embedded model: the calls are real, the seconds mean nothing.
The options that are not ours go to ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from demo.conversion import load_workflow
from demo.server import Server

from . import cute_animal
from . import cute_animal_graphs as graphs
from .cute_animal import FREE_GIB, WORDS, Row
from .small_machine import Gauge
from .text_to_image import ROOT, device_bytes_used, small_card

PROBE = "/exchange_probe"
TOLD = ("exchange", "side", "counts", "seconds", "RAM")  # while it runs
A, B = "A", "B"
SPENT = ("load_models_gpu", "pin_memory", "reset_cast_buffers")  # functions worth a column
CLEAR = "QwenVRAMClear"
# What B has of ours, in the order of suspicion; "clear" is put behind the decode.
EXCHANGES: dict[str, frozenset[str]] = {
    "all": frozenset({*graphs.STOCK, graphs.WORDS, graphs.PROMPT}),
    "sampler": frozenset({"QwenVRAMSampler"}),
    "encode": frozenset({"QwenVRAMCachedTextEncode"}),
    "loaders": frozenset(name for name in graphs.STOCK if name.startswith("QwenVRAMLoad")),
    "words": frozenset({graphs.WORDS, graphs.PROMPT}),
    "decode": frozenset({"QwenVRAMDecode"}),
    "clear": frozenset({CLEAR}),
}
GUESS = 75.0  # seconds of a pair, before one has been run
ROLES = {  # what a node does, by either side's class
    **{name: kind for kind, name in (("load", n) for n in EXCHANGES["loaders"])},
    **{graphs.STOCK[n][0]: "load" for n in EXCHANGES["loaders"]},
    **dict.fromkeys(("QwenVRAMCachedTextEncode", "CLIPTextEncode"), "encode"),
    **dict.fromkeys(("QwenVRAMSampler", "KSampler"), "sampler"),
    **dict.fromkeys(("QwenVRAMDecode", "VAEDecode"), "decode"),
    **{"SaveImage": "save", CLEAR: "clear"},
    **dict.fromkeys((graphs.WORDS, graphs.PROMPT), "words"),
}


# ------------------------------------------------------------------------------------ what to draw
def turns(exchange: str, each: int, rounds: int) -> list[tuple[str, bool]]:
    """(side, whether it counts) of each picture of a pair."""
    own_models = bool(EXCHANGES[exchange] & EXCHANGES["loaders"])
    if own_models:
        return [(side, number > 0) for side in (A, B) for number in range(each * rounds)]
    sides = [side for _ in range(rounds) for side in (A, B) for _ in range(each)]
    return [(side, number > 0) for number, side in enumerate(sides)]


def words_of(number: int) -> str:
    """Another prompt for each picture of a process."""
    again, place = divmod(number, len(WORDS))
    return WORDS[place] + (f" {again + 1}" if again else "")


def graph_of(
    exchange: str, side: str, graph: graphs.Graph, prompt: Callable[..., tuple[str, str]]
) -> graphs.Graph:
    """A side's graph of a workflow in API format."""
    if side == A:
        return graphs.stock(graph, prompt)
    made = graphs.stock(graph, prompt, EXCHANGES[exchange])
    if CLEAR in EXCHANGES[exchange]:
        _clear_behind(made, graphs.the_one(made, "VAEDecode"))
    return made


def _clear_behind(graph: graphs.Graph, key: str) -> None:
    """Clear VRAM as the workflow has it, in the way of what this node puts out."""
    own = f"{key} clear"
    for node in graph.values():
        for name, value in node["inputs"].items():
            if value == [key, 0]:
                node["inputs"][name] = [own, 0]
    kinds = ("diffusion_models", "text_encoders", "vaes", "other_models")
    inputs = {
        "value": [key, 0],
        "level": "cache",
        "keep_needed": False,
        **dict.fromkeys(kinds, True),
    }
    graph[own] = {"class_type": CLEAR, "inputs": inputs, "_meta": {}}


# ------------------------------------------------------------------------------------------ a pair
def pair(options: argparse.Namespace, exchange: str) -> Iterator[Row]:
    """One server process: a row for each picture."""
    before, begin = device_bytes_used(), time.perf_counter()
    cpu = not torch.cuda.is_available()
    extra = ["--front-end-root", str(options.base / "web"), *options.args]
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with Server(comfyui, options.base, ROOT, cpu=cpu, extra_args=extra) as server:
        started = round(time.perf_counter() - begin, 2)
        workflow = load_workflow(cute_animal.WORKFLOW, server.get_json("/object_info"))
        gauge, last = Gauge(server.pid), ""
        try:
            for number, (side, counts) in enumerate(turns(exchange, options.each, options.rounds)):
                graph = graphs.with_words(workflow, words_of(number), number)
                graph = graph_of(exchange, side, graph, cute_animal.texts)
                graph = cute_animal.tiny(graph) if options.rehearse else graph
                row = cute_animal.one(server, gauge, before, graph)
                if row["status"] != "success":
                    raise SystemExit(f"{exchange}, {side}: {row['error']}")
                classes = {key: node["class_type"] for key, node in graph.items()}
                rows = server.get_json(PROBE)
                probed = [{**r, "class": classes.get(r["node"], r["node"])} for r in rows]
                yield {
                    "exchange": exchange, "number": number, "side": side, "counts": counts,
                    "settled": side == last, "started": started, **row, "probe": probed,
                    "classes": classes,
                }  # fmt: skip
                last = side
            yield {"exchange": exchange, "end": True, "RAM": ram_by_node(server.pid)}
        finally:
            gauge.running = False


def ram_by_node(pid: int) -> dict[str, int] | None:
    """Bytes of a process by NUMA node: RAM far from the card is copied there slower. None where
    the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/numa_maps").read_text()
    except OSError:
        return None
    found: dict[str, int] = {}
    for line in text.splitlines():
        size = re.search(r" kernelpagesize_kB=(\d+)", line)
        for node, pages in re.findall(r" (N\d+)=(\d+)", line):
            found[node] = found.get(node, 0) + int(pages) * int(size[1] if size else 4) * 1024
    return found


def run(options: argparse.Namespace) -> None:
    """Every pair that is not in the file yet, as long as there is time."""
    until = time.monotonic() + options.seconds
    probe = options.base / "custom_nodes" / "exchange_probe"
    with cute_animal.prepared(options.base, options.rehearse):
        shutil.copytree(ROOT / "benchmarks" / "exchange_probe", probe, dirs_exist_ok=True)
        try:
            _pairs(options, until)
        finally:
            shutil.rmtree(probe)  # other benchmarks in this folder are not to be probed


def _pairs(options: argparse.Namespace, until: float) -> None:
    for exchange in options.exchange:
        pairs = read(options.out)
        if exchange in pairs:
            continue
        longest = max(
            (p["took"] for p in pairs.values()), default=0.0 if options.rehearse else GUESS
        )
        if time.monotonic() + longest > until:
            print("stopped: no time for another pair; run the same again", flush=True)
            return
        # Else what an earlier pair has encoded would be known.
        shutil.rmtree(options.base / "user" / "__qwen_vram", ignore_errors=True)
        begin, rows = time.monotonic(), []
        with small_card(None if options.rehearse else FREE_GIB[options.card]):
            for row in pair(options, exchange):
                rows.append(row)
                print({k: row[k] for k in TOLD if k in row}, flush=True)
        took = round(time.monotonic() - begin, 1)
        *rows, end = rows
        facts = {"card": options.card, "args": options.args, "took": took, "RAM": end["RAM"]}
        pairs[exchange] = {**facts, "rows": rows}
        whole = options.out.with_suffix(".writing")
        whole.write_text(json.dumps(pairs), encoding="utf-8")
        whole.replace(options.out)
    print("done", flush=True)


def read(path: Path) -> dict[str, Row]:
    """The pairs so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --------------------------------------------------------------------------------------- the table
def middle(values: Iterable[float]) -> float | None:
    """The median, or None of nothing."""
    found = list(values)
    return statistics.median(found) if found else None


def role_of(kind: str) -> str:
    """What a node of this class does."""
    return ROLES.get(kind, "other")


def brought(node: Row, model: str) -> float:
    """Bytes of a model's weights that came from the RAM while a node ran."""
    kinds = node["streamed"].get(model, {})
    return sum(size for kind, (_, size) in kinds.items() if kind != "resident")


def called(node: Row) -> dict[str, int]:
    """How often each function was called while a node ran."""
    found = Counter(call["call"] for call in node["calls"])
    return dict(found) | {name: number for name, (number, _, _) in node["counts"].items()}


def held(node: Row, when: str, model: str) -> int | None:
    """Bytes of a model on its device before or after a node; None where it is not loaded."""
    found = node.get(when, {}).get("models", {}).get(model)
    return sum(facts["device"] for facts in found) if found else None


def sides(rows: list[Row], settled: bool = False) -> dict[str, list[Row]]:
    """The pictures that count, by side; `settled`: only those behind one of the same side."""
    counted = [r for r in rows if r["counts"] and (r["settled"] or not settled)]
    return {side: [r for r in counted if r["side"] == side] for side in (A, B)}


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
        pairs = [by_role_seconds(every[side], role) for side in (A, B)]
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
    for side, pictures in sides(rows).items():
        for role in ("encode", "sampler", "decode", "clear"):
            nodes = [n for r in pictures for n in r["probe"] if role_of(n["class"]) == role]
            if not nodes:
                continue
            held_, brought_ = [], []
            for model in models_in(rows):
                ends = [
                    middle(_known(held(n, w, model) for n in nodes)) for w in ("before", "after")
                ]
                held_.append(f"{model} {gigabytes(ends[0])} to {gigabytes(ends[1])}")
                if (size := middle(brought(n, model) for n in nodes)) is not None and size > 0:
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
    """Markdown: seconds of each pair, then what lay where and who was called."""
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


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table").add_argument("out", type=Path)
    measure = commands.add_parser("run")
    measure.add_argument("base", type=Path)
    measure.add_argument("out", type=Path)
    measure.add_argument("--exchange", nargs="+", choices=EXCHANGES, default=list(EXCHANGES))
    measure.add_argument("--card", type=int, choices=FREE_GIB, default=24)
    measure.add_argument("--each", type=int, default=2, help="pictures of a side in a row")
    measure.add_argument("--rounds", type=int, default=2, help="how often both sides have a turn")
    measure.add_argument("--seconds", type=float, default=570.0)
    measure.add_argument("--rehearse", action="store_true")
    options, options.args = parser.parse_known_args()
    if options.command == "run":
        # As an exit, so that the server of the pair ends, too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
        options.base.mkdir(parents=True, exist_ok=True)
        run(options)
    print(table(read(options.out)))


if __name__ == "__main__":
    main()
