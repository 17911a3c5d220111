"""What each format does to each kind of layer, measured on the activations of real runs.

Usage: COMFYUI_PATH=... python -m benchmarks.quantization_error OUT.jsonl [--plot OUT.png]
       python -m benchmarks.quantization_error OUT.jsonl --table [--plot OUT.png]

The embedded model draws and edits in ComfyUI itself, on the CPU in float32. Of each linear layer
the inputs are kept (a sample of tokens), and the relative error of weights and of outputs is taken
without the bias. Then each kind of layer alone is quantised, and each of several presets: what the
whole denoiser predicts is compared, call by call, and the finished picture. The text encoder
likewise, by its conditioning. And one layer of full size: random weights, with and without outliers
in weights and activations. Each line of OUT.jsonl holds the figures of one thing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quantization_table import (
    CANDIDATES,
    GROUPS,
    TEXT_CANDIDATES,
    TEXT_GROUPS,
    plot,
    preset_of,
    tables,
)
from benchmarks.quantization_variants import COMPUTED, WEIGHTS, Linear, linear_of
from core import quantization
from demo import artist, embedded, environment, figures
from demo.artist import Artist, Settings

TOKENS = 24  # rows kept of a layer's inputs in each call
CHOSEN = ("bnb_int8", "int8", "bnb_nf4", "bnb_fp4", "w4a8", "w4a4")
PICTURED = ("int8", "bnb_nf4")  # pictures take longest
FOUR_BIT = ("bnb_nf4", "w4a8")  # for which it matters what stays in 8 bit
EDIT = Settings(cfg=1.0)
Row = dict[str, Any]


class Run:
    """The embedded model, what it is asked, and what it does in full precision."""

    def __init__(self, drawings: int, edits: int) -> None:
        self.artist = Artist(embedded.FOLDER)
        self.texts = figures.SHOWN[:drawings]
        asked = [e for e in figures.edits_to_judge(60) if e[0] not in ("identity", "watermark")]
        self.edits = [(e[3][0], figures.drawn(e[1])) for e in asked[:edits]]
        self.denoiser: nn.Module = self.artist.model.model.diffusion_model
        self.encoder: nn.Module = self.artist.clip.cond_stage_model.qwen25_7b.transformer

    def pictures(self) -> list[Tensor]:
        """The drawings and the edits, in [0, 1]."""
        done = [self.artist.draw(t, settings=Settings(seed=i)) for i, t in enumerate(self.texts)]
        for seed, (text, picture) in enumerate(self.edits):
            done.append(self.artist.edit(text, picture, EDIT.with_seed(seed)))
        return [torch.from_numpy(pixels).double() / 255 for pixels in done]

    @torch.inference_mode()
    def conditionings(self) -> list[Tensor]:
        """What the encoder makes of the texts and of the edits, (tokens, width)."""
        encode = self.artist.nodes.CLIPTextEncode().encode
        found = [encode(self.artist.clip, text)[0] for text in self.texts]
        for text, picture in self.edits:
            image = torch.tensor(picture).float()[None] / 255
            made = self.artist.encode_edit.execute(self.artist.clip, text, image1=image)
            found.append(made.args[0])
        return [conditioning[0][0][0].double() for conditioning in found]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def planned(layers: Iterable[str], variant: str, preset: quantization.Preset) -> dict[str, str]:
    """The variant of each layer, at any width: the variants here turn what a card's kernels cannot,
    so that the small model shows what the published widths lose."""
    wanted = {layer: preset.format_of(layer, variant) for layer in layers}
    return {layer: made for layer, made in wanted.items() if made != quantization.KEEP}


def relative(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Norm of all differences over the norm of what is exact."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    wrong = sum((a - b).square().sum() for a, b in pairs)
    return math.sqrt(wrong / sum(b.square().sum() for _, b in pairs))


def psnr(found: list[Tensor], exact: list[Tensor]) -> float:
    """The mean over pictures in [0, 1], in dB; a picture that is the same counts as 99."""
    errors = [(a - b).square().mean().item() for a, b in zip(found, exact, strict=True)]
    return statistics.mean(-10 * math.log10(e) if e else 99.0 for e in errors)


@contextmanager
def inputs_of(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """A sample of what goes into each layer meanwhile, rows of (in,)."""
    kept: dict[str, list[Tensor]] = defaultdict(list)
    chance = torch.Generator().manual_seed(0)

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1])
            some = torch.randint(len(rows), (min(TOKENS, len(rows)),), generator=chance)
            kept[name].append(rows[some].float().clone())

        return keep

    hooks = [m.register_forward_pre_hook(keeper(n)) for n, m in layers.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]]:
    """Arguments and result of each call of a model meanwhile."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    hook = model.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out.clone())), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


class Quantiser:
    """Lets layers compute in formats for a while; each weight is quantised once."""

    def __init__(self, layers: dict[str, nn.Module], *, weights_only: bool) -> None:
        self.layers, self.weights_only = layers, weights_only
        self._linears: dict[tuple[str, str], Linear] = {}

    @contextmanager
    def __call__(self, plan: dict[str, str]) -> Iterator[None]:
        """`plan`: layer -> variant."""
        for name, variant in plan.items():
            layer = self.layers[name]
            layer.forward = _with_bias(self._linear(name, variant), layer.bias)
        try:
            yield
        finally:
            for name in plan:
                del self.layers[name].forward  # the class's own again

    def _linear(self, name: str, variant: str) -> Linear:
        if (name, variant) not in self._linears:
            weight = self.layers[name].weight.data.float()
            made = linear_of(variant, weight, weights_only=self.weights_only)
            self._linears[name, variant] = made
        return self._linears[name, variant]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """For core.quantization.plan."""
        return {name: tuple(layer.weight.shape) for name, layer in self.layers.items()}


def _with_bias(linear: Linear, bias: Tensor | None) -> Linear:
    return lambda x: linear(x) if bias is None else linear(x) + bias.to(x.dtype)


def matching(layers: dict[str, nn.Module], patterns: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of a group."""
    return {n: m for n, m in layers.items() if any(fnmatchcase(n, p) for p in patterns)}


def shares(layers: dict[str, nn.Module], kept: dict[str, list[Tensor]], kind: str) -> Iterator[Row]:
    """Error of the weights and of the outputs of every layer in every variant."""
    for name, layer in layers.items():
        weight, x = layer.weight.data.float(), torch.cat(kept[name])
        exact = x @ weight.T
        for variant, decode in WEIGHTS.items():
            if weight.shape[1] % 64 and variant.startswith(("w4", "int8,")):
                continue  # narrow layers of the embedded model's vision tower
            row = {"part": kind, "layer": name, "variant": variant}
            row["weights"] = relative([decode(weight)], [weight])
            row["outputs"] = relative([linear_of(variant, weight, weights_only=True)(x)], [exact])
            if variant in COMPUTED:
                row["computed"] = relative([linear_of(variant, weight)(x)], [exact])
            yield row


def sensitivity(run: Run, every: int) -> Iterator[Row]:
    """The error of the prediction, and PSNR of pictures: each group alone, then each preset."""
    layers = linears(run.denoiser)
    with calls_of(run.denoiser) as calls, inputs_of(layers) as kept:
        exact = run.pictures()
    yield from shares(layers, kept, "layers")
    quantised, some = Quantiser(layers, weights_only=False), calls[::every]

    def figures_of(plan: dict[str, str], pictured: bool) -> Row:
        with quantised(plan):
            out = [run.denoiser(*args, **kwargs) for args, kwargs, _ in some]
            found: Row = {"prediction": relative(out, [result for _, _, result in some])}
            if pictured:
                found["psnr"] = psnr(run.pictures(), exact)
        return found

    for name, rules in CANDIDATES.items():
        for variant in FOUR_BIT:
            plan = planned(quantised.shapes(), variant, preset_of(rules))
            row = {"part": "presets", "preset": name, "variant": variant}
            yield row | figures_of(plan, True)
    for group, patterns in GROUPS.items():
        for variant in CHOSEN:
            plan = dict.fromkeys(matching(layers, patterns), variant)
            row = {"part": "groups", "group": group, "variant": variant}
            yield row | figures_of(plan, variant in PICTURED)


def text_sensitivity(run: Run) -> Iterator[Row]:
    """The same of the text encoder; ComfyUI computes it in full precision, so weights alone."""
    layers = linears(run.encoder)
    with inputs_of(layers) as kept:
        exact = run.conditionings()
    layers = {n: m for n, m in layers.items() if n in kept}
    yield from shares(layers, kept, "text layers")
    quantised = Quantiser(layers, weights_only=True)
    for name, rules in TEXT_CANDIDATES.items():
        for variant in FOUR_BIT:
            plan = planned(quantised.shapes(), variant, preset_of(rules))
            with quantised(plan):
                error = relative(run.conditionings(), exact)
            yield {"part": "text presets", "preset": name, "variant": variant, "prediction": error}
    for group, patterns in TEXT_GROUPS.items():
        chosen = matching(layers, patterns)
        for variant in CHOSEN:
            if not chosen or (group.startswith("vision") and variant.startswith("w4")):
                continue
            with quantised(dict.fromkeys(chosen, variant)):
                error = relative(run.conditionings(), exact)
            yield {"part": "text groups", "group": group, "variant": variant, "prediction": error}


def full_size() -> Iterator[Row]:
    """One layer of the published width; outliers as large models are known to have them."""
    chance = torch.Generator().manual_seed(0)
    shape = (1024, 3072)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=chance)

    squares = torch.stack([normal(*shape).square() for _ in range(4)])
    weights = {"normal": normal(*shape), "Student's t": normal(*shape) / squares.mean(0).sqrt()}
    channels = torch.ones(3072)
    channels[torch.randperm(3072, generator=chance)[:16]] = 40.0
    for kind, weight in weights.items():
        for name, scale in (("even", torch.ones(3072)), ("16 channels x40", channels)):
            x = normal(256, 3072) * scale
            layer = nn.Linear(3072, 1024, bias=False)
            layer.weight.data = weight / math.sqrt(3072)
            label = f"{kind}; {name}"
            yield from shares({label: layer}, {label: [x]}, "full size")


def measure(options: argparse.Namespace) -> None:
    """Everything, line by line."""
    run = Run(options.drawings, options.edits)
    with torch.inference_mode(), options.out.open("w") as file:
        for part in (full_size(), text_sensitivity(run), sensitivity(run, options.every)):
            for row in part:
                rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                file.write(json.dumps(rounded) + "\n")
                file.flush()


def main() -> None:
    """Measure, unless only the tables are wanted; print them, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drawings", type=int, default=3)
    parser.add_argument("--edits", type=int, default=3)
    parser.add_argument("--every", type=int, default=4, help="how few calls are compared")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not options.table:
        artist.import_comfyui(environment.required_comfyui(), cpu=True)
        measure(options)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    print(tables(rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
