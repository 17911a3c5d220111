"""The identity of an upstream graph: blind to ids, awake to everything else."""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core.file_identity import MAX_FILES_IN_DIRECTORY, FileIdentity, identify
from pack.core.graph_identity import (
    MAX_NODES,
    ClassFacts,
    Host,
    LoadedFiles,
    NotCacheable,
    digest,
    identify_upstream,
    source_digest,
)

Graph = dict[str, dict[str, Any]]


def host(graph: Graph, files: dict[str, FileIdentity] | None = None, **facts: ClassFacts) -> Host:
    """A host that knows this graph, these files, and one package."""
    known = files or {}
    return Host(
        graph.__getitem__,
        lambda _, node: facts.get(node["class_type"], ClassFacts("pack")),
        lambda text: [known[text]] if text in known else [],
    )


def sha(graph: Graph, link: list = ["n1", 0], **options: Any) -> str:  # noqa: B006
    """The identity as one digest."""
    identity = identify_upstream(link, host(graph, **options))
    return digest(identity.nodes, [[f.path, f.size, f.mtime_ns] for f in identity.files])


LORA_CHAIN: Graph = {
    "n1": {"class_type": "Lora", "inputs": {"clip": ["n2", 0], "name": "l", "strength": 1.0}},
    "n2": {"class_type": "Switch", "inputs": {"on": True, "a": ["n3", 0], "b": ["n3", 1]}},
    "n3": {"class_type": "Load", "inputs": {"file": "f", "options": {"x": [1, 2]}}},
}


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A random acyclic graph whose first node is n0."""
    count = draw(st.integers(1, 7))
    graph: Graph = {}
    for i in range(count):
        inputs: dict[str, Any] = draw(
            st.dictionaries(
                st.sampled_from("abc"), st.integers() | st.text() | st.booleans(), max_size=3
            )
        )
        for j in draw(st.lists(st.integers(i + 1, count), max_size=2)):
            if j < count:
                inputs[f"in{j}"] = [f"n{j}", draw(st.integers(0, 1))]
        graph[f"n{i}"] = {"class_type": draw(st.sampled_from("XYZ")), "inputs": inputs}
    return graph


@given(graphs(), st.randoms())
@settings(deadline=None)
def test_node_ids_and_the_order_of_inputs_do_not_matter(graph: Graph, rng: random.Random) -> None:
    names = dict(zip(graph, rng.sample(range(100, 999), len(graph)), strict=True))
    names = {old: str(new) for old, new in names.items()}

    def renamed(value: Any) -> Any:
        return [names[value[0]], value[1]] if isinstance(value, list) else value

    other = {}
    for old in rng.sample(list(graph), len(graph)):
        inputs = list(graph[old]["inputs"].items())
        rng.shuffle(inputs)
        other[names[old]] = {**graph[old], "inputs": {k: renamed(v) for k, v in inputs}}
    assert sha(graph, ["n0", 0]) == sha(other, [names["n0"], 0])


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [
        ("n1", "strength", 1),
        ("n1", "strength", 1.0000001),
        ("n1", "name", "L"),
        ("n1", "extra", None),
        ("n1", "clip", ["n2", 1]),
        ("n1", "clip", ["n3", 0]),
        ("n2", "on", 1),
        ("n2", "a", ["n3", 1]),
        ("n3", "options", {"x": [2, 1]}),
    ],
)
def test_every_change_upstream_changes_the_identity(node: str, name: str, value: Any) -> None:
    other = copy.deepcopy(LORA_CHAIN)
    other[node]["inputs"][name] = value
    assert sha(other) != sha(LORA_CHAIN)


def test_class_package_fingerprint_and_socket_are_in_the_identity() -> None:
    assert sha(LORA_CHAIN) != sha(LORA_CHAIN, ["n1", 1])
    assert sha(LORA_CHAIN) != sha(LORA_CHAIN, Load=ClassFacts("other"))
    assert sha(LORA_CHAIN) != sha(LORA_CHAIN, Load=ClassFacts("pack", "print"))
    other = copy.deepcopy(LORA_CHAIN)
    other["n3"]["class_type"] = "Load2"
    assert sha(other) != sha(LORA_CHAIN)


def test_nodes_beside_the_chain_do_not_matter() -> None:
    assert sha({**LORA_CHAIN, "n9": {"class_type": "Save", "inputs": {}}}) == sha(LORA_CHAIN)


def test_a_choice_that_another_node_computes_is_refused_unless_it_names_a_file() -> None:
    graph = copy.deepcopy(LORA_CHAIN)
    graph["n3"]["inputs"]["file"] = ["n4", 0]
    graph["n4"] = {"class_type": "Text", "inputs": {"a": "f"}}
    facts = {"Load": ClassFacts("pack", choices=frozenset({"file"}))}
    with pytest.raises(NotCacheable, match="file of Load is computed"):
        sha(graph, **facts)
    assert sha(graph, files={"f": FileIdentity("/f", 1, 1)}, **facts)


def test_a_link_that_is_none_is_refused() -> None:
    with pytest.raises(NotCacheable, match="builds a graph of its own"):
        identify_upstream(object(), host(LORA_CHAIN))


def test_a_neutral_input_is_left_out() -> None:
    other = copy.deepcopy(LORA_CHAIN)
    other["n3"]["inputs"]["keep"] = True
    assert sha(other, Load=ClassFacts("pack", None, frozenset({"keep"}))) == sha(LORA_CHAIN)


def test_files_named_deep_inside_values_are_found_and_their_version_counts() -> None:
    graph = copy.deepcopy(LORA_CHAIN)
    graph["n1"]["inputs"]["loras"] = {"one": [{"lora": "deep", "on": True}]}
    old, new = FileIdentity("/deep", 1, 1), FileIdentity("/deep", 1, 2)
    assert identify_upstream(["n1", 0], host(graph, {"deep": old})).files == [old]
    assert sha(graph, files={"deep": old}) != sha(graph, files={"deep": new}) != sha(graph)


def test_values_that_cannot_be_compared_and_endless_graphs_are_refused() -> None:
    graph = copy.deepcopy(LORA_CHAIN)
    for value in (float("nan"), object(), float("inf")):
        graph["n1"]["inputs"]["strength"] = value
        with pytest.raises(NotCacheable, match="strength of Lora"):
            sha(graph)
    chain = {f"n{i}": {"class_type": "X", "inputs": {"a": [f"n{i + 1}", 0]}} for i in range(5000)}
    with pytest.raises(NotCacheable, match=f"more than {MAX_NODES}"):
        sha(chain)


def test_source_digest_sees_every_python_file_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "pack"
    (root / "sub").mkdir(parents=True)
    (root / "a.py").write_text("1")
    (root / "sub" / "b.py").write_text("2")
    before, newest = source_digest([root], tmp_path)
    assert newest == max(os.stat(p).st_ctime for p in root.rglob("*.py"))
    (root / "note.txt").write_text("x")
    (root / ".venv").mkdir()
    (root / ".venv" / "c.py").write_text("x")
    assert source_digest([root], tmp_path)[0] == before
    for folder in ("sub", "models", "_private", "input", "tests"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "b.py").write_text("3")
        now = source_digest([root], tmp_path)[0]
        assert now != before
        before = now


def test_a_folder_is_all_its_files_and_a_gguf_brings_its_mmproj(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"1")
    assert [f.path for f in identify(model)] == [str(model.resolve())]
    projector = tmp_path / "model-mmproj-f16.gguf"
    projector.write_bytes(b"2")
    assert len(identify(model)) == 2 and len(identify(tmp_path)) == 2
    many = tmp_path / "many"
    many.mkdir()
    for i in range(MAX_FILES_IN_DIRECTORY + 1):
        (many / str(i)).touch()
    with pytest.raises(ValueError, match="more than"):
        identify(many)


class Model:
    """Can be referenced weakly, as a torch module can."""


def test_a_model_is_doubted_when_its_file_changed_after_the_start_or_after_loading(
    tmp_path,
) -> None:
    file = tmp_path / "e.safetensors"
    file.write_text("v1")
    identity, started = FileIdentity.of(file), file.stat().st_ctime_ns + 1
    time.sleep(0.02)
    loaded, model = LoadedFiles(started), Model()
    assert loaded.doubt(model, [identity]) is None
    os.utime(file, (1, 1))  # replaced by an older file: only the change time tells
    replaced = FileIdentity.of(file)
    assert loaded.doubt(model, [replaced]) == "e.safetensors changed after it was loaded"
    assert loaded.doubt(Model(), [replaced]) == "e.safetensors changed after ComfyUI started"
    ours = Model()
    loaded.record(ours, replaced)
    assert loaded.doubt(ours, [replaced]) is None
