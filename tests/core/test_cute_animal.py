"""The prompt of a cute animal keeps a child's words, and its phrases ask for nothing else."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core.cute_animal import ALWAYS, BACKGROUNDS, NEGATIVE, PALETTES, STYLES, positive
from pack.core.kind_words import SUBJECT, language_of, word_list
from pack.demo import vocabulary

LOOKS = [*STYLES.values(), *PALETTES.values(), *BACKGROUNDS.values(), ALWAYS]
FIRST = [next(iter(table)) for table in (STYLES, PALETTES, BACKGROUNDS)]
choices = st.tuples(*(st.sampled_from(list(table)) for table in (STYLES, PALETTES, BACKGROUNDS)))


@given(st.text(min_size=1), choices)
def test_the_words_stand_first_and_unchanged(words, chosen) -> None:
    prompt = positive(words, *chosen)
    assert prompt.startswith(words.strip() or SUBJECT["en"])
    assert len(prompt) > len(words.strip())


@pytest.mark.parametrize("chosen", list(product(STYLES, PALETTES)))
def test_phrases_have_the_language_of_the_words(chosen) -> None:
    english = positive("a little bear with a hat", *chosen, FIRST[2])
    chinese = positive("一只戴帽子的小熊", *chosen, FIRST[2])
    assert english.isascii() and not re.search("[a-z]", chinese)
    assert not word_list().find(english) and not word_list().find(chinese)


def test_a_full_stop_is_not_followed_by_a_comma() -> None:
    assert positive("A bear.", *FIRST).startswith("A bear. storybook")
    assert positive("小熊！", *FIRST).startswith("小熊！儿童")
    assert positive("a bear", *FIRST).startswith("a bear, storybook")


def test_no_phrase_asks_for_an_animal_a_colour_or_something_worn() -> None:
    for name, words in vocabulary.EN.items():
        if name != "plain":
            named = [w for w in words if any(re.search(rf"\b{w}\b", x.en) for x in LOOKS)]
            assert not named, f"{named}: {name}"
    for name, words in vocabulary.ZH.items():
        if name != "plain":
            assert not [w for w in words if any(w in look.zh for look in LOOKS)], name


def test_labels_have_both_languages_and_every_look_both_phrases() -> None:
    for look in LOOKS:
        assert not look.label or re.fullmatch(r"[a-z ]+ · [\u4e00-\u9fff]+", look.label)
        assert bool(look.en) == bool(look.zh) == (look.label != list(BACKGROUNDS)[1])
        assert look.en.isascii() and (not look.zh or language_of(look.zh) == "zh")
    assert language_of(NEGATIVE) == "zh" and "frightening" in NEGATIVE


@pytest.mark.parametrize("place", range(3))
def test_an_unknown_choice_is_named(place) -> None:
    chosen = [*FIRST[:place], "baroque", *FIRST[place + 1 :]]
    name = ("style", "palette", "background")[place]
    with pytest.raises(ValueError, match=f"{name} is 'baroque': choose "):
        positive("a bear", *chosen)
