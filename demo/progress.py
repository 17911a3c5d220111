"""One line of progress on the terminal and one table at the end."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from .server import Result
from .substitutions import Prompt

BAR_WIDTH = 24


def title_of(prompt: Prompt, node_id: str) -> str:
    """The title that the editor shows for a node."""
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type", node_id)


class ProgressLine:
    """Redraws one line from the host's events; into a pipe it writes one line per node instead."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._cached: set[str] = set()
        self._fractions: dict[str, float] = {}
        self._title = ""
        self._printed: set[str] = set()
        self._live = sys.stdout.isatty()

    def on_event(self, event: str, data: dict[str, Any]) -> None:
        """Takes one event of the host."""
        if event == "execution_cached":
            self._cached = set(data["nodes"])
        elif event == "progress_state":
            for node_id, node in data["nodes"].items():
                self._fractions[node_id] = node["value"] / max(node["max"], 1)
        elif event == "executing" and data["node"] is not None:
            title = title_of(self._prompt, data["display_node"])
            if not self._live and title not in self._printed:
                print(f"  {title}", flush=True)
            self._printed.add(title)
            self._title = title
        self._draw(self._percent())

    def _percent(self) -> float:
        # Nodes that a lazy input never asks for stay at zero; finish() accounts for them.
        done = {**self._fractions, **dict.fromkeys(self._cached, 1.0)}
        return 100 * min(1.0, sum(done.values()) / len(self._prompt))

    def _draw(self, percent: float) -> None:
        if not self._live:
            return
        filled = round(BAR_WIDTH * percent / 100)
        line = f"  [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {percent:3.0f} %  {self._title}"
        columns = shutil.get_terminal_size().columns - 1
        print("\r" + line[:columns].ljust(columns), end="", flush=True)

    def finish(self) -> None:
        """Fills the bar and leaves the line."""
        self._title = "done"
        self._draw(100.0)
        if self._live:
            print(flush=True)


def _cache_text(result: Result, node_id: str) -> str:
    """What our nodes say about themselves in their ui output."""
    entries = result.outputs.get(node_id, {}).get("qwen_vram", [])
    texts = [entry["text"] for entry in entries if isinstance(entry, dict) and "text" in entry]
    return "; ".join(" ".join(str(text).split()) for text in texts)


def table(prompt: Prompt, result: Result) -> str:
    """Node, seconds and what the node says, in the order of execution; then what did not run."""
    ran = [node_id for node_id in result.executed if node_id in result.seconds]
    rows = [("node", "seconds", "what the node says")]
    for node_id in ran:
        seconds = f"{result.seconds[node_id]:.2f}"
        rows.append((title_of(prompt, node_id), seconds, _cache_text(result, node_id)))
    width = max(len(row[0]) for row in rows)
    lines = [f"  {name:<{width}}  {seconds:>7}  {cache}".rstrip() for name, seconds, cache in rows]
    rest = list(dict.fromkeys(title_of(prompt, i) for i in prompt if i not in ran))
    lines += [f"  not run: {', '.join(rest)}"] if rest else []
    return "\n".join([lines[0], "  " + "-" * (width + 16), *lines[1:]])
