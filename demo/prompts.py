"""Says in many English and Chinese wordings what a scene shows.

A description names whatever is not the default (no accessory, standing, plain background, the
animal's natural colour), so a prompt that leaves something out has one right picture, too.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from .scenes import NATURAL, Scene, random_scene
from .vocabulary import (
    ADJECTIVES,
    ADJECTIVES_ZH,
    CLOSINGS,
    CLOSINGS_ZH,
    EN,
    OPENINGS,
    OPENINGS_ZH,
    STRANGERS,
    STRANGERS_ZH,
    ZH,
    article,
    finish,
)


class Named(NamedTuple):
    """Which attributes a prompt names; the animal always is."""

    colour: bool
    accessory: bool
    action: bool
    background: bool


# The order of the draws from `rng` is part of the world: with another one, a seed that is trained
# or tested with means other prompts.


def describe(rng: random.Random, scene: Scene) -> str:
    """One of very many prompts for `scene`."""
    return (_chinese if rng.random() < 0.4 else _english)(rng, scene)


def _named(rng: random.Random, scene: Scene) -> Named:
    return Named(
        scene.colour != NATURAL[scene.animal] or rng.random() < 0.5,
        scene.accessory != "none",
        scene.action != "standing" or rng.random() < 0.25,
        scene.background != "plain" or rng.random() < 0.15,
    )


# ------------------------------------------------------------------------------------- English
def _english(rng: random.Random, scene: Scene) -> str:
    named = _named(rng, scene)
    animal, colour = rng.choice(EN[scene.animal]), rng.choice(EN[scene.colour])
    adjective = rng.choice(ADJECTIVES)
    noun = f"{adjective} {animal}" if rng.random() < 0.35 else animal
    late = named.colour and rng.random() < 0.1  # the colour comes after the noun
    if named.colour and not late:
        first = rng.random() < 0.5
        noun = f"{colour} {noun}" if first else noun.replace(animal, f"{colour} {animal}")
    accessory = _english_wearing(rng, scene) if named.accessory else ""
    action = rng.choice(EN[scene.action]) if named.action else ""
    place = rng.choice(EN[scene.background]) if named.background else ""
    if rng.random() < 0.2:
        return _english_tags(rng, animal, colour if named.colour else "", accessory, action, place)
    subject = rng.choice((article(noun), article(noun), f"the {noun}", f"one {noun}", noun))
    if late:
        subject += rng.choice((f" that is {colour}", f", {colour},", f" coloured {colour}"))
    if action and not action.startswith("with"):
        forms = ("is {}", "{}", "{}", "that is {}", ", {},", "which is {}")
        action = rng.choice(forms).format(action)
    return finish(rng, _english_sentence(rng, subject, accessory, action, place))


def _english_wearing(rng: random.Random, scene: Scene) -> str:
    thing = rng.choice(EN[scene.accessory])
    if scene.accent:
        thing = f"{rng.choice(EN[scene.accent])} {thing}"
    if scene.accessory != "glasses":
        thing = rng.choice((article(thing), article(thing), f"its {thing}", f"the {thing}"))
    forms = ("wearing {}", "with {}", "in {}", "who wears {}", "that has {} on")
    return rng.choice(forms).format(thing)


def _english_sentence(
    rng: random.Random, subject: str, accessory: str, action: str, place: str
) -> str:
    parts = [accessory, action, place]
    rng.shuffle(parts)
    if place and rng.random() < 0.15:
        words = [place + ",", subject, accessory, action]
    else:
        words = [subject, *parts]
        if rng.random() < 0.15 and action:
            words = [subject, action, "and" if accessory else "", accessory, place]
    if rng.random() < 0.35:
        words.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.15:
        words = _sprinkle(rng, words)
    text = " ".join(word for word in words if word).replace(" ,", ",").strip(", ")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        text += f", {rng.choice(CLOSINGS)}"
    return text


def _sprinkle(rng: random.Random, words: list[str]) -> list[str]:
    """Puts words in between that mean nothing here."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        words.insert(rng.randint(0, len(words)), rng.choice(STRANGERS))
    return words


def _english_tags(
    rng: random.Random, animal: str, colour: str, accessory: str, action: str, place: str
) -> str:
    accessory = accessory.split(" ", 1)[1] if accessory and rng.random() < 0.5 else accessory
    if colour and rng.random() < 0.5:
        animal, colour = f"{colour} {animal}", ""
    tags = [tag for tag in (animal, colour, accessory, action, place) if tag]
    if rng.random() < 0.5:
        rng.shuffle(tags)
    for _ in range(rng.choice((0, 0, 1, 2))):
        tags.insert(rng.randint(0, len(tags)), rng.choice(CLOSINGS + ADJECTIVES))
    return finish(rng, rng.choice((", ", ", ", " ", "; ")).join(tags))


# ------------------------------------------------------------------------------------- Chinese
def _chinese(rng: random.Random, scene: Scene) -> str:
    named = _named(rng, scene)
    animal = rng.choice(ZH[scene.animal])
    count = rng.choice(("一只", "一只", "一个", "", "这只", "有一只", "一头"))
    colour = rng.choice(ZH[scene.colour]) + rng.choice(("的", "的", "")) if named.colour else ""
    adjective = rng.choice(ADJECTIVES_ZH) if rng.random() < 0.3 else ""
    wearing = _chinese_wearing(rng, scene) if named.accessory else ""
    action = rng.choice(ZH[scene.action]) if named.action else ""
    place = rng.choice(ZH[scene.background]) if named.background else ""
    form = rng.random()
    if form < 0.2:
        tags = [tag for tag in (colour + animal, wearing, action, place) if tag]
        rng.shuffle(tags)
        text = rng.choice(("，", "，", " ", "、")).join(tags)
    elif form < 0.6 and wearing:
        text = f"{count}{wearing}的{adjective}{colour}{animal}{place}{action}"
    elif form < 0.75 and place:
        joint = rng.choice(("，", "有", ""))
        text = f"{place}{joint}{count}{adjective}{colour}{animal}{wearing}{action}"
    else:
        order = [wearing, place, action] if rng.random() < 0.5 else [place, action, wearing]
        joint = rng.choice(("", "", "，"))
        rest = joint.join(part for part in order if part)
        text = f"{count}{adjective}{colour}{animal}{joint if rest else ''}{rest}"
    return _chinese_frame(rng, text)


def _chinese_wearing(rng: random.Random, scene: Scene) -> str:
    thing = rng.choice(ZH[scene.accessory])
    if scene.accent:
        thing = rng.choice(ZH[scene.accent]) + rng.choice(("", "的")) + thing
    verb = "穿" if scene.accessory == "dress" else rng.choice(("戴", "戴", "系"))
    if scene.accessory in ("hat", "glasses"):
        verb = "戴"
    return verb + rng.choice(("", "着", "了")) + thing


def _chinese_frame(rng: random.Random, text: str) -> str:
    """With openings, closings, strangers and a full stop around it, or without."""
    if rng.random() < 0.3:
        text = rng.choice(OPENINGS_ZH) + rng.choice(("", "，", "：")) + text
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        text += rng.choice(("，", ",", " ")) + rng.choice(CLOSINGS_ZH)
    if rng.random() < 0.1:
        text = rng.choice(STRANGERS_ZH) + "，" + text
    elif rng.random() < 0.1:
        text += "，" + rng.choice(STRANGERS_ZH) + rng.choice(STRANGERS_ZH)
    return text + rng.choice(("", "", "。", "！"))


# ---------------------------------------------------------------------------- scenes with prompts
def scene_and_prompts(rng: random.Random, count: int) -> tuple[Scene, list[str]]:
    """A picture and `count` prompts for it; a few prompts name no animal or nothing at all."""
    scene = random_scene(rng)
    if rng.random() < 0.03:
        colour = NATURAL[scene.animal]
        scene = replace(scene, colour=colour, accessory="none", action="standing", accent="")
        return scene, [_nonsense(rng, scene) for _ in range(count)]
    return scene, [describe(rng, scene) for _ in range(count)]


def _nonsense(rng: random.Random, scene: Scene) -> str:
    """Words that mean nothing here, and the background."""
    words = [rng.choice(STRANGERS) for _ in range(rng.randint(1, 6))]
    if scene.background != "plain":
        words.insert(rng.randint(0, len(words)), rng.choice(EN[scene.background]))
    return finish(rng, " ".join([rng.choice(("a", "the", *OPENINGS)), *words]))


# ---------------------------------------------------- wordings that training never sees, for tests
HELD_OUT = (
    "my favourite {adjective} {colour} {animal} {wearing} {action} {place} right now",
    "could you sketch {place} some {colour} {animal} {wearing}, {action}?",
    "Story time: we met a {colour} {animal} {wearing}. It was {action} {place}.",
    "poster, {colour} {animal}, {wearing}, {action}, {place}, retro look",
    "{place} lives a shy {colour} {animal} {wearing} {action}",
)
HELD_OUT_ZH = (
    "从前有一只{colour}的{animal}，{wearing}，{action}，{place}",
    "海报：{place}，{colour}{animal}，{wearing}，{action}，复古",
    "帮我做一张{colour}{animal}的图，它{wearing}，{place}{action}",
)


def held_out(rng: random.Random, scene: Scene) -> str:
    """A wording that training has not seen; the words for what matters are known ones."""
    chinese = rng.random() < 0.4
    words = ZH if chinese else EN
    wearing = ""
    if scene.accessory != "none":
        thing = rng.choice(words[scene.accessory])
        if chinese:
            wearing = ("穿着" if scene.accessory == "dress" else "戴着") + thing
        else:
            wearing = "dressed up with " + (
                thing if scene.accessory == "glasses" else article(thing)
            )
    text = rng.choice(HELD_OUT_ZH if chinese else HELD_OUT).format(
        adjective="imaginary",
        colour=rng.choice(words[scene.colour]),
        animal=rng.choice(words[scene.animal]),
        wearing=wearing,
        action=rng.choice(words[scene.action]),
        place=rng.choice(words[scene.background]),
    )
    for gap in ("  ", " ,", ",,", "，，", " ."):
        text = text.replace(gap, gap[-1])
    return text
