"""The READMEs and the guides in docs/: links that lead somewhere, and figures that were measured."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pack.core.cute_animal import BACKGROUNDS, PALETTES, STYLES, positive
from pack.tests.conftest import ROOT

READMES = ("README.md", "README.zh.md")
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / name for name in (*READMES, "CONTRIBUTING.md", "CONTRIBUTING.zh.md", "CHANGELOG.md")
]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
RESULTS = "benchmarks/RESULTS.md"
LINES = 190  # of a README: what is longer belongs in docs/

CHINESE = re.compile(r"[\u4e00-\u9fff]")
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
PICTURE = re.compile(r'src="([^"]+)"')
MEASURED = re.compile(r"RESULTS\.md#([^)\s]+)")
# No part of a word (fp8), of a size behind its x, or of another number.
NUMBER = re.compile(r"(?<![A-Za-z0-9_.,])\d+(?:[.,]\d+)*")
SIZE = re.compile(r"\d{3,}x\d{3,}")
UNIT = re.compile(r"(?<=\d )(?:GB|dB|%)")  # seconds are often named above a table only
CLAUSE = re.compile(r"[;；]")
SENTENCE = re.compile(r"(?<=[.:;])\s+(?=[A-Z0-9*(`])|\n\s*\n|\n- ")
CODE = re.compile(r"`([^`]+)`")
CHOICE = re.compile(r"`([a-zA-Z][\w, '-]*)`|(?<!\*)\*([a-zA-Z][\w, '-]*)\*(?!\*)", re.ASCII)
LABELLED = re.compile(r"[`*]([^`*（）\n]+)（([^`*（）\n]+)）[`*]")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
MODULE = re.compile(r"python -m (benchmarks\.\w+|demo(?: (?!tests)\w+)?)")

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
each_readme = pytest.mark.parametrize("name", READMES)


# ------------------------------------------------------------------------------ reading Markdown
@functools.cache
def text(path: Path) -> str:
    """A page."""
    return path.read_text(encoding="utf-8")


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)|[`*]", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@functools.cache
def sections(path: Path) -> dict[str, str]:
    """Anchor -> what stands under the heading, down to the next heading of its rank or higher."""
    parts = re.split(r"^(#{1,6}) (.+)$", text(path), flags=re.MULTILINE)[1:]
    found = {}
    for at in range(0, len(parts), 3):
        body = parts[at + 2]
        for below in range(at + 3, len(parts), 3):
            if len(parts[below]) <= len(parts[at]):
                break
            body += parts[below + 1] + parts[below + 2]
        found[slug(parts[at + 1])] = body
    return found


def tables(page: str) -> list[tuple[list[str], str]]:
    """The rows of every table without its head, and the paragraph that follows it."""
    found = []
    blocks = re.split(r"\n\s*\n", page)
    for block, after in zip(blocks, [*blocks[1:], ""], strict=True):
        lines = block.strip().splitlines()
        if len(lines) > 2 and set(lines[1]) <= set("|-: "):
            found.append((lines[2:], after))
    return found


def shown(row: str) -> str:
    """What a row shows: not its addresses, public threads and code."""
    plain = re.sub(r"\[[^\]]*\]\(https?:[^)]*\)|<[^>]+>", "", CODE.sub("", row))
    return re.sub(r"\]\([^)]*\)", "]", plain)


def figures(row: str) -> list[str]:
    """The numbers that a row shows."""
    return NUMBER.findall(shown(row))


def cells(line: str) -> list[str]:
    """Those of a line of a table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


@functools.cache
def statements(section: str) -> list[str]:
    """What the results say at one place: a row, a column, a sentence; rows with their head.

    Predictions are left out: they are no measurements.
    """
    found, prose = [], []
    for block in re.split(r"\n\s*\n", section):
        lines = block.strip().splitlines()
        if len(lines) > 2 and set(lines[1]) <= set("|-: "):
            found += [f"{lines[0]} {line}" for line in lines[2:]]
            found += [" ".join(column) for column in zip(*map(cells, lines), strict=True)]
        else:
            prose.append(block)
    sentences = SENTENCE.split("\n\n".join(prose))
    # "Predicted: 1 s; found: 2 s" goes on behind its first mark.
    return found + [" ".join(s.split()) for s in sentences if not re.match(r"\W*Predicted", s)]


@functools.cache
def scope(anchor: str) -> tuple[str, ...]:
    """What is said under an anchor of the results."""
    return tuple(statements(sections(ROOT / RESULTS)[anchor]))


def of_size(size: str, place: str, anchor: str) -> bool:
    """Whether a place, or the first paragraph of its section, is about pictures of a size."""
    first = sections(ROOT / RESULTS)[anchor].strip().split("\n\n")[0]
    return size in place or f"{size.split('x')[0]} px" in place or size in first


def stands(clause: str, anchors: set[str], same: Callable[[str, str], bool] = str.__eq__) -> bool:
    """Whether one place of these sections holds all figures, units and sizes of a clause."""
    sizes, wanted = SIZE.findall(clause), NUMBER.findall(SIZE.sub("", clause))
    return not (sizes or wanted) or any(
        all(unit in place for unit in UNIT.findall(clause))
        and all(of_size(size, place, anchor) for size in sizes)
        and all(any(same(n, found) for found in NUMBER.findall(place)) for n in wanted)
        for anchor in anchors
        for place in scope(anchor)
    )


def measured_rows(page: str) -> list[tuple[str, set[str]]]:
    """Rows with the anchors in RESULTS.md that they, or the paragraph behind the table, name."""
    rows = [
        (row, set(MEASURED.findall(row)) or set(MEASURED.findall(after)))
        for lines, after in tables(page)
        for row in lines
    ]
    return [(row, anchors) for row, anchors in rows if anchors]


# ---------------------------------------------------------------------------------------- links
@each_page
def test_every_link_and_picture_leads_somewhere(path: Path) -> None:
    for target in LINK.findall(text(path)) + PICTURE.findall(text(path)):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or anchor in sections(file), target


@each_readme
def test_a_readme_is_short_and_links_every_guide(name: str) -> None:
    folder = "docs/zh" if ".zh." in name else "docs"
    assert len(text(ROOT / name).splitlines()) <= LINES
    assert {f"{folder}/{guide}" for guide in GUIDES} <= set(LINK.findall(text(ROOT / name)))


@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_is_in_both_languages_with_the_same_parts(guide: str) -> None:
    english, chinese = text(ROOT / "docs" / guide), text(ROOT / "docs" / "zh" / guide)
    for page in (english, chinese):
        assert page.startswith("# ")
    assert CHINESE.search(chinese.splitlines()[0]) and not CHINESE.search(english.splitlines()[0])
    shape = [[len(rows) for rows, _ in tables(page)] for page in (english, chinese)]
    assert shape[0] == shape[1]
    ranks = [re.findall(r"^#+ ", page, flags=re.MULTILINE) for page in (english, chinese)]
    assert ranks[0] == ranks[1]


@each_page
def test_a_chinese_page_speaks_of_the_menu_as_it_is_shown(path: Path) -> None:
    chinese = path.parent.name == "zh" or ".zh." in path.name
    assert not (chinese and re.search("Extensions [›>]", text(path)))


def chinese_texts() -> dict[str, str]:
    """What is read in Chinese beside the editor: README, guides and the notes of workflows."""
    pages = [ROOT / "README.zh.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
    found = {page.name: text(page) for page in pages}
    for path in sorted((ROOT / "workflows").glob("*.json")):
        for node in json.loads(text(path))["nodes"]:
            if node["type"] == "MarkdownNote" and CHINESE.search(node["widgets_values"][0]):
                found[f"{path.stem}, {node['id']}"] = node["widgets_values"][0]
    return found


def labels() -> dict[str, set[str]]:
    """The Chinese labels of a choice, by its value."""
    nodes = json.loads(text(ROOT / "locales" / "zh" / "nodeDefs.json")).values()
    every = [entry for node in nodes for entry in node.get("inputs", {}).values()]
    found: dict[str, set[str]] = {}
    for value, label in (pair for entry in every for pair in entry.get("options", {}).items()):
        found.setdefault(value, set()).add(label)
    return found


@pytest.mark.parametrize("name", chinese_texts())
def test_a_choice_is_written_as_the_chinese_editor_shows_it(name: str) -> None:
    """自动（auto）, not auto: names of inputs that no choice has, files and commands stay."""
    known, plain = labels(), FENCED.sub("", chinese_texts()[name])
    for written in map("".join, CHOICE.findall(plain)):
        assert written not in known, f"{written}: write {known[written]}（{written}）"
    for label, value in LABELLED.findall(plain):
        assert value not in known or label in known[value], (label, value)


FOLDERS = {"clip", "diffusion_models", "text_encoders", "vae"}  # and inputs of the same name


@pytest.mark.parametrize("path", [p for p in PAGES if "zh" in str(p)], ids=lambda p: p.name)
def test_chinese_pages_name_an_input_as_the_chinese_editor_shows_it(path: Path) -> None:
    nodes = json.loads(text(ROOT / "locales" / "zh" / "nodeDefs.json")).values()
    inputs = {name for node in nodes for name in node.get("inputs", {})} - FOLDERS
    plain = FENCED.sub("", text(path))
    bare = {name for name in CODE.findall(plain) if name in inputs}
    assert bare <= {value for _, value in LABELLED.findall(plain)}


def test_the_children_s_guide_has_a_prompt_as_the_node_writes_it() -> None:
    looks = [next(iter(kind)) for kind in (STYLES, PALETTES, BACKGROUNDS)]
    for guide, words in (("", "a little bear with a hat"), ("zh/", "一只戴帽子的小熊")):
        wanted = positive(words, *looks)
        assert f"  {wanted}\n" in text(ROOT / "docs" / f"{guide}children.md")


def test_no_chinese_guide_is_left_over() -> None:
    assert sorted(path.name for path in (ROOT / "docs" / "zh").glob("*.md")) == GUIDES


@pytest.mark.parametrize(("name", "language"), [("README.md", "en"), ("README.zh.md", "zh")])
def test_every_node_has_its_name_and_its_picture_in_the_readme(name: str, language: str) -> None:
    nodes = json.loads(text(ROOT / "locales" / language / "nodeDefs.json"))
    folder = "media/nodes" if language == "en" else "media/nodes/zh"
    for node_id, entry in nodes.items():
        page = f"js/docs/{node_id}.md" if language == "en" else f"js/docs/{node_id}/zh.md"
        assert f"[{entry['display_name']}]({page})" in text(ROOT / name)
        assert f'src="{folder}/{node_id}.webp"' in text(ROOT / name)


# -------------------------------------------------------------------------------------- figures
@each_page
def test_what_a_cell_of_a_measured_table_says_stands_in_one_place_of_the_results(
    path: Path,
) -> None:
    for row, anchors in measured_rows(text(path)):
        for clause in (c for cell in cells(row) for c in CLAUSE.split(shown(cell))):
            assert stands(clause, anchors), (clause, row)


@each_readme
def test_the_table_of_savings_names_commands_that_exist_and_belong_to_its_sections(
    name: str,
) -> None:
    rows, _ = tables(text(ROOT / name))[0]
    known = sections(ROOT / RESULTS)
    assert len(rows) >= 5
    for row in rows:
        (anchor,) = MEASURED.findall(row)
        command = CODE.findall(row)[-1]
        # Stock and ours by one measurement, not each by what suits it.
        assert stands(shown(" ".join(cells(row)[1:3])), {anchor}), row
        # A part of a section is measured by the commands of the whole.
        whole = next(body for body in known.values() if known[anchor] in body and command in body)
        assert command in whole and len(figures(row)) >= 2, row


@each_readme
def test_the_table_of_cards_leads_to_what_was_tried(name: str) -> None:
    rows, _ = tables(text(ROOT / name))[3]
    led = [row for row in rows if MEASURED.search(row)]
    assert len(rows) == 5 and len(led) == 5
    assert not [row for row in rows if row not in led and re.search(r"\d\.\d", shown(row))]


# By rounding: notes on a canvas are short.
NOTES = {
    "cute_animal_for_kids": {"within-the-memory-there-is-010-2026-11-21"},
    "qwen_image_2512": {"quantised-loading-010-2026-11-21"},
    "qwen_image_2512_low_vram": {
        "within-the-memory-there-is-010-2026-11-21",
        "quantised-loading-010-2026-11-21",
    },
    "qwen_image_edit_2511": {"reference-cache-and-attention-010"},
    "qwen_image_edit_fast": {"reference-cache-and-attention-010"},
    "qwen_image_edit_tiled": {"tiled-editing-010"},
}


def rounded(short: str, found: str) -> bool:
    """Whether a figure is another one with fewer places."""
    if "," in found or found.count(".") > 1:
        return short == found
    return f"{float(found):.{len(short.partition('.')[2])}f}" == short


def of_the_note(note: str) -> list[str]:
    """The clauses with measured figures of its table "Your card"; the decimals of a footnote."""
    body = shown(note.replace(" × ", "x").replace("秒", " s"))
    body = re.sub(r"\(1\)|\b4 (bit|位)", "", body)
    rows = [cells(line)[1] for line in body.splitlines() if line.startswith("|")]
    rows += [line for line in body.splitlines() if line.startswith("(1)")]
    clauses = [c for row in rows for c in re.split(r"[,;，；。：]|\. ", row)]
    return [c for c in clauses if re.search(r"\d\.\d|\d (s|GB)\b", c)]


@pytest.mark.parametrize("name", sorted(NOTES))
def test_the_cards_of_a_workflow_s_note_have_the_figures_of_the_results(name: str) -> None:
    workflow = json.loads(text(ROOT / "workflows" / f"{name}.json"))
    notes = [n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "MarkdownNote"]
    notes = [note for note in notes if "| Your card |" in note or "| 你的显卡 |" in note]
    assert len(notes) == 2
    said = [clause for note in notes for clause in of_the_note(note)]
    assert said or name in ("cute_animal_for_kids",)
    for clause in said:
        assert stands(clause, NOTES[name], rounded), clause


def test_every_workflow_with_a_table_of_cards_is_looked_at() -> None:
    assert sorted(NOTES) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def test_both_readmes_measure_the_same() -> None:
    english, chinese = (measured_rows(text(ROOT / name)) for name in READMES)
    assert [anchors for _, anchors in english] == [anchors for _, anchors in chinese]
    for (row, _), (zeile, _) in zip(english, chinese, strict=True):
        assert sorted(figures(row)) == sorted(figures(zeile)), zeile
        assert CODE.findall(row)[-1] == CODE.findall(zeile)[-1]


@each_page
def test_every_command_exists(path: Path) -> None:
    commands = set(re.findall(r'"(\w+)": _\w+', text(ROOT / "demo" / "__main__.py")))
    for module in MODULE.findall(text(path)):
        room, _, what = module.replace(".", " ").partition(" ")
        if room == "benchmarks":
            assert (ROOT / "benchmarks" / f"{what}.py").is_file(), module
        else:
            file = ROOT / "demo" / f"{what or '__main__'}.py"
            assert what in commands | {"setup", "clean"} or file.is_file(), module


# ----------------------------------------------------------------------- continuous integration
def jobs(name: str) -> dict[str, dict]:
    """The jobs of a GitHub workflow."""
    return yaml.safe_load(text(ROOT / ".github" / "workflows" / name))["jobs"]


@each_readme
def test_the_tests_run_by_the_command_of_the_readme_on_the_floor_and_the_newest(name: str) -> None:
    (job,) = jobs("tests.yml").values()
    assert "make test" in [step.get("run") for step in job["steps"]]
    assert "| `make test` |" in text(ROOT / name)
    floor = re.search(r'requires-comfyui = ">=([\d.]+)"', text(ROOT / "pyproject.toml"))[1]
    assert job["strategy"]["matrix"]["comfyui"] == [f"v{floor}", "newest"]
    assert "newest" in job["continue-on-error"]  # until it has run
    assert job["env"]["CI"] and job["env"]["COMFYUI_PATH"].endswith("/ComfyUI")


def test_what_is_published_has_passed_the_tests() -> None:
    steps = jobs("publish.yml")
    (tests,) = (name for name, job in steps.items() if "tests.yml" in job.get("uses", ""))
    assert steps[tests]["uses"] == "./.github/workflows/tests.yml"
    assert tests in steps["publish"]["needs"] and "always()" not in steps["publish"]["if"]
    # YAML 1.1 reads the key `on` as true.
    assert "workflow_call" in yaml.safe_load(text(ROOT / ".github/workflows/tests.yml"))[True]


@pytest.mark.parametrize("name", ["tests.yml", "publish.yml"])
def test_a_github_workflow_may_write_only_what_it_must(name: str) -> None:
    whole = yaml.safe_load(text(ROOT / ".github" / "workflows" / name))
    assert whole["permissions"] == {"contents": "read"} and whole["concurrency"]
    more = [job["permissions"] for job in whole["jobs"].values() if "permissions" in job]
    assert more == ([{"contents": "read", "issues": "write"}] if name == "publish.yml" else [])
    assert all(
        "@" in step["uses"]
        for job in whole["jobs"].values()
        for step in job.get("steps", [])
        if "uses" in step
    )
