"""The rows of benchmarks/quantized_loading.py as a table."""

from __future__ import annotations

import statistics

from .small_card_runs import Row

HEAD = (
    "group", "way", "card", "RAM", "file GB", "loader s cold / warm", "first step after s",
    "first image s", "s a step CFG 4 / 1", "with LoRA", "RAM loading: own + file GB",
    "RAM running", "VRAM loading / running GB",
)  # fmt: skip


def steady(row: Row, name: str) -> str:
    """Median seconds of a step, without the first."""
    steps = row.get(name, {}).get("step seconds", [])
    return f"{statistics.median(steps[1:] or steps):.3f}" if steps else "-"


def peaks(row: Row, node: str) -> dict[str, float]:
    """Of the first prompt."""
    return row["first"].get("peaks", {}).get(node, {})


def ram(row: Row, node: str) -> str:
    """Anonymous and of the file."""
    found = peaks(row, node)
    return f"{found.get('RssAnon', 0):.1f} + {found.get('RssFile', 0):.1f}"


def line(row: Row) -> str:
    """One cell."""
    first, warm = row["first"], row.get("warm", {})
    cells = [row["group"], " ".join([row["way"], row["flags"]]).strip(), row["card"]]
    cells += [row["ram"], f"{row['bytes'] / 1e9:.1f}"]
    if row["status"] != "success":
        failed = next(v for v in row.values() if isinstance(v, dict) and v.get("error"))
        return f"| {' | '.join([*cells, failed['error'][:120]])} |"
    loads = [one.get("nodes", {}).get("unet", 0.0) for one in (first, warm)]
    cells += [f"{loads[0]:.1f} / {loads[1]:.1f}" if warm else f"{loads[0]:.1f}"]
    cells += [" / ".join(str(one.get("first step")) for one in (first, warm) if one)]
    cells += [str(first["seconds"]), f"{steady(row, 'first')} / {steady(row, 'CFG 1')}"]
    cells += [steady(row, "LoRA"), ram(row, "unet"), ram(row, "sampler")]
    cells += [" / ".join(str(peaks(row, n).get("VRAM", "-")) for n in ("unet", "sampler"))]
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *map(line, rows)])
