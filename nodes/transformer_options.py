"""What the pack's parts tell each other in ComfyUI's transformer_options."""

from __future__ import annotations

from typing import Any

Options = dict[str, Any]

# What patches that record or count commit after a forward pass that succeeded, and what patches
# hold on the GPU.
ON_SUCCESS, HOLDINGS = "qwen_vram.on_success", "qwen_vram.holdings"
PART = "qwen_vram.part"  # which part of the picture or the batch a forward pass is about
PARTS = "qwen_vram.parts"  # into how many parts a run cuts the picture, where it does


def with_part(options: Options, kind: str, *which: int) -> Options:
    """A copy that says which part of a whole the model sees: tile, item of a batch.

    Parts nest. What keeps something of a forward pass for the next one keeps it for each part.
    """
    return {**options, PART: (*part_of(options), (kind, *which))}


def part_of(options: Options) -> tuple[tuple[str | int, ...], ...]:
    """The parts within parts that a pass is about, outermost first; () for the whole."""
    return options.get(PART, ())
