"""Decode and encode: ours, stock's at once, and stock's tiles, on the same input in one run.

Usage: COMFYUI_PATH=... python -m benchmarks.vae BASE OUT.json [--sizes 1024 2048] [--card GIB]
[--limits GB ...] [--layers] [--tiny]. BASE/models/vae holds the official file or that of
full_size_checkpoints. With --card, another process holds the rest of the GPU. Peak is
torch.cuda.max_memory_allocated above what the weights take; the error is against stock at once,
and "other kernels" is stock at once with cuDNN choosing its kernels by trial, the yardstick. It
runs when all else has: kernels that were found by trial are used from then on.
--layers measures what each layer takes, against the prediction. --tiny rehearses on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import full_size_checkpoints as files
from .text_to_image import small_card

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


class Warnings(logging.Handler):
    """Remembers whether ComfyUI said that it falls back to tiles."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the sentence."""
        self.seen.append(record.getMessage())


WARNINGS = Warnings()


def load_pack() -> None:
    """The pack as `pack`, without its entry point: ComfyUI has a module called nodes, too."""
    for name, folder in (
        ("pack", ROOT),
        ("pack.nodes", ROOT / "nodes"),
        ("pack.core", ROOT / "core"),
    ):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module


def start_comfyui(cpu: bool) -> None:
    """Its modules, without a server."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = cpu
    args.use_pytorch_cross_attention = True


def open_vae(path: Path, tiny: bool) -> Any:
    """A VAE of ComfyUI's."""
    import comfy.sd
    import comfy.utils

    if tiny:
        import comfy.ldm.wan.vae as wan

        model = wan.WanVAE(dim=16, z_dim=16, temperal_downsample=[False, True, True])
        torch.manual_seed(0)
        weights = {k: torch.randn(v.shape) * 0.05 for k, v in model.state_dict().items()}
        return comfy.sd.VAE(sd=weights)
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


# ----------------------------------------------------------------------------------- measuring
def settle() -> None:
    """Nothing of the last run is left."""
    import comfy.model_management

    gc.collect()
    comfy.model_management.soft_empty_cache()


def measured(act: Callable[[], Tensor], repeats: int) -> Result:
    """Seconds (the best of some), peak above the start in bytes, and the result; or the error."""
    seconds, peak, result = [], None, None
    try:
        for _ in range(repeats):
            result = None
            settle()
            before = start_counting()
            start = time.perf_counter()
            result = act()
            seconds.append(time.perf_counter() - start)
            peak = None if before is None else torch.cuda.max_memory_allocated() - before
    except Exception as error:  # what a run ends with is a result of the benchmark
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"seconds": min(seconds), "peak": peak, "result": result.float().cpu()}


def start_counting() -> int | None:
    """Bytes allocated now, as the base of a peak; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def weights_in(vae: Any, needed: int) -> None:
    """The weights are loaded, so that no peak counts them."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)


def error_of(found: Tensor | None, exact: Tensor | None) -> str:
    """Largest and mean difference, in parts of the exact result's own largest value."""
    if found is None or exact is None:
        return "not measurable"
    scale = exact.abs().max()
    worst, total = 0.0, 0.0
    for a, b in zip(found.split(256, 2), exact.split(256, 2), strict=True):
        difference = (a - b).abs()
        worst, total = max(worst, difference.max().item()), total + difference.double().sum().item()
    return f"{worst / scale:.1e} / {total / exact.numel() / scale:.1e}"


# ------------------------------------------------------------------------------------- the runs
def fallback_tile(vae: Any, shape: tuple[int, ...], card_bytes: int) -> int:
    """The side of stock's tiles in latent pixels, as VAE.decode chooses it when memory ran out."""
    most = vae.memory_used_decode(shape, vae.vae_dtype)
    budget, tile = min(most, int(card_bytes * 0.8)), 32
    while tile * 2 <= max(shape[3:]):
        next_shape = (*shape[:3], min(shape[3], tile * 2), min(shape[4], tile * 2))
        if vae.memory_used_decode(next_shape, vae.vae_dtype) > budget:
            break
        tile *= 2
    return tile


def runs_of(
    vae: Any, direction: str, size: int, options: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """By name, in the order in which they are made."""
    from pack.nodes import vae_pictures as ours

    generator = torch.Generator().manual_seed(size)
    side = size // 8
    if direction == "decode":
        source = torch.randn(1, 16, 1, side, side, generator=generator)
        tile = fallback_tile(vae, tuple(source.shape), int(options.tiles_for * 2**30))
        at_once = functools.partial(vae.decode, source)
        tiles = functools.partial(
            vae.decode_tiled, source, tile_x=tile, tile_y=tile, overlap=tile // 4
        )
        ours_of = functools.partial(ours.decode, vae, source)
    else:
        tile = 256
        source = torch.rand(1, size, size, 3, generator=generator)
        at_once = functools.partial(vae.encode, source)
        tiles = functools.partial(vae.encode_tiled, source, tile_x=256, tile_y=256, overlap=64)
        ours_of = functools.partial(ours.encode, vae, source)
    made: dict[str, Callable[[], Tensor]] = {}
    if not options.card:
        made[AT_ONCE] = at_once
    made[f"stock tiles of {tile * (8 if direction == 'decode' else 1)} px"] = tiles
    made["ours"] = functools.partial(told, ours_of, None)
    for limit in options.limits:
        made[f"ours within {limit} GB"] = functools.partial(told, ours_of, int(limit * 1e9))
    return made


def with_other_kernels(act: Callable[[], Tensor]) -> Tensor:
    """With kernels that cuDNN chooses by trial."""
    torch.backends.cudnn.benchmark = True
    try:
        return act()
    finally:
        torch.backends.cudnn.benchmark = False


TOLD: list[str] = []
AT_ONCE = "stock at once"


def told(act: Callable[[int | None], tuple[Tensor, Any]], limit: int | None) -> Tensor:
    """Ours, with what the node would say."""
    result, outcome = act(limit)
    TOLD.append(outcome.text())
    return result


def compare(
    vae: Any, direction: str, size: int, options: argparse.Namespace
) -> tuple[list[Result], Tensor | None]:
    """All runs of one size but the yardstick, and what stock makes at once."""
    rows, exact = [], None
    for name, act in runs_of(vae, direction, size, options).items():
        row, found = one_run(vae, act, options.repeats)
        if name == AT_ONCE and not WARNINGS.seen:
            exact = found
        rows.append(row | {"direction": direction, "size": size, "run": name})
        rows[-1]["error_of"] = error_of(found, exact)
        print(line_of(rows[-1]), flush=True)
    return rows, exact


def yardstick(
    vae: Any, direction: str, size: int, exact: Tensor | None, options: argparse.Namespace
) -> Result:
    """What other kernels change in stock at once; torch keeps using them for these shapes."""
    at_once = runs_of(vae, direction, size, options)[AT_ONCE]
    act = functools.partial(with_other_kernels, at_once)
    row, found = one_run(vae, act, options.repeats)
    row |= {"direction": direction, "size": size, "run": f"{AT_ONCE}, other kernels"}
    row["error_of"] = error_of(found, exact)
    print(line_of(row), flush=True)
    return row


def one_run(vae: Any, act: Callable[[], Tensor], repeats: int) -> tuple[Result, Tensor | None]:
    """Measured, with what was said meanwhile."""
    TOLD.clear()
    WARNINGS.seen.clear()
    weights_in(vae, 1 << 30)
    row = measured(act, repeats)
    found = row.pop("result", None)
    return row | {"told": TOLD[-1:], "warnings": list(WARNINGS.seen)}, found


def line_of(row: Result) -> str:
    """A row of the Markdown table."""
    if "error" in row:
        return f"| {row['direction']} {row['size']} | {row['run']} | {row['error']} | | | |"
    peak = "not measurable" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}"
    note = "; ".join([*row["told"], *row["warnings"]])
    figures = f"{row['seconds']:.2f} | {peak} | {row['error_of']} | {note}"
    return f"| {row['direction']} {row['size']} | {row['run']} | {figures} |"


# ----------------------------------------------------------------------------------- the layers
def measure_layers(vae: Any, side: int) -> None:
    """Peak of every layer over a tile, above its input, and what the plan reckons with."""
    from pack.core import vae_tiles
    from pack.nodes.vae_passes import Layers

    weights_in(vae, 1 << 33)
    model, element = vae.first_stage_model, vae.vae_dtype.itemsize
    print("| layer | input | peak MB | predicted MB | workspace of the largest convolution |")
    print("|---|---|---|---|---|")
    for layers in (Layers.decoding(vae), Layers.encoding(vae)):
        shape = (1, 16, 1, side, side) if layers.before[0] is model.conv2 else None
        x = torch.randn(shape or (1, model.encoder.conv1.in_channels, 1, side * 8, side * 8))
        x = x.to(vae.device, vae.vae_dtype)
        for layer in (*layers.before, layers.attention, *layers.after):
            before, held = start_counting(), x.numel() * element
            result = layer(x)
            if before is not None:
                peak = torch.cuda.max_memory_allocated() - before + held
                steps = vae_tiles.steps_of(layer)
                sizes = vae_tiles.lengths(steps, x.shape[-1])
                guess = vae_tiles.tile_bytes(steps, sizes, sizes, element)
                moved = [
                    (s.channels_in * a * a + s.channels_out * b * b) * element
                    for s, a, b in zip(steps, sizes, sizes[1:], strict=False)
                    if s.channels_out
                ]
                workspace = (peak - held) / max(moved) - 1 if moved else 0.0
                figures = f"{peak / 1e6:.0f} | {guess / 1e6:.0f} | {workspace:.2f}"
                print(f"| {type(layer).__name__} | {tuple(x.shape[1:])} | {figures} |", flush=True)
            x = result
            del result


def main() -> None:
    """Every size and direction, and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--limits", type=float, nargs="*", default=[4.0, 2.0, 1.0])
    parser.add_argument("--card", type=float, help="GiB of a smaller card")
    parser.add_argument("--tiles-for", type=float, default=8.0, help="GiB of stock's tiles' card")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="latent sides to measure")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    rows: list[Result] = []
    with small_card(options.card), torch.inference_mode():
        if options.card:
            from . import small_card as _patched  # noqa: F401  # reports the smaller total
        start_comfyui(cpu=not torch.cuda.is_available())
        load_pack()
        logging.getLogger().addHandler(WARNINGS)
        vae = open_vae(options.base / "models" / files.VAE, options.tiny)
        for side in options.layers:
            measure_layers(vae, side)
        print("| case | run | s | peak GB | error (largest / mean) | |\n|---|---|---|---|---|---|")
        exact: dict[tuple[str, int], Tensor | None] = {}
        for size in options.sizes:
            for direction in ("decode", "encode"):
                found, exact[direction, size] = compare(vae, direction, size, options)
                rows += found
                options.out.write_text(json.dumps(rows, indent=1))
        for (direction, size), whole in exact.items() if not options.card else ():
            rows.append(yardstick(vae, direction, size, whole, options))
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
