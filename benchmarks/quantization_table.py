"""The tables and the plot of benchmarks.quantization_error, and what its groups of layers are."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from core import quantization
from core.quantization import EIGHT_BIT, KEEP, MAIN, Preset, Rule
from core.qwen_layers import published

Row = dict[str, Any]

GROUPS = {
    "modulation, image": ("*.img_mod.1",),
    "modulation, text": ("*.txt_mod.1",),
    "attention q k, image": ("*.attn.to_[qk]",),
    "attention v, image": ("*.attn.to_v",),
    "attention out, image": ("*.attn.to_out.0",),
    "attention q k, text": ("*.attn.add_[qk]_proj",),
    "attention v, text": ("*.attn.add_v_proj",),
    "attention out, text": ("*.attn.to_add_out",),
    "MLP up, image": ("*.img_mlp.net.0.proj",),
    "MLP down, image": ("*.img_mlp.net.2",),
    "MLP up, text": ("*.txt_mlp.net.0.proj",),
    "MLP down, text": ("*.txt_mlp.net.2",),
    "img_in": ("img_in",),
    "txt_in": ("txt_in",),
    "time embedding": ("time_text_embed.*",),
    "norm_out": ("norm_out.linear",),
    "proj_out": ("proj_out",),
    "all of the first block": ("transformer_blocks.0.*",),
    "all of the last block": ("transformer_blocks.5.*",),  # as many parameters as in the 60th
    "all blocks": ("transformer_blocks.*",),
    "all blocks but modulation": (
        *("*.attn.*", "*.img_mlp.*"),
        "*.txt_mlp.*",
    ),
}
TEXT_GROUPS = {
    "attention q k v": ("model.layers.*.self_attn.[qkv]_proj",),
    "attention out": ("model.layers.*.self_attn.o_proj",),
    "MLP gate, up": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    "MLP down": ("model.layers.*.mlp.down_proj",),
    "all layers": ("model.layers.*",),
    "vision blocks": ("visual.blocks.*",),
    "vision merger": ("visual.merger.*",),
}
IMAGE = ("*.attn.to_[qkv]", "*.attn.to_out.0", "*.img_mlp.*")
CANDIDATES = {  # the denoiser's presets that were compared: what stays in 8 bit
    "nothing": (),
    "modulation": ("*_mod.1",),
    "image modulation": ("*.img_mod.1",),
    "image v, out": ("*.attn.to_v", "*.attn.to_out.0"),
    "image MLP": ("*.img_mlp.*",),
    "image v, out, MLP": ("*.attn.to_v", "*.attn.to_out.0", "*.img_mlp.*"),
    "image attention, MLP": IMAGE,
    "image attention, MLP, modulation": (*IMAGE, "*.img_mod.1"),
    "image attention, MLP, all modulation": (*IMAGE, "*_mod.1"),
}
TEXT_CANDIDATES = {
    "nothing": (),
    "q k v": ("model.layers.*.self_attn.[qkv]_proj",),
    "attention": ("model.layers.*.self_attn.*",),
    "MLP down": ("model.layers.*.mlp.down_proj",),
    "attention, MLP down": ("model.layers.*.self_attn.*", "model.layers.*.mlp.down_proj"),
    "vision": ("visual.blocks.*",),
    "attention, MLP down, vision": (
        *("model.layers.*.self_attn.*", "model.layers.*.mlp.down_proj"),
        "visual.blocks.*",
    ),
}
COLUMNS = ("bnb_int8", "int8", "w4a8", "bnb_nf4", "bnb_fp4", "w4a4")


def preset_of(patterns: Iterable[str]) -> Preset:
    """Blocks in the main format but for these, in 8 bit; the rest is kept."""
    eight = tuple(Rule(pattern, EIGHT_BIT) for pattern in patterns)
    kept = (Rule("transformer_blocks.*", MAIN), Rule("model.layers.*", MAIN), Rule("*", KEEP))
    return Preset("", "", (*eight, *kept))


def gigabytes(kind: str, format: str, preset: Preset) -> float:
    """Of the published model, what is kept in bf16; 10**9 bytes."""
    layers = published()[kind]
    plan = quantization.plan(layers, format, preset)
    sizes = (
        quantization.bytes_of(plan[n], s) if n in plan else 2 * s[0] * s[1]
        for n, s in layers.items()
    )
    return sum(sizes) / 1e9


def billions(kind: str, patterns: Iterable[str]) -> float:
    """Parameters of a group in the published model, in 10**9."""
    layers = published()[kind].items()
    return sum(s[0] * s[1] for n, s in layers if any(fnmatchcase(n, p) for p in patterns)) / 1e9


def tables(rows: list[Row]) -> str:
    """All of them in Markdown."""
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        parts[row["part"]].append(row)
    return "\n\n".join(
        (
            preset_table(parts["presets"], CANDIDATES, quantization.KINDS[0]),
            preset_table(parts["text presets"], TEXT_CANDIDATES, quantization.KINDS[1]),
            group_table(parts["groups"], GROUPS, quantization.KINDS[0]),
            layer_table(parts["layers"], GROUPS),
            group_table(parts["text groups"], TEXT_GROUPS, quantization.KINDS[1]),
            layer_table(parts["text layers"], TEXT_GROUPS),
            variant_table(parts),
        )
    )


def group_table(rows: list[Row], groups: dict[str, tuple[str, ...]], kind: str) -> str:
    """A line for each group: its size, and the error of the prediction (and PSNR) by format."""
    lines = [head("group", "10^9 parameters", *COLUMNS)]
    for group, patterns in groups.items():
        found = {r["variant"]: r for r in rows if r["group"] == group}
        if found:
            cells = [_prediction(found.get(variant)) for variant in COLUMNS]
            lines.append(line(group, f"{billions(kind, patterns):.3f}", *cells))
    return "\n".join(lines)


def _prediction(row: Row | None) -> str:
    if row is None:
        return ""
    error = f"{100 * row['prediction']:.2f}"
    return f"{error} / {row['psnr']:.1f}" if "psnr" in row else error


def preset_table(rows: list[Row], candidates: dict[str, tuple[str, ...]], kind: str) -> str:
    """A line for each preset: size of the published model, and the figures, by format."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [head("in 8 bit", *(cell for v in variants for cell in (f"{v}: GB", v)))]
    for name, patterns in candidates.items():
        cells = []
        for variant in variants:
            found = [r for r in rows if (r["preset"], r["variant"]) == (name, variant)]
            cells.append(f"{gigabytes(kind, variant, preset_of(patterns)):.2f}")
            cells.append(_prediction(found[0] if found else None))
        lines.append(line(name, *cells))
    return "\n".join(lines)


def layer_table(rows: list[Row], groups: dict[str, tuple[str, ...]]) -> str:
    """A line for each group: the mean error of a layer's outputs, in percent, and the largest."""
    lines = [head("group", *COLUMNS)]
    for group, patterns in groups.items():
        cells = []
        for variant in COLUMNS:
            errors = [
                100 * r.get("computed", r["outputs"])
                for r in rows
                if r["variant"] == variant and any(fnmatchcase(r["layer"], p) for p in patterns)
            ]
            cells.append(f"{statistics.mean(errors):.2f} ({max(errors):.2f})" if errors else "")
        if any(cells):
            lines.append(line(group, *cells))
    return "\n".join(lines)


def variant_table(parts: dict[str, list[Row]]) -> str:
    """A line for each variant: weights, outputs, outputs as computed; then the full-size layers."""
    layers = [r for r in parts["layers"] if ".attn." in r["layer"] or "mlp" in r["layer"]]
    modulation = [r for r in parts["layers"] if "_mod." in r["layer"]]
    columns = {"blocks": layers, "modulation": modulation}
    for row in parts["full size"]:
        columns.setdefault(row["layer"], []).append(row)
    lines = [head("variant", *columns)]
    for variant in dict.fromkeys(r["variant"] for r in parts["full size"]):
        cells = []
        for rows in columns.values():
            own = [r for r in rows if r["variant"] == variant]
            cells.append(" / ".join(_means(own, ("weights", "outputs", "computed"))))
        lines.append(line(variant, *cells))
    return "\n".join(lines)


def _means(rows: list[Row], keys: Iterable[str]) -> list[str]:
    return [
        f"{100 * statistics.mean(r[key] for r in rows):.2f}"
        for key in keys
        if rows and all(key in r for r in rows)
    ]


def head(*cells: str) -> str:
    """The two first lines of a table."""
    return f"{line(*cells)}\n|{'---|' * len(cells)}"


def line(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------------- plot
COLOURS = {"bnb_int8": "#1f77b4", "int8": "#17becf", "w4a8": "#2ca02c", "bnb_nf4": "#ff7f0e"}
COLOURS |= {"bnb_fp4": "#d62728", "w4a4": "#9467bd"}
LEFT, WIDE, HIGH, TOP = 190, 640, 18, 50
LOWEST, HIGHEST = 0.01, 30.0  # percent, a logarithmic axis


def plot(rows: list[Row], out: Path) -> None:
    """A line for each group: the error of the prediction when it alone is quantised."""
    found = {(r["group"], r["variant"]): r["prediction"] for r in rows if r["part"] == "groups"}
    size = (LEFT + WIDE + 30, TOP + HIGH * len(GROUPS) + 50)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    def place(percent: float) -> float:
        share = math.log(min(max(percent, LOWEST), HIGHEST) / LOWEST) / math.log(HIGHEST / LOWEST)
        return LEFT + share * WIDE

    for percent in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30):
        x, bottom = place(percent), TOP + HIGH * len(GROUPS)
        draw.line([x, TOP, x, bottom], fill="#dddddd")
        draw.text((x - 8, bottom + 6), f"{percent:g}", fill="black")
    for number, group in enumerate(GROUPS):
        y = TOP + HIGH * number + HIGH // 2
        draw.text((8, y - 6), group, fill="black")
        for variant, colour in COLOURS.items():
            if (group, variant) in found:
                x = place(100 * found[group, variant])
                draw.ellipse([x - 5, y - 5, x + 5, y + 5], outline=colour, width=2)
    for number, (variant, colour) in enumerate(COLOURS.items()):
        draw.text((LEFT + 105 * number, 10), variant, fill=colour)
    note = "error of the prediction in percent when this group alone is quantised, embedded model"
    draw.text((LEFT, size[1] - 22), note, fill="black")
    picture.save(out, optimize=True)
