"""Nodes for the tests: what other packs do between a text encoder and a prompt."""

from __future__ import annotations

import asyncio
import importlib
import random
import sys
import threading

import torch


class Passing:
    """A node that hands its CLIP on."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}}

    def run(self, clip):
        return (clip,)


class RandomClip(Passing):
    def run(self, clip):
        return (clip if random.random() < 2 else None,)


class RandomBase(RandomClip):
    pass


class CounterClip(Passing):
    count = 0

    def run(self, clip):
        self.count += 1
        return (clip,)


class NaNClip(Passing):
    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")


class NotIdempotentClip(Passing):
    NOT_IDEMPOTENT = True


class WorkflowReader(Passing):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}, "hidden": {"prompt": "PROMPT"}}

    def run(self, clip, prompt):
        return (clip,)


class HookedClip(Passing):
    def run(self, clip):
        import comfy.hooks

        hooked = clip.clone()
        hooked.apply_hooks_to_conds = comfy.hooks.HookGroup()
        hooked.apply_hooks_to_conds.add(comfy.hooks.Hook())
        return (hooked,)


class NoClip(Passing):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (None,)


class TextList:
    RETURN_TYPES = ("STRING",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (["one", "two"],)


class WideConditioning(TextList):
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_IS_LIST = (False,)

    def run(self):
        return ([[torch.zeros(1, 4, 96), {"pooled_output": None}]],)


class StockLike:
    """A loader without a fingerprint, as ComfyUI's own: it keeps what it loaded."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        import folder_paths

        return {"required": {"clip_name": (folder_paths.get_filename_list("text_encoders"),)}}

    def run(self, clip_name):
        import folder_paths
        import nodes

        pack = nodes.NODE_CLASS_MAPPINGS["QwenVRAMLoadTextEncoder"].__module__.rpartition(".")[0]
        architectures = sys.modules.get(f"{pack}.architectures") or importlib.import_module(
            f"{pack}.architectures"
        )
        path = folder_paths.get_full_path_or_raise("text_encoders", clip_name)
        return (architectures.load_text_encoder(path, {}),)


class Layers(TextList):
    RETURN_TYPES = ("INT",)

    def run(self):
        return ([-1, -2],)


class Joined(TextList):
    """A text made of two, for any input: a file name too."""

    RETURN_TYPES = ("*",)
    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("STRING",), "b": ("STRING",)}}

    def run(self, a, b):
        return (a + b,)


class Expand(Passing):
    """A node that hands its CLIP object into a graph of its own."""

    RETURN_TYPES = ("CONDITIONING",)

    def run(self, clip):
        from comfy_execution.graph_utils import GraphBuilder

        graph = GraphBuilder()
        inner = graph.node("QwenVRAMCachedTextEncode", clip=clip, text="a fox", cache="memory")
        return {"result": (inner.out(0),), "expand": graph.finalize()}


class ExpandStock(TextList):
    """A node that builds a loader and a stock encode."""

    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING",)}}

    def run(self, text):
        from comfy_execution.graph_utils import GraphBuilder

        graph = GraphBuilder()
        clip = graph.node("TestStockLike", clip_name="tiny_qwen_2.5_vl.safetensors")
        inner = graph.node("CLIPTextEncode", clip=clip.out(0), text=text)
        return {"result": (inner.out(0),), "expand": graph.finalize()}


class SeededImage(TextList):
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT",)}}

    def run(self, seed):
        return (torch.full((1, 64, 64, 3), 1 / seed),)


class FolderImage(TextList):
    """Gives something that none of its inputs names, and says nothing of it."""

    RETURN_TYPES = ("IMAGE",)
    OUTPUT_IS_LIST = (False,)

    def run(self):
        return (torch.zeros(1, 64, 64, 3),)


class FileText(TextList):
    RETURN_TYPES = ("STRING",)
    OUTPUT_IS_LIST = (False,)

    def run(self):
        with open(__file__, encoding="utf-8") as file:
            return (file.readline(),)


class Bare:
    """Encodes as a CLIP does, and is none."""

    def __init__(self, clip):
        self.clip = clip

    def tokenize(self, text):
        return self.clip.tokenize(text)

    def encode_from_tokens_scheduled(self, tokens):
        return self.clip.encode_from_tokens_scheduled(tokens)


class BareClip(Passing):
    def run(self, clip):
        return (Bare(clip),)


class OwnIdClip(Passing):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}, "hidden": {"node_id": "UNIQUE_ID"}}

    def run(self, clip, node_id):
        return (clip,)


class Gated(TextList):
    """Tells that it runs, and waits until it may go on. ComfyUI caches neither it nor the rest."""

    RETURN_TYPES = ("STRING",)
    OUTPUT_IS_LIST = (False,)
    started = threading.Event()
    go = threading.Event()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"fail": ("BOOLEAN", {"default": False})}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, fail):
        self.started.set()
        assert self.go.wait(60)
        if fail:
            raise ValueError("as asked")
        return (threading.current_thread().name,)


class GatedAsync(Gated):
    """The same, while other nodes run."""

    started = threading.Event()
    go = threading.Event()

    async def run(self, fail):
        self.started.set()
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return ("done",)


class FragmentHeap(TextList):
    """Leaves a card's memory full of holes: every second of many tensors lives on."""

    OUTPUT_IS_LIST = (False,)
    OUTPUT_NODE = True
    live: list = []

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"pieces": ("INT",), "piece_mb": ("INT",)}}

    def run(self, pieces, piece_mb):
        size = piece_mb * 1_000_000
        FragmentHeap.live = []
        whole = torch.empty(pieces * size, dtype=torch.uint8, device="cuda")
        del whole  # torch's own allocator keeps it in one piece, and cuts the next ones from it
        every = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(pieces)]
        FragmentHeap.live = every[::2]
        return ("done",)


class LeaveCache(TextList):
    """Takes memory of a card and lets go of it: torch's allocator keeps it for later."""

    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"megabytes": ("INT",)}}

    def run(self, megabytes):
        torch.empty(megabytes * 1_000_000, dtype=torch.uint8, device="cuda")
        return ("done",)


class NoiseConditioning(TextList):
    """Numbers in the shape of an encoded text."""

    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT",), "tokens": ("INT",), "width": ("INT",)}}

    def run(self, seed, tokens, width):
        draw = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, tokens, width, generator=draw), {"pooled_output": None}]],)


class NoiseLatent(TextList):
    """A latent of Qwen-Image's."""

    RETURN_TYPES = ("LATENT",)
    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT",), "side": ("INT",)}}

    def run(self, seed, side):
        draw = torch.Generator().manual_seed(seed)
        return ({"samples": torch.randn(1, 16, 1, side // 8, side // 8, generator=draw)},)


class FailingModel(TextList):
    """A model that raises an out-of-memory after some of its blocks, counted over a whole run."""

    RETURN_TYPES = ("MODEL",)
    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "at": ("STRING",), "inside": ("BOOLEAN",)}}

    def run(self, model, at, inside):
        calls, wanted = [0], {int(number) for number in at.split()}

        def count(args):
            calls[0] += 1
            if calls[0] - 1 in wanted:
                if inside:
                    self.fail_in_the_next_cast()
                else:
                    raise torch.OutOfMemoryError("as asked")
            return args

        failing = model.clone()
        failing.set_model_patch(count, "double_block")
        return (failing,)

    def fail_in_the_next_cast(self):
        """Where a real one leaves a page pinned: between two halves of a cast."""
        import comfy.ops

        name = "resolve_cast_module_with_vbar"
        real = getattr(comfy.ops, name)

        def fail(*args, **kwargs):
            setattr(comfy.ops, name, real)
            raise torch.OutOfMemoryError("as asked, in a cast")

        setattr(comfy.ops, name, fail)


class TakenMoment(TextList):
    """A model in whose run all memory of the card is taken for some seconds, after a block."""

    RETURN_TYPES = ("MODEL",)
    OUTPUT_IS_LIST = (False,)

    @classmethod
    def INPUT_TYPES(cls):
        required = {"model": ("MODEL",), "at": ("INT",), "seconds": ("FLOAT",)}
        return {"required": required}

    def run(self, model, at, seconds):
        calls, held = [0], []

        def count(args):
            calls[0] += 1
            if calls[0] == at:
                self.take(held)
                threading.Timer(seconds, held.clear).start()
            return args

        taken = model.clone()
        taken.set_model_patch(count, "double_block")
        return (taken,)

    def take(self, held):
        """In ever smaller pieces, down to 2 MB."""
        size = 1 << 33
        while size >= 1 << 21:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2


class Pages(TextList):
    """What a failed pass could have left on the models that are loaded."""

    OUTPUT_IS_LIST = (False,)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def run(self, after):
        import comfy.model_management

        found = {"pinned": 0, "prefetched": 0, "dynamic": 0, "resident": 0}
        for entry in comfy.model_management.current_loaded_models:
            if not entry.model.is_dynamic():
                continue
            vbar = entry.model.model.dynamic_vbars[entry.model.load_device]
            flags = vbar.get_residency()
            found["dynamic"] += 1
            found["resident"] += sum(flag & 1 for flag in flags)
            found["pinned"] += sum(flag >> 1 & 1 for flag in flags)
            found["prefetched"] += sum(
                hasattr(module, "_prefetch") for module in entry.model.model.modules()
            )
        fraction = torch.cuda.get_per_process_memory_fraction()
        return {"ui": {"pages": [{**found, "fraction": fraction}]}, "result": ("done",)}


CLASSES = (
    NoiseConditioning,
    NoiseLatent,
    FailingModel,
    TakenMoment,
    Pages,
    Gated,
    GatedAsync,
    LeaveCache,
    FragmentHeap,
    FolderImage,
    FileText,
    ExpandStock,
    SeededImage,
    Layers,
    Joined,
    Expand,
    BareClip,
    OwnIdClip,
)
CLASSES += (RandomClip, RandomBase, CounterClip, NaNClip, NotIdempotentClip, WorkflowReader)
CLASSES += (HookedClip, NoClip, TextList, WideConditioning, StockLike)
NODE_CLASS_MAPPINGS = {f"Test{c.__name__}": c for c in CLASSES}
