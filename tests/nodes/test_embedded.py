"""What only a model that draws can prove: the picture shows what was asked for, and stays so."""

from __future__ import annotations

import pytest
import torch
from pack.demo import classifier, figures
from pack.demo.animals import Scene
from pack.demo.edit_graph import edit_graph
from pack.demo.embedded import FOLDER, TRANSFORMER, VAE
from pack.tests.graphs import embedded_text_to_image, node
from PIL import Image

BEAR = Scene("bear", "brown", accessory="hat")
FOX = Scene("fox", "red", action="reading", background="beach")
TEXTS = {"一只戴帽子的小熊": BEAR, "a red fox reading a book on the beach": FOX}


def picture(run) -> torch.Tensor:
    """(3, H, W) in [-1, 1]."""
    return run.outputs["decode"][0][0][0].permute(2, 0, 1) * 2 - 1


@pytest.fixture(scope="module")
def judge() -> classifier.Classifier:
    return classifier.load()


def seen(judge, image: torch.Tensor) -> dict[str, object]:
    """What the classifier sees."""
    return classifier.seen(judge, image[None])[0]


def asked(scene: Scene) -> dict[str, object]:
    """What it should see."""
    return {name: getattr(scene, name) for name in classifier.HEADS}


@pytest.mark.parametrize("text", TEXTS)
def test_the_picture_shows_what_the_text_asks_for(host, judge, text) -> None:
    assert seen(judge, picture(host.run(embedded_text_to_image(text)))) == asked(TEXTS[text])


# Larger, and of either shape. demo/quality.py looks at more of them, and at the share of mistakes.
SIZES = ((240, 320), (512, 288))


@pytest.mark.parametrize("size", SIZES)
def test_it_does_so_at_other_sizes(host, judge, size) -> None:
    assert size in figures.OTHER_SIZES
    graph = embedded_text_to_image(
        "a red fox reading a book on the beach", width=size[0], height=size[1]
    )
    image = picture(host.run(graph))
    assert image.shape[1:] == size[::-1]
    found = seen(judge, image)
    # Above 384x384 the animal itself is often wrong; demo/README.md has the shares.
    certain = {"colour": "red", "action": "reading", "background": "beach"}
    if max(size) <= 384:
        certain["animal"] = "fox"
    assert {k: found[k] for k in certain} == certain


def test_a_cached_prompt_draws_the_same_picture_and_another_prompt_another(fresh, judge) -> None:
    graph = embedded_text_to_image("a purple cat")
    first = picture(fresh.run(graph))
    fresh.restart()
    again = fresh.run(graph)
    assert "hit" in again.status("positive")["text"]
    assert torch.equal(picture(again), first)
    other = picture(fresh.run(embedded_text_to_image("a purple dog")))
    assert [seen(judge, image)["animal"] for image in (first, other)] == ["cat", "dog"]


def test_image_to_image_keeps_the_scene_and_changes_the_colour(host, judge) -> None:
    image = figures.drawn(Scene("cat", "orange", background="meadow", jitter=3))
    Image.fromarray(image).save(host.base / "input" / "cat.png")
    graph = embedded_text_to_image("a yellow cat in a meadow")
    graph["given"] = node("LoadImage", image="cat.png")
    graph["latent"] = node("VAEEncode", pixels=["given", 0], vae=["vae", 0])
    graph["sampler"]["inputs"]["denoise"] = 0.7
    found = seen(judge, picture(host.run(graph)))
    shown = (found["animal"], found["colour"], found["background"])
    assert shown == ("cat", "yellow", "meadow")


def test_a_lora_changes_the_picture_and_its_absence_restores_it(fresh) -> None:
    graph = embedded_text_to_image("purple cat")
    graph["sampler"]["inputs"]["steps"] = 2
    plain = picture(fresh.run(graph))
    graph["lora"] = node(
        "LoraLoaderModelOnly",
        model=["unet", 0],
        lora_name="tiny_animals_lora.safetensors",
        strength_model=1.0,
    )
    graph["shift"]["inputs"]["model"] = ["lora", 0]
    changed = picture(fresh.run(graph))
    assert (changed - plain).abs().mean() > 0.01
    graph["lora"]["inputs"]["strength_model"] = 0.0
    assert torch.equal(picture(fresh.run(graph)), plain)


@pytest.mark.parametrize(
    ("instruction", "change"),
    [
        ("make it blue", {"colour": "blue"}),
        ("把背景换成夜晚", {"background": "night"}),
        ("remove the watermark", {"watermark": False}),
        ("keep it as it is", {}),
    ],
)
def test_an_edit_changes_what_is_asked_and_nothing_else(host, judge, instruction, change) -> None:
    before = Scene("pig", "pink", background="snow", watermark="watermark" in change, jitter=5)
    Image.fromarray(figures.drawn(before)).save(host.base / "input" / "pig.png")
    run = host.run(edit_graph("pig.png", instruction))
    assert seen(judge, picture(run)) == {**asked(before), **change}


def test_what_is_in_the_repository_stays_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {p.name for p in files} >= {p.rpartition("/")[2] for p in (TRANSFORMER, VAE)}
    assert sum(path.stat().st_size for path in files) <= 10_000_000
