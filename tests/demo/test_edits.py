"""An edit changes what its kind names and nothing else, and its instruction says to what."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from pack.demo import edits
from pack.demo.scenes import Scene
from pack.demo.vocabulary import EN, ZH
from pack.tests.examples import examples

SEEDS = st.integers(0, 1 << 40).map(random.Random)
CHANGES = {
    "colour": {"colour"},
    "add": {"accessory"},
    "remove": {"accessory"},
    "background": {"background"},
    "watermark": {"watermark"},
    "identity": set(),
    "animal": {"animal"},
    "action": {"action"},
}


def changed(before: Scene, after: Scene) -> set[str]:
    """Names of the attributes in which two scenes differ."""
    return {name for name, value in vars(before).items() if getattr(after, name) != value}


def test_every_kind_of_edit_occurs() -> None:
    rng = random.Random(2)
    assert {edits.scene_edit(rng, 1)[0] for _ in range(500)} == set(edits.EDITS) == set(CHANGES)


@given(SEEDS)
@settings(max_examples=examples(100), deadline=None)
def test_an_edit_changes_exactly_what_its_kind_names(rng) -> None:
    kind, before, after, texts = edits.scene_edit(rng, 3)
    found = changed(before, after)
    if kind == "add":  # what is put on may come with a colour
        assert before.accessory == "none" and not before.accent
        found -= {"accent"}
    if kind == "remove":
        assert after.accessory == "none"
    assert found == CHANGES[kind]
    assert not after.watermark and before.watermark == (kind == "watermark")
    assert len(texts) == 3 and all(texts)


@given(SEEDS)
@settings(max_examples=examples(100), deadline=None)
def test_an_instruction_names_the_new_value(rng) -> None:
    kind, before, after, texts = edits.scene_edit(rng, 2)
    new = {
        "add": {after.accessory, after.accent} - {""},
        "remove": {before.accessory},
        "watermark": set(),
        "identity": set(),
    }.get(kind) or {getattr(after, name) for name in CHANGES[kind] - {"watermark", "accessory"}}
    for text in texts:
        for value in new:
            words = [*EN[value], *ZH[value]]
            assert any(word.lower() in text.lower() for word in words), (kind, value, text)
        assert not set("{}") & set(text)


@given(SEEDS)
@settings(max_examples=examples(40), deadline=None)
def test_only_the_two_scenes_and_the_seed_decide(rng) -> None:
    state, own = rng.getstate(), random.getstate()
    first = edits.scene_edit(rng, 2)
    rng.setstate(state)
    assert edits.scene_edit(rng, 2) == first
    assert random.getstate() == own
    kind, before, after, _ = first
    said = [
        edits.instruct(random.Random(7), kind, replace(before, jitter=j), replace(after, jitter=j))
        for j in (1, 2)
    ]
    assert said[0] == said[1]
