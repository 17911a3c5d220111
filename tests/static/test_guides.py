"""The READMEs and the guides in docs/: links that lead somewhere, and figures that were measured."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import yaml
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
CODE = re.compile(r"`([^`]+)`")
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


def figures(row: str) -> list[str]:
    """The numbers that a row shows: not those of addresses, public threads and code."""
    plain = re.sub(r"\[[^\]]*\]\(https?:[^)]*\)|<[^>]+>", "", CODE.sub("", row))
    return NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", plain))


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
def test_every_figure_of_a_measured_table_stands_in_its_section_of_the_results(path: Path) -> None:
    known = sections(ROOT / RESULTS)
    for row, anchors in measured_rows(text(path)):
        standing = {n for anchor in anchors for n in NUMBER.findall(known[anchor])}
        assert [n for n in figures(row) if n not in standing] == [], row


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
        # A part of a section is measured by the commands of the whole.
        whole = next(body for body in known.values() if known[anchor] in body and command in body)
        assert command in whole and len(figures(row)) >= 2, row


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
    assert job["env"]["CI"] and job["env"]["COMFYUI_PATH"].endswith("/ComfyUI")


@pytest.mark.parametrize("name", ["tests.yml", "publish.yml"])
def test_a_github_workflow_may_write_only_what_it_must(name: str) -> None:
    whole = yaml.safe_load(text(ROOT / ".github" / "workflows" / name))
    assert whole["permissions"] == {"contents": "read"} and whole["concurrency"]
    more = [job["permissions"] for job in whole["jobs"].values() if "permissions" in job]
    assert more == ([{"contents": "read", "issues": "write"}] if name == "publish.yml" else [])
    assert all(
        "@" in step["uses"]
        for job in whole["jobs"].values()
        for step in job["steps"]
        if "uses" in step
    )
