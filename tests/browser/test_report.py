"""Memory Report in the real frontend: on a wire, with its picture and its line."""

from __future__ import annotations

from pack.tests.browser.editor import Editor

BUILD = """() => {
    app.graph.clear();
    const add = (type, x) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, 200];
        app.graph.add(node);
        return node;
    };
    const image = add('EmptyImage', 60), report = add('QwenVRAMReport', 400);
    const shown = add('PreviewImage', 900);
    report.setSize([400, 480]);
    image.connect(0, report, 0);
    report.connect(0, shown, 0);
    return [image, report, shown].map(node => Number(node.id));
}"""
TYPES = "(id) => app.graph.getNodeById(id).outputs.map(output => output.type)"
HELP = "async (name) => (await fetch(`/extensions/qwen-vram/docs/${name}`)).status"


def test_it_shows_the_map_on_a_wire_and_makes_nothing_run_again(editor: Editor) -> None:
    image, report, shown = editor.page.evaluate(BUILD)
    assert editor.page.evaluate(TYPES, report)[0] == "IMAGE"  # of what is connected
    ran = editor.run()
    assert ran.status == "execution_success" and ran.executed == {image, report, shown}
    width, height = editor.picture(report)
    assert width == 800 and height > 250
    editor.page.get_by_text("RAM: ").first.wait_for(state="attached")
    assert editor.run().executed == set()
    assert editor.page.evaluate(HELP, "memory_map.png") == 200
    assert editor.problems == []
