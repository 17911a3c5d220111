"""What benchmarks/quantized_loading.py measures: ways to load, machines, and their graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .full_size_checkpoints import VAE
from .small_card_runs import nodes
from .text_to_image import Graph

SIDE, TINY_SIDE, STEPS, MORE_STEPS = 1328, 256, 4, 3
TOKENS = 60
RANK = 64
# All the RAM, but as much pinned as in the cgroup for 32 GB, and with 64 GB on Windows.
LITTLE_PINNED, HALF_PINNED = "whole, 14 GiB pinned", "whole, 25.6 GiB pinned"
# GiB that the process may take of such a RAM; below, that ComfyUI may pin.
RAMS = {"whole": None, "32 GB": 30.0, "16 GB": 14.5, LITTLE_PINNED: None, HALF_PINNED: None}
PINNED = {LITTLE_PINNED: 14.0, HALF_PINNED: 25.6}
LORA, BLOCK = "bench_rank64.safetensors", "transformer_blocks.0"
BF16, FP8 = "bench_bf16.safetensors", "bench_fp8.safetensors"
KINDS = {BF16: torch.bfloat16, FP8: torch.float8_e4m3fn}
LEGACY, FAST_DISK = "--disable-dynamic-vram", "--fast-disk"
SAVED_NF4, SAVED_INT8 = "saved_nf4_smallest", "saved_int8"  # prefixes of what is saved


@dataclass(frozen=True)
class Way:
    """How a model is loaded: by which side's node, of which file, with which choices."""

    side: str
    file: str
    weight_dtype: str = "default"
    preset: str = "balanced"

    def loader(self, file: str) -> tuple[str, dict[str, Any]]:
        """The node."""
        own = {"unet_name": file, "weight_dtype": self.weight_dtype}
        if self.side == "stock":
            return "UNETLoader", own
        more = {"preset": self.preset, "device": "default", "keep_loaded": False}
        return "QwenVRAMLoadDiffusionModel", own | more


STOCK_BF16, STOCK_FP8, STOCK_FAST = "stock bf16", "stock fp8", "stock fp8 fast"
NF4, INT8 = "saved bnb_nf4, smallest", "saved int8"
OURS_FP8, OURS_BF16 = "fp8, as auto takes it", "bf16"
WAYS = {
    STOCK_BF16: Way("stock", BF16),
    STOCK_FP8: Way("stock", FP8),
    STOCK_FAST: Way("stock", FP8, "fp8_e4m3fn_fast"),
    OURS_FP8: Way("ours", FP8, "fp8_e4m3fn"),
    OURS_BF16: Way("ours", BF16),
    "bnb_nf4, smallest": Way("ours", BF16, "bnb_nf4", "smallest"),
    "bnb_nf4": Way("ours", BF16, "bnb_nf4"),
    "bnb_fp4": Way("ours", BF16, "bnb_fp4"),
    "bnb_int8": Way("ours", BF16, "bnb_int8"),
    "int8": Way("ours", BF16, "int8"),
    "int4": Way("ours", BF16, "int4"),
    "int4, smallest": Way("ours", BF16, "int4", "smallest"),
    "bnb_int8 of fp8": Way("ours", FP8, "bnb_int8"),
    "bnb_nf4 of fp8": Way("ours", FP8, "bnb_nf4"),
    "int8 of fp8": Way("ours", FP8, "int8"),
    "int4 of fp8": Way("ours", FP8, "int4"),
    NF4: Way("ours", SAVED_NF4),
    INT8: Way("ours", SAVED_INT8),
    "saved int8, stock's loader": Way("stock", SAVED_INT8),
}


@dataclass(frozen=True)
class Cell:
    """One way on one machine.

    `cold`: the file is dropped from the page cache before. `twice`: loaded again, warm; `saves`:
    written under this prefix.
    """

    group: str
    way: str
    card: str = "whole"
    ram: str = "whole"
    flags: str = ""
    lora: bool = False
    twice: bool = False
    saves: str = ""
    steps: int = STEPS
    cold: bool = True


def groups() -> dict[str, list[Cell]]:
    """Every cell, in the order in which it runs."""
    made: dict[str, list[Cell]] = {
        "bf16": [
            Cell("bf16", "bnb_nf4, smallest", twice=True, lora=True, saves=SAVED_NF4),
            Cell("bf16", STOCK_BF16, twice=True, lora=True),
            Cell("bf16", "int8", twice=True, lora=True),
            *(Cell("bf16", w, cold=False) for w in ("bnb_nf4", "int4", "bnb_int8", "bnb_fp4")),
        ],
        "16 GB RAM": [Cell("16 GB RAM", "bnb_nf4, smallest", "12 GB", "16 GB")],
        "bf16 cards": [Cell("bf16 cards", STOCK_BF16, c) for c in ("12 GB", "8 GB", "24 GB")],
        "bf16, little pinned": [
            Cell("bf16, little pinned", w, "12 GB", HALF_PINNED, cold=False)
            for w in (STOCK_BF16, OURS_BF16)
        ],
        "32 GB RAM": [
            Cell("32 GB RAM", "int8", "12 GB", "32 GB"),
            Cell("32 GB RAM", "bnb_nf4", "12 GB", "32 GB"),
            Cell("32 GB RAM", STOCK_BF16, "12 GB", "32 GB", steps=1),
        ],
        "fp8": [
            Cell("fp8", STOCK_FP8, twice=True, lora=True),
            *(Cell("fp8", w, cold=False) for w in (STOCK_FAST, "bnb_nf4 of fp8", "int4 of fp8")),
            Cell("fp8", "int8 of fp8", saves=SAVED_INT8, cold=False),
            Cell("fp8", NF4, twice=True),
            Cell("fp8", INT8, twice=True),
            Cell("fp8", "saved int8, stock's loader", cold=False),
        ],
    }
    small = [(w, c) for c in ("12 GB", "8 GB") for w in (STOCK_FP8, STOCK_FAST, NF4, INT8)]
    small += [("int4 of fp8", "12 GB"), ("bnb_int8 of fp8", "12 GB")]
    small += [(STOCK_FP8, "24 GB"), (NF4, "24 GB"), (INT8, "24 GB")]
    made["cards"] = sorted(
        (Cell("cards", way, card, cold=False) for way, card in small), key=lambda c: c.card
    )
    made["cards, 32 GB RAM"] = [
        Cell("cards, 32 GB RAM", way, "12 GB", "32 GB") for way in (STOCK_FP8, NF4)
    ]
    fp8 = (STOCK_FP8, OURS_FP8)
    made["pinned"] = [
        *(Cell("pinned", w, "12 GB", LITTLE_PINNED, cold=False) for w in fp8),
        *(Cell("pinned", w, c, "32 GB") for c in ("12 GB", "8 GB") for w in fp8),
        Cell("pinned", STOCK_FP8, "12 GB", "32 GB", FAST_DISK),
    ]
    rams = [STOCK_FP8, NF4, INT8]
    made["saved, 16 GB RAM"] = [Cell("saved, 16 GB RAM", w, "12 GB", "16 GB") for w in rams]
    legacy = {"flags": LEGACY, "lora": True, "cold": False}
    made["legacy"] = [Cell("legacy", w, "12 GB", **legacy) for w in rams]
    return made


# ------------------------------------------------------------------------------------- the graphs
def graph(
    cell: Cell, file: str, number: int, tiny: bool, cfg: float, steps: int, *extra: str
) -> Graph:
    """Sampling that is measured, from random conditions. `extra`: decode, lora, save."""
    side = TINY_SIDE if tiny else SIDE
    text = {"width": 64 if tiny else 3584, "references": ""}
    sampler = {
        "model": ["measure", 0], "positive": ["positive", 0], "negative": ["negative", 0],
        "latent_image": ["latent", 0], "seed": number, "steps": steps, "cfg": cfg,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "unet": WAYS[cell.way].loader(file),
        "positive": ("BenchConditions", {**text, "tokens": TOKENS + 13}),
        "negative": ("BenchConditions", {**text, "tokens": TOKENS}),
        "latent": ("EmptySD3LatentImage", {"width": side, "height": side, "batch_size": 1}),
        "sampler": ("KSampler", sampler),
        "report": ("BenchReport", {"measure": ["measure", 1], "after": ["sampler", 0]}),
    }
    last = "unet"
    if "lora" in extra:
        names = {"lora_name": LORA, "strength_model": 1.0}
        made["lora"], last = ("LoraLoaderModelOnly", {"model": [last, 0], **names}), "lora"
    made["shift"] = ("ModelSamplingAuraFlow", {"model": [last, 0], "shift": 3.1})
    made["measure"] = ("BenchMeasure", {"model": ["shift", 0], "number": number})
    if "decode" in extra:
        name = "tiny_wan_vae.safetensors" if tiny else VAE.split("/")[1]
        made["vae"] = ("VAELoader", {"vae_name": name})
        made["decode"] = ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]})
        made["show"] = ("PreviewImage", {"images": ["decode", 0]})
    return nodes(made)


def save_graph(cell: Cell, file: str) -> Graph:
    """Write what was quantised."""
    own = {"model": ["unet", 0], "filename_prefix": cell.saves}
    return nodes({"unet": WAYS[cell.way].loader(file), "save": ("QwenVRAMSaveQuantized", own)})
