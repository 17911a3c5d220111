"""Large pictures on small cards, stock nodes against ours: who finishes, seconds, peak.

Usage: COMFYUI_PATH=... python -m benchmarks.within_vram matrix BASE OUT.jsonl [--cards 5.6 7.6]
[--vram dynamic legacy] [--cases ...] [--repeats N] [--seconds S] [--tiny]
       python -m benchmarks.within_vram thief BASE OUT.jsonl [--card 7.6] [--prompts N] ...
BASE/models holds the official files or those of full_size_checkpoints. Another process holds the
rest of the GPU. Each prompt adds a line to OUT.jsonl; cells that are there already are not run
again, so a run can be cut into parts. --seconds: begin nothing new after that. `thief`: a third
process takes and returns memory at random while prompts run. --tiny: the rehearsal on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from demo.server import Server

from .small_card_runs import (
    CASES,
    FLAGS,
    SIDES,
    Case,
    Row,
    difference,
    graph,
    run_one,
    running,
)
from .text_to_image import ROOT, Peak, device_bytes_used, small_card

REFERENCE_SIDE = 1024
TOUCH_SIDE = 256


# ------------------------------------------------------------------------------------- the matrix
def cells(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Case, repeat and side, in the order of a server; who goes first changes with each repeat."""
    return [
        (case, repeat, side)
        for case in options.cases
        for repeat in range(options.repeats)
        for side in (SIDES if repeat % 2 == 0 else SIDES[::-1])
    ]


def seen(out: Path) -> list[Row]:
    """The rows of earlier parts."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def write(out: Path, row: Row) -> None:
    """Add a row, and print what matters of it."""
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "whole error"}), flush=True)


def key(row: Row) -> tuple[Any, ...]:
    """What tells a cell from others."""
    return tuple(row[name] for name in ("card", "vram", "case", "repeat", "side"))


def matrix(options: argparse.Namespace) -> None:
    """Every card and kind of VRAM management: a server each, stock and ours in turns."""
    done = {key(row) for row in seen(options.out)}
    for vram in options.vram:
        for card in options.cards:
            wanted = [c for c in cells(options) if (card, vram, *c) not in done]
            if wanted and time.monotonic() < options.end:
                serve(options, card, vram, wanted)


def serve(
    options: argparse.Namespace, card: float, vram: str, wanted: list[tuple[str, int, str]]
) -> None:
    """The cells of one server. Before each the same side draws a small picture, untimed."""
    with small_card(None if options.tiny else card):
        before = device_bytes_used()
        with running(options, FLAGS[vram]) as (server, peak):
            pictures: dict[tuple[str, int], list[np.ndarray]] = {}
            for name, repeat, side in wanted:
                if time.monotonic() > options.end:
                    return
                case = options.every[name]
                touch = Case(TOUCH_SIDE, references=case.references)
                first = graph(side, touch, repeat, options.tiny, decode=False)
                ready = server.submit(first, timeout=300.0)
                prompt = graph(side, case, 1000 + repeat, options.tiny)
                row, drawn = run_one(server, peak, before, prompt)
                row |= {"touch": ready.status, "touch error": ready.error[:300]}
                row |= difference(pictures.get((name, repeat), []), drawn)
                pictures[(name, repeat)] = drawn
                place = {"card": card, "vram": vram, "case": name, "repeat": repeat, "side": side}
                write(options.out, place | row)


# -------------------------------------------------------------------------------------- the thief
THIEF = """
import random, sys, threading, time, torch
most, seed, pause = float(sys.argv[1]) * 1e9, int(sys.argv[2]), float(sys.argv[3])
draw, held, block, at_work = random.Random(seed), [], 1 << 26, threading.Event()
torch.empty(1, device="cuda")  # its context is there before the card is made small

def obey():
    for line in sys.stdin:
        (at_work.set if line == "steal\\n" else at_work.clear)()

threading.Thread(target=obey, daemon=True).start()
print("ready", flush=True)
while True:
    wanted = int(draw.uniform(0, most) / block) if at_work.is_set() else 0
    del held[wanted:]
    torch.cuda.empty_cache()
    while len(held) < wanted:
        try:
            held.append(torch.empty(block, dtype=torch.uint8, device="cuda"))
        except RuntimeError:  # all is taken
            break
    time.sleep(pause)
"""


class Thief:
    """Another process, which takes and returns up to so much at random while it is told to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        if torch.cuda.is_available():
            how = (str(options.thief), str(options.seed), str(options.pause))
            self.process = subprocess.Popen(
                [sys.executable, "-c", THIEF, *how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert self.process.stdout
            self.process.stdout.readline()

    def tell(self, steals: bool) -> None:
        """To steal, or to give everything back and wait."""
        if self.process is not None:
            assert self.process.poll() is None and self.process.stdin, "the thief has died"
            self.process.stdin.write(b"steal\n" if steals else b"rest\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Stop the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def steal(options: argparse.Namespace) -> None:
    """Prompts of both sides, in blocks by turns: in peace first, then with the thief at work."""
    done = {(row["thief"], row["n"], row["side"]) for row in seen(options.out)}
    plan = turns(0.0, options.peaceful, options) + turns(options.thief, options.prompts, options)
    plan = [place for place in plan if place not in done]
    thief = Thief(options)
    try:
        with small_card(None if options.tiny else options.card):
            before = device_bytes_used()
            with running(options, FLAGS[options.vram[0]]) as (server, peak):
                for previous, place in zip([None, *plan], plan, strict=False):
                    if time.monotonic() > options.end:
                        return
                    warm = previous is None or previous[2] != place[2]
                    steal_once(options, server, peak, before, place, thief, warm)
    finally:
        thief.end()


def turns(taken: float, prompts: int, options: argparse.Namespace) -> list[tuple[float, int, str]]:
    """What the thief takes at most, number and side, in blocks: a change of side loads a model."""
    blocks = [range(n, min(n + options.block, prompts)) for n in range(0, prompts, options.block)]
    order = [SIDES if i % 2 == 0 else SIDES[::-1] for i in range(len(blocks))]
    return [
        (taken, n, side)
        for block, sides in zip(blocks, order, strict=True)
        for side in sides
        if side in options.sides
        for n in block
    ]


def steal_once(
    options: argparse.Namespace,
    server: Server,
    peak: Peak,
    before: int,
    place: tuple[float, int, str],
    thief: Thief,
    warm: bool,
) -> None:
    """One prompt; where the side changes, one before it that is not counted, in peace."""
    taken, n, side = place
    if warm:
        thief.tell(False)
        server.submit(graph(side, options.every[options.case], 1, options.tiny), timeout=300.0)
    thief.tell(taken > 0)
    prompt = graph(side, options.every[options.case], 5000 + n, options.tiny)
    row, _ = run_one(server, peak, before, prompt)
    where = {"card": options.card, "vram": options.vram[0], "case": options.case}
    write(options.out, {"thief": taken, "n": n, "side": side, **where, **row})


# ------------------------------------------------------------------------------------------- main
def prepare(options: argparse.Namespace) -> None:
    """Folders, the references, the node that reports a small card."""
    base = options.base.absolute()
    target = base / "custom_nodes" / "small_card"
    shutil.copytree(ROOT / "benchmarks" / "small_card", target, dirs_exist_ok=True)
    for folder in ("web", "input"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "web" / "index.html").touch()
    side = TOUCH_SIDE if options.tiny else REFERENCE_SIDE
    for n in range(1, 4):
        coarse = np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(coarse).resize((side, side), PIL.Image.Resampling.BICUBIC)
        picture.save(base / "input" / f"reference{n}.png")
    if options.tiny:
        from demo.checkpoints import make_checkpoints

        make_checkpoints(Path(os.environ["COMFYUI_PATH"]), base / "models")
        teach = ROOT / "tests" / "teach_stock"
        shutil.copytree(teach, base / "custom_nodes" / "teach_stock", dirs_exist_ok=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("matrix", "thief"))
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cards", type=float, nargs="+", default=[5.6, 7.6, 11.5])
    parser.add_argument("--vram", choices=tuple(FLAGS), nargs="+", default=["dynamic", "legacy"])
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:4])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--card", type=float, default=7.6, help="of the thief's prompts, GiB")
    parser.add_argument("--case", choices=tuple(CASES), default="1024", help="of the thief's")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--peaceful", type=int, default=5, help="prompts without a thief")
    parser.add_argument("--block", type=int, default=10, help="prompts of a side in a row")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--thief", type=float, default=4.0, help="most that it takes, GB")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between its moves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.end = time.monotonic() + options.seconds
    options.every = CASES
    if options.tiny:
        options.every = {
            name: Case(c.side // 16 // 16 * 16, c.batch, c.references, c.steps)
            for name, c in CASES.items()
        }
    return options


def main() -> None:
    """The matrix or the thief."""
    options = parsed()
    prepare(options)
    {"matrix": matrix, "thief": steal}[options.what](options)


if __name__ == "__main__":
    main()
