"""What the memory panel costs: the same run with somebody asking for the report, and without.

Usage: COMFYUI_PATH=... python -m benchmarks.memory_panel BASE OUT.json [--rounds N] [ARGS]
One server, small models of the demo, in turns: nobody asks, the panel asks once a second, and for
scale somebody asks without a pause. Seconds of a prompt from posting it to its end, and the CPU
seconds of the server's process meanwhile, which other work on the machine changes less. The seed
is another in each run, so that sampling and decoding run and nothing else. ARGS go to ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from demo.checkpoints import make_checkpoints
from demo.server import Server
from demo.substitutions import substitute

from .text_to_image import PROMPT_A, graph

ROOT = Path(__file__).resolve().parents[1]
REPORT = "/qwen_vram/report"
PAUSES = {"nobody asks": None, "once a second": 1.0, "without a pause": 0.0}  # seconds


class Asking(threading.Thread):
    """Asks for the report as the panel does: the pause begins with the answer."""

    def __init__(self, server: Server, pause_seconds: float) -> None:
        super().__init__(daemon=True)
        self.server, self.pause_seconds = server, pause_seconds
        self.took: list[float] = []
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            began = time.perf_counter()
            self.server.get(REPORT)
            self.took.append(time.perf_counter() - began)
            self._end.wait(self.pause_seconds)

    def end(self) -> list[float]:
        """Stop asking; seconds that each answer took."""
        self._end.set()
        self.join()
        return self.took


def run_one(server: Server, seed: int, steps: int, pause: float | None) -> dict[str, Any]:
    """One prompt of one kind: its seconds and those of the answers."""
    prompt = substitute(graph("ours", PROMPT_A, seed, 256, steps))
    prompt["sampler"]["inputs"]["steps"] = steps
    asking = None if pause is None else Asking(server, pause)
    if asking:
        asking.start()
    began, used = time.perf_counter(), cpu_seconds(server)
    result = server.submit(prompt)
    seconds, used = time.perf_counter() - began, cpu_seconds(server) - used
    answers = asking.end() if asking else []
    if result.status != "success":
        raise SystemExit(f"The run failed: {result.error}")
    return {"seconds": seconds, "cpu_seconds": used, "answers": answers}


def cpu_seconds(server: Server) -> float:
    """What the server's process has computed so far, all threads."""
    times = psutil.Process(server.pid).cpu_times()
    return times.user + times.system


def measure(server: Server, rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """All kinds in turns, each round in another order, so that drift meets all alike."""
    kinds = list(PAUSES)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for at in range(len(kinds)):
            kind = kinds[(number + at) % len(kinds)]
            seed = 1 + number * len(kinds) + at
            runs[kind].append(run_one(server, seed, steps, PAUSES[kind]))
    return runs


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and the ratios to the run of the same round in which nobody asked."""
    alone, told = runs["nobody asks"], {}
    for kind, each in runs.items():
        answers = sum((run["answers"] for run in each), [])
        told[kind] = {"answers": len(answers), "answer_seconds": spread(answers)}
        for figure in ("seconds", "cpu_seconds"):
            pairs = zip(each, alone, strict=True)
            ratios = [run[figure] / other[figure] for run, other in pairs]
            told[kind][figure] = spread([run[figure] for run in each])
            told[kind][f"{figure}_ratio"] = spread(ratios)
    return told


def spread(values: list[float]) -> list[float] | None:
    """The smallest, the median, the largest."""
    if not values:
        return None
    return [round(v, 4) for v in (min(values), statistics.median(values), max(values))]


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    options, args = parser.parse_known_args()
    comfyui, cpu = Path(os.environ["COMFYUI_PATH"]), not torch.cuda.is_available()
    make_checkpoints(comfyui, options.base / "models")
    with Server(comfyui, options.base, ROOT, cpu=cpu, extra_args=args) as server:
        run_one(server, 0, options.steps, None)  # loads the models
        runs = measure(server, options.rounds, options.steps)
    told = summary(runs)
    options.out.write_text(json.dumps({"summary": told, "runs": runs}, indent=1))
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
