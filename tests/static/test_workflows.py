"""What can be said about the bundled workflows without a host."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from pack.tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))
FOR_THE_DEMO = sorted((ROOT / "demo" / "workflows").glob("*.json"))
STOCK_NODES = {
    "CFGNorm",
    "ComfySwitchNode",
    "EmptySD3LatentImage",
    "ImageScale",
    "ImageScaleToTotalPixels",
    "KSampler",
    "LoadImage",
    "LoraLoaderModelOnly",
    "MarkdownNote",
    "MaskPreview",
    "ModelSamplingAuraFlow",
    "PreviewAny",
    "PreviewImage",
    "PrimitiveBoolean",
    "PrimitiveFloat",
    "PrimitiveInt",
    "PrimitiveStringMultiline",
    "SaveImage",
    "VAEDecode",
}
LOADERS = ("QwenVRAMLoadDiffusionModel", "QwenVRAMLoadTextEncoder", "QwenVRAMLoadVAE")
MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
MODEL_FOLDERS = {"diffusion_models", "text_encoders", "vae", "loras"}
ABSOLUTE_PATH = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\\\\)|/(home|Users|root|workspace)/")
THUMBNAIL_BYTES = 80_000
TITLE_HEIGHT = 30
Box = tuple[float, float, float, float]
# ComfyUI draws no text where it would be smaller than 8 of its 14 px: a scale of 0.571.
READABLE, WINDOW = 0.58, (1600, 950)

CARDS = ("6", "8", "12", "16", "24")  # GB
TITLE = re.compile(r"(?P<title>.+) · (?P<cards>\d+((, |、)\d+)*) GB")
HAN = re.compile("[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def stem(path: Path) -> str:
    """A file's name without its ending."""
    return path.stem


each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=stem)
each_graph = pytest.mark.parametrize("path", [*WORKFLOWS, *SUBGRAPHS], ids=stem)
each_with_notes = pytest.mark.parametrize("path", [*WORKFLOWS, *FOR_THE_DEMO], ids=stem)


def load(path: Path) -> dict[str, Any]:
    """A workflow file."""
    return json.loads(path.read_text(encoding="utf-8"))


def nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes of a workflow and of its subgraphs, without those that stand for a subgraph."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    ids = {graph["id"] for graph in subgraphs}
    every = [node for graph in (workflow, *subgraphs) for node in graph["nodes"]]
    return [node for node in every if node["type"] not in ids]


def notes(workflow: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and text of every note, in the order of the file."""
    found = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    return [(note["title"], note["widgets_values"][0]) for note in found]


def table(text: str) -> list[list[str]]:
    """The rows of the table in a note."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if "---" not in row[0]]


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


@functools.cache
def our_nodes() -> set[str]:
    """The node ids in the schemas of the pack, read from the source."""
    return {
        keyword.value.value
        for file in (ROOT / "nodes").glob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
    }


def test_there_are_workflows() -> None:
    assert WORKFLOWS


@each_graph
def test_every_node_is_known(path: Path) -> None:
    assert {n["type"] for n in nodes(load(path))} <= our_nodes() | STOCK_NODES


@each_workflow
def test_it_has_a_thumbnail(path: Path) -> None:
    picture = path.with_suffix(".jpg").read_bytes()
    assert picture[:3] == b"\xff\xd8\xff", "not a JPEG"
    assert len(picture) < THUMBNAIL_BYTES


@each_graph
def test_it_contains_no_absolute_path(path: Path) -> None:
    assert [s for s in strings(load(path)) if ABSOLUTE_PATH.search(s)] == []


@each_graph
def test_every_model_file_has_a_link(path: Path) -> None:
    named = 0
    for node in nodes(load(path)):
        links = {model["name"]: model for model in node["properties"].get("models", [])}
        for value in strings(node.get("widgets_values", [])):
            # A note names files in sentences; a widget holds the name and nothing else.
            if "\n" in value or not value.endswith(MODEL_SUFFIXES):
                continue
            named += 1
            assert value in links, f"node {node['id']} ({node['type']}) has no link for {value}"
            assert re.fullmatch(rf"https://\S+/{re.escape(value)}", links[value]["url"])
            assert links[value]["directory"] in MODEL_FOLDERS
    assert named


def test_the_graphs_load_a_file_in_one_way_a_plain_fp8_diffusion_model_by_auto() -> None:
    """Else it lies in memory twice. In plain fp8 auto adds LoRAs while it computes."""
    ways: dict[str, set[tuple[Any, ...]]] = {}
    for path in [*WORKFLOWS, *SUBGRAPHS]:
        for node in nodes(load(path)):
            if node["type"] in LOADERS:
                file, *options = node["widgets_values"]
                ways.setdefault(file, set()).add(tuple(options))
    assert len(ways) == 4 and {file for file, found in ways.items() if len(found) > 1} == set()
    auto = {file for file, found in ways.items() if any(way[0] == "auto" for way in found)}
    assert auto == {file for file in ways if "_fp8_e4m3fn" in file}


def apart(one: Box, other: Box) -> bool:
    """Whether two boxes have no point in common."""
    (x, y, width, height), (x2, y2, width2, height2) = one, other
    return x >= x2 + width2 or x2 >= x + width or y >= y2 + height2 or y2 >= y + height


def within(one: Box, other: Box) -> bool:
    """Whether the first box lies inside the second."""
    (x, y, width, height), (x2, y2, width2, height2) = one, other
    return x >= x2 and y >= y2 and x + width <= x2 + width2 and y + height <= y2 + height2


@each_workflow
def test_nothing_overlaps(path: Path) -> None:
    workflow = load(path)
    groups = [tuple(group["bounding"]) for group in workflow["groups"]]
    cards = [
        (n["pos"][0], n["pos"][1] - TITLE_HEIGHT, n["size"][0], n["size"][1] + TITLE_HEIGHT)
        for n in workflow["nodes"]
    ]
    assert all(apart(a, b) for boxes in (groups, cards) for a, b in combinations(boxes, 2))
    assert all(apart(c, g) or within(c, g) for c, g in product(cards, groups))


@each_with_notes
def test_it_opens_where_its_note_and_first_group_can_be_read(path: Path) -> None:
    workflow = load(path)
    scale, (left, top) = (workflow["extra"]["ds"][key] for key in ("scale", "offset"))
    assert scale >= READABLE
    note = next(n for n in workflow["nodes"] if n["type"] == "MarkdownNote")
    for x, y, width, height in ([*note["pos"], *note["size"]], workflow["groups"][0]["bounding"]):
        seen = min(y + height, y + 400)  # a tall group goes on below
        assert (x + left) * scale > 0 and (y + top) * scale > 0
        assert (x + width + left) * scale < WINDOW[0] and (seen + top) * scale < WINDOW[1]


# ----------------------------------------------------------------------------------------- words
@each_with_notes
def test_titles_are_in_both_languages(path: Path) -> None:
    workflow = load(path)
    given = [group["title"] for group in workflow["groups"]]
    given += [n["title"] for n in workflow["nodes"] if n["type"] != "MarkdownNote" and "title" in n]
    assert [title for title in given if not HAN.search(title)] == []


@each_workflow
def test_its_title_names_the_cards_in_both_languages(path: Path) -> None:
    (title, text), (chinese_title, chinese) = notes(load(path))[:2]
    named, named_in_chinese = TITLE.fullmatch(title), TITLE.fullmatch(chinese_title)
    assert named and named_in_chinese
    cards = NUMBER.findall(named["cards"])
    assert NUMBER.findall(named_in_chinese["cards"]) == cards
    assert set(cards) <= set(CARDS) and cards == sorted(cards, key=int)
    assert text.startswith(f"# {title}\n") and chinese.startswith(f"# {chinese_title}\n")
    assert HAN.search(chinese_title) and not HAN.search(title)


@each_workflow
def test_its_table_says_what_to_set_for_every_card_and_for_little_ram(path: Path) -> None:
    (_, text), (_, chinese) = notes(load(path))[:2]
    english, other = table(text), table(chinese)
    assert (english[0][0], other[0][0]) == ("Your card", "你的显卡")
    rows = [row[0] for row in english[1:]]
    assert sorted(n for row in rows[:-1] for n in NUMBER.findall(row)) == sorted(CARDS)
    assert rows[-1] == "16 GB of RAM"
    assert [NUMBER.findall(row[0]) for row in english] == [NUMBER.findall(row[0]) for row in other]


def test_together_they_are_for_every_card() -> None:
    titles = [TITLE.fullmatch(notes(load(path))[0][0]) for path in WORKFLOWS]
    assert {card for title in titles for card in NUMBER.findall(title["cards"])} == set(CARDS)


@each_with_notes
def test_its_notes_are_in_english_and_chinese_and_tell_the_same_figures(path: Path) -> None:
    both = [note for note in notes(load(path)) if note[0] != "Files · 文件"]  # is in both
    assert len(both) >= 2 and len(both) % 2 == 0
    for (title, text), (chinese_title, chinese) in zip(both[::2], both[1::2], strict=True):
        assert not HAN.search(title) and HAN.search(chinese_title)
        assert len(HAN.findall(chinese)) > len(text) / 8
        rows = zip(table(text), table(chinese), strict=True)
        for row, other in rows:
            assert sorted(NUMBER.findall(row[1])) == sorted(NUMBER.findall(other[1]))


# -------------------------------------------------------------------------------------- subgraphs
def test_there_are_subgraphs() -> None:
    assert {path.stem for path in SUBGRAPHS} == {"Cute animal", "Qwen edit", "Qwen text to image"}


@pytest.mark.parametrize("path", SUBGRAPHS, ids=stem)
def test_a_subgraph_is_one_node_that_shows_what_is_to_be_set(path: Path) -> None:
    workflow = load(path)
    (node,), (inside,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["type"] == inside["id"] and node["title"] == inside["name"] == path.stem
    assert inside["category"] == "Qwen VRAM" and HAN.search(inside["description"])
    assert "IMAGE" in [output["type"] for output in inside["outputs"]]
    shown = {slot["name"] for slot in inside["inputs"]}
    assert {"unet_name", "weight_dtype", "clip_name", "vae_name", "lora_name", "seed"} <= shown
    named = {
        slot["name"]: slot.get("label", "") for slot in inside["inputs"] if slot["type"] != "IMAGE"
    }
    assert [name for name, label in named.items() if not HAN.search(label)] == []
    (loader,) = (n for n in inside["nodes"] if n["type"] == LOADERS[0])
    outside, within_it = (n["widgets_values_named"]["weight_dtype"] for n in (node, loader))
    assert outside == within_it
    links = {link["id"]: link for link in inside["links"]}
    types = {n["id"]: n["type"] for n in inside["nodes"]}
    for slot in inside["inputs"]:
        assert {links[link]["origin_id"] for link in slot["linkIds"]} == {-10}
        assert all(links[link]["target_id"] in types for link in slot["linkIds"])
