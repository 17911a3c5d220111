"""The graph of workflows/cute_animal_for_kids.json as it is, and the same work by stock nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

Graph = dict[str, dict[str, Any]]

# What the sides beside "ours" have of their own, as values of the loader.
WEIGHTS = {
    "nf4": {"weight_dtype": "bnb_nf4", "preset": "smallest"},
    "fp8": {"weight_dtype": "fp8_e4m3fn"},
    "merged": {"weight_dtype": "default"},
}
SIDES = ("stock", "ours", "whole", *WEIGHTS)
# Our nodes, the stock node that does the same, and the inputs that it takes.
STOCK: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "QwenVRAMLoadDiffusionModel": ("UNETLoader", ("unet_name",), {"weight_dtype": "default"}),
    "QwenVRAMLoadTextEncoder": (
        "CLIPLoader", ("clip_name",), {"type": "qwen_image", "device": "default"},
    ),
    "QwenVRAMLoadVAE": ("VAELoader", ("vae_name",), {}),
    "QwenVRAMCachedTextEncode": ("CLIPTextEncode", ("clip", "text"), {}),
    "QwenVRAMSampler": (
        "KSampler",
        ("model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative",
         "latent_image", "denoise"),
        {},
    ),
    "QwenVRAMDecode": ("VAEDecode", ("samples", "vae"), {}),
}  # fmt: skip
SECOND_PART = ("QwenVRAMColouringPage", "QwenVRAMStickerSheet")  # nothing in stock does it
LOADER = "QwenVRAMLoadDiffusionModel"
WORDS, PROMPT = "QwenVRAMKindWords", "QwenVRAMCuteAnimalPrompt"


def is_link(value: Any) -> bool:
    """Whether an input takes what another node puts out."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def of_class(graph: Graph, *names: str) -> list[str]:
    """The ids of the nodes of these classes."""
    return [key for key, node in graph.items() if node["class_type"] in names]


def the_one(graph: Graph, name: str) -> str:
    """The id of the only node of a class. Raises ValueError if there is another number of them."""
    found = of_class(graph, name)
    if len(found) != 1:
        raise ValueError(f"The workflow has {len(found)} nodes {name}; the benchmark needs one.")
    return found[0]


def behind(graph: Graph, key: str, name: str) -> tuple[str, str]:
    """The node and the input that hold what an input gets, through links to nodes of one text."""
    while is_link(value := graph[key]["inputs"][name]):
        key = value[0]
        texts = [n for n, v in graph[key]["inputs"].items() if is_link(v) or isinstance(v, str)]
        name = "words" if "words" in texts else texts[0]
    return key, name


def with_words(graph: Graph, words: str, seed: int) -> Graph:
    """A copy that draws these words with this seed."""
    graph = copy.deepcopy(graph)
    key, name = behind(graph, the_one(graph, WORDS), "words")
    graph[key]["inputs"][name] = words
    for node in graph.values():
        if "seed" in node["inputs"] and not is_link(node["inputs"]["seed"]):
            node["inputs"]["seed"] = seed
    return graph


def needed(graph: Graph, ends: list[str]) -> Graph:
    """What these nodes need, with themselves."""
    found: Graph = {}
    open_ = list(ends)
    while open_:
        key = open_.pop()
        if key in found:
            continue
        found[key] = graph[key]
        open_ += [value[0] for value in graph[key]["inputs"].values() if is_link(value)]
    return found


def _downstream(graph: Graph, keys: set[str]) -> set[str]:
    """Those nodes and all that depend on them."""
    while True:
        more = {
            key
            for key, node in graph.items()
            if any(is_link(v) and v[0] in keys for v in node["inputs"].values())
        }
        if more <= keys:
            return keys
        keys = keys | more


def first_part(graph: Graph) -> Graph:
    """Only what draws the animal: without the colouring page and the stickers, which have no
    counterpart, and without Clear VRAM behind them: nothing else asks for its output."""
    gone = _downstream(graph, set(of_class(graph, *SECOND_PART)))
    return copy.deepcopy({key: node for key, node in graph.items() if key not in gone})


def stock(
    graph: Graph, prompt: Callable[..., tuple[str, str]], keep: frozenset[str] = frozenset()
) -> Graph:
    """The same by stock nodes: the same texts, files, steps and size.

    `prompt` gives the two texts for the inputs of Cute Animal Prompt. Clear VRAM has no stock
    counterpart and goes. The classes `keep` stay ours.
    """
    graph = first_part(graph)
    key = the_one(graph, PROMPT)
    source, name = behind(graph, key, "words")
    inputs = {n: v for n, v in graph[key]["inputs"].items() if not is_link(v)}
    texts = prompt(**{**inputs, "words": graph[source]["inputs"][name]})
    ends = of_class(graph, "SaveImage", *(("PreviewAny",) if WORDS in keep else ()))
    made: Graph = {}
    for node_id, node in needed(graph, ends).items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in (WORDS, PROMPT) and kind not in keep:
            continue
        inputs = {
            n: texts[v[1]] if is_link(v) and v[0] == key and not _linked(v, keep) else v
            for n, v in inputs.items()
        }
        # The pack keeps the prompts of unmodified workflows too, unless a node says otherwise.
        meta = {} if kind in keep else {"qwen_vram": {"keep_nothing": "stock, without the cache"}}
        if kind in STOCK and kind not in keep:
            kind, names, more = STOCK[kind]
            inputs = {n: inputs[n] for n in names if n in inputs} | more
        if kind.startswith("QwenVRAM") and kind not in keep:
            raise ValueError(f"The benchmark knows no stock node for {kind}.")
        made[node_id] = {"class_type": kind, "inputs": inputs, "_meta": meta}
    return needed(made, ends)


def _linked(link: list[Any], keep: frozenset[str]) -> bool:
    """Whether a text still comes from Cute Animal Prompt. The negative, which never changes, only
    where ours encodes it: stock would encode it again for each new prompt."""
    return PROMPT in keep and (link[1] == 0 or "QwenVRAMCachedTextEncode" in keep)


def graph_of(side: str, graph: Graph, prompt: Callable[..., tuple[str, str]]) -> Graph:
    """One side's graph: "stock", "ours" (the same nodes by ours), the "whole" workflow, "nf4": ours
    with the transformer in bnb_nf4, all of it that may be, "fp8": with LoRAs at run time, or
    "merged": with LoRAs merged by ComfyUI, as in stock."""
    if side == "whole":
        return graph
    if side == "stock":
        return stock(graph, prompt)
    graph = first_part(graph)
    for key in of_class(graph, LOADER):
        graph[key]["inputs"] |= WEIGHTS.get(side, {})
    return graph
