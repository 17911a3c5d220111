"""Every help page has an example of one line, the same in both languages, from demo/examples.py."""

from __future__ import annotations

import json

import pytest
from pack.demo.example_blocks import block_in, downloads, page
from pack.demo.examples import BY_MENU, EXAMPLES
from pack.tests.static.test_documentation import LANGUAGES, schemas

each_node = pytest.mark.parametrize("node_id", sorted(schemas()))


def block(node_id: str, language: str) -> str:
    """The line to be copied from a help page."""
    found = block_in(page(node_id, language).read_text(encoding="utf-8"), language)
    assert found, f"{node_id}, {language}: no example; see demo/example_blocks.py"
    return found[1]


def test_there_is_an_example_for_every_node_and_for_nothing_else() -> None:
    assert EXAMPLES.keys() == schemas().keys()
    assert EXAMPLES.keys() >= set(BY_MENU)


@each_node
def test_both_languages_have_the_same_line(node_id: str) -> None:
    english, chinese = (block(node_id, language) for language in LANGUAGES)
    assert english == chinese


@each_node
def test_the_line_is_a_workflow_with_the_nodes_of_the_example(node_id: str) -> None:
    workflow = json.loads(block(node_id, "en"))
    # Without one of these the editor pastes the last copied nodes instead.
    assert workflow["version"] and workflow["nodes"] and "extra" in workflow
    graph = EXAMPLES[node_id]
    nodes = {str(n["id"]): n["type"] for n in workflow["nodes"]}
    assert nodes == {i: n["class_type"] for i, n in graph.items()}
    assert (node_id in nodes.values()) is (node_id not in BY_MENU)
    assert len(nodes) <= 11


@each_node
def test_the_editor_can_download_every_model_file_of_the_line(node_id: str) -> None:
    for node in json.loads(block(node_id, "en"))["nodes"]:
        named = [v for v in node.get("widgets_values", []) if str(v).endswith(".safetensors")]
        offered = node["properties"].get("models", [])
        assert [model["name"] for model in offered] == named
        assert all(model == downloads()[model["name"]] for model in offered)
        assert all(model["url"].endswith("/" + model["name"]) for model in offered)
