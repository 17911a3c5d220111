"""Every backend of attention that is installed: error and speed against PyTorch's SDPA.

Usage: COMFYUI_PATH=... python -m benchmarks.attention_backends OUT.jsonl [--tokens N ...]

24 heads of 128 as in Qwen-Image, bf16, random queries, keys and values, on the GPU; with and
without the mask that ComfyUI gives (it hides an eighth of the keys from all queries). Error: L2,
relative to SDPA in float32 on the same numbers, of the first heads. Milliseconds: median by CUDA
events after one call. A length is left out where the one before says that it takes too long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
HEADS, WIDTH = 24, 128
TOKENS = (1024, 4096, 16384, 65536)
JUDGED_HEADS = 2
MOST_SECONDS = 2.0  # of one call
BUDGET_SECONDS = 0.25  # for the repetitions of one call
Row = dict[str, Any]


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values (1, heads, tokens, width) and an added mask (1, 1, 1, tokens)."""
    draw = torch.Generator("cuda").manual_seed(tokens)
    shape = (1, HEADS, tokens, WIDTH)
    made = [torch.randn(shape, generator=draw, device="cuda").bfloat16() for _ in range(3)]
    mask = torch.zeros(1, 1, 1, tokens, device="cuda", dtype=torch.bfloat16)
    mask[..., : tokens // 8] = torch.finfo(torch.bfloat16).min
    return (*made, mask)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """In float32, of the first heads."""
    shown = slice(None) if mask is None else mask[0, 0, 0] == 0
    own = [x[:, :JUDGED_HEADS].float() for x in (q, k[:, :, shown], v[:, :, shown])]
    return scaled_dot_product_attention(*own)


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Median of several calls."""
    found: list[float] = []
    while len(found) < 3 or (sum(found) < BUDGET_SECONDS * 1000 and len(found) < 30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
        if found[0] > MOST_SECONDS * 1000:
            break
    return statistics.median(found)


def tried(backend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Row:
    """One backend on one input: the self-test's verdict, error, time, memory; or why not."""
    from pack.core.attention import HIDDEN_KEYS, NO_MASK, mask_aware
    from pack.nodes.attention_health import Situation, verdict

    kind = NO_MASK if mask is None else HIDDEN_KEYS
    found = verdict(backend, Situation(q.device, q.dtype, WIDTH, kind))
    row: Row = {"healthy": found.healthy, "reason": found.reason}
    if missing := backend.probe(q.device):
        return row | {"failed": missing}
    attend = mask_aware(backend.attend, backend.takes_masks)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        with torch.inference_mode():
            result = attend(q, k, v, mask, WIDTH**-0.5)
            peak = torch.cuda.max_memory_allocated() - before
            wanted = exact(q, k, v, mask)
            gap = (result[:, :JUDGED_HEADS].float() - wanted).norm() / wanted.norm()
            del result, wanted
            time = milliseconds(lambda: attend(q, k, v, mask, WIDTH**-0.5))
    except Exception as error:  # a backend may raise anything: that is a result
        torch.cuda.empty_cache()
        return row | {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}
    return row | {"error": gap.item(), "ms": round(time, 3), "peak": peak}


def loaded_backends() -> dict[str, Any]:
    """The node's own table, with ComfyUI's modules behind it."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.modules["pack"] = types.ModuleType("pack")
    sys.modules["pack"].__path__ = [str(ROOT)]
    from pack.nodes.attention_backends import BACKENDS

    return dict(BACKENDS)


def measure(options: argparse.Namespace) -> None:
    """A row for each backend, length and mask."""
    for name, backend in loaded_backends().items():
        if options.only and name not in options.only or name in options.without:
            continue
        slow = dict.fromkeys((False, True), 0.0)
        for tokens in options.tokens:
            q, k, v, mask = inputs(tokens)
            for masked, before in slow.items():
                if before * 16 > MOST_SECONDS * 1000:
                    continue
                row = {"backend": name, "tokens": tokens, "masked": masked}
                row |= tried(backend, q, k, v, mask if masked else None)
                slow[masked] = row.get("ms", 0.0)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def table(rows: list[Row]) -> str:
    """Markdown: a line for each backend; milliseconds (error) for each length and mask."""
    columns = sorted({(row["tokens"], row["masked"]) for row in rows})
    head = [f"{n // 1024}k{', mask' if masked else ''}" for n, masked in columns]
    lines = [f"| backend | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    for name in dict.fromkeys(row["backend"] for row in rows):
        own = {(r["tokens"], r["masked"]): r for r in rows if r["backend"] == name}
        cells = [shown(own.get(column)) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(row: Row | None) -> str:
    """One cell."""
    if row is None:
        return "too slow"
    failed = "" if row["healthy"] else f" self-test: {row['reason'][:60]}"
    return row.get("failed", "")[:80] or f"{row['ms']:.2f} ({row['error']:.1e}){failed}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--only", nargs="*", default=[], help="names of backends")
    parser.add_argument("--without", nargs="*", default=[], help="names of backends")
    parser.add_argument("--table", action="store_true", help="of what there is")
    options = parser.parse_args()
    if not options.table:
        measure(options)
    print(table([json.loads(line) for line in options.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
