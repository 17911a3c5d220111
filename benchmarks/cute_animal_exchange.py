"""Which node makes a new prompt of Cute_Animal_For_Kids slower than stock's, one at a time.

    COMFYUI_PATH=... python -m benchmarks.cute_animal files BASE/models
    COMFYUI_PATH=... python -m benchmarks.cute_animal_exchange run BASE out.json
    python -m benchmarks.cute_animal_exchange table out.json

A is the graph from stock nodes, B the same with one thing exchanged for ours; ComfyUI merges the
LoRA on both sides. Each pair has a server process of its own and draws A A B B A A B B, every
picture from another new prompt; the first of the process does not count. Where loaders or encoders
are exchanged it is A A A A B B B B, and the first of each does not count: the models of both sides
would push each other out, and ComfyUI lets go of the other side's conditioning of the negative
prompt, which it then encodes anew. Nodes are compared in pictures behind one of the same side, if
there are any.

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
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from demo.conversion import load_workflow
from demo.server import Server

from . import cute_animal
from . import cute_animal_graphs as graphs
from .cute_animal import FREE_GIB, WORDS, Row
from .cute_animal_exchange_table import CLEAR, LOADERS, A, B, table
from .small_machine import Gauge
from .text_to_image import ROOT, device_bytes_used, small_card

PROBE = "/exchange_probe"
TOLD = ("exchange", "side", "counts", "seconds", "RAM")  # while it runs
# What B has of ours, in the order of suspicion; "clear" is put behind the decode.
EXCHANGES: dict[str, frozenset[str]] = {
    "all": frozenset({*graphs.STOCK, graphs.WORDS, graphs.PROMPT}),
    "sampler": frozenset({"QwenVRAMSampler"}),
    "encode": frozenset({"QwenVRAMCachedTextEncode"}),
    "loaders": LOADERS,
    "words": frozenset({graphs.WORDS, graphs.PROMPT}),
    "decode": frozenset({"QwenVRAMDecode"}),
    "clear": frozenset({CLEAR}),
}
GUESS = 75.0  # seconds of a pair, before one has been run


# ------------------------------------------------------------------------------------ what to draw
def turns(exchange: str, each: int, rounds: int) -> list[tuple[str, bool]]:
    """(side, whether it counts) of each picture of a pair."""
    if EXCHANGES[exchange] & {*LOADERS, "QwenVRAMCachedTextEncode"}:
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
    for key in graphs.of_class(made, graphs.LOADER):  # the LoRA merged, as in stock
        made[key]["inputs"] |= graphs.WEIGHTS["merged"]
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
    here = {"card": options.card, "args": options.args, "rehearsal": options.rehearse}
    for exchange in options.exchange:
        pairs = read(options.out)
        if any(kept[name] != here[name] for kept in pairs.values() for name in here):
            raise SystemExit(f"{options.out} has pairs of other options; name another file.")
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
        pairs[exchange] = {**here, "took": took, "RAM": end["RAM"], "rows": rows}
        whole = options.out.with_suffix(".writing")
        whole.write_text(json.dumps(pairs), encoding="utf-8")
        whole.replace(options.out)
    print("done", flush=True)


def read(path: Path) -> dict[str, Row]:
    """The pairs so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
