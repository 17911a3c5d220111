"""Words in many ways how one scene becomes another: eight kinds of edit."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

from .scenes import ACCESSORIES, ACTIONS, ANIMALS, BACKGROUNDS, COLOURS, Scene, random_scene
from .vocabulary import EN, ZH, article, finish

EDITS = ("colour", "add", "remove", "background", "watermark", "identity", "animal", "action")
EDIT_WEIGHTS = (26, 20, 12, 20, 9, 5, 4, 4)
OTHER: dict[str, Iterable[str]] = {  # kinds of edit that give an attribute another value
    "colour": COLOURS,
    "background": BACKGROUNDS,
    "animal": ANIMALS,
    "action": ACTIONS,
}


def scene_edit(rng: random.Random, count: int) -> tuple[str, Scene, Scene, list[str]]:
    """The kind of an edit, the picture before, the picture after and `count` instructions."""
    kind = rng.choices(EDITS, EDIT_WEIGHTS)[0]
    before, after = _change(rng, kind, random_scene(rng))
    return kind, before, after, [instruct(rng, kind, before, after) for _ in range(count)]


def _change(rng: random.Random, kind: str, scene: Scene) -> tuple[Scene, Scene]:
    """The scene, made such that this kind of edit is possible, and the edited one."""
    if kind in OTHER:
        others = [value for value in OTHER[kind] if value != getattr(scene, kind)]
        return scene, replace(scene, **{kind: rng.choice(others)})
    if kind == "add":
        before = replace(scene, accessory="none", accent="")
        accent = rng.choice(("", "", "red", "blue", "green", "purple"))
        accessory = rng.choice(ACCESSORIES[1:])
        accent = "" if accessory == "glasses" else accent
        return before, replace(before, accessory=accessory, accent=accent)
    if kind == "remove":
        if scene.accessory == "none":
            scene = replace(scene, accessory=rng.choice(ACCESSORIES[1:]))
        return scene, replace(scene, accessory="none")
    if kind == "watermark":
        return replace(scene, watermark=True), scene
    return scene, scene  # identity


ENGLISH_EDITS = {
    "colour": (
        *("make it {c}", "make the {a} {c}", "change the colour to {c}", "turn the {a} {c}"),
        *("change the color of the {a} to {c}", "paint it {c}", "{c}", "a {c} {a} instead"),
        *("the {a} should be {c}", "recolour the {a} in {c}", "dye the {a} {c}", "turn it {c}"),
    ),
    "add": (
        *("add {x}", "put {x} on it", "give it {x}", "give the {a} {x}", "let it wear {x}"),
        *("add {x} to the {a}", "put {x} on the {a}", "the {a} wears {x}", "dress it in {x}"),
        *("it should have {x}", "make the {a} wear {x}", "now with {x}"),
    ),
    "remove": (
        *("remove the {t}", "take off the {t}", "take the {t} off", "without the {t}", "no {t}"),
        *("remove the {t} from the {a}", "delete the {t}", "the {a} without {t}", "drop the {t}"),
        *("get rid of the {t}", "erase the {t}"),
    ),
    "background": (
        *("change the background to {p}", "put it {p}", "place the {a} {p}", "make it {p}"),
        *("move the {a} {p}", "the {a} is {p} now", "{p}", "now {p}", "set the scene {p}"),
        *("replace the background: {p}", "a new background, {p}"),
    ),
    "watermark": (
        *("remove the watermark", "delete the watermark", "take away the watermark"),
        *("erase the watermark", "get rid of the watermark", "clean the watermark"),
        *("no watermark", "without the watermark", "remove the stripes", "clean up the picture"),
    ),
    "identity": (
        *("keep it as it is", "do nothing", "change nothing", "no change", "leave it as it is"),
        *("the same picture", "keep everything the same", "don't change anything", "copy it"),
    ),
    "animal": (
        *("turn the {o} into a {a}", "replace the {o} by a {a}", "turn it into a {a}"),
        *("make it a {a}", "a {a} instead of the {o}", "change the {o} into a {a}"),
    ),
    "action": (
        *("make it {v}", "it is {v} now", "the {a} is {v} now", "let the {a} be {v}", "now {v}"),
    ),
}
CHINESE_EDITS = {
    "colour": (
        *(
            "把它变成{c}",
            "把{a}变成{c}",
            "改成{c}",
            "换成{c}",
            "颜色改为{c}",
            "让{a}变成{c}的",
            "把颜色换成{c}",
        ),
        *("将{a}的颜色改成{c}", "涂成{c}", "染成{c}"),
    ),
    "add": (
        *("给它{x}", "给{a}{x}", "加上{t}", "添加{t}", "让它{x}", "让{a}{x}", "加一个{t}", "{x}"),
    ),
    "remove": (
        *("去掉{t}", "把{t}去掉", "摘掉{t}", "脱掉{t}", "不要{t}", "删除{t}", "移除{t}", "没有{t}"),
    ),
    "background": (
        *(
            "背景换成{p}",
            "把背景改为{p}",
            "把它放{p}",
            "让{a}{p}",
            "{p}",
            "背景改成{p}",
            "将背景换成{p}",
        ),
    ),
    "watermark": (
        "去掉水印",
        "去除水印",
        "把水印去掉",
        "删除水印",
        "移除水印",
        "不要水印",
        "消除水印",
    ),
    "identity": ("保持不变", "不要改变", "什么都不改", "保持原样", "不变", "原样"),
    "animal": ("把{o}变成{a}", "换成{a}", "把{o}换成{a}", "变成一只{a}", "改成一只{a}"),
    "action": ("让它{v}", "让{a}{v}", "改成{v}", "现在{v}", "它{v}"),
}


def instruct(rng: random.Random, kind: str, before: Scene, after: Scene) -> str:
    """One of many instructions that turn `before` into `after`."""
    chinese = rng.random() < 0.35
    words = ZH if chinese else EN
    worn = before.accessory if kind == "remove" else after.accessory
    thing = rng.choice(words[worn]) if worn != "none" else ""
    wear = thing
    if kind == "add":
        thing, wear = _added(rng, chinese, thing, after)
    values = {
        "a": rng.choice(words[after.animal]),
        "o": rng.choice(words[before.animal]),
        "c": rng.choice(words[after.colour]),
        "t": thing,
        "x": wear,
        "p": rng.choice(words[after.background]),
        "v": rng.choice(words[after.action]),
    }
    text = rng.choice((CHINESE_EDITS if chinese else ENGLISH_EDITS)[kind]).format(**values)
    if chinese:
        return rng.choice(("", "", "", "请")) + text + rng.choice(("", "", "。", "，其他不变"))
    return _english_frame(rng, text)


def _added(rng: random.Random, chinese: bool, thing: str, after: Scene) -> tuple[str, str]:
    """What is put on, in its colour, alone and as one says it of somebody."""
    words = ZH if chinese else EN
    if after.accent:
        thing = rng.choice(words[after.accent]) + ("" if chinese else " ") + thing
    if chinese:
        verb = "穿上" if after.accessory == "dress" else rng.choice(("戴上", "戴"))
        return thing, verb + thing
    return thing, thing if after.accessory == "glasses" else article(thing)


def _english_frame(rng: random.Random, text: str) -> str:
    """With "please" and with what to keep, or without."""
    if rng.random() < 0.2:
        text = f"please {text}"
    if rng.random() < 0.15:
        text += rng.choice(
            (", keep everything else", ", nothing else", ", please", " and keep the rest")
        )
    return finish(rng, text)
