"""Early Exit in the real frontend: its curve on the node, long after the node itself has run."""

from __future__ import annotations

from typing import Any

import pytest
from pack.tests.browser.editor import Editor
from pack.tests.browser.test_workflow import STATUS
from pack.tests.graphs import node, text_to_image

LOAD = "graph => app.loadApiJson(graph, 'test')"
# As a user does who looks at another workflow meanwhile.
AWAY = "() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')"
BACK = """async () => {
    await app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow');
    return app.graph.nodes.length;
}"""
SOURCE = "(id) => app.graph.getNodeById(id).imgs?.[0]?.src ?? ''"
OTHER = "([id, src]) => (app.graph.getNodeById(id).imgs?.[0]?.src ?? src) !== src"
SIZE = "(id) => { const n = app.graph.getNodeById(id); n.setSize([380, 640]); n.pos = [60, 80]; }"


@pytest.fixture
def graph() -> tuple[dict[str, Any], dict[str, int]]:
    """A picture in 9 steps with our node before the sampler, and the nodes' numbers by name."""
    named = text_to_image(steps=9)
    asked = {"threshold": 100.0, "patience": 3, "min_steps": 4, "keep_last_step": True}
    named["exit"] = node("QwenVRAMEarlyExit", model=["shift", 0], **asked)
    named["sampler"]["inputs"]["model"] = ["exit", 0]
    numbers = {name: number for number, name in enumerate(named, 1)}
    for item in named.values():
        for name, value in item["inputs"].items():
            if isinstance(value, list):
                item["inputs"][name] = [str(numbers[value[0]]), value[1]]
    return {str(numbers[name]): item for name, item in named.items()}, numbers


def test_the_curve_is_on_the_node_after_each_run_and_after_a_look_at_another_workflow(
    editor: Editor, graph: tuple[dict[str, Any], dict[str, int]]
) -> None:
    prompt, numbers = graph
    page, own, sampler = editor.page, numbers["exit"], numbers["sampler"]
    page.evaluate(LOAD, prompt)
    page.evaluate(SIZE, own)
    ran = editor.run()
    assert ran.status == "execution_success" and own in ran.executed, ran.detail
    assert editor.picture(own) == [640, 690]
    line = "stopped after step 4 of 9 and the last one · steps saved: 4 · change "
    assert editor.widgets(own)[STATUS].startswith(line)

    first = page.evaluate(SOURCE, own)
    editor.set_widgets({str(sampler): {"seed": 2}})
    ran = editor.run()
    assert ran.status == "execution_success" and own in ran.cached  # only the sampler ran
    page.wait_for_function(OTHER, arg=[own, first], timeout=20_000)
    assert editor.widgets(own)[STATUS].startswith(line)

    page.evaluate(AWAY)
    assert page.evaluate(BACK) == len(prompt)
    assert editor.picture(own) == [640, 690]
    assert editor.problems == []
