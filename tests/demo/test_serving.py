"""The workflows that `make run` offers, looked at without a host."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pack.demo import embedded, serving
from pack.demo.edit_graph import edit_graph
from pack.demo.progress import table
from pack.demo.server import Result, free_port
from pack.tests.conftest import ROOT
from pack.tests.static import test_workflows as bundled

OFFERED = sorted(serving.WORKFLOWS.glob("*.json"))
SWITCH = ("LoraLoaderModelOnly", "PrimitiveBoolean", "PrimitiveInt", "PrimitiveFloat")
SWITCH += ("ComfySwitchNode",)
NOTE = "MarkdownNote"
SPEED = {"QwenVRAMReferenceCache", "QwenVRAMAttention", "QwenVRAMEarlyExit"}

each_workflow = pytest.mark.parametrize("path", OFFERED, ids=lambda path: path.stem)


def types(path: Path) -> Counter[str]:
    """How many nodes of each type there are."""
    return Counter(node["type"] for node in bundled.nodes(bundled.load(path)))


def test_the_workflows_for_editing_find_the_picture_they_begin_with(tmp_path: Path) -> None:
    comfyui, base = tmp_path / "ComfyUI", tmp_path / "base"
    for folder in (comfyui, base):
        (folder / "input").mkdir(parents=True)
    serving.copy_example(comfyui, base)
    assert not list((base / "input").iterdir())
    (comfyui / "input" / "example.png").write_bytes(b"picture")
    serving.copy_example(comfyui, base)
    assert (base / "input" / "example.png").read_bytes() == b"picture"
    edit = bundled.load(ROOT / "workflows" / "qwen_image_edit_2511.json")
    assert "example.png" in list(bundled.strings(edit))


def test_it_offers_those_that_it_names() -> None:
    assert {path.stem for path in OFFERED} == {serving.OPENED, *serving.OTHERS}


@each_workflow
def test_it_is_laid_out_like_the_bundled_ones(path: Path) -> None:
    bundled.test_nothing_overlaps(path)
    bundled.test_it_contains_no_absolute_path(path)


@each_workflow
def test_it_names_the_embedded_model_and_no_download(path: Path) -> None:
    files = {Path(name).name for name in embedded.FILES}
    texts = list(bundled.strings(json.loads(path.read_text(encoding="utf-8"))))
    named = {text for text in texts if text.endswith(bundled.MODEL_SUFFIXES)}
    assert named == files - {embedded.CLASSIFIER}
    assert not [text for text in texts if "http" in text]


def test_drawing_is_the_bundled_workflow_without_its_switch() -> None:
    whole = types(ROOT / "workflows" / "qwen_image_2512.json")
    drawing = types(serving.WORKFLOWS / f"{serving.OPENED}.json")
    del whole[NOTE], drawing[NOTE]
    assert drawing == Counter({t: n for t, n in whole.items() if t not in SWITCH})


def test_drawing_for_children_is_the_bundled_workflow_without_its_switch() -> None:
    whole = types(ROOT / "workflows" / "cute_animal_for_kids.json")
    drawing = types(serving.WORKFLOWS / "cute_animal_for_kids_tiny.json")
    del whole[NOTE], drawing[NOTE]
    assert drawing == Counter({t: n for t, n in whole.items() if t not in SWITCH})


def test_the_faster_edit_has_the_speed_nodes_of_the_bundled_one_and_steps_to_save() -> None:
    whole = bundled.load(ROOT / "workflows" / "qwen_image_edit_fast.json")
    tiny = bundled.load(serving.WORKFLOWS / "qwen_image_edit_fast_tiny.json")

    def settings(workflow: dict[str, Any]) -> dict[str, list[Any]]:
        return {n["type"]: n["widgets_values"] for n in workflow["nodes"] if n["type"] in SPEED}

    assert settings(tiny) == settings(whole)
    assert settings(tiny).keys() == SPEED
    left_out = {*SWITCH, "CFGNorm", "ImageScaleToTotalPixels"}
    assert {n["type"] for n in tiny["nodes"]} == {n["type"] for n in whole["nodes"]} - left_out
    (sampler,) = (n for n in tiny["nodes"] if n["type"] == "QwenVRAMSampler")
    assert sampler["widgets_values_named"]["steps"] == 20


def test_offering_puts_them_into_the_panel_and_the_templates(tmp_path: Path) -> None:
    for _ in range(2):  # as every start does
        serving.offer_workflows(tmp_path)
    for folder in ("user/default/workflows", f"custom_nodes/{serving.TEMPLATES}/workflows"):
        copies = sorted((tmp_path / folder).iterdir())
        assert [c.read_bytes() for c in copies] == [path.read_bytes() for path in OFFERED]
    for name in serving.OTHERS:
        editing = bundled.load(serving.WORKFLOWS / f"{name}.json")
        for loader in (node for node in editing["nodes"] if node["type"] == "LoadImage"):
            assert (tmp_path / "input" / loader["widgets_values"][0]).is_file()


def test_another_one_on_the_same_folder_is_found(tmp_path: Path) -> None:
    told = {"folder": str(tmp_path / "user" / "__qwen_vram" / "conditioning")}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        port = other.server_port
        assert serving.running(tmp_path, port) == f"http://127.0.0.1:{port}"
        assert serving.running(tmp_path / "elsewhere", port) is None
        told.clear()  # another program
        assert serving.running(tmp_path, port) is None
        other.shutdown()
    assert serving.running(tmp_path, free_port()) is None


def test_the_table_names_nodes_as_the_editor_does_and_folds_what_did_not_run() -> None:
    path = ROOT / "locales" / "en" / "nodeDefs.json"
    names = json.loads(path.read_text(encoding="utf-8"))
    graph = edit_graph("a.png", "text")
    for node in graph.values():
        if node["class_type"] in names:
            assert node["_meta"]["title"] == names[node["class_type"]]["display_name"]
    ran = Result("p", executed=["picture", "save"], seconds={"picture": 0.5, "save": 0.1})
    lines = table(graph, ran).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["Load", "Save", "not"]
    assert lines[-1].startswith("  not run: Load Diffusion Model (Qwen VRAM), Load Text Encoder")
