"""What quantised models draw, against the file as it is: PSNR, the classifier, and with a LoRA.

Usage: COMFYUI_PATH=... python -m benchmarks.quantization_quality OUT.jsonl
       python -m benchmarks.quantization_quality OUT.jsonl --table

The embedded model on the CPU, opened as the loaders open it: drawings of held-out wordings (8
steps, CFG 2) and edits (8 steps, CFG 1), 256x256, the same seeds for all. Each cell adds a line to
OUT.jsonl; cells that are there already are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quantization_table import head, line
from core import quantization
from demo import artist, classifier, embedded, environment, figures, prompts
from demo.artist import Artist, Settings

EDIT = Settings(cfg=1.0)
LORA_RANK, LORA_SIZE = 8, 0.25  # its product, relative to the weight that it is added to
NOTHING = "default"
UNMERGED = " unmerged"  # after the name of an fp8 dtype: with LoRAs apart, as our loader has it
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Formats and presets of the two models; "default" is the file as it is."""

    transformer: str = NOTHING
    preset: str = ""
    text_encoder: str = NOTHING
    text_preset: str = ""
    lora: bool = False


def cells() -> Iterator[Cell]:
    """All of them, what everything is compared with first."""
    transformer, text = quantization.presets().values()
    default = quantization.DEFAULT_PRESET
    yield Cell()
    for format in ("bnb_int8", "int8"):  # presets differ in little there
        yield Cell(format, default)
    for format in ("bnb_nf4", "w4a8"):
        for preset in transformer:
            yield Cell(format, preset)
    for format in ("bnb_fp4", "w4a4"):
        yield Cell(format, default)
    yield Cell("fp8_e4m3fn")  # ComfyUI's own, for comparison
    for format in ("bnb_int8", "int8"):
        yield Cell(text_encoder=format, text_preset=default)
    for format in ("bnb_nf4", "w4a8"):
        for preset in text:
            yield Cell(text_encoder=format, text_preset=preset)
    yield Cell(lora=True)
    yield Cell("fp8_e4m3fn", lora=True)
    yield Cell(f"fp8_e4m3fn{UNMERGED}", lora=True)
    for format in ("bnb_int8", "int8", "bnb_nf4", "w4a8"):
        yield Cell(format, default, format, default)
        yield Cell(format, default, lora=True)


# --------------------------------------------------------------------------------------- drawing
def options_of(kind: str, format: str, preset: str) -> dict[str, Any]:
    """What the loader nodes give to nodes/architectures.py."""
    import qwen_vram_pack.nodes.quantized_loading as loading  # the pack, as demo.artist imports it
    from qwen_vram_pack.core.quantization import presets

    if format in quantization.FORMATS:
        return {"quantization": loading.Quantization(format, presets()[kind][preset])}
    if format == NOTHING:
        return {}
    dtype = getattr(torch, f"float8_{format.removesuffix(UNMERGED)[4:]}")
    return {"dtype": dtype, "unmerged_loras": format.endswith(UNMERGED)}


def opened(cell: Cell) -> Artist:
    """The models of a cell."""
    return Artist(
        embedded.FOLDER,
        lambda: options_of("diffusion_models", cell.transformer, cell.preset),
        lambda: options_of("text_encoders", cell.text_encoder, cell.text_preset),
    )


def lora_of(layers: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """A LoRA on every layer, with names as diffusers' trainers write them."""
    chance, made = torch.Generator().manual_seed(7), {}
    for name, (outputs, inputs) in layers.items():
        down = torch.randn(LORA_RANK, inputs, generator=chance) / math.sqrt(inputs)
        up = torch.randn(outputs, LORA_RANK, generator=chance) / math.sqrt(LORA_RANK)
        made[f"transformer.{name}.lora_A.weight"] = down
        made[f"transformer.{name}.lora_B.weight"] = up * LORA_SIZE / math.sqrt(inputs) * 2
    return made


def shapes() -> dict[str, tuple[int, int]]:
    """The linear layers of the embedded transformer's blocks."""
    from safetensors import safe_open

    with safe_open(embedded.FOLDER / embedded.TRANSFORMER, "pt") as file:
        found = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    return {
        name.removesuffix(".weight"): shape
        for name, shape in found.items()
        if name.startswith("transformer_blocks.") and len(shape) == 2
    }


@torch.inference_mode()  # as ComfyUI runs its nodes
def pictures(cell: Cell, drawings: int, edits: int) -> list[np.ndarray]:
    """What a cell draws and edits, (H, W, 3) bytes."""
    own = opened(cell)
    if cell.lora:
        import comfy.sd

        own.model, _ = comfy.sd.load_lora_for_models(own.model, None, lora_of(shapes()), 1.0, 0.0)
    rng = random.Random(901)
    texts = [prompts.held_out(rng, scene) for scene in figures.scenes_to_judge(drawings)]
    done = [own.draw(text, settings=Settings(seed=i)) for i, text in enumerate(texts)]
    for seed, edit in enumerate(figures.edits_to_judge(edits)):
        done.append(own.edit(edit[3][0], figures.drawn(edit[1]), EDIT.with_seed(seed)))
    return done


def judged(done: list[np.ndarray], drawings: int) -> Row:
    """Shares of pictures in which the classifier sees all that was asked for."""
    judge, images = classifier.load(), figures.to_tensor(done)
    asked = figures.scenes_to_judge(drawings)
    shares = figures.shares_of(classifier.right(judge, images[:drawings], asked))
    row: Row = {"drawings": shares["all"]}
    if len(done) > drawings:
        wanted = [edit[2] for edit in figures.edits_to_judge(len(done) - drawings)]
        every = torch.stack(list(classifier.right(judge, images[drawings:], wanted).values()))
        row["edits"] = round(every.all(0).float().mean().item(), 4)
    return row


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """In dB; 99 for the same picture."""
    error = np.mean((one.astype(float) - other.astype(float)) ** 2) / 255**2
    return 99.0 if error == 0 else -10 * math.log10(error)


def measure(options: argparse.Namespace) -> None:
    """The cells that are not there yet."""
    done = {cell_of(row) for row in seen(options.out)}
    exact: dict[bool, list[np.ndarray]] = {}
    for cell in cells():
        if cell in done and cell != Cell(lora=cell.lora):
            continue
        made = pictures(cell, options.drawings, options.edits)
        exact.setdefault(cell.lora, made)
        if cell in done:
            continue
        found = [psnr(a, b) for a, b in zip(made, exact[cell.lora], strict=True)]
        row = asdict(cell) | {
            **{"psnr": round(statistics.mean(found), 2), "least": round(min(found), 2)},
            **({} if cell.lora else judged(made, options.drawings)),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        gc.collect()


# ----------------------------------------------------------------------------------------- table
def seen(out: Path) -> list[Row]:
    """The rows of earlier parts."""
    return [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []


def cell_of(row: Row) -> Cell:
    """What was measured."""
    return Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})


def table(rows: list[Row]) -> str:
    """Markdown: a line for each cell."""
    columns = ("PSNR, dB", "least", "drawings right", "edits right")
    lines = [head("transformer", "text encoder", "LoRA", *columns)]
    for row in rows:
        cell = cell_of(row)
        shares = [f"{100 * row[key]:.1f} %" if key in row else "" for key in ("drawings", "edits")]
        same = row["least"] == 99
        found = ["same", "same"] if same else [f"{row['psnr']:.1f}", f"{row['least']:.1f}"]
        names = (_name(cell.transformer, cell.preset), _name(cell.text_encoder, cell.text_preset))
        lines.append(line(*names, "yes" if cell.lora else "", *found, *shares))
    return "\n".join(lines)


def _name(format: str, preset: str) -> str:
    if format == NOTHING:
        return "as it is"
    return f"{format}, {preset}" if preset else format


def main() -> None:
    """Measure, unless only the table is wanted; print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drawings", type=int, default=24)
    parser.add_argument("--edits", type=int, default=12)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        artist.import_comfyui(environment.required_comfyui(), cpu=True)
        measure(options)
    print(table(seen(options.out)))


if __name__ == "__main__":
    main()
