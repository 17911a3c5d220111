"""Says in many English and Chinese wordings what a scene shows, or how one scene becomes another.

A description names whatever is not the default (no accessory, standing, plain background, the
animal's natural colour), so a prompt that leaves something out has one right picture, too.
"""

from __future__ import annotations

import random
from dataclasses import replace

from .animals import (
    ACCESSORIES,
    ACTIONS,
    ANIMALS,
    BACKGROUNDS,
    COLOURS,
    NATURAL,
    Scene,
    random_scene,
)

EN = {
    "bear": ["bear", "bear", "teddy bear", "bear cub", "teddy"],
    "bunny": ["bunny", "rabbit", "hare", "bunny rabbit"],
    "cat": ["cat", "cat", "kitten", "kitty"],
    "dog": ["dog", "dog", "puppy", "doggy"],
    "fox": ["fox"],
    "pig": ["pig", "pig", "piglet", "piggy"],
    "mouse": ["mouse", "mouse", "rat"],
    "panda": ["panda", "panda", "panda bear"],
    "frog": ["frog", "frog", "toad"],
    "duck": ["duck", "duck", "duckling"],
    "elephant": ["elephant"],
    "lion": ["lion", "lion", "lion cub"],
    "red": ["red", "red", "crimson", "scarlet"],
    "orange": ["orange", "orange", "orange-coloured"],
    "yellow": ["yellow", "yellow", "golden"],
    "green": ["green", "green", "emerald"],
    "blue": ["blue", "blue", "azure"],
    "purple": ["purple", "purple", "violet"],
    "pink": ["pink", "pink", "rosy"],
    "brown": ["brown", "brown", "chocolate"],
    "hat": ["hat", "hat", "cap", "top hat"],
    "scarf": ["scarf", "scarf", "muffler"],
    "dress": ["dress", "dress", "skirt", "gown"],
    "glasses": ["glasses", "glasses", "spectacles", "eyeglasses"],
    "standing": ["standing", "standing", "standing up"],
    "sitting": ["sitting", "sitting", "sitting down", "seated"],
    "dancing": ["dancing", "dancing", "dancing happily"],
    "sleeping": ["sleeping", "asleep", "lying asleep", "sleeping soundly"],
    "reading": ["reading", "reading a book", "reading a story", "with a book"],
    "plain": ["on a plain background", "with a plain background", "on a blank background"],
    "meadow": ["in a meadow", "on the grass", "in a green field", "among flowers", "in the meadow"],
    "snow": ["in the snow", "in snow", "in a snowy field", "in winter", "on a snowy day"],
    "beach": ["on the beach", "at the beach", "by the sea", "at the seaside", "on a sunny beach"],
    "night": ["at night", "under the stars", "under the moon", "in the night", "by moonlight"],
    "room": ["in a room", "indoors", "at home", "in the house", "inside a room"],
}
ZH = {
    "bear": ["熊", "小熊", "小熊", "狗熊", "大熊"],
    "bunny": ["兔子", "小兔子", "兔", "小兔", "小白兔"],
    "cat": ["猫", "小猫", "猫咪", "猫猫"],
    "dog": ["狗", "小狗", "狗狗"],
    "fox": ["狐狸", "小狐狸"],
    "pig": ["猪", "小猪", "猪猪"],
    "mouse": ["老鼠", "小老鼠", "小鼠"],
    "panda": ["熊猫", "大熊猫", "小熊猫"],
    "frog": ["青蛙", "小青蛙", "蛙"],
    "duck": ["鸭子", "小鸭子", "小鸭"],
    "elephant": ["大象", "小象", "象"],
    "lion": ["狮子", "小狮子", "雄狮"],
    "red": ["红色", "红"],
    "orange": ["橙色", "橘色", "橘黄色"],
    "yellow": ["黄色", "黄", "金黄色"],
    "green": ["绿色", "绿"],
    "blue": ["蓝色", "蓝"],
    "purple": ["紫色", "紫"],
    "pink": ["粉色", "粉红色"],
    "brown": ["棕色", "褐色", "咖啡色"],
    "hat": ["帽子", "礼帽", "小帽子"],
    "scarf": ["围巾", "围脖"],
    "dress": ["裙子", "连衣裙", "小裙子"],
    "glasses": ["眼镜", "一副眼镜"],
    "standing": ["站着", "站立", "正站着"],
    "sitting": ["坐着", "坐在那里", "坐"],
    "dancing": ["跳舞", "在跳舞", "正在跳舞", "跳着舞"],
    "sleeping": ["睡觉", "在睡觉", "正在睡觉", "睡着了"],
    "reading": ["看书", "在看书", "读书", "正在读书", "阅读"],
    "plain": ["纯色背景", "简单背景", "空白背景"],
    "meadow": ["草地上", "在草地上", "在草原上", "在花丛中", "在田野里"],
    "snow": ["在雪地里", "雪地里", "在雪中", "下雪天", "在冬天的雪地上"],
    "beach": ["在海滩上", "沙滩上", "在海边", "海边", "在沙滩上"],
    "night": ["在夜里", "夜晚", "在星空下", "晚上", "在月光下"],
    "room": ["在房间里", "屋里", "在家里", "室内", "在屋子里"],
}
ADJECTIVES = (
    *("small", "little", "cute", "happy", "big", "tiny", "lovely", "funny", "sweet", "friendly"),
    *("fluffy", "young", "old", "cheerful", "adorable", "charming", "fat", "nice", "smiling"),
)
ADJECTIVES_ZH = ("可爱的", "快乐的", "胖胖的", "开心的", "漂亮的", "小小的", "毛茸茸的", "友好的")
OPENINGS = (
    *("a photo of", "a drawing of", "a cartoon of", "a picture of", "an illustration of"),
    *("please draw", "draw", "I want", "show me", "there is", "imagine", "a painting of"),
    *("a simple drawing of", "generate an image of", "a scene with", "once upon a time", "here is"),
)
OPENINGS_ZH = (
    "画",
    "请画",
    "一张照片",
    "一幅画",
    "卡通",
    "插画",
    "我想要",
    "生成",
    "图片里有",
    "这是",
)
CLOSINGS = (
    *("high quality", "simple drawing", "cartoon style", "flat colours", "best quality"),
    *("highly detailed", "4k", "masterpiece", "clean lines", "children's book", "vector art"),
    *("soft light", "digital art", "Ultra HD", "very cute", "cinematic composition"),
)
CLOSINGS_ZH = (
    "高清",
    "简单的画",
    "卡通风格",
    "扁平风格",
    "高质量",
    "儿童插画",
    "细节丰富",
    "超清",
    "杰作",
)
STRANGERS = tuple(
    """
    mountain table seven music castle of and very quickly bottle engine river because paper under
    window history garden computer between gently coffee bicycle market old tomorrow letter with
    street number while tree sugar king story cloud road spoon metal beautiful apple train above
    guitar silver dream summer pencil bridge city robot orchestra breakfast happily near bright
    """.split()  # noqa: SIM905
)
STRANGERS_ZH = tuple(
    """
    山 桌子 音乐 城堡 河流 窗户 历史 电脑 咖啡 自行车 明天 街道 树 故事 云 道路 苹果 火车
    吉他 夏天 铅笔 桥 城市 机器人 早餐 非常 旁边 明亮 和 慢慢地
    """.split()  # noqa: SIM905
)


def article(phrase: str) -> str:
    """With "a" or "an" before it."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def describe(rng: random.Random, scene: Scene) -> str:
    """One of very many prompts for `scene`."""
    return (_chinese if rng.random() < 0.4 else _english)(rng, scene)


def _named(rng: random.Random, scene: Scene) -> tuple[bool, bool, bool, bool]:
    """Which of colour, accessory, action and background the prompt names."""
    return (
        scene.colour != NATURAL[scene.animal] or rng.random() < 0.5,
        scene.accessory != "none",
        scene.action != "standing" or rng.random() < 0.25,
        scene.background != "plain" or rng.random() < 0.15,
    )


def _sprinkle(rng: random.Random, words: list[str], strangers: tuple[str, ...]) -> list[str]:
    """Puts words in between that mean nothing here."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        words.insert(rng.randint(0, len(words)), rng.choice(strangers))
    return words


def _english(rng: random.Random, scene: Scene) -> str:
    say_colour, say_accessory, say_action, say_place = _named(rng, scene)
    animal, colour = rng.choice(EN[scene.animal]), rng.choice(EN[scene.colour])
    adjective = rng.choice(ADJECTIVES)
    noun = f"{adjective} {animal}" if rng.random() < 0.35 else animal
    late = say_colour and rng.random() < 0.1
    if say_colour and not late:
        noun = (
            f"{colour} {noun}" if rng.random() < 0.5 else noun.replace(animal, f"{colour} {animal}")
        )
    accessory = action = place = ""
    if say_accessory:
        thing = rng.choice(EN[scene.accessory])
        if scene.accent:
            thing = f"{rng.choice(EN[scene.accent])} {thing}"
        if scene.accessory != "glasses":
            thing = rng.choice((article(thing), article(thing), f"its {thing}", f"the {thing}"))
        accessory = rng.choice(("wearing {}", "with {}", "in {}", "who wears {}", "that has {} on"))
        accessory = accessory.format(thing)
    if say_action:
        action = rng.choice(EN[scene.action])
    if say_place:
        place = rng.choice(EN[scene.background])
    if rng.random() < 0.2:
        return _english_tags(rng, animal, colour if say_colour else "", accessory, action, place)
    subject = rng.choice((article(noun), article(noun), f"the {noun}", f"one {noun}", noun))
    if late:
        subject += rng.choice((f" that is {colour}", f", {colour},", f" coloured {colour}"))
    if action and not action.startswith("with"):
        action = rng.choice(("is {}", "{}", "{}", "that is {}", ", {},", "which is {}")).format(
            action
        )
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
        words = _sprinkle(rng, words, STRANGERS)
    text = " ".join(word for word in words if word).replace(" ,", ",").strip(", ")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        text += f", {rng.choice(CLOSINGS)}"
    return _finish(rng, text)


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
    return _finish(rng, rng.choice((", ", ", ", " ", "; ")).join(tags))


def _finish(rng: random.Random, text: str) -> str:
    chance = rng.random()
    if chance < 0.35:
        text = text[0].upper() + text[1:]
    elif chance < 0.4:
        text = text.title()
    elif chance < 0.42:
        text = text.upper()
    return text + rng.choice(("", "", "", ".", "!"))


def _chinese(rng: random.Random, scene: Scene) -> str:
    say_colour, say_accessory, say_action, say_place = _named(rng, scene)
    animal = rng.choice(ZH[scene.animal])
    count = rng.choice(("一只", "一只", "一个", "", "这只", "有一只", "一头"))
    colour = rng.choice(ZH[scene.colour]) + rng.choice(("的", "的", "")) if say_colour else ""
    adjective = rng.choice(ADJECTIVES_ZH) if rng.random() < 0.3 else ""
    wearing = ""
    if say_accessory:
        thing = rng.choice(ZH[scene.accessory])
        if scene.accent:
            thing = rng.choice(ZH[scene.accent]) + rng.choice(("", "的")) + thing
        verb = "穿" if scene.accessory == "dress" else rng.choice(("戴", "戴", "系"))
        if scene.accessory in ("hat", "glasses"):
            verb = "戴"
        wearing = verb + rng.choice(("", "着", "了")) + thing
    action = rng.choice(ZH[scene.action]) if say_action else ""
    place = rng.choice(ZH[scene.background]) if say_place else ""
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
    if rng.random() < 0.3:
        text = rng.choice(OPENINGS_ZH) + rng.choice(("", "，", "：")) + text
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        text += rng.choice(("，", ",", " ")) + rng.choice(CLOSINGS_ZH)
    if rng.random() < 0.1:
        text = rng.choice(STRANGERS_ZH) + "，" + text
    elif rng.random() < 0.1:
        text += "，" + rng.choice(STRANGERS_ZH) + rng.choice(STRANGERS_ZH)
    return text + rng.choice(("", "", "。", "！"))


def scene_and_prompts(rng: random.Random, count: int) -> tuple[Scene, list[str]]:
    """A picture and `count` prompts for it; a few prompts name no animal or nothing at all."""
    scene = random_scene(rng)
    if rng.random() < 0.03:
        scene = replace(
            scene, colour=NATURAL[scene.animal], accessory="none", action="standing", accent=""
        )
        texts = []
        for _ in range(count):
            words = [rng.choice(STRANGERS) for _ in range(rng.randint(1, 6))]
            if scene.background != "plain":
                words.insert(rng.randint(0, len(words)), rng.choice(EN[scene.background]))
            texts.append(_finish(rng, " ".join([rng.choice(("a", "the", *OPENINGS)), *words])))
        return scene, texts
    return scene, [describe(rng, scene) for _ in range(count)]


# ------------------------------------------------------------------------------------- editing
EDITS = ("colour", "add", "remove", "background", "watermark", "identity", "animal", "action")
EDIT_WEIGHTS = (26, 20, 12, 20, 9, 5, 4, 4)


def scene_edit(rng: random.Random, count: int) -> tuple[str, Scene, Scene, list[str]]:
    """The kind of an edit, the picture before, the picture after and `count` instructions."""
    kind = rng.choices(EDITS, EDIT_WEIGHTS)[0]
    before = random_scene(rng)
    after = before
    if kind == "colour":
        after = replace(before, colour=_other(rng, COLOURS, before.colour))
    elif kind == "add":
        before = replace(before, accessory="none", accent="")
        accent = rng.choice(("", "", "red", "blue", "green", "purple"))
        accessory = rng.choice(ACCESSORIES[1:])
        after = replace(
            before, accessory=accessory, accent="" if accessory == "glasses" else accent
        )
    elif kind == "remove":
        if before.accessory == "none":
            before = replace(before, accessory=rng.choice(ACCESSORIES[1:]))
        after = replace(before, accessory="none")
    elif kind == "background":
        after = replace(before, background=_other(rng, BACKGROUNDS, before.background))
    elif kind == "watermark":
        before = replace(before, watermark=True)
    elif kind == "animal":
        after = replace(before, animal=_other(rng, ANIMALS, before.animal))
    elif kind == "action":
        after = replace(before, action=_other(rng, ACTIONS, before.action))
    return kind, before, after, [instruct(rng, kind, before, after) for _ in range(count)]


def _other(rng: random.Random, values: object, value: str) -> str:
    return rng.choice([v for v in values if v != value])  # type: ignore[attr-defined]


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
        if after.accent:
            thing = rng.choice(words[after.accent]) + ("" if chinese else " ") + thing
        if chinese:
            verb = "穿上" if worn == "dress" else rng.choice(("戴上", "戴"))
            wear = verb + thing
        else:
            wear = thing if worn == "glasses" else article(thing)
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
    if rng.random() < 0.2:
        text = f"please {text}"
    if rng.random() < 0.15:
        text += rng.choice(
            (", keep everything else", ", nothing else", ", please", " and keep the rest")
        )
    return _finish(rng, text)


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
    for twice in ("  ", ", ,", "，，", " ."):
        text = text.replace(twice, twice[-1])
    return text
