"""Help pages, translations and READMEs say what the schemas in nodes/ say."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pack.tests.conftest import ROOT

DOCS = ROOT / "js" / "docs"
LANGUAGES = ("en", "zh")
READMES = ("README.md", "README.zh.md")
SOURCES = sorted((ROOT / "nodes").glob("*.py"))
CHINESE = re.compile(r"[\u4e00-\u9fff]")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")
# In the frontend's translations these characters are syntax (vue-i18n); tooltips are taken raw.
TRANSLATION_SYNTAX = set("{}@|")
CATEGORY = re.compile(r'category="Qwen VRAM/(\w+)"')
# What ComfyUI's frontend translates itself, and what is written the same in Chinese.
HOSTS_CATEGORIES = {"loaders", "conditioning", "sampling", "vae"}
STATUS_HEADINGS = ("## Status line\n", "## 状态行\n")


class Schema(NamedTuple):
    """What a node's `define_schema` tells: inputs as id -> tooltip, outputs as their names."""

    display_name: str
    description: str
    inputs: dict[str, str]
    outputs: list[str]


# --------------------------------------------------------------------------- reading the schemas
@functools.cache
def every(kind: type[ast.AST]) -> list[Any]:
    """Every such node of the modules of nodes/, which are walked once: each worker collects this."""
    if kind is not ast.AST:
        return [node for node in every(ast.AST) if isinstance(node, kind)]
    return [n for path in SOURCES for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


@functools.cache
def constants() -> dict[str, str]:
    """The strings that the modules give a name."""
    return {
        node.targets[0].id: node.value.value
        for node in every(ast.Assign)
        if isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def text(value: ast.expr | None) -> str:
    """A string in the source, written out or by name."""
    if isinstance(value, ast.Name):
        return constants()[value.id]
    return ast.literal_eval(value) if value is not None else ""


def keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    """The keyword arguments of a call."""
    return {keyword.arg: keyword.value for keyword in call.keywords}


def inputs_in(listed: ast.expr) -> Iterator[tuple[str, str]]:
    """Id and tooltip of every input in a list, also where a function gives some of them."""
    assert isinstance(listed, ast.List), ast.unparse(listed)
    for item in listed.elts:
        if isinstance(item, ast.Starred):
            assert isinstance(item.value, ast.Call)
            name = item.value.func.attr  # cls.common_inputs(...)
            function = next(n for n in every(ast.FunctionDef) if n.name == name)
            yield from inputs_in(next(n.value for n in function.body if isinstance(n, ast.Return)))
        else:
            yield text(item.args[0]), text(keywords(item).get("tooltip"))


def output_name(call: ast.Call) -> str:
    """What ComfyUI calls an output: its display name, or else its type (`io.Model.Output()`)."""
    return text(keywords(call).get("display_name")) or call.func.value.attr.upper()


@functools.cache
def schemas() -> dict[str, Schema]:
    """Every schema of the pack by node id."""
    found = {}
    for call in every(ast.Call):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "io.Schema":
            given = keywords(call)
            found[text(given["node_id"])] = Schema(
                text(given["display_name"]),
                text(given["description"]),
                dict(inputs_in(given["inputs"])),
                [output_name(output) for output in given["outputs"].elts],
            )
    return found


@functools.cache
def strings_of_the_code() -> list[str]:
    """Every piece of text in nodes/, core/ and js/, as a status line can be made of."""
    files = [*SOURCES, *(ROOT / "core").glob("*.py")]
    every = (n for f in files for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))))
    scripts = [f.read_text(encoding="utf-8") for f in (ROOT / "js").glob("*.js")]
    texts = [n.value for n in every if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return texts + scripts


# ----------------------------------------------------------------------- reading the documentation
def page(node_id: str, language: str) -> Path:
    """Where the frontend looks first for a language, and last for all: `<NodeId>.md`."""
    return DOCS / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")


@functools.cache
def translations(language: str) -> dict[str, Any]:
    """The node definitions of a language."""
    path = ROOT / "locales" / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))


def section(content: str, headings: tuple[str, ...]) -> str:
    """What stands under the first of the headings that occurs."""
    heading = next(h for h in headings if h in content)
    return content.partition(heading)[2].partition("\n## ")[0]


each_node = pytest.mark.parametrize("node_id", sorted(schemas()))
each_language = pytest.mark.parametrize("language", LANGUAGES)


def test_every_schema_was_read() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert set(schemas()) == set(re.findall(r'node_id="(\w+)"', source)) != set()


@each_node
@each_language
def test_every_node_has_a_help_page_under_its_name(node_id: str, language: str) -> None:
    heading = page(node_id, language).read_text(encoding="utf-8").splitlines()[0]
    assert heading == f"# {translations(language)[node_id]['display_name']}"


def test_no_help_page_is_left_over() -> None:
    pages = {page(node_id, language) for node_id in schemas() for language in LANGUAGES}
    pictures = {(path, name) for path in pages for name in PICTURE.findall(path.read_text("utf-8"))}
    # ComfyUI looks for pictures in docs/, whatever the language of the page; GitHub beside it.
    shown = {DOCS / name for _, name in pictures}
    beside = {path.parent / name for path, name in pictures}
    assert {path for path in DOCS.rglob("*") if path.is_file()} == pages | shown | beside
    assert all(path.stat().st_size < 150_000 for path in shown)
    assert all(path.read_bytes() == (DOCS / path.name).read_bytes() for path in beside)


@each_node
def test_the_chinese_page_speaks_of_the_menu_as_it_is_shown(node_id: str) -> None:
    assert not re.search("Extensions [›>]", page(node_id, "zh").read_text(encoding="utf-8"))


@each_node
@each_language
def test_the_help_page_has_a_table_of_all_inputs(node_id: str, language: str) -> None:
    lines = page(node_id, language).read_text(encoding="utf-8").splitlines()
    named = [re.findall(r"`(\w+)`", x.split("|")[1]) for x in lines if x.startswith("|")]
    assert [name for cell in named for name in cell] == list(schemas()[node_id].inputs)


@each_node
@each_language
def test_the_help_page_quotes_the_status_line_as_the_code_writes_it(
    node_id: str, language: str
) -> None:
    quoted = section(page(node_id, language).read_text(encoding="utf-8"), STATUS_HEADINGS)
    # Words in capitals stand for what differs: `loaded in N s`.
    pieces = [
        p for span in re.findall(r"`([^`]+)`", quoted) for p in re.split(r"\b[A-Z]+\b|·", span)
    ]
    for piece in filter(None, (p.strip() for p in pieces)):
        assert any(piece in known for known in strings_of_the_code()), piece


@each_node
def test_english_is_what_the_schema_says(node_id: str) -> None:
    schema = schemas()[node_id]
    assert translations("en")[node_id] == {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {i: {"name": i, "tooltip": tip} for i, tip in schema.inputs.items()},
        "outputs": {str(i): {"name": name} for i, name in enumerate(schema.outputs)},
    }


@each_node
def test_chinese_has_the_same_entries_in_chinese(node_id: str) -> None:
    english, chinese = translations("en")[node_id], translations("zh")[node_id]
    assert chinese.keys() == english.keys()
    assert list(chinese["inputs"]) == list(english["inputs"])
    assert list(chinese["outputs"]) == list(english["outputs"])
    tooltips = [entry["tooltip"] for entry in chinese["inputs"].values()]
    assert all(map(CHINESE.search, [chinese["display_name"], chinese["description"], *tooltips]))
    assert all(entry["name"] for kind in ("inputs", "outputs") for entry in chinese[kind].values())


@each_language
def test_the_loaders_name_the_files_that_other_loaders_open(language: str) -> None:
    for node_id, name in (
        ("QwenVRAMLoadDiffusionModel", "unet_name"),
        ("QwenVRAMLoadTextEncoder", "clip_name"),
    ):
        tooltip = translations(language)[node_id]["inputs"][name]["tooltip"]
        assert all(kind in tooltip for kind in ("Qwen-Image 2.1", "GGUF", "nunchaku")), tooltip


@each_language
def test_translations_name_no_other_node_and_use_no_syntax(language: str) -> None:
    assert translations(language).keys() == schemas().keys()
    for entry in translations(language).values():
        sockets = [*entry["inputs"].values(), *entry["outputs"].values()]
        names = [entry["display_name"], entry["description"], *(s["name"] for s in sockets)]
        assert not TRANSLATION_SYNTAX & set("".join(names))


def test_every_category_of_nodes_has_a_chinese_name() -> None:
    found = {category for path in SOURCES for category in CATEGORY.findall(path.read_text("utf-8"))}
    english, chinese = (
        json.loads((ROOT / "locales" / language / "main.json").read_text("utf-8"))["nodeCategories"]
        for language in LANGUAGES
    )
    assert len(found) > 5 and found <= chinese.keys() | HOSTS_CATEGORIES
    assert english == {name: name for name in chinese}  # ComfyUI looks names up in both
    assert all(map(CHINESE.search, chinese.values()))


@pytest.mark.parametrize("file", ["main", "settings", "commands"])
def test_both_languages_have_the_same_keys(file: str) -> None:
    english, chinese = (
        dict(leaves(json.loads((ROOT / "locales" / name / f"{file}.json").read_text("utf-8"))))
        for name in LANGUAGES
    )
    assert list(english) == list(chinese)
    same = {key for key, text in chinese.items() if not CHINESE.search(text)}
    assert {english[key] for key in same} <= {"Qwen VRAM", "native", "cudaMallocAsync"}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts of a file of translations, each with the keys that lead to it."""
    if isinstance(value, str):
        yield path, value
        return
    for key, inner in value.items():
        yield from leaves(inner, (*path, key))


@pytest.mark.parametrize("name", READMES)
def test_the_readme_links_every_help_page(name: str) -> None:
    language = "zh" if ".zh." in name else "en"
    links = LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    pages = {page(node_id, language).relative_to(ROOT).as_posix() for node_id in schemas()}
    assert pages <= set(links)
