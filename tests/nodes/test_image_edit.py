"""Edit prompts: as stock, bit for bit; each part is found again, and made again when it must be."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.tests.graphs import CLIP, LORA, VAE, keeping_nothing, loader, node, preview
from pack.tests.host import RunError
from pack.tests.nodes.test_conditioning import edit, same
from PIL import Image
from safetensors.torch import save_file

LORA_LOADER = {"model": ["unet", 0], "clip": ["clip", 0], "lora_name": LORA, "strength_model": 1.0}


def write(host: Any, name: str, seed: int, size: tuple[int, int] = (72, 56)) -> str:
    """A picture file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(host.base / "input" / name)
    return name


@pytest.fixture
def files(fresh) -> list[str]:
    """Three picture files."""
    sizes = [(72, 56), (64, 64), (40, 120)]
    return [write(fresh, f"picture{i}.png", i, size) for i, size in enumerate(sizes)]


def pictures(*names: str) -> dict[str, Any]:
    """Loaders called load1, load2 ..."""
    return {f"load{i}": node("LoadImage", image=name) for i, name in enumerate(names, 1)}


def graph(*names: str, text: str = "make it blue", vae: bool = True, **inputs: Any) -> dict:
    """One edit prompt, small and fast unless told otherwise."""
    options = {"reference_size": "given", "width": 64, "height": 64, "cache": "memory and disk"}
    images = {f"image{i}": [f"load{i}", 0] for i in range(1, len(names) + 1)}
    models = {"clip": ["clip", 0], **({"vae": ["vae", 0]} if vae else {})}
    made = node(
        "QwenVRAMCachedImageEditEncode", text=text, **{**models, **images, **options, **inputs}
    )
    loaders = {"clip": loader("TextEncoder", CLIP), "vae": loader("VAE", VAE)}
    return {**loaders, **pictures(*names), "e": made, **preview("e")}


def stock(ours: dict[str, Any]) -> dict[str, Any]:
    """The same graph with stock's node, of which nothing is kept."""
    inputs = dict(ours["e"]["inputs"])
    for name in ("reference_size", "width", "height", "cache"):
        del inputs[name]
    inputs["prompt"] = inputs.pop("text")
    plus = node("TextEncodeQwenImageEditPlus", **inputs)
    return keeping_nothing({**ours, "e": plus})


def value(run: Any) -> Any:
    """The conditioning that a run gave."""
    return run.outputs["e"][0][0]


def size(run: Any) -> list[int]:
    """Width and height that a run gave."""
    return [run.outputs["e"][1][0], run.outputs["e"][2][0]]


def references(run: Any) -> list[torch.Tensor]:
    """The reference latents that a run gave."""
    return value(run)[0][1]["reference_latents"]


def again(host: Any, changed: dict[str, Any]) -> Any:
    """Run as after a restart."""
    host.restart()
    return host.run(changed)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_text_and_pictures_equal_stock_bit_for_bit_fresh_from_memory_and_from_disk(
    fresh, files, count
) -> None:
    ours = graph(*files[:count], vae=False, reference_size="1 megapixel")
    expected = value(fresh.run(stock(ours)))
    miss = again(fresh, ours)
    assert miss.status("e")["result"] == "miss" and same(value(miss), expected)
    fresh.executor.reset()
    memory = fresh.run(ours)
    assert memory.status("e")["tier"] == "memory" and same(value(memory), expected)
    disk = again(fresh, ours)
    assert disk.status("e")["tier"] == "disk" and same(value(disk), expected)
    assert "clip" not in memory.executed + disk.executed


def test_references_of_a_megapixel_equal_stock_bit_for_bit(fresh, files, monkeypatch) -> None:
    """In the same order, from the same pixels, of which the VAE sees a part: it takes seconds."""
    import comfy.sd

    whole, seen = comfy.sd.VAE.encode, []

    def encode(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return whole(self, pixels[:, 400:464, 600:664])

    ours = graph(*files[:2], reference_size="1 megapixel")
    with monkeypatch.context() as patch:
        patch.setattr(comfy.sd.VAE, "encode", encode)
        # What such code makes is not kept otherwise, and the hit is looked at too.
        patch.setattr(fresh.part("nodes.environment"), "intruders", set)
        expected = value(fresh.run(stock(ours)))
        for result in ("miss", "hit"):
            run = again(fresh, ours)
            assert run.status("e")["result"] == result
            assert len(references(run)) == 2 and same(value(run), expected)
    assert [list(pixels.shape) for pixels in seen[:2]] == [[1, 904, 1160, 3], [1, 1024, 1024, 3]]
    assert len(seen) == 4 and all(
        torch.equal(a, b) for a, b in zip(seen[:2], seen[2:], strict=True)
    )


def test_a_gap_between_the_inputs_is_numbered_as_in_stock(fresh, files) -> None:
    ours = graph(*files, vae=False)
    del ours["e"]["inputs"]["image2"]
    expected = value(fresh.run(stock(ours)))
    assert same(value(again(fresh, ours)), expected)


def test_after_a_restart_no_model_is_touched_and_the_bits_are_the_same(fresh, files) -> None:
    first = fresh.run(graph(*files))
    assert first.status("e")["text"].startswith("conditioning: miss (new text), encoded in ")
    assert "reference latents: miss (new image 1, new image 2, new" in first.status("e")["text"]
    assert first.status("e")["kept"] == "stored"
    second = again(fresh, graph(*files))
    assert not {"clip", "vae"} & set(second.executed)
    line = second.status("e")["text"]
    assert line.startswith("conditioning: hit, disk · reference latents: hit, disk")
    assert same(value(second), value(first)) and size(second) == size(first) == [64, 64]


def test_a_new_instruction_reuses_the_latents(fresh, files) -> None:
    first = fresh.run(graph(*files))
    changed = graph(*files, text="make it red")
    run = again(fresh, changed)
    status = run.status("e")
    assert "vae" not in run.executed and "clip" in run.executed
    assert status["result"] == "partial" and status["why"] == "new text"
    assert [r["result"] for r in status["references"]] == ["hit"] * 3
    assert same(references(run), references(first))
    assert same(value(run), value(again(fresh, keeping_nothing(changed))))


def test_a_new_size_reuses_the_conditioning(fresh, files) -> None:
    first = fresh.run(graph(*files))
    run = again(fresh, graph(*files, reference_size="own size"))
    status = run.status("e")
    assert "clip" not in run.executed and "vae" in run.executed
    assert status["conditioning"]["result"] == "hit"
    assert status["references"][0]["why"] == "reference size changed"
    assert [list(r.shape[-2:]) for r in references(run)] == [[8, 8], [8, 8], [16, 4]]
    assert same(value(run)[0][0], value(first)[0][0])


def test_width_and_height_count_only_when_they_are_given(fresh, files) -> None:
    fresh.run(graph(*files, reference_size="own size"))
    run = again(fresh, graph(*files, reference_size="own size", width=512))
    assert run.status("e")["result"] == "hit"


def test_one_other_pixel_is_a_miss_of_both_parts_that_names_the_picture(fresh, files) -> None:
    before = fresh.run(graph(*files))
    path = fresh.base / "input" / files[1]
    with Image.open(path) as image:
        pixel = image.getpixel((3, 3))
        image.putpixel((3, 3), ((pixel[0] + 1) % 256, *pixel[1:]))
        image.save(path)
    run = fresh.run(graph(*files))  # in the same process, nothing reset
    status = run.status("e")
    assert status["conditioning"]["why"] == "new image 2"
    assert [r.get("why", "hit") for r in status["references"]] == ["hit", "new image 2", "hit"]
    assert "reference latents: 2 of 3 hit, memory; miss (new image 2), enc" in status["text"]
    assert not same(value(run)[0][0], value(before)[0][0])
    assert not same(references(run)[1], references(before)[1])


def test_another_order_is_another_text_with_the_same_latents(fresh, files) -> None:
    before = fresh.run(graph(*files, reference_size="own size"))
    run = again(fresh, graph(*files[::-1], reference_size="own size"))
    status = run.status("e")
    assert status["conditioning"]["why"] == "image 1 changed" and "vae" not in run.executed
    assert same(references(run), references(before)[::-1])
    assert size(before) == [64, 64] and size(run) == [32, 128]


def test_one_picture_less_or_more_is_told(fresh, files) -> None:
    fresh.run(graph(*files))
    less = again(fresh, graph(*files[:2])).status("e")
    assert less["conditioning"]["why"] == "number of images changed"
    assert [r["result"] for r in less["references"]] == ["hit", "hit"]


def test_the_same_picture_in_another_file_is_a_hit(fresh, files) -> None:
    fresh.run(graph(*files))
    source = fresh.base / "input" / files[0]
    shutil.copy(source, source.with_name("copy.png"))
    assert again(fresh, graph("copy.png", *files[1:])).status("e")["result"] == "hit"


def test_without_a_vae_there_are_no_references(fresh, files) -> None:
    fresh.run(graph(*files))
    run = again(fresh, graph(*files, vae=False))
    assert run.status("e")["text"].startswith("conditioning: hit, disk · no reference latents")
    assert "reference_latents" not in value(run)[0][1] and size(run) == [64, 64]


@pytest.fixture
def own_files(fresh) -> Iterator[dict[str, Path]]:
    """Copies of encoder and VAE that a test may change."""
    paths = {}
    for name, folder, file in (("clip", "text_encoders", CLIP), ("vae", "vae", VAE)):
        paths[name] = fresh.models / folder / f"my_{name}.safetensors"
        shutil.copy(fresh.models / folder / file, paths[name])
    yield paths
    for path in paths.values():
        path.unlink()


@pytest.mark.parametrize(
    ("name", "why"), [("clip", "text encoder file changed"), ("vae", "VAE file changed")]
)
def test_a_touched_file_is_a_miss_of_its_part_alone(fresh, files, own_files, name, why) -> None:
    mine = {
        "clip": loader("TextEncoder", "my_clip.safetensors"),
        "vae": loader("VAE", "my_vae.safetensors"),
    }
    fresh.run({**graph(files[0]), **mine})
    os.utime(own_files[name])
    run = again(fresh, {**graph(files[0]), **mine})
    assert run.status("e")["result"] == "partial" and run.status("e")["why"] == why
    assert {"clip", "vae"} & set(run.executed) == {name}


def test_replaced_files_are_never_stale(fresh, files, own_files) -> None:
    mine = {
        "clip": loader("TextEncoder", "my_clip.safetensors"),
        "vae": loader("VAE", "my_vae.safetensors"),
    }
    before = fresh.run({**graph(files[0]), **mine})
    edit(own_files["clip"])
    run = fresh.run({**graph(files[0]), **mine})  # the same process, nothing reset
    assert run.status("e")["why"] == "text encoder file changed"
    assert not same(value(run)[0][0], value(before)[0][0])


@pytest.mark.parametrize(
    ("name", "changed"),
    [("vae", {"weight_dtype": "bf16"}), ("clip", {"weight_dtype": "fp32"})],
)
def test_another_type_of_the_weights_is_a_miss_of_its_part_alone(
    fresh, files, name, changed
) -> None:
    fresh.run(graph(files[0]))
    other = graph(files[0])
    other[name]["inputs"].update(changed)
    run = again(fresh, other)
    assert run.status("e")["result"] == "partial"
    assert run.status("e")["why"] == f"nodes before {name} changed"
    assert {"clip", "vae"} & set(run.executed) == {name}
    assert same(value(run), value(again(fresh, keeping_nothing(other))))


def test_the_strength_of_a_lora_is_a_miss_of_the_conditioning(fresh, files) -> None:
    def with_lora(strength: float) -> dict[str, Any]:
        made = graph(files[0])
        made["unet"] = loader("DiffusionModel", "tiny_qwen_image.safetensors")
        made["lora"] = node("LoraLoader", **LORA_LOADER, strength_clip=strength)
        made["e"]["inputs"]["clip"] = ["lora", 1]
        return made

    fresh.run(with_lora(0.5))
    run = again(fresh, with_lora(0.6))
    assert run.status("e")["why"] == "LoRA before clip changed" and "vae" not in run.executed
    assert again(fresh, with_lora(0.5)).status("e")["result"] == "hit"


def test_an_embedding_that_appears_is_a_miss(fresh, files) -> None:
    folder = fresh.base / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    made = graph(files[0], text="like embedding:mine", vae=False)
    fresh.run(made)
    save_file({"qwen25_7b": torch.ones(1, 64)}, folder / "mine.safetensors")
    try:
        assert again(fresh, made).status("e")["why"] == "embedding file changed"
    finally:
        (folder / "mine.safetensors").unlink()


def test_a_batch_is_a_row_of_pictures(fresh, files) -> None:
    files[1] = write(fresh, "second.png", 8, (72, 56))
    apart = fresh.run(graph(*files))
    batched = graph(*files)
    batched["batch"] = node("ImageBatch", image1=["load1", 0], image2=["load2", 0])
    batched["e"]["inputs"].update(image1=["batch", 0], image2=["load3", 0])
    del batched["e"]["inputs"]["image3"]
    run = again(fresh, batched)
    assert run.status("e")["result"] == "hit" and same(value(run), value(apart))


def test_given_cuts_the_first_picture_and_keeps_the_shape_of_the_others(fresh, files) -> None:
    run = fresh.run(graph(*files, width=100, height=64))
    assert size(run) == [96, 64]  # a number from another node need not be a multiple of 32
    shapes = [list(r.shape[-2:]) for r in references(run)]
    assert shapes == [[8, 12], [8, 8], [16, 4]]


def test_a_list_of_instructions_asks_for_the_encoder_alone_when_one_is_new(fresh, files) -> None:
    fresh.run(graph(files[0], text="one"))
    both = {**graph(files[0], text=["list", 0]), "list": node("TestTextList")}
    run = again(fresh, both)
    assert [s["result"] for s in run.ui["e"]["qwen_vram"]] == ["hit", "partial"]
    assert "clip" in run.executed and "vae" not in run.executed
    run = again(fresh, both)
    assert [s["result"] for s in run.ui["e"]["qwen_vram"]] == ["hit", "hit"]


def test_cache_modes(fresh, files) -> None:
    off = fresh.run(graph(files[0], cache="off")).status("e")
    assert off["why"] == "cache is off" and off["kept"] == "" and off["result"] == "not kept"
    memory = graph(files[0], cache="memory")
    assert fresh.run(memory).status("e")["kept"] == "stored in memory"
    fresh.executor.reset()
    assert fresh.run(memory).status("e")["tier"] == "memory"
    assert not fresh.store_directory.exists()


def test_what_it_saved_is_counted(fresh, files) -> None:
    savings = fresh.part("nodes.store").SAVINGS
    fresh.run(graph(*files))
    before = savings.now
    run = again(fresh, graph(*files))
    assert savings.now.hits == before.hits + 1 and savings.now.misses == before.misses
    saved = savings.now.seconds - before.seconds
    assert saved == pytest.approx(run.status("e")["seconds_saved"]) and saved > 0
    again(fresh, graph(*files, text="make it red"))
    assert (savings.now.hits, savings.now.misses) == (before.hits + 2, before.misses + 1)


# ------------------------------------------------------------------------------ unusual pictures
@pytest.fixture
def hand_over(fresh, monkeypatch):
    """Make a graph whose load1 gives an object of the test."""
    given_objects: list[Any] = []

    class Given:
        RETURN_TYPES = ("*",)
        FUNCTION = "run"
        CATEGORY = "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        @classmethod
        def IS_CHANGED(cls) -> float:
            return float("nan")

        def run(self) -> tuple[Any]:
            return (given_objects[-1],)

    monkeypatch.setitem(fresh.nodes.NODE_CLASS_MAPPINGS, "TestGiven", Given)

    def make(thing: Any, **inputs: Any) -> dict[str, Any]:
        given_objects.append(thing)
        return {**graph("none", **inputs), "load1": node("TestGiven")}

    return make


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random pixels, always the same."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def test_a_picture_is_known_by_type_shape_and_every_bit(fresh, hand_over) -> None:
    pixels = noise(1, 40, 40, 3)
    fresh.run(hand_over(pixels, vae=False))
    assert again(fresh, hand_over(pixels.clone(), vae=False)).status("e")["result"] == "hit"
    lowest = pixels.clone()
    lowest.view(torch.int32)[0, 0, 0, 0] += 1
    others = [lowest, -0.0 * pixels, pixels.half(), pixels.reshape(1, 20, 80, 3), pixels[:, :, :39]]
    others.append(pixels.transpose(1, 2).contiguous().transpose(1, 2))  # other kernels may run
    for other in others:
        assert again(fresh, hand_over(other, vae=False)).status("e")["result"] == "miss"


@pytest.mark.parametrize(
    "pixels",
    [
        noise(1, 1, 1, 3),
        noise(1, 1, 400, 3),
        torch.full((1, 40, 40, 3), torch.nan),
        noise(1, 40, 40, 4),
        noise(1, 40, 40, 3) * 3 - 1,
    ],
    ids=["one pixel", "one line", "NaN", "alpha", "out of range"],
)
@pytest.mark.parametrize("choice", ["own size", "given"])
def test_unusual_pictures_are_encoded_and_found_again(fresh, hand_over, pixels, choice) -> None:
    made = fresh.run(hand_over(pixels, reference_size=choice))
    found = again(fresh, hand_over(pixels, reference_size=choice))
    assert made.status("e")["kept"] == "stored" and found.status("e")["result"] == "hit"
    flat = [
        torch.cat([value(run)[0][0].flatten(), references(run)[0].flatten()])
        for run in (made, found)
    ]
    assert torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))


def test_alpha_is_dropped(fresh, hand_over) -> None:
    with_alpha = noise(1, 40, 40, 4)
    made = fresh.run(hand_over(with_alpha))
    plain = fresh.run(hand_over(with_alpha[..., :3].contiguous()))
    assert torch.allclose(value(made)[0][0], value(plain)[0][0], atol=1e-4)
    assert torch.allclose(references(made)[0], references(plain)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (None, "image1 carries no picture. Connect an image"),
        (noise(0, 40, 40, 3), "image1 carries no picture"),
        (noise(1, 0, 40, 3), "image1 carries no picture"),
        (noise(40, 40, 3), "image1 carries no picture"),
        (noise(1, 40, 40, 1), r"image1 has 1 channel\(s\) instead of red, green and blue"),
        (noise(11, 8, 8, 3), "11 pictures are connected, 10 are the most"),
    ],
    ids=["none", "empty batch", "no rows", "no batch", "mask", "too many"],
)
def test_what_is_no_picture_gets_a_sentence(fresh, hand_over, pixels, sentence) -> None:
    with pytest.raises(RunError, match=sentence):
        fresh.run(hand_over(pixels))


def test_a_missing_model_gets_a_sentence(fresh, files) -> None:
    made = graph(files[0])
    made["clip"] = node("TestNoClip")
    with pytest.raises(RunError, match="The clip input carries no text encoder"):
        fresh.run(made)


def test_a_loader_without_a_vae_gets_a_sentence(fresh, files, hand_over) -> None:
    made = {**hand_over(None), **pictures(files[0]), "vae": node("TestGiven")}
    with pytest.raises(RunError, match="The vae input carries no VAE"):
        fresh.run(made)


class Blind:
    """A tokenizer of an encoder that reads no pictures."""

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Leave the pictures out."""
        return {"l": [[(1, 1.0)]]}


def test_an_encoder_that_reads_no_pictures_gets_a_sentence(fresh, files, hand_over) -> None:
    bare = graph(files[0], bare=["bare", 0])
    bare["e"]["inputs"]["clip"] = bare["e"]["inputs"].pop("bare")
    bare["bare"] = node("TestBareClip", clip=["clip", 0])
    with pytest.raises(RunError, match=r"\(Bare\) does not take pictures. Load a Qwen2.5-VL"):
        fresh.run(bare)
    clip = again(fresh, graph(files[0])).outputs["clip"][0][0].clone()
    clip.tokenizer = Blind()
    made = {**hand_over(clip), **pictures(files[0]), "clip": node("TestGiven")}
    with pytest.raises(RunError, match=r"\(Blind\) does not take pictures"):
        fresh.run(made)


class ForeignVAE:
    """Encodes as a VAE does, and is none of ComfyUI's."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give something of the right shape."""
        return torch.zeros(1, 16, 1, pixels.shape[1] // 8, pixels.shape[2] // 8)


def test_what_another_kind_of_vae_makes_is_used_and_not_stored(fresh, files, monkeypatch) -> None:
    class Loader:
        RETURN_TYPES = ("VAE",)
        FUNCTION = "run"
        CATEGORY = "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        def run(self) -> tuple[Any]:
            return (ForeignVAE(),)

    monkeypatch.setitem(fresh.nodes.NODE_CLASS_MAPPINGS, "TestForeignVAE", Loader)
    run = fresh.run({**graph(files[0]), "vae": node("TestForeignVAE")})
    kept = run.status("e")["references"][0]["kept"]
    assert kept == "not stored: ForeignVAE is not ComfyUI's VAE"
    assert run.status("e")["conditioning"]["kept"] == "stored"


# ------------------------------------------------------------------------- what happens meanwhile
def test_latents_that_were_encoded_in_tiles_are_not_kept(fresh, files) -> None:
    vae = fresh.run(graph(files[0])).outputs["vae"][0][0]
    whole = vae.first_stage_model.encode

    def no_memory_at_first(*args: Any, **kwargs: Any) -> Any:
        vae.first_stage_model.encode = whole
        raise torch.OutOfMemoryError

    vae.first_stage_model.encode = no_memory_at_first
    run = fresh.run(graph(files[1]))
    assert "vae" in run.cached
    kept = run.status("e")["references"][0]["kept"]
    assert kept == "not stored: too little memory, it was encoded in tiles"
    del vae.first_stage_model.encode
    assert again(fresh, graph(files[1])).status("e")["references"][0]["result"] == "miss"


def test_an_interrupt_stops_before_the_next_encoding_and_keeps_what_is_done(fresh, files) -> None:
    import comfy.model_management

    vae = fresh.run(graph(files[0])).outputs["vae"][0][0]
    whole = vae.first_stage_model.encode

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        latent = whole(*args, **kwargs)
        comfy.model_management.interrupt_current_processing()
        return latent

    vae.first_stage_model.encode = interrupted
    with pytest.raises(RunError):
        fresh.run(graph(*files[1:]))
    del vae.first_stage_model.encode
    status = again(fresh, graph(*files[1:])).status("e")
    assert [r["result"] for r in status["references"]] == ["hit", "miss"]
    assert status["conditioning"]["result"] == "miss"


def test_a_result_is_not_stored_when_the_vae_was_replaced_meanwhile(
    fresh, files, own_files
) -> None:
    mine = {"vae": loader("VAE", "my_vae.safetensors")}
    vae = fresh.run({**graph(files[0]), **mine}).outputs["vae"][0][0]
    whole = vae.first_stage_model.encode

    def replaced(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        os.utime(own_files["vae"])
        return whole(*args, **kwargs)

    vae.first_stage_model.encode = replaced
    run = fresh.run({**graph(files[1]), **mine})
    del vae.first_stage_model.encode
    kept = run.status("e")["references"][0]["kept"]
    assert kept.startswith("not stored: ")
    assert again(fresh, {**graph(files[1]), **mine}).status("e")["why"] == "new image 1"


def test_the_outputs_size_the_empty_latent_of_a_whole_edit(fresh, files) -> None:
    made = graph(files[2], reference_size="own size")
    made["unet"] = loader("DiffusionModel", "tiny_qwen_image.safetensors")
    made["latent"] = node("EmptySD3LatentImage", width=["e", 1], height=["e", 2], batch_size=1)
    both = {"positive": ["e", 0], "negative": ["e", 0], "latent_image": ["latent", 0]}
    steps = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    made["sampler"] = node("KSampler", model=["unet", 0], denoise=1.0, **both, **steps)
    made["decode"] = node("VAEDecode", samples=["sampler", 0], vae=["vae", 0])
    made["save"] = node("SaveImage", images=["decode", 0], filename_prefix="edit")
    first = fresh.run(made).outputs["decode"][0][0]
    assert first.shape[1:3] == (128, 32)
    run = again(fresh, made)
    assert "clip" not in run.executed and torch.equal(run.outputs["decode"][0][0], first)


# --------------------------------------------------------------------------------------- geometry
SIDES = st.integers(1, 16384)
CHOICES = st.sampled_from(["1 megapixel", "own size", "given"])


@given(width=SIDES, height=SIDES, wide=SIDES, high=SIDES, choice=CHOICES, first=st.booleans())
def test_sides_of_references(host, width, height, wide, high, choice, first) -> None:
    part = host.part("nodes.pictures")
    own, asked = part.Size(width, height), part.Size(wide, high)
    found = part.reference_size(own, choice, asked, first)
    step = 8 if choice == "1 megapixel" else 32
    assert all(side >= step and side % step == 0 for side in found)
    if choice == "own size":
        assert all(
            abs(a - b) <= 16 or (a, b < 16) == (32, True) for a, b in zip(found, own, strict=True)
        )
        assert found == part.reference_size(found, choice, asked, first)
    elif choice == "given" and first:
        assert found == part.aligned(asked)
    else:  # the shape is kept but for the rounding of each side
        pixels = 1 << 20 if step == 8 else part.aligned(asked).width * part.aligned(asked).height
        scale = (pixels / (width * height)) ** 0.5
        ideal = (width * scale, height * scale)
        assert all(
            abs(a - b) <= step / 2 + 1e-6 or a == step for a, b in zip(found, ideal, strict=True)
        )


@given(width=SIDES, height=SIDES)
def test_a_picture_of_the_given_shape_gets_the_given_size_first_or_not(host, width, height) -> None:
    part = host.part("nodes.pictures")
    size = part.aligned(part.Size(width, height))
    for first in (True, False):
        assert part.reference_size(size, "given", size, first) == size


@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    high=st.integers(1, 4),
    wide=st.integers(1, 4),
)
def test_the_cut_is_in_the_middle_and_as_large_as_can_be(host, height, width, high, wide) -> None:
    part = host.part("nodes.pictures")
    target = part.Size(wide * 32, high * 32)
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None, :].expand(height, width)
    kept = part.center_crop(torch.stack([rows, columns])[None], target)[0]
    assert kept.shape[1] == height or kept.shape[2] == width
    before = [int(kept[0].min()), int(kept[1].min())]
    after = [height - 1 - int(kept[0].max()), width - 1 - int(kept[1].max())]
    assert all(0 <= a - b <= 1 for a, b in zip(after, before, strict=True))
    ratio = (kept.shape[2] * high) / (kept.shape[1] * wide)
    assert abs(ratio - 1) <= max(1 / kept.shape[1], 1 / kept.shape[2]) or 1 in kept.shape[1:]


def test_pixels_that_fit_are_untouched_and_little_is_lost_otherwise(host) -> None:
    part = host.part("nodes.pictures")
    size = part.Size(96, 64)
    for choice in ("own size", "given"):
        (picture,) = part.pictures_of([noise(1, 64, 96, 3)], choice, size)
        result = part.resized(picture.pixels, picture.size, picture.how)
        assert picture.how == "untouched" and result.data_ptr() == picture.pixels.data_ptr()
    y, x = torch.meshgrid(torch.linspace(0, 1, 100), torch.linspace(0, 1, 150), indexing="ij")
    (picture,) = part.pictures_of([torch.stack([x, y, x * y], -1)[None]], "own size", size)
    assert picture.size == part.Size(160, 96)
    result = part.resized(picture.pixels, picture.size, picture.how)[0]
    centers = (torch.arange(160) + 0.5) * 150 / 160 - 0.5  # no shift: edge falls on edge
    inner = slice(4, -4)
    assert torch.allclose(result[48, inner, 0], (centers / 149)[inner], atol=1e-3)
    assert result.min() >= 0 and result.max() <= 1
