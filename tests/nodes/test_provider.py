"""Workflows with stock encode nodes: nothing encodes or loads twice, and nothing stale is served."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pack.demo import embedded
from pack.tests.graphs import CLIP, LORA, encode, keeping_nothing, loader, node, preview
from pack.tests.links import symlink
from pack.tests.nodes.test_conditioning import same

Graph = dict[str, Any]
ENCODERS = ("pos", "neg", "latent")


VAE = embedded.VAE.rpartition("/")[2]  # quicker than the random one


def events(host: Any) -> list[dict[str, Any]]:
    """What the frontend was told about the cache during the last run."""
    return [data for name, data in host.events if name == "qwen_vram.cache"]


def told(host: Any, node_id: str) -> dict[str, Any]:
    """What it was told about one node, once."""
    (event,) = [data for data in events(host) if data["node"] == node_id]
    return event


def text_graph(text: str = "a red fox") -> Graph:
    """One stock text encode."""
    return {
        "clip": loader("TextEncoder", CLIP),
        "e": node("CLIPTextEncode", clip=["clip", 0], text=text),
        **preview("e"),
    }


def draw(path: Path, colour: tuple[int, int, int], spot: int = 0) -> None:
    """A plain picture with one pixel of its own."""
    pixels = np.full((48, 64, 3), colour, dtype=np.uint8)
    pixels[20, 30] = spot
    PIL.Image.fromarray(pixels).save(path)


def edit_graph() -> Graph:
    """An edit with two pictures, as in the official templates; everything but a sampler."""
    graph = {
        "clip": node("TestStockLike", clip_name="mine_clip.safetensors"),
        "vae": loader("VAE", "mine_vae.safetensors"),
        "lora": node(
            "LoraLoader",
            model=["unet", 0],
            clip=["clip", 0],
            lora_name="mine_lora.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
        ),
        "unet": loader("DiffusionModel", "tiny_qwen_image.safetensors"),
        "one": node("LoadImage", image="one.png"),
        "two": node("LoadImage", image="two.png"),
        "scale": node(
            "ImageScale",
            image=["one", 0],
            upscale_method="bicubic",
            width=64,
            height=64,
            crop="center",
        ),
        "latent": node("VAEEncode", pixels=["scale", 0], vae=["vae", 0]),
    }
    pictures = {"vae": ["vae", 0], "image1": ["scale", 0], "image2": ["two", 0]}
    for name, text, more in (("pos", "make it red", pictures), ("neg", "", {})):
        links = {"clip": ["lora", 1], **more}
        graph[name] = node("TextEncodeQwenImageEditPlus", prompt=text, **links)
    return {**graph, **preview(*ENCODERS)}


def without_vae(graph: Graph) -> Graph:
    """Quicker."""
    graph = copy.deepcopy(graph)
    del graph["pos"]["inputs"]["vae"], graph["latent"], graph["out_latent"]
    return graph


@pytest.fixture(scope="module", autouse=True)
def small_references(host) -> Iterator[None]:
    """Stock makes references of 1 megapixel; here a quarter as wide and high, in the same way."""
    edit_node = host.nodes.NODE_CLASS_MAPPINGS["TextEncodeQwenImageEditPlus"]
    quarter = SimpleNamespace(sqrt=lambda number: math.sqrt(number) / 4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys.modules[edit_node.__module__], "math", quarter)
        yield


class Files:
    """The files of `edit_graph`, which a test may change: older than ComfyUI's start, as a user's."""

    def __init__(self, host: Any) -> None:
        models = host.models
        sources = {"text_encoders/mine_clip": CLIP, "vae/mine_vae": VAE, "loras/mine_lora": LORA}
        for name, source in sources.items():
            shutil.copy(models / name.partition("/")[0] / source, models / f"{name}.safetensors")
        self.pictures = [host.base / "input" / f"{name}.png" for name in ("one", "two")]
        draw(self.pictures[0], (200, 40, 40))
        draw(self.pictures[1], (40, 40, 200))
        paths = [*(models / f"{name}.safetensors" for name in sources), *self.pictures]
        self.environment = host.part("nodes.environment")
        self.started_ns = self.environment.STARTED_NS
        host.part("nodes.keys")._first_seen.clear()
        self.environment.STARTED_NS = time.time_ns()
        self.before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    def restore(self) -> None:
        """As they were: same bytes, same dates."""
        for path, (content, mtime_ns) in self.before.items():
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            os.utime(path, ns=(mtime_ns, mtime_ns))

    def remove(self) -> None:
        """Leave nothing behind."""
        self.environment.STARTED_NS = self.started_ns
        for path in self.before:
            path.unlink(missing_ok=True)


@pytest.fixture
def edit(fresh) -> Iterator[Graph]:
    """`edit_graph` with its files; the cache is empty."""
    files = Files(fresh)
    yield edit_graph()
    files.remove()


@pytest.fixture(scope="module")
def known(host) -> Iterator[Files]:
    """The files of `edit_graph`, which is known to the cache."""
    host.forget_everything()
    files = Files(host)
    host.run(edit_graph())
    assert len(list(host.store_directory.glob("*.safetensors"))) == len(ENCODERS)
    yield files
    files.remove()


def outcome(host: Any, graph: Graph) -> dict[str, str]:
    """For each encode node "hit", or why it misses; after a restart, without running anything."""
    host.restart()
    host.run(graph, targets=[])
    missed = {n: asked.why for n, asked in host.part("nodes.provider").PROVIDER._asked.items()}
    return {**missed, **{e["node"]: "hit" for e in events(host)}}


# --------------------------------------------------------------------------- it saves the work
@pytest.mark.parametrize("cache", ["CLASSIC", "LRU", "RAM_PRESSURE"])
def test_a_known_prompt_needs_neither_encoder_nor_loader(fresh, cache) -> None:
    fresh.restart(cache)
    first = fresh.run(text_graph())
    assert told(fresh, "e")["why"] == "new text" and told(fresh, "e")["kept"] == "stored"
    fresh.restart(cache)
    second = fresh.run(text_graph())
    assert second.executed == ["out_e"] and told(fresh, "e")["tier"] == "disk"
    found = fresh.executor.caches.outputs.get_local("e").outputs[0][0]
    assert same(found, first.outputs["e"][0][0])


def test_without_caches_in_comfyui_it_is_not_asked_and_nothing_breaks(fresh) -> None:
    fresh.restart("NONE")
    fresh.run(text_graph())
    assert events(fresh) == [] and "e" in fresh.run(text_graph()).executed


def test_stock_nodes_and_ours_know_each_others_prompts(fresh) -> None:
    fresh.run(text_graph("one"))
    ours = {**text_graph(), "e": encode("one")}
    fresh.restart()
    assert fresh.run(ours).status("e")["result"] == "hit"
    ours["e"] = encode("two")
    fresh.run(ours)
    fresh.restart()
    assert "clip" not in fresh.run(text_graph("two")).executed


def test_an_edit_needs_no_encoder_no_vae_and_gives_the_same_bits(fresh, edit) -> None:
    first = fresh.run(edit)
    assert {"clip", "vae", "unet", *ENCODERS} <= set(first.executed)
    references = first.outputs["pos"][0][0][0][1]["reference_latents"]
    assert [list(one.shape[-2:]) for one in references] == [[32, 32], [28, 37]]
    fresh.restart()
    second = fresh.run(edit)
    assert set(second.executed) == {f"out_{n}" for n in ENCODERS}  # not even the pictures are read
    assert told(fresh, "pos")["seconds_saved"] > 0
    for name in ENCODERS:
        found = fresh.executor.caches.outputs.get_local(name).outputs
        assert same(found, first.outputs[name])
    fresh.restart()
    stock = fresh.run(keeping_nothing(edit))
    assert all(same(stock.outputs[name], first.outputs[name]) for name in ENCODERS)


def test_a_prompt_that_ends_at_once_is_stored_all_the_same(fresh) -> None:
    graph = text_graph()
    fresh.run(graph)  # nothing runs after the encoding: a task of ComfyUI's would be cancelled
    assert fresh.store.flush() and len(list(fresh.store_directory.glob("*.safetensors"))) == 1


def test_a_miss_counts_once_and_a_hit_counts_once(fresh) -> None:
    savings = fresh.part("nodes.store").SAVINGS
    before = savings.now
    fresh.run(text_graph())
    fresh.restart()
    fresh.run(text_graph())
    assert (savings.now.hits - before.hits, savings.now.misses - before.misses) == (1, 1)


def test_comfyuis_own_cache_is_not_asked(fresh) -> None:
    fresh.run(text_graph())
    fresh.run(text_graph())
    assert events(fresh) == []


def test_it_can_be_switched_off_and_other_nodes_added(fresh, monkeypatch) -> None:
    provider, store = fresh.part("nodes.provider"), fresh.part("nodes.store")
    settings = fresh.part("nodes.settings")
    for keep in (settings.KEEP_OURS, settings.KEEP_NOTHING):
        chosen = settings.Settings(keep=keep)
        monkeypatch.setattr(store, "settings", lambda chosen=chosen: chosen)
        fresh.run(text_graph())
        assert told(fresh, "e")["why"] == "nothing is kept, by the settings"
        assert fresh.store.flush() and not fresh.store_directory.exists()
        fresh.restart()
    ours = fresh.run({**text_graph(), "e": encode("a red fox")})
    assert ours.status("e")["why"] == "nothing is kept, by the settings"
    monkeypatch.undo()
    more = settings.Settings(more_nodes=frozenset({"CLIPTextEncodeControlnet"}))
    monkeypatch.setattr(provider, "settings", lambda: more)
    graph = {
        **text_graph(),
        "c": node("ConditioningZeroOut", conditioning=["e", 0]),
        **preview("c"),
    }
    del graph["out_e"]
    fresh.run(graph)
    assert [e["node"] for e in events(fresh)] == ["e"]
    monkeypatch.setattr(
        provider,
        "settings",
        lambda: settings.Settings(more_nodes=frozenset({"ConditioningZeroOut"})),
    )
    assert outcome(fresh, graph)["c"] == "new text"
    fresh.run(graph)
    assert outcome(fresh, graph)["c"] == "hit"


def test_it_works_inside_a_graph_that_a_node_builds(fresh) -> None:
    graph = {**text_graph(), "x": node("TestExpandStock", text="inside"), **preview("x")}
    del graph["e"], graph["out_e"]
    for cache in ("LRU", "RAM_PRESSURE"):
        fresh.forget_everything()
        fresh.restart(cache)
        first = fresh.run(graph)
        assert events(fresh)[0]["kept"] == "stored"
        fresh.restart(cache)
        second = fresh.run(graph)
        assert events(fresh)[0]["result"] == "hit" and len(second.executed) < len(first.executed)


# --------------------------------------------------------------------------- it is never stale
def rewrite(path: Path) -> None:
    """Other bytes under the same name, as after a download."""
    os.utime(path)


def setting(key: str, name: str, value: Any) -> Callable[[Graph, Any, Any], None]:
    """Change one input of one node."""

    def change(graph: Graph, host: Any, monkeypatch: Any) -> None:
        graph[key]["inputs"][name] = value

    return change


def touching(kind: str, name: str) -> Callable[[Graph, Any, Any], None]:
    """Replace a file."""
    return lambda graph, host, monkeypatch: rewrite(host.models / kind / f"{name}.safetensors")


def patching(module: str, where: str, name: str, value: Any) -> Callable[[Graph, Any, Any], None]:
    """Start ComfyUI in another way."""

    def change(graph: Graph, host: Any, monkeypatch: Any) -> None:
        owner = host.part(module)
        for step in filter(None, where.split(".")):
            owner = getattr(owner, step)
        monkeypatch.setattr(owner, name, value)

    return change


def one_pixel(graph: Graph, host: Any, monkeypatch: Any) -> None:
    draw(host.base / "input" / "two.png", (40, 40, 200), spot=1)


def transparency(graph: Graph, host: Any, monkeypatch: Any) -> None:
    path = host.base / "input" / "two.png"
    picture = PIL.Image.open(path).convert("RGBA")
    picture.putalpha(128)
    picture.save(path)


def swap(graph: Graph, host: Any, monkeypatch: Any) -> None:
    inputs = graph["pos"]["inputs"]
    inputs["image1"], inputs["image2"] = inputs["image2"], inputs["image1"]


def without(name: str) -> Callable[[Graph, Any, Any], None]:
    return lambda graph, host, monkeypatch: graph["pos"]["inputs"].pop(name)


def third_picture(graph: Graph, host: Any, monkeypatch: Any) -> None:
    graph["pos"]["inputs"]["image3"] = ["one", 0]


def older_encode(graph: Graph, host: Any, monkeypatch: Any) -> None:
    inputs = graph["pos"]["inputs"]
    graph["pos"] = node(
        "TextEncodeQwenImageEdit",
        image=inputs["image1"],
        **{k: inputs[k] for k in ("clip", "vae", "prompt")},
    )


def second_lora(graph: Graph, host: Any, monkeypatch: Any) -> None:
    again = copy.deepcopy(graph["lora"])
    again["inputs"].update(model=["lora", 0], clip=["lora", 1])
    graph["again"] = again
    graph["pos"]["inputs"]["clip"] = ["again", 1]


def last_layer(graph: Graph, host: Any, monkeypatch: Any) -> None:
    graph["last"] = node("CLIPSetLastLayer", clip=["lora", 1], stop_at_clip_layer=-2)
    graph["pos"]["inputs"]["clip"] = ["last", 0]


def other_loader(graph: Graph, host: Any, monkeypatch: Any) -> None:
    graph["clip"] = loader("TextEncoder", "mine_clip.safetensors")


def link_elsewhere(graph: Graph, host: Any, monkeypatch: Any) -> None:
    path = host.models / "loras" / "mine_lora.safetensors"
    path.unlink()
    symlink(path, path.with_name("tiny_animals_lora.safetensors"))


def stock_code(graph: Graph, host: Any, monkeypatch: Any) -> None:
    environment = host.part("nodes.environment")
    real = environment._source_of
    monkeypatch.setattr(
        environment, "_source_of", lambda n: ("other", 0.0) if n == "comfyui" else real(n)
    )


CHANGES = {
    "another text": (setting("pos", "prompt", "make it blue"), "new text"),
    "one more blank": (setting("pos", "prompt", "make it red "), "new text"),
    "LoRA strength": (setting("lora", "strength_clip", 0.5), "LoRA before clip changed"),
    "another LoRA": (setting("lora", "lora_name", LORA), "LoRA before clip changed"),
    "a second LoRA": (second_lora, "LoRA before clip changed"),
    "LoRA file": (touching("loras", "mine_lora"), "LoRA file changed"),
    "LoRA file linked elsewhere": (link_elsewhere, "LoRA file changed"),
    "encoder file": (touching("text_encoders", "mine_clip"), "text encoder file changed"),
    "VAE file": (touching("vae", "mine_vae"), "VAE file changed"),
    "VAE weights": (setting("vae", "weight_dtype", "bf16"), "nodes before vae changed"),
    "no VAE": (without("vae"), "nodes before vae is gone"),
    "encoder's loader": (other_loader, "nodes before clip changed"),
    "layer": (last_layer, "nodes before clip changed"),
    "one pixel": (one_pixel, "new image2"),
    "transparency": (transparency, "new image2"),
    "pictures swapped": (swap, "image1 changed"),
    "picture removed": (without("image2"), "image2 is gone"),
    "picture added": (third_picture, "new image3"),
    "another picture": (setting("two", "image", "one.png"), "new image2"),
    "scaled otherwise": (setting("scale", "width", 80), "new image1"),
    "scaled by another filter": (setting("scale", "upscale_method", "area"), "new image1"),
    "another class": (older_encode, "new text"),
    "--fp16-intermediates": (
        patching("nodes.environment", "args", "fp16_intermediates", True),
        "start options changed",
    ),
    "ComfyUI's version": (
        patching("nodes.environment", "comfyui_version", "__version__", "99.0"),
        "ComfyUI's version changed",
    ),
    "ComfyUI's code": (stock_code, "code version changed"),
    "libraries": (
        patching("nodes.environment", "", "_version", lambda n: "9"),
        "libraries changed",
    ),
    "another card": (
        patching("nodes.environment", "", "_hardware", lambda: ["x"]),
        "hardware changed",
    ),
    "precision": (
        patching("nodes.environment", "", "_precision", lambda: ["x"]),
        "precision changed",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_a_miss_with_its_reason(host, known, name) -> None:
    change, reason = CHANGES[name]
    changed = edit_graph()
    with pytest.MonkeyPatch.context() as monkeypatch:
        change(changed, host, monkeypatch)
        assert outcome(host, changed)["pos"] == reason
    known.restore()
    assert set(outcome(host, edit_graph()).values()) == {"hit"}  # it was that change alone


def test_what_does_not_matter_hits(host, known, monkeypatch) -> None:
    edit = edit_graph()
    renamed = {f"{k}:9" if k != "out_pos" else k: copy.deepcopy(v) for k, v in edit.items()}
    for item in renamed.values():
        for name, value in item["inputs"].items():
            if isinstance(value, list):
                item["inputs"][name] = [f"{value[0]}:9", value[1]]
    monkeypatch.setattr(host.part("nodes.environment").args, "port", 9999)
    renamed["lora:9"]["inputs"]["strength_clip"] = 1  # which ComfyUI turns into 1.0
    assert set(outcome(host, renamed).values()) == {"hit"}
    os.utime(known.pictures[0])  # the same picture, uploaded again
    assert set(outcome(host, edit).values()) == {"hit"}


def test_a_file_changed_behind_a_stock_loader_is_never_stored_under_its_new_name(
    fresh, edit
) -> None:
    edit = without_vae(edit)
    fresh.run(edit)
    rewrite(fresh.models / "text_encoders" / "mine_clip.safetensors")
    edit["pos"]["inputs"]["prompt"] = "make it green"  # ComfyUI still holds the old encoder
    fresh.run(edit)
    assert (
        told(fresh, "pos")["kept"]
        == "not stored: mine_clip.safetensors changed after ComfyUI started"
    )


def test_a_file_changed_behind_our_loader_is_seen_at_once_and_stored(fresh, edit) -> None:
    graph = {**without_vae(edit), "clip": loader("TextEncoder", "mine_clip.safetensors")}
    fresh.run(graph)
    rewrite(fresh.models / "text_encoders" / "mine_clip.safetensors")
    fresh.run(graph)
    assert told(fresh, "pos")["why"] == "text encoder file changed"
    assert told(fresh, "pos")["kept"] == "stored"


def test_a_picture_replaced_while_it_is_encoded_is_not_stored(fresh, edit, monkeypatch) -> None:
    edit = without_vae(edit)
    clip_class = fresh.part("nodes.conditioning").comfy.sd.CLIP
    tokenize = clip_class.tokenize

    def slow(self, *args, **kwargs):
        draw(fresh.base / "input" / "two.png", (1, 2, 3))
        return tokenize(self, *args, **kwargs)

    monkeypatch.setattr(fresh.part("nodes.environment"), "intruders", set)
    monkeypatch.setattr(clip_class, "tokenize", slow)
    fresh.run(edit)
    assert (
        told(fresh, "pos")["kept"] == "not stored: what it depends on changed while it was encoded"
    )


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (node("TestRandomClip", clip=["clip", 0]), "TestRandomClip is random"),
        (node("TestCounterClip", clip=["clip", 0]), "TestCounterClip counts in"),
        (node("TestWorkflowReader", clip=["clip", 0]), "reads the whole workflow"),
    ],
)
def test_behind_a_node_that_cannot_be_foreseen_nothing_is_kept(fresh, before, reason) -> None:
    graph = {**text_graph(), "t": before}
    graph["e"]["inputs"]["clip"] = ["t", 0]
    fresh.run(graph)
    assert reason in told(fresh, "e")["why"] and told(fresh, "e")["kept"] == ""
    assert fresh.store.flush() and not fresh.store_directory.exists()


def test_behind_a_node_that_always_runs_comfyui_does_not_ask(fresh) -> None:
    graph = {**text_graph(), "t": node("TestNaNClip", clip=["clip", 0])}
    graph["e"]["inputs"]["clip"] = ["t", 0]
    fresh.run(graph)
    assert events(fresh) == [] and fresh.store.flush() and not fresh.store_directory.exists()


def test_lists_and_seeds_are_not_kept(fresh) -> None:
    listed = {**text_graph(), "list": node("TestTextList")}
    listed["e"]["inputs"]["text"] = ["list", 0]
    fresh.run(listed)
    assert "gives a list" in told(fresh, "e")["why"]
    seeded = {
        "vae": loader("VAE", VAE),
        "noise": node("TestSeededImage", seed=3),
        "latent": node("VAEEncode", pixels=["noise", 0], vae=["vae", 0]),
        **preview("latent"),
    }
    fresh.run(seeded)
    assert told(fresh, "latent")["why"] == "cannot be cached: TestSeededImage has a seed"


def test_a_text_that_another_node_makes_is_known_by_the_graph(fresh) -> None:
    graph = {**text_graph(), "s": node("PrimitiveString", value="a red fox")}
    graph["e"]["inputs"]["text"] = ["s", 0]
    fresh.run(graph)
    assert outcome(fresh, graph)["e"] == "hit"
    graph["s"]["inputs"]["value"] = "a red dog"
    assert outcome(fresh, graph)["e"] == "linked text changed"


@pytest.mark.parametrize("source", ["TestFolderImage", "TestFileText"])
def test_a_foreign_node_that_reads_something_of_its_own_is_not_trusted(fresh, source) -> None:
    graph = {"s": node(source), "vae": loader("VAE", VAE), "clip": loader("TextEncoder", CLIP)}
    if source == "TestFolderImage":
        graph["e"] = node("VAEEncode", pixels=["s", 0], vae=["vae", 0])
    else:
        graph["e"] = node("CLIPTextEncode", text=["s", 0], clip=["clip", 0])
    fresh.run({**graph, **preview("e")})
    assert source in told(fresh, "e")["why"] and told(fresh, "e")["kept"] == ""


def test_latents_that_were_encoded_in_tiles_are_not_kept(fresh, monkeypatch) -> None:
    """ComfyUI does so when memory is short; with enough of it the result is another."""
    vae = fresh.part("nodes.conditioning").comfy.sd.VAE
    real = vae.encode

    def short_of_memory(self, pixels):
        logging.warning("Ran out of memory, retrying with tiled VAE encoding.")
        return real(self, pixels)

    monkeypatch.setattr(fresh.part("nodes.environment"), "intruders", set)
    graph = {
        "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=5),
        "vae": loader("VAE", VAE),
        "latent": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        **preview("latent"),
    }
    with monkeypatch.context() as short:
        short.setattr(vae, "encode", short_of_memory)
        fresh.run(graph)
        assert told(fresh, "latent")["kept"].startswith("not stored: too little memory")
    fresh.restart()
    fresh.run(graph)
    assert told(fresh, "latent")["kept"] == "stored"
    assert told(fresh, "latent")["why"] == "new image"


def test_an_input_that_is_called_like_a_part_of_the_key_hides_nothing(fresh) -> None:
    from comfy_execution.graph import DynamicPrompt

    keys = fresh.part("nodes.keys")

    def key(class_type: str, text: str) -> str:
        graph = {"s": node("PrimitiveString", value=text), "clip": loader("TextEncoder", CLIP)}
        graph["e"] = node(class_type, text=["s", 0], clip=["clip", 0])
        return keys.node_key("e", DynamicPrompt(graph)).sha256

    found = {key(c, t) for c in ("CLIPTextEncode", "CLIPTextEncodeHunyuanDiT") for t in ("a", "b")}
    assert len(found) == 4


@pytest.mark.parametrize("text", ["/imagine a red fox", "../secret", "//host/x.json", "a\0b"])
def test_no_text_breaks_the_search_or_gets_into_the_log(fresh, edit, caplog, text) -> None:
    graph = without_vae(edit)
    graph["pos"]["inputs"]["prompt"] = text
    fresh.run(graph)
    assert told(fresh, "pos")["kept"] == "stored" and text not in caplog.text


def test_an_error_of_the_cache_costs_the_search_and_quotes_no_prompt(
    fresh, monkeypatch, caplog
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a red fox")

    monkeypatch.setattr(fresh.part("nodes.provider"), "node_key", broken)
    run = fresh.run(text_graph())
    assert "e" in run.executed and told(fresh, "e")["why"] == "cannot be cached: KeyError"
    assert "KeyError" in caplog.text and "red fox" not in caplog.text


def test_tiny_autoencoders_are_known_by_their_files(fresh) -> None:
    folder = fresh.models / "vae_approx"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"taesd_{part}.safetensors" for part in ("encoder", "decoder")]
    for path in paths:
        path.write_bytes(b"x")
    named = {Path(f.path).name for f in fresh.part("nodes.upstream").files_named("taesd")}
    for path in paths:
        path.unlink()
    assert named == {path.name for path in paths}
