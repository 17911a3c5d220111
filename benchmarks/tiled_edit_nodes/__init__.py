"""Custom nodes of benchmarks/tiled_edit.py: known inputs, and a measure around the sampling.

QWEN_VRAM_RAM_GIB in the environment makes the free RAM look like that of a smaller machine, which
only a benchmark may do.
"""

import os
import sys
import time

import comfy.model_management
import comfy.patcher_extension
import psutil
import torch

TYPES = comfy.patcher_extension.WrappersMP
REFERENCE_SEED = 3

ram_gib = os.environ.get("QWEN_VRAM_RAM_GIB")
if ram_gib:
    real = psutil.virtual_memory

    def virtual_memory():
        """What is available, at most that of the small machine."""
        memory = real()
        return memory._replace(available=min(memory.available, int(float(ram_gib) * 2**30)))

    psutil.virtual_memory = virtual_memory


def synchronise():
    """Wait for the card, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Measure:
    """Of each step the seconds, what torch holds and the RAM that is gone since sampling began.

    Issued: the seconds until all of a step's work was handed to the card. If they are much less
    than the step's, the card set the pace; if nearly all of them, the processor did, or it waited
    for the card. Peak: of torch's memory, above what it held when sampling began.
    """

    def __init__(self):
        self.runs = []

    def sampling(self, executor, *args, **kwargs):
        """Around one run of a sampler; the models are loaded."""
        run = {"steps": [], "issued": [], "peak": None, "held": [], "RAM": []}
        self.runs.append(run)
        self.before, self.ram = 0, psutil.virtual_memory().available
        cuda = torch.cuda.is_available()
        if cuda:
            synchronise()
            torch.cuda.reset_peak_memory_stats()
            run["before"] = self.before = torch.cuda.memory_allocated()
        try:
            return executor(*args, **kwargs)
        finally:
            if cuda:
                run["peak"] = torch.cuda.max_memory_allocated() - self.before
                run["pinned"] = comfy.model_management.TOTAL_PINNED_MEMORY

    def step(self, executor, *args, **kwargs):
        """Around one evaluation with all its conds."""
        synchronise()
        start = time.perf_counter()
        result = executor(*args, **kwargs)
        issued = time.perf_counter() - start
        synchronise()
        run = self.runs[-1]
        run["issued"].append(issued)
        run["steps"].append(time.perf_counter() - start)
        if torch.cuda.is_available():
            run["held"].append(torch.cuda.memory_allocated() - self.before)
        run["RAM"].append(self.ram - psutil.virtual_memory().available)
        return result


class BenchMeasure:
    """A model whose sampling is measured."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "BENCH_MEASURE"), "run", "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        """A number that makes ComfyUI run it again."""
        return {"required": {"model": ("MODEL",), "number": ("INT", {"max": 2**31})}}

    def run(self, model, number):
        """A clone with two wrappers."""
        measure, clone = Measure(), model.clone()
        clone.add_wrapper_with_key(TYPES.SAMPLER_SAMPLE, "bench", measure.sampling)
        clone.add_wrapper_with_key(TYPES.PREDICT_NOISE, "bench", measure.step)
        own = clone.get_wrappers(TYPES.OUTER_SAMPLE, "qwen_vram.reference_cache")
        measure.cache = own[0].__self__ if own else None
        return (clone, measure)


class BenchNothing:
    """A model that predicts what it was given: all that is left is the work around it."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        """The patched model."""
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        """Inside of the patches that came before."""
        clone = model.clone()
        clone.add_wrapper_with_key(
            TYPES.CALC_COND_BATCH,
            "bench.nothing",
            lambda executor, model, conds, x, *rest: [x.clone() for _ in conds],
        )
        return (clone,)


class BenchConditions:
    """A text of random numbers and random reference latents, "height x width" in pixels each."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        """Sizes."""
        sizes = {"tokens": ("INT",), "width": ("INT", {"max": 9999}), "references": ("STRING",)}
        return {"required": sizes, "optional": {"method": ("STRING", {"default": ""})}}

    def run(self, tokens, width, references, method=""):
        """The same at each call. `method`: how references are marked and modulated."""
        draw = torch.Generator().manual_seed(REFERENCE_SEED)
        text = torch.randn(1, tokens, width, generator=draw)
        latents = [
            torch.randn(1, 16, 1, *(int(side) // 8 for side in size.split("x")), generator=draw)
            for size in references.split()
        ]
        values = {"reference_latents": latents} if latents else {}
        if method:
            values["reference_latents_method"] = method
        return ([[text, values]],)


class BenchPicture:
    """A smooth picture of any size whose memory is a file, written row by row."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        """Its sides."""
        side = ("INT", {"min": 1, "max": 65536})
        return {"required": {"width": side, "height": side}}

    def run(self, width, height):
        """Two waves and a gradient; nothing of it stays in anonymous memory."""
        picture = ours("nodes.disk").new_picture((1, height, width, 3))
        across = torch.arange(width) / width
        for row in range(height):
            down = row / height
            line = picture[0, row]
            line[:, 0] = 0.5 + 0.4 * torch.sin(across * 37 + down * 11)
            line[:, 1] = across * 0.8 + 0.1
            line[:, 2] = 0.5 + 0.4 * torch.sin(across * 5 - down * 53)
        return (picture,)


class BenchLook:
    """What came out: shape, range and how far it is from what went in, row by row."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "benchmark", True

    @classmethod
    def INPUT_TYPES(cls):
        """The result and the source."""
        return {"required": {"image": ("IMAGE",), "source": ("IMAGE",)}}

    def run(self, image, source):
        """As data of the node."""
        worst, total, finite = 0.0, 0.0, True
        for row in range(image.shape[1]):
            gap = (image[0, row, :, :3] - source[0, row, :, :3]).abs()
            finite = finite and bool(torch.isfinite(gap).all())
            worst, total = max(worst, gap.max().item()), total + gap.double().sum().item()
        found = {"shape": list(image.shape), "finite": finite, "largest change": worst}
        found["mean change"] = total / source[0, ..., :3].numel()
        return {"ui": {"bench": [found]}}


class BenchReport:
    """What a measure saw, after sampling."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "benchmark", True

    @classmethod
    def INPUT_TYPES(cls):
        """The measure, and what must be done before."""
        return {"required": {"measure": ("BENCH_MEASURE",), "after": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        """Anything may be waited for."""
        return True

    def run(self, measure, after):
        """As data of the node; with what torch holds now, and what a reference cache did."""
        for run in measure.runs:
            run["cache"] = measure.cache and measure.cache.record.line()
        if torch.cuda.is_available():
            for run in measure.runs:
                run["after"] = torch.cuda.memory_allocated()
        return {"ui": {"bench": measure.runs}}


def ours(name):
    """A module of the pack, however ComfyUI calls it."""
    (found,) = [m for key, m in sys.modules.items() if key.endswith(f".{name}")]
    return found


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (BenchMeasure, BenchNothing, BenchConditions, BenchPicture, BenchLook, BenchReport)
}
