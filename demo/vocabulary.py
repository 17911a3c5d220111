"""The English and Chinese words for what a scene shows, and words that mean nothing in it."""

from __future__ import annotations

import random
import re

from .scenes import ANIMALS

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


_ANIMAL_WORDS = re.compile(
    r"\b(?:"
    + "|".join(word for animal in ANIMALS for word in EN[animal])
    + r")\b|"
    + "|".join(word for animal in ANIMALS for word in ZH[animal]),
    re.ASCII | re.IGNORECASE,
)


def names_animal(text: str) -> bool:
    """Whether a prompt has one of the words for an animal."""
    return _ANIMAL_WORDS.search(text) is not None


def article(phrase: str) -> str:
    """With "a" or "an" before it."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def finish(rng: random.Random, text: str) -> str:
    """With capitals and a full stop as people put them, or without."""
    chance = rng.random()
    if chance < 0.35:
        text = text[0].upper() + text[1:]
    elif chance < 0.4:
        text = text.title()
    elif chance < 0.42:
        text = text.upper()
    return text + rng.choice(("", "", "", ".", "!"))
