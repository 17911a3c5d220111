"""What ComfyUI demands of a node, for every node of the pack, asked of ComfyUI's own classes."""

from __future__ import annotations

import inspect

import pytest


@pytest.fixture(params=range(26))
def node(host, request):
    """Every node class of the loaded pack."""
    classes = host.part("nodes").NODES
    assert len(classes) == 28  # one more node: one more parameter above
    return classes[request.param]


def test_comfyui_lists_it_under_our_category(host, node) -> None:
    schema = node.GET_SCHEMA()
    assert host.nodes.NODE_CLASS_MAPPINGS[schema.node_id] is node
    assert schema.node_id.startswith("QwenVRAM") and schema.category.startswith("Qwen VRAM/")
    assert schema.display_name and schema.description and schema.search_aliases


def test_schema_inputs_are_the_parameters_of_execute_and_the_lazy_check(node) -> None:
    inputs = [i.id for i in node.GET_SCHEMA().inputs]
    parameters = inspect.signature(node.execute).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        assert sorted(parameters) == sorted(inputs)
    if "check_lazy_status" in vars(node):
        assert sorted(inspect.signature(node.check_lazy_status).parameters) == sorted(inputs)
    assert all(i.tooltip for i in node.GET_SCHEMA().inputs)


def test_defaults_are_among_the_choices(node) -> None:
    for kind in node.INPUT_TYPES().values():
        for name, spec in kind.items():
            options = spec[1].get("options") if len(spec) > 1 else None
            if options and "default" in spec[1]:
                assert spec[1]["default"] in options, name


def test_it_asks_for_nothing_that_would_spoil_cache_keys(node) -> None:
    if node.GET_SCHEMA().is_output_node:  # ComfyUI adds them itself, and nothing comes behind it
        return
    hidden = {h.value for h in node.GET_SCHEMA().hidden}
    writing = (
        "Qwen VRAM/sampling",
        "Qwen VRAM/tiles",
        "Qwen VRAM/speed",
    )  # they write the picture's metadata
    if node.GET_SCHEMA().category in writing:
        hidden -= {
            "EXTRA_PNGINFO"
        }  # which is no part of ComfyUI's keys; a seed bars them from ours
    assert not hidden & {"UNIQUE_ID", "PROMPT", "EXTRA_PNGINFO"}


def test_only_javascript_and_documents_are_served_from_the_web_directory(host) -> None:
    names = {path.suffix for path in (host.pack_root / "js").rglob("*") if path.is_file()}
    assert names <= {".js", ".md", ".png"}
