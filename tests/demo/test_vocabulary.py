"""Which prompts name an animal, and what the commands say about words."""

from __future__ import annotations

import random

import pytest
from pack.demo import scenes
from pack.demo.__main__ import KNOWN, _options
from pack.demo.prompts import describe, held_out
from pack.demo.vocabulary import names_animal


@pytest.mark.parametrize("word", [describe, held_out])
def test_every_prompt_of_the_training_names_an_animal(word) -> None:
    rng = random.Random(7)
    prompts = [word(rng, scenes.random_scene(rng)) for _ in range(500)]
    assert [text for text in prompts if not names_animal(text)] == []


@pytest.mark.parametrize("text", ["", "a photo of a mountain", "a category of foxtrots", "一幅画"])
def test_other_prompts_name_none(text: str) -> None:
    assert not names_animal(text)


def test_help_tells_every_word_of_the_world() -> None:
    values = (scenes.ANIMALS, scenes.COLOURS, scenes.ACTIONS, scenes.BACKGROUNDS)
    wanted = [*(word for kind in values for word in kind), *scenes.ACCESSORIES[1:]]
    assert [word for word in wanted if word not in KNOWN] == []


def test_an_empty_prompt_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _options("demo", ["--prompt", "  "])
    assert 'say what to draw, as "a red fox' in capsys.readouterr().err
