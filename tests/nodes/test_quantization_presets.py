"""The user's own presets stand beside the pack's; a broken file is named when a loader asks."""

from __future__ import annotations

import importlib
import json
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from pack.tests.graphs import UNET, loader, node
from pack.tests.host import Host, RunError

KIND = "diffusion_models"
MINE = {KIND: {"mine": {"title": "all", "rules": [["*", "main"]]}}}


@pytest.fixture
def presets(host: Host) -> types.ModuleType:
    """The module of the loaded pack."""
    return importlib.import_module(f"{host.pack.__name__}.nodes.quantization_presets")


@pytest.fixture
def file(host: Host, presets) -> Iterator[Path]:
    """The user's file, its folder made and nothing in it yet."""
    path = presets.user_file()
    assert path.is_relative_to(host.folder_paths.get_user_directory())
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def test_without_a_file_there_are_ours(presets, file) -> None:
    assert {"balanced", "smallest"} <= presets.all_presets()[KIND].keys()
    assert presets.preset(KIND, "balanced") == presets.all_presets()[KIND]["balanced"]


def test_the_users_are_added_and_an_edit_counts_at_once(presets, file) -> None:
    ours = list(presets.all_presets()[KIND])
    file.write_text(json.dumps(MINE))
    assert list(presets.all_presets()[KIND]) == [*ours, "mine"]
    assert presets.all_presets()["text_encoders"].keys() == {"balanced", "smallest"}
    first = presets.preset(KIND, "mine")
    assert first.format_of("img_in", "int8") == "int8"
    kept = {KIND: {"mine": {"rules": [["img_in", "keep"]]}}}
    file.write_text(json.dumps(kept))
    assert presets.preset(KIND, "mine") != first


def test_a_byte_order_mark_does_no_harm(presets, file) -> None:
    file.write_text(json.dumps(MINE), encoding="utf-8-sig")  # as editors of Windows write
    assert presets.preset(KIND, "mine").name == "mine"


def test_one_of_ours_can_be_replaced(presets, file) -> None:
    file.write_text(json.dumps({KIND: {"balanced": {"rules": [["*", "keep"]]}}}))
    assert presets.preset(KIND, "balanced").format_of("transformer_blocks.0.img_mod.1", "int8") == (
        "keep"
    )


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"diffusion_models": {"mine": {}}}'])
def test_a_broken_file_leaves_ours_in_the_list_and_stops_the_loader(presets, file, content) -> None:
    ours = presets.all_presets()
    file.write_bytes(content)
    assert presets.all_presets() == ours
    with pytest.raises(ValueError) as caught:
        presets.preset(KIND, "balanced")
    assert str(file) in str(caught.value) and str(caught.value).endswith(".")


def test_a_folder_in_its_place_is_named_too(presets, file) -> None:
    file.mkdir()
    try:
        with pytest.raises(ValueError, match="cannot be read"):
            presets.preset(KIND, "balanced")
        assert "balanced" in presets.all_presets()[KIND]
    finally:
        file.rmdir()


def test_a_preset_that_is_gone_is_named_with_those_that_are_there(presets, file) -> None:
    with pytest.raises(ValueError, match="no preset mine; choose balanced, ") as caught:
        presets.preset(KIND, "mine")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("nothing", ["", None])
def test_no_preset_at_all_is_asked_for(fresh, presets, nothing) -> None:
    with pytest.raises(ValueError, match=r"^No preset is chosen; choose balanced, .*best\.$"):
        presets.preset(KIND, nothing)
    with pytest.raises(RunError, match="No preset is chosen"):
        layers(fresh, weight_dtype="int8", preset=nothing)


def test_a_broken_file_is_reported_once_in_the_log(presets, file, caplog) -> None:
    file.write_text('{"once": 1}')
    for _ in range(3):
        presets.all_presets()
    assert sum("once is no kind" in r.message for r in caplog.records) == 1


def layers(host: Host, **options: str) -> str:
    """The status of a loader that runs with these inputs."""
    graph = {"unet": loader("DiffusionModel", UNET, **options)}
    graph["out"] = node("PreviewAny", source=["unet", 0])
    return host.run(graph).status("unet")["text"]


def test_a_loader_takes_the_users_preset_and_names_a_file_that_broke(fresh, presets, file) -> None:
    rules = [["*.to_q", "main"], ["*.to_k", "8 bit"], ["*", "keep"]]
    file.write_text(json.dumps({KIND: {"mine": {"rules": rules}}}))
    mine = {"weight_dtype": "bnb_nf4", "preset": "mine"}
    said = layers(fresh, **mine)
    assert "bnb_nf4" in said and "bnb_int8" in said
    file.write_text(file.read_text().replace("8 bit", "16 bit"))
    with pytest.raises(RunError, match="16 bit is no format") as caught:
        layers(fresh, **mine)
    assert str(file) in str(caught.value)
    assert "bnb" not in layers(fresh, weight_dtype="default", preset="mine")  # asks for no preset
