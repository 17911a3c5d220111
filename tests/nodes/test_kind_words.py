"""Kind Words and Cute Animal Prompt in graphs that ComfyUI runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.core import cute_animal
from pack.core.kind_words import SUBJECT
from pack.tests.graphs import CLIP, encode, loader, node
from pack.tests.host import Host, Run, RunError

SUBJECTS = tuple(SUBJECT.values())
LOOK = [next(iter(table)) for table in (cute_animal.STYLES, cute_animal.PALETTES)]


@pytest.fixture
def settings(host: Host) -> Iterator[Path]:
    """ComfyUI's settings file of the only user; none at first."""
    path = host.base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


def kind(words: Any, **inputs: Any) -> dict[str, Any]:
    """The node as the editor sends it."""
    usual = {"when_found": "draw something kind", "instead": "", "also_avoid": "", "allowed": ""}
    return node("QwenVRAMKindWords", words=words, **{**usual, **inputs})


def graph(words: Any, **inputs: Any) -> dict[str, Any]:
    """With something behind each output."""
    outputs = {f"out_{n}": node("PreviewAny", source=["kind", n]) for n in range(3)}
    return {"kind": kind(words, **inputs), **outputs}


def given(run: Run) -> tuple[Any, ...]:
    """What the node handed on."""
    return tuple(values[0] for values in run.outputs["kind"])


def test_kind_words_go_on_unchanged(fresh) -> None:
    for words, text in ((" a bear\nwith a hat ", "kind words"), ("一只小熊", "友好的词语")):
        run = fresh.run(graph(words))
        assert given(run) == (words, "", True)
        assert run.status("kind")["text"] == text


@pytest.mark.parametrize(("words", "place"), [("a bear with a gun", 0), ("拿着枪的小熊", 1)])
def test_something_kind_is_drawn_and_said(fresh, words, place) -> None:
    run = fresh.run(graph(words))
    subject, answer, fine = given(run)
    assert subject == SUBJECTS[place] and subject in answer and fine is False
    status = run.status("kind")
    assert status == {
        **{"text": answer, "answer": answer, "kind": False, "stopped": False},
        "categories": ["weapons"],
    }
    assert given(fresh.run(graph(words, instead="a cat with a kite")))[0] == "a cat with a kite"


def test_words_can_be_linked(fresh) -> None:
    linked = graph(["box", 0])
    for words, fine in (("a bear with a bomb", False), ("a bear with a hat", True)):
        linked["box"] = node("PrimitiveStringMultiline", value=words)
        assert given(fresh.run(linked))[2] is fine


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_an_empty_box_draws_something_in_the_language_of_the_page(fresh, settings, locale) -> None:
    settings.write_text(json.dumps({"Comfy.Locale": locale}))
    subject, answer, fine = given(fresh.run(graph("")))
    assert subject == SUBJECT[locale] and subject in answer and fine is True


@pytest.mark.parametrize("encoder", ["ours", "stock"])
def test_stop_makes_no_picture_and_no_error(fresh, encoder) -> None:
    wanted = graph("a bear with a gun", when_found="stop")
    del wanted["out_0"]
    wanted["clip"] = loader("TextEncoder", CLIP)
    stock = node("CLIPTextEncode", clip=["clip", 0], text="")
    wanted["encode"] = encode("") if encoder == "ours" else stock
    wanted["encode"]["inputs"]["text"] = ["kind", 0]
    wanted["end"] = node("PreviewAny", source=["encode", 0])
    run = fresh.run(wanted)  # raises if it failed
    assert not {"end"} & run.ui.keys() and run.ui["out_1"]["text"][0].startswith("Let us think of")
    assert run.status("kind")["stopped"] is True
    assert "execution_error" not in [name for name, _ in fresh.events]
    wanted["kind"]["inputs"]["words"] = "a bear with a hat"
    assert "end" in fresh.run(wanted).ui


def test_added_words_count_and_a_mistake_is_named(fresh) -> None:
    run = fresh.run(graph("two spiders", also_avoid="wasp\nspider"))
    assert run.status("kind")["categories"] == ["words to avoid"]
    assert given(fresh.run(graph("a cold beer", allowed="beer、wine")))[2] is True
    with pytest.raises(RunError, match=r"also_avoid: '\?' is no word"):
        fresh.run(graph("a bear", also_avoid="spider, ?"))
    with pytest.raises(RunError, match="instead has something that the list avoids"):
        fresh.run(graph("a bear", instead="a gun"))


def test_the_answer_is_told_again_when_the_result_was_kept(fresh) -> None:
    """The page, and so the child, hears nothing else: not when a warm-up was first, either."""
    wanted = graph("a bear with a gun")
    wanted["cute"] = cute(["kind", 0])
    wanted["out_0"]["inputs"]["source"] = ["cute", 0]
    first = fresh.run(wanted)
    second = fresh.run(wanted)
    assert second.executed == []
    for name in ("kind", "cute"):
        (event,) = [d for e, d in fresh.events if e == "executed" and d["node"] == name]
        assert event["output"]["qwen_vram"] == [first.status(name)] == [second.status(name)]


def test_a_change_of_the_settings_counts_at_the_next_run(fresh, settings) -> None:
    wanted = graph("a spider with a beer")
    assert fresh.run(wanted).status("kind")["categories"] == ["drugs and alcohol"]
    assert "kind" in fresh.run(wanted).cached
    chosen = {"QwenVRAM.KindWords.AlsoAvoid": "spider, wasp"}
    settings.write_text(json.dumps(chosen))
    assert "words to avoid" in fresh.run(wanted).status("kind")["categories"]
    chosen["QwenVRAM.KindWords.AlwaysAllow"] = "beer"
    settings.write_text(json.dumps(chosen))
    assert fresh.run(wanted).status("kind")["categories"] == ["words to avoid"]
    settings.write_text(json.dumps({"QwenVRAM.KindWords.AlsoAvoid": "spider, !"}))
    with pytest.raises(
        RunError, match="Also avoid, under Words for children in ComfyUI's settings"
    ):
        fresh.run(wanted)


def test_a_stored_prompt_of_other_settings_is_not_served(fresh, settings) -> None:
    """Behind a stock encoder the prompt cache knows the graph alone."""
    wanted = {"clip": loader("TextEncoder", CLIP), "kind": kind("a spider")}
    wanted["encode"] = node("CLIPTextEncode", clip=["clip", 0], text=["kind", 0])
    wanted["end"] = node("PreviewAny", source=["encode", 0])
    fresh.run(wanted)
    fresh.restart()
    assert "kind" not in fresh.run(wanted).executed  # it is known, and nothing was needed
    settings.write_text(json.dumps({"QwenVRAM.KindWords.AlsoAvoid": "spider"}))
    fresh.restart()
    assert given(fresh.run(wanted))[0] == SUBJECT["en"]


def test_several_users_avoid_together_and_allow_together(host, settings, monkeypatch) -> None:
    known = host.part("nodes.kind_words")._known
    other = settings.parent.parent / "ann_1" / settings.name
    other.parent.mkdir(exist_ok=True)
    names = ("QwenVRAM.KindWords.AlsoAvoid", "QwenVRAM.KindWords.AlwaysAllow")
    settings.write_text(json.dumps(dict(zip(names, ("wasp", "beer, wine"), strict=True))))
    other.write_text(json.dumps(dict(zip(names, ("spider", "wine"), strict=True))))
    try:
        assert not known("", "").find("a spider with a beer")
        monkeypatch.setattr(host.part("nodes.settings").args, "multi_user", True)
        together = known("", "")
        assert together.find("a wasp") and together.find("a spider") and together.find("a beer")
        assert not together.find("wine")
    finally:
        other.unlink()


def test_a_setting_that_is_no_text_is_told_and_not_used(host, settings, caplog) -> None:
    settings.write_text(json.dumps({"QwenVRAM.KindWords.AlsoAvoid": 7}))
    assert host.part("nodes.settings").words_for_children() == [["", ""]]
    assert "QwenVRAM.KindWords.AlsoAvoid is 7, not a text" in caplog.text


# ------------------------------------------------------------------------------ Cute Animal Prompt
def cute(words: Any, **inputs: Any) -> dict[str, Any]:
    """The node as a client sends it that knows no background."""
    return node("QwenVRAMCuteAnimalPrompt", words=words, style=LOOK[0], palette=LOOK[1], **inputs)


def test_the_negative_prompt_is_encoded_once_for_all_words(fresh) -> None:
    wanted = {"clip": loader("TextEncoder", CLIP), "box": kind("a bear with a hat")}
    wanted["cute"] = cute(["box", 0])
    for number, name in enumerate(("positive", "negative")):
        wanted[name] = encode("")
        wanted[name]["inputs"]["text"] = ["cute", number]
        wanted[f"out_{name}"] = node("PreviewAny", source=[name, 0])
    first = fresh.run(wanted)
    assert "clip" in first.executed
    assert first.outputs["cute"][0][0].startswith("a bear with a hat, ")
    assert first.status("cute")["text"] == first.outputs["cute"][0][0]
    wanted["box"] = kind("一只戴帽子的小熊")
    second = fresh.run(wanted)
    assert second.outputs["cute"][1] == first.outputs["cute"][1] == [cute_animal.NEGATIVE]
    results = [second.status(name)["result"] for name in ("positive", "negative")]
    assert results == ["miss", "hit"]


def test_without_words_it_draws_the_subject_and_says_so(fresh) -> None:
    background = list(cute_animal.BACKGROUNDS)[1]
    wanted = {"cute": cute(" ", background=background)}
    run = fresh.run({**wanted, "out": node("PreviewAny", source=["cute", 0])})
    assert run.outputs["cute"][0][0].startswith(SUBJECT["en"])
    assert "background" not in run.outputs["cute"][0][0]
    assert run.status("cute")["text"] == f"words is empty: draws {SUBJECT['en']}"
