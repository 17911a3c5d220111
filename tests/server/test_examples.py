"""The examples of the help pages are current, and run on the embedded model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pack.demo.conversion import to_api
from pack.demo.example_blocks import block_in, complete, page, to_workflow
from pack.demo.examples import EXAMPLES
from pack.demo.server import Server
from pack.demo.substitutions import substitute

SMALL = {"steps": 2, "reference_size": "own size", "scale_by": 1.0}


@pytest.fixture(scope="module")
def info(server: Server) -> dict[str, Any]:
    """What the host says about every node."""
    return server.get_json("/object_info")


def different() -> list[str]:
    """One node for each graph that several pages share."""
    return list({json.dumps(graph): node_id for node_id, graph in EXAMPLES.items()}.values())


def small(graph: dict[str, Any]) -> dict[str, Any]:
    """Tiny files, sizes and steps in place of the official ones."""
    graph = substitute(graph)
    for node in graph.values():
        node["inputs"] |= {k: v for k, v in SMALL.items() if k in node["inputs"]}
    return graph


@pytest.mark.parametrize("node_id", EXAMPLES)
def test_the_page_has_what_the_source_says(node_id: str, info: dict[str, Any]) -> None:
    found = block_in(page(node_id, "en").read_text(encoding="utf-8"), "en")
    assert found and json.loads(found[1]) == to_workflow(EXAMPLES[node_id], info), (
        "run `python -m demo pictures examples` to write the examples into the help pages"
    )


@pytest.mark.parametrize("node_id", different())
def test_it_runs(node_id: str, info: dict[str, Any], server: Server) -> None:
    graph = to_api(to_workflow(EXAMPLES[node_id], info), info)
    assert graph == {
        i: {**graph[i], **node} for i, node in complete(EXAMPLES[node_id], info).items()
    }
    result = server.submit(small(graph))
    assert result.status == "success", result.error
    # A text encoder does not run where the prompt cache knows the text from the graph before.
    spared = {i for i, n in graph.items() if n["class_type"] == "QwenVRAMLoadTextEncoder"}
    assert graph.keys() - spared <= {*result.executed, *result.cached}
