"""What Reference Cache takes: when it computes references again, what it keeps, and where."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from ..core.reference_store import FORMATS
from ..core.refresh_policy import AUTO, MODES
from .reference_memory import PLACE_CHOICES


@dataclass(frozen=True)
class Settings:
    """The node's inputs; see js/docs/QwenVRAMReferenceCache.md."""

    refresh: str = AUTO
    refresh_every: int = 10
    drift_threshold: float = 0.2
    full_last_steps: int = 0
    store_format: str = "int8"
    store_place: str = "auto"
    causal: bool = False
    region: bool = False
    region_margin: int = 64
    region_threshold: float = 0.05


def when_to_refresh() -> list[io.Input]:
    """When references are computed again."""
    return [
        io.Combo.Input(
            "refresh",
            options=list(MODES),
            default=AUTO,
            tooltip=(
                "When the reference pictures are computed again. auto: as suits the model and "
                "the number of steps. first step: once; the fastest, and the least exact. every n "
                "steps: see refresh_every. when drifted: see drift_threshold."
            ),
        ),
        io.Int.Input(
            "refresh_every",
            default=10,
            min=1,
            max=1000,
            tooltip=(
                "For every n steps: how many. 1, with any refresh: every step in full, the "
                "same picture as without this node."
            ),
        ),
        io.Float.Input(
            "drift_threshold",
            default=0.2,
            min=0.0,
            max=10.0,
            step=0.01,
            round=0.001,
            tooltip=(
                "For when drifted: by how much the keys and values of the references may "
                "differ in the first blocks, as a share of themselves. 0, with any refresh: "
                "every step in full, the same picture as without this node."
            ),
        ),
        io.Int.Input(
            "full_last_steps",
            default=0,
            min=0,
            max=1000,
            tooltip="So many steps at the end are computed in full.",
        ),
    ]


def how_and_where_to_keep() -> list[io.Input]:
    """What is kept where."""
    return [
        io.Combo.Input(
            "store_format",
            options=list(FORMATS),
            default="int8",
            tooltip=(
                "How exactly keys and values are kept. model: as the model computes them. "
                "int8: half the memory. int4: a quarter, and it can be seen."
            ),
        ),
        io.Combo.Input(
            "store_place",
            options=list(PLACE_CHOICES),
            default="auto",
            tooltip=(
                "Where they are kept. gpu: in VRAM. ram: in the computer's memory, and "
                "fetched block by block. auto: in VRAM beside the whole model, or else in RAM, or "
                "in the place of some weights."
            ),
        ),
    ]


def for_masks_and_causal_models() -> list[io.Input]:
    """What most users never need."""
    return [
        io.Boolean.Input(
            "causal",
            default=False,
            tooltip=(
                "Only for checkpoints that were trained so, as Qwen-Image-Edit-Causal: each "
                "reference sees only itself, and is computed once; with store_format model "
                "nothing is lost by that. Other checkpoints make worse pictures with it."
            ),
            advanced=True,
        ),
        io.Boolean.Input(
            "region",
            default=False,
            tooltip=(
                "With a mask on the latent: what lies outside of it is no longer computed "
                "once it has settled."
            ),
            advanced=True,
        ),
        io.Int.Input(
            "region_margin",
            default=64,
            min=0,
            max=4096,
            step=8,
            tooltip="So many pixels around the mask are always computed.",
            advanced=True,
        ),
        io.Float.Input(
            "region_threshold",
            default=0.05,
            min=0.0,
            max=10.0,
            step=0.01,
            round=0.001,
            tooltip=(
                "The outside has settled when its keys and values change by less than this "
                "share of themselves from one step to the next."
            ),
            advanced=True,
        ),
    ]
