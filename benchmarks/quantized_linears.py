"""The linear layers of one block in every format of weights: error, milliseconds, and quantising.

Usage: COMFYUI_PATH=... python -m benchmarks.quantized_linears OUT.jsonl [--only NAME ...] [--ours]
Normal weights in the shapes of Qwen-Image's transformer, bf16, on the GPU. "block": the six layers
of an image stream at the tokens of a 1328 px picture; "text": the same at those of a prompt;
"modulation": its layer, at one token. Error: L2 of the outputs, relative to float32 on the weights
that were quantised. Milliseconds: median by CUDA events; below 1,000 tokens by turns over the
weights of two blocks, which the card's cache does not hold. "quantising": calculated for the 840
layers of the transformer from the milliseconds of one layer of each shape. --ours: by the pack's
own codec and layouts; else by the packages' own calls. --tiny: a rehearsal on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HIDDEN, BLOCKS = 3072, 12288, 60
SQUARE, UP, DOWN = (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)
MODULATION = (6 * WIDTH, WIDTH)
STREAM = [SQUARE] * 4 + [UP, DOWN]
SIZES = {"block": (STREAM, 6889), "text": (STREAM, 128), "modulation": ([MODULATION], 1)}
IN_MODEL = {SQUARE: 8 * BLOCKS, UP: 2 * BLOCKS, DOWN: 2 * BLOCKS, MODULATION: 2 * BLOCKS}
BUDGET_MS = 150.0
TINY_DIVISOR = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Layer = Callable[[Tensor], Tensor]
Way = Callable[[Tensor], tuple[Layer, int]]  # a bf16 weight -> the layer and its bytes
Row = dict[str, Any]


def plain(weight: Tensor) -> tuple[Layer, int]:
    """As it is."""
    return lambda x: linear(x, weight), weight.nbytes


def fp8_cast(weight: Tensor) -> tuple[Layer, int]:
    """What ComfyUI does with an fp8 file: cast at each use."""
    small = weight.to(torch.float8_e4m3fn)
    return lambda x: linear(x, small.to(x.dtype)), small.nbytes


def fp8_fast(weight: Tensor) -> tuple[Layer, int]:
    """fp8_e4m3fn_fast: the product of two fp8 matrices, scales of 1."""
    small, one = weight.to(torch.float8_e4m3fn), torch.ones((), device=weight.device)

    def layer(x: Tensor) -> Tensor:
        x8 = x.clamp(-448, 448).to(torch.float8_e4m3fn)
        return torch._scaled_mm(x8, small.t(), scale_a=one, scale_b=one, out_dtype=x.dtype)

    return layer, small.nbytes


def kitchen(layout: str, **how: Any) -> Way:
    """A layout of comfy-kitchen, by the route that ComfyUI takes."""

    def prepare(weight: Tensor) -> tuple[Layer, int]:
        from comfy.quant_ops import QuantizedTensor

        held = QuantizedTensor.from_float(weight, layout, **how)
        names, _ = held.__tensor_flatten__()
        return lambda x: linear(x, held), sum(getattr(held, name).nbytes for name in names)

    return prepare


def bits4(quant_type: str, fused: bool = False) -> Way:
    """bitsandbytes' 4 bits with double quantisation; `fused`: its own product."""

    def prepare(weight: Tensor) -> tuple[Layer, int]:
        import bitsandbytes.functional as bnb

        small, state = bnb.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type=quant_type
        )
        size = small.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        if not fused:
            return lambda x: linear(x, bnb.dequantize_4bit(small, state)), size
        return lambda x: torch.ops.bitsandbytes.gemm_4bit.default(
            x, small, list(state.shape), state.state2.absmax, 64, quant_type, None,
            state.absmax, state.state2.code, state.offset,
        ), size  # fmt: skip

    return prepare


def bnb_int8(product: bool) -> Way:
    """bitsandbytes' int8: its own product (LLM.int8, threshold 0), or the weights alone."""

    def prepare(weight: Tensor) -> tuple[Layer, int]:
        import bitsandbytes.functional as bnb

        small, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        rows = (scales / 127).to(weight.dtype)
        size = small.nbytes + scales.nbytes
        if not product:
            return lambda x: linear(x, small.to(x.dtype)) * rows, size

        def layer(x: Tensor) -> Tensor:
            x8, x_scales, _ = bnb.int8_vectorwise_quant(x.half())
            return torch.ops.bitsandbytes.int8_scaled_mm.default(
                x8, small, x_scales, scales, bias=None, dtype=x.dtype
            )

        return layer, size

    return prepare


WAYS: dict[str, Way] = {
    "bf16": plain,
    "fp8, cast": fp8_cast,
    "fp8 x fp8": fp8_fast,
    "int8 x int8, ConvRot": kitchen(
        "TensorWiseINT8Layout", per_channel=True, convrot=True, convrot_groupsize=256
    ),
    "int8 x int8": kitchen("TensorWiseINT8Layout", per_channel=True),
    "w4a8": kitchen("AsymW4A8Int8Layout"),
    "w4a4": kitchen("TensorCoreConvRotW4A4Layout"),
    "nf4": bits4("nf4"),
    "fp4": bits4("fp4"),
    "nf4, fused": bits4("nf4", fused=True),
    "bnb int8, weights only": bnb_int8(product=False),
    "LLM.int8": bnb_int8(product=True),
}


def own(format: str) -> Way:
    """A format of the pack, by its codec and its layouts."""

    def prepare(weight: Tensor) -> tuple[Layer, int]:
        from pack.core.quantized_layers import encode
        from pack.nodes.quantized_layouts import linear as quantised
        from pack.nodes.quantized_layouts import tensor_from

        entries = encode(weight, format)
        held = tensor_from(entries, weight.dtype)
        return lambda x: quantised(x, held, None), sum(e.nbytes for e in entries.values())

    return prepare


def median_ms(calls: list[Callable[[], Any]]) -> float:
    """Of all calls together, repeated."""
    found: list[float] = []
    for call in calls:
        call()
    while len(found) < 3 or (sum(found) < BUDGET_MS and len(found) < 50):
        if DEVICE == "cpu":
            start = time.perf_counter()
            for call in calls:
                call()
            found.append(1000 * (time.perf_counter() - start))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def weights(shapes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """Normal numbers of a trained model's size."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    made = [torch.randn(s, generator=draw, device=DEVICE) for s in shapes]
    return [(w * 0.02).bfloat16() for w in made]


def measured(way: Way, shapes: list[tuple[int, int]], tokens: int) -> Row:
    """Error and time of one way on one size."""
    rounds = 2 if tokens < 1000 and DEVICE == "cuda" else 1  # of the weights: more than the cache
    draw = torch.Generator(DEVICE).manual_seed(tokens)
    x = {
        n: torch.randn(tokens, n, generator=draw, device=DEVICE).bfloat16()
        for n in {inputs for _, inputs in shapes}
    }
    layers: list[tuple[Layer, Tensor]] = []
    wrong, size = [], 0
    for seed in range(rounds):
        for weight in weights(shapes, seed):
            layer, size_here = way(weight)
            given = x[weight.shape[1]]
            layers.append((layer, given))
            if seed:
                continue
            size += size_here
            exact = linear(given.float(), weight.float())
            wrong.append(float((layer(given).float() - exact).norm() / exact.norm()))
    ms = median_ms([lambda f=f, g=g: f(g) for f, g in layers]) / rounds
    worst = [f"{'x'.join(map(str, s))} {e:.4f}" for s, e in zip(shapes, wrong, strict=True)]
    return {"ms": round(ms, 4), "error": statistics.mean(wrong), "bytes": size, "errors": worst}


def quantising(way: Way, shrink: int) -> Row:
    """Seconds for all layers of the transformer, the weights being on the card."""
    found = {}
    for shape in IN_MODEL:
        (weight,) = weights([smaller(shape, shrink)], 0)
        found[shape] = median_ms([lambda w=weight: way(w)])
    seconds = sum(found[shape] * count for shape, count in IN_MODEL.items()) / 1000
    ms = {"x".join(map(str, shape)): round(t, 3) for shape, t in found.items()}
    return {"seconds": round(seconds, 2), "layer ms": ms}


def smaller(shape: tuple[int, int], shrink: int) -> tuple[int, int]:
    """For the rehearsal."""
    return shape[0] // shrink, shape[1] // shrink


def tried(way: Way, size: str, shrink: int) -> Row:
    """One cell, or why there is none."""
    try:
        with torch.inference_mode():
            if size == "quantising":
                return quantising(way, shrink)
            shapes, tokens = SIZES[size]
            return measured(way, [smaller(s, shrink) for s in shapes], -(-tokens // shrink))
    except Exception as error:  # a package may raise anything: that is a result
        return {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    finally:
        torch.cuda.empty_cache()


def table(rows: list[Row]) -> str:
    """Markdown: a line for each format."""
    sizes = [*SIZES, "quantising"]
    lines = [f"| format | {' | '.join(sizes)} |", "|" + "---|" * (len(sizes) + 1)]
    for name in dict.fromkeys(row["format"] for row in rows):
        cells = {row["size"]: shown(row) for row in rows if row["format"] == name}
        lines.append(f"| {name} | {' | '.join(cells.get(size, '') for size in sizes)} |")
    return "\n".join(lines)


def shown(row: Row) -> str:
    """One cell."""
    if "failed" in row:
        return row["failed"][:100]
    if row["size"] == "quantising":
        return f"{row['seconds']:.1f} s"
    return f"{row['ms']:.3f} ms, {100 * row['error']:.2f} %, {row['bytes'] / 1e6:.1f} MB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = sys.argv[:1]
    ways, shrink = WAYS, TINY_DIVISOR if options.tiny else 1
    if options.ours:
        pack = sys.modules["pack"] = types.ModuleType("pack")
        pack.__path__ = [str(ROOT)]
        from pack.core.quantization import BITSANDBYTES, FORMATS

        ours = [f.name for f in FORMATS.values() if f.package == BITSANDBYTES]
        ways = {f"ours: {name}": own(name) for name in ours}
    rows = []
    for name, way in ways.items():
        if options.only and name not in options.only:
            continue
        for size in (*SIZES, "quantising"):
            rows.append({"format": name, "size": size, **tried(way, size, shrink)})
            with options.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
