"""What is freed: requests that are read, and models that are chosen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core.clearing import (
    KINDS,
    LEVELS,
    NEEDED,
    NOT_CHOSEN,
    UNKNOWN,
    Model,
    Wish,
    freed,
    is_named,
    names_in,
    why_kept,
    wish_of,
)

SOME = {"1": {"class_type": "VAELoader", "inputs": {"vae_name": "a.safetensors"}}}
names = st.text(st.characters(exclude_characters="/\\\0", codec="utf-8"), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("fields", "wish"),
    [
        ({"level": "cache"}, Wish("cache")),
        ({"level": "everything", "wait_seconds": 0}, Wish("everything")),
        ({"level": "models"}, Wish("models", frozenset(KINDS))),
        ({"level": "models", "kinds": ["VAE"]}, Wish("models", frozenset({"VAE"}))),
        (
            {"level": "models", "keep_needed": True, "prompt": SOME},
            Wish("models", keep_needed=True),
        ),
        ({"level": "models", "keep_needed": False}, Wish("models")),
    ],
)
def test_a_request_is_read(fields: dict[str, Any], wish: Wish) -> None:
    assert wish_of(fields) == wish


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "level must be cache, models or everything."),
        ({"level": "all"}, "level must be"),
        ({"level": "cache", "kinds": ["VAE"]}, "kinds belongs to the level models"),
        ({"level": "everything", "keep_needed": True}, "keep_needed belongs to"),
        ({"level": "models", "kinds": []}, "kinds must be a list of one or more of: diffusion"),
        ({"level": "models", "kinds": ["vae"]}, "kinds must be"),
        ({"level": "models", "kinds": [{}]}, "kinds must be"),
        ({"level": "models", "keep_needed": True}, "send it as prompt"),
        ({"level": "cache", "wait_seconds": -1}, "wait_seconds must be a number from 0 to 600."),
        ({"level": "cache", "wait_seconds": 1e9}, "wait_seconds must be"),
    ],
)
def test_a_request_that_makes_no_sense_gets_a_sentence(fields, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        wish_of(fields)


@given(st.lists(names, min_size=1, max_size=5), st.integers(1, 5), st.booleans(), st.booleans())
def test_a_file_is_recognised_however_its_folder_is_written(
    parts: list[str], count: int, path_windows: bool, name_windows: bool
) -> None:
    path = ("C:\\" if path_windows else "/") + ("\\" if path_windows else "/").join(parts)
    name = ("\\" if name_windows else "/").join(parts[-count:])
    prompt = {"1": {"class_type": "L", "inputs": {"some": [{"deep": name}], "link": ["2", 0]}}}
    assert is_named(path, names_in(prompt))


def test_a_file_is_not_recognised_by_half_a_name() -> None:
    prompt = {"1": {"inputs": {"a": "image.safetensors", "b": "other/qwen.sft", "c": "models"}}}
    for path in ("/models/vae/qwen_image.safetensors", "/models/vae/qwen.sft", "/models/vae/x"):
        assert not is_named(path, names_in(prompt))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/vae_approx/taesd_encoder.safetensors", "taesd"),
        ("/models/vae_approx/taesdxl_decoder.pth", "taesdxl"),
        ("/models/vae_approx/own/taef1_decoder.safetensors", "own/taef1"),
        ("/models/diffusers/sdxl/unet/diffusion_pytorch_model.fp16.safetensors", "sdxl"),
        ("C:\\models\\diffusers\\my\\SDXL\\text_encoder_2\\model.safetensors", "my\\SDXL"),
    ],
)
def test_loaders_that_name_no_file_are_understood(path: str, name: str) -> None:
    assert is_named(path, names_in({"1": {"inputs": {"a": name}}}))
    for other in ("tae", "encoder", "unet", "vae_approx", "text_encoder_2", "another"):
        assert not is_named(path, names_in({"1": {"inputs": {"a": other}}}))


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.just({"inputs": 3})))
def test_no_prompt_is_too_strange_to_be_read(prompt: dict[str, Any]) -> None:
    assert "" not in names_in(prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_chosen_by_kind_and_need(kind: str) -> None:
    model = Model("a", kind, "cuda:0", 1, ("/models/vae/a.safetensors",))
    others = frozenset(KINDS) - {kind}
    assert why_kept(model, Wish("models"), ()) == ""
    assert why_kept(model, Wish("models", frozenset({kind})), ()) == ""
    assert why_kept(model, Wish("models", others), ()) == NOT_CHOSEN
    assert why_kept(model, Wish("cache"), ()) == NOT_CHOSEN
    keeping = Wish("models", keep_needed=True)
    assert why_kept(model, keeping, names_in(SOME)) == NEEDED
    assert why_kept(model, keeping, {"b.safetensors"}) == ""
    assert why_kept(model._replace(files=()), keeping, {"b.safetensors"}) == UNKNOWN
    assert why_kept(model._replace(files=()), Wish("models"), ()) == ""


figures = st.lists(st.none() | st.integers(0, 1 << 40), min_size=3, max_size=3)


@given(figures, figures)
def test_the_first_figure_that_was_measured_twice_counts(before, after) -> None:
    both = [(a, b) for a, b in zip(before, after, strict=True) if None not in (a, b)]
    assert freed(before, after) == (both[0][0] - both[0][1] if both else None)


def test_levels_are_those_of_the_interface() -> None:
    assert LEVELS == ("cache", "models", "everything")
