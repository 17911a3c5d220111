"""What early exit saves and costs on the embedded model: thresholds, steps, PSNR.

Usage: COMFYUI_PATH=... python -m benchmarks.early_exit [--steps 40] [--count 4] [--out FOLDER]

Pictures and edits of the embedded model on the CPU, each with the full schedule and with each
threshold, the last step kept and not. PSNR of the decoded picture against all steps. Beside it,
for scale: a shorter schedule of as many steps, which is the other way to save them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import statistics
import sys
import tempfile
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # run as a program, not by the tests
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]
    sys.modules["pack"].__file__ = str(ROOT / "__init__.py")

from pack.demo import environment, figures  # noqa: E402
from pack.demo.edit_graph import edit_graph  # noqa: E402
from pack.tests.graphs import embedded_text_to_image, node  # noqa: E402
from pack.tests.host import Host  # noqa: E402

THRESHOLDS = (1e-4, 1e-2, 1e-1, 0.3, 0.5, 1.0, 2.0, 4.0)
Graph = dict[str, Any]


def leaving(graph: Graph, steps: int, threshold: float, keep: bool) -> Graph:
    """The graph with so many steps and our node before the sampler."""
    changed = copy.deepcopy(graph)
    given = {"threshold": threshold, "patience": 3, "min_steps": 4, "keep_last_step": keep}
    changed["exit"] = node("QwenVRAMEarlyExit", model=["shift", 0], **given)
    changed["sampler"]["inputs"] |= {"model": ["exit", 0], "steps": steps}
    changed["save"] = node("PreviewImage", images=["decode", 0])
    return changed


def graphs(host: Host, count: int) -> Iterator[tuple[str, Graph]]:
    """Texts and edits, as the embedded model is judged by."""
    for seed, text in enumerate(figures.SHOWN[:count]):
        yield "text to image", embedded_text_to_image(text, seed=seed)
    for seed, (_, before, _, instructions) in enumerate(figures.edits_to_judge(count)):
        name = f"scene_{seed}.png"
        Image.fromarray(figures.drawn(before)).save(host.base / "input" / name)
        yield "edit", edit_graph(name, instructions[0], seed=seed)


def run(host: Host, graph: Graph) -> tuple[Tensor, Any]:
    """The picture (h, w, 3), and what our node recorded."""
    host.run(graph)
    results = (host.executor.caches.outputs.get_local(name) for name in ("decode", "exit"))
    picture, patched = (result.outputs[0][0] for result in results)
    (wrapper,) = patched.wrappers["sampler_sample"]["qwen_vram.early_exit"]
    return picture[0], wrapper.__self__.record


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Decibels, of values 0..1; infinite for the same picture."""
    error = float((made.double() - wanted.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def mean(decibels: list[float]) -> str:
    """The mean of those that are finite, and how many are the same picture."""
    finite = [value for value in decibels if math.isfinite(value)]
    same = len(decibels) - len(finite)
    shown = f"{statistics.mean(finite):.1f}, least {min(finite):.1f}" if finite else ""
    return f"{shown} ({same} the same)" if same and finite else shown or "the same"


def _compared(
    host: Host, graph: Graph, whole: Tensor, steps: int, threshold: float, keep: bool
) -> tuple[int, float, float]:
    """Steps saved, and PSNR of the picture and of one from a schedule that is as short."""
    made, left = run(host, leaving(graph, steps, threshold, keep))
    if not left.saved:
        return 0, psnr(made, whole), psnr(made, whole)
    short, _ = run(host, leaving(graph, steps - left.saved, 0.0, True))
    return left.saved, psnr(made, whole), psnr(short, whole)


def main() -> None:
    """Print the table; with --out, write the curves as the node shows them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    comfyui = environment.required_comfyui()
    rows: dict[Any, list[Any]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as base, torch.inference_mode():
        host = Host(comfyui, Path(base), ROOT)
        for number, (kind, graph) in enumerate(graphs(host, given.count)):
            whole, record = run(host, leaving(graph, given.steps, 0.0, True))
            changes = record.changes()
            print(f"{kind} {number}:", " ".join(f"{c:.2g}" for c in changes), flush=True)
            if given.out:
                given.out.mkdir(parents=True, exist_ok=True)
                record.picture.save(given.out / f"curve_{number}.png")
            for threshold in THRESHOLDS:
                for keep in (True, False):
                    found = _compared(host, graph, whole, given.steps, threshold, keep)
                    rows[kind, threshold, keep].append(found)
    print("\n| work | threshold | last step | steps saved | PSNR, dB | a schedule that short, dB |")
    print("|---|---|---|---|---|---|")
    for (kind, threshold, keep), found in rows.items():
        saved, own, short = (list(column) for column in zip(*found, strict=True))
        kept = "kept" if keep else "not kept"
        print(
            f"| {kind} | {threshold:g} | {kept} | {statistics.mean(saved):.1f} of {given.steps} "
            f"| {mean(own)} | {mean(short)} |"
        )


if __name__ == "__main__":
    main()
