"""What Kind Words finds, what it lets pass, and what it answers."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.core.kind_words import (
    ALSO_AVOIDED,
    DRAW_SOMETHING_KIND,
    LONGEST_TEXT,
    MOST_ENTRIES,
    STOP,
    SUBJECT,
    entries_of,
    judge,
    language_of,
    word_list,
)
from pack.core.word_forms import expanded, inflected, readings
from pack.tests.conftest import ROOT

LIST = json.loads((ROOT / "core" / "kind_words.json").read_text(encoding="utf-8"))
KNOWN = word_list()
ENGLISH = [w for c in LIST["categories"].values() for k in ("en", "en_as_written") for w in c[k]]
CHINESE = [w for c in LIST["categories"].values() for w in c["zh"]]
FIRST = [w for c in LIST["categories"].values() for w in c.get("zh_first", [])]
WORDS = [w for w in ENGLISH if w.isascii() and w.isalpha()]
SIMPLE = {pair[1]: pair[0] for line in LIST["traditional"] for pair in line.split()}

# What children ask for, with words in it that come close to those of the list.
PROMPTS = """
a little bear with a hat
a bunny in a red dress dancing in the snow
a shooting star over a sleeping fox
two killer whales jump out of the sea
a panda eats bamboo shoots
a water gun fight with three ducks
a mouse slices a blood orange
a hot dog with a smiling face
a cat in a classroom with a grape
an assistant elephant with glasses
it's hot today, draw a penguin with ice cream
the pen is blue and the pig is pink
the bear's hit song, with a guitar
a skilled knight with a sword and a shield
a friendly dragon breathes fire on a cake
a pirate parrot with a treasure map
a little ghost says boo
a witch and her cat on a broom
a ninja frog
a robot dinosaur, green
a tie-dye t-shirt for my puppy
sh, it is sleeping. Is the fox?
a pussycat and a cockatoo in a tree
a peacock with its tail open
a robin redbreast on a snowy branch
a donkey and an ox in a barn
the ugly duckling becomes a swan
a monster that is not scary
a spider that isn't scary, with boots
dumbo the elephant flies
a hamster lifting dumbbells
a bear at the drugstore buys plasters
a hedgehog doing a handstand
the fox sits under a weeping willow
a firefighter dog puts out a fire
a doctor bunny with a syringe
a caterpillar on a leaf
3 pigs and 5 hens
4 ducks, 2 dogs & 1 cat!
a tiger playing tug of war with a lion
a cat playing dead
a knife and fork and a plate with pancakes
a bear sews with needle and thread
a lion plays basketball and shoots hoops
an astronaut mouse on the moon in a rocket
a fish tank with goldfish
a bath bomb and a rubber duck
snails in the rain, watercolour
a skeleton of a dinosaur in a museum
a polar bear with a scarf and mittens
a class of baby ducks crossing the street
I love my mum, draw us as foxes
a turtle that is very very slow
a bear heading home in the evening
a frog sings in the bathtub
the three little kittens lost their mittens
a giraffe with a bow tie
a unicorn with rainbow hair
a happy sloth hanging from a branch
a squirrel hides an acorn under dead leaves
a cock-a-doodle-doo rooster wakes everyone
a water pistol and a bubble gun
an ugly bug meets a horny toad
an ox and an ass in a stable
a murder of crows, rolling a six-sided die
a killer robot with a dead battery
a cat shoots a penalty and is shooting a ball
a wine red scarf and a devil mask
H-E-L-L-O kitty
h e l l o
a blue tit on a mushroom
C L A S S of 2026
s e a s h e l l
h-e-l-l-o, k-i-t-t-y
h e l l o k i t t y
d r a w a s h e l l
p l e a s e d r a w m e a n a s s i s t a n t
marshmallows over an open fire
chestnuts roasting on an open fire
a cat by the open fire, cosy
spic and span kitchen
cut yourself a slice of cake
the bear cuts himself a big piece of pie
bats hang themselves upside down
a monkey hangs itself by its tail
a mouse hanged her coat on a hook
a picture hanged on the wall
一只戴帽子的小熊
穿裙子的小兔子在雪地里跳舞
小猫在草地上追蝴蝶
两只小狗在海边堆沙堡
小老虎拿着水枪玩水
小松鼠吃血橙
大麻雀站在电线上
小熊吃大麻花
兔子弹钢琴
小猴子弹吉他，小鸟唱歌
我们一起做爱心卡片送给妈妈
他叫做爱丽丝，是一只小白兔
蓝色情人节贺卡，两只小猫
绿色情绪小怪兽
小鸭子用消毒品洗手
不可怕的小怪兽
一点也不吓人的恐龙
树上吊着一个气球
屋顶上吊着彩灯
小熊玩火车
把玩具放火车上
小象放火箭上天
小朋友们打架子鼓
小猫把绳子打死结
小猪笑起来有红酒窝
性感冒了的小猪盖被子
一棵树下有林阴道
一大片金黄片片落叶
小羊练标枪
魔鬼鱼在海里游
跳楼梯的青蛙
废物利用做的小机器人
丑小鸭变成白天鹅
可爱的小鬼过万圣节
孙悟空和小熊
小海盗和鹦鹉找宝藏
骑士和喷火龙做朋友
医生小兔给小熊打针
熊猫宝宝吃竹子
小狐狸累死了，躺在床上睡觉
五只企鹅滑冰
戴眼镜的小猪在看书
小蜗牛背着房子
老虎妈妈抱着小老虎
月亮上的兔子
红酒色的裙子和红缨枪
火枪手猫
小蝌蚪的变态
小猪滚蛋糕
提高个人质量，女人质疑
蚊子弹走了
改变态度
用剪刀和刀叉，穿着冰刀
石头剪刀布
去死海玩，笑死了
妈妈的帽子，我妈的围巾
小鸡巴士
粉白相间的裙子和白粉色的蝴蝶结
体操你会做吗
猩猩妈的香蕉
刺猬妈的帽子
龟妈的壳
小长颈鹿和长颈鹿妈的围巾
双手掐腰的小熊
小兔子掐着腰
水果刀切苹果
医生小熊拿着手术刀
美工刀和彩纸
指甲刀
农民小熊拿着镰刀割麦子
海盗的弯刀
血管里的红细胞
游戏里的血量条
小熊满血复活
白粉墙上的猫
走了狗屎运
小猫的铲屎官
你不是笨蛋
""".strip().splitlines()


def test_the_lists_hold_what_they_should() -> None:
    assert len(PROMPTS) >= 100 and min(len(ENGLISH), len(CHINESE)) >= 150
    assert len(set(ENGLISH)) == len(ENGLISH) and len(set(CHINESE)) == len(CHINESE)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ordinary_wishes_pass(prompt) -> None:
    assert KNOWN.find(prompt) == ()
    assert judge(prompt, STOP, "", KNOWN) == (prompt, "", True, ())


@pytest.mark.parametrize("category", LIST["categories"])
def test_every_entry_is_found_in_its_category(category) -> None:
    lists = LIST["categories"][category]
    english, emoji = lists["en"] + lists["en_as_written"], LIST["emoji"].get(category, [])
    chinese = lists["zh"] + lists.get("zh_first", []) + emoji
    sentences = [f"a bear, {w}!" for w in english] + [f"小熊：{w}呢" for w in chinese]
    assert [s for s in sentences if category not in KNOWN.find(s)] == []


def test_every_harmless_phrase_passes_and_hides_nothing_beside_it() -> None:
    phrases = expanded(LIST["harmless"]["en"] + LIST["harmless"]["zh"])
    assert [p for p in phrases if KNOWN.find(p)] == []
    for sentence in (
        "a shooting star and a gun",
        "kill the killer whale",
        "水枪和手枪",
        "杀菌杀人",
    ):
        assert KNOWN.find(sentence)


@pytest.mark.parametrize(
    "word",
    ["kills", "killed", "killing", "Killer", "stabbing", "stabbed", "bombs", "corpses", "knives"]
    + ["torturing", "tortured", "gun's", "machine-guns", "bears/guns", "dying", "BLOODY", "k!ll!"]
    + ["k1ll", "kiiiill", "killlll", "k*ll", "gun2", "2guns", "$ex", "mur-der", "mu-r-der"]
    + [
        "w.e.a.p.o.n",
        "we.ap.on",
        "ki ll",
        "gu n",
        "k 1 l l",
        "ki\u200bll",
        "k\u00edll",
        "self-harm",
    ]
    + ["kidnapped", "kidnapping", "kidnapper", "shitty", "AK-47", "AK 47", "ak47", "ki11", "a$$"]
    + ["cut herself", "hurts himself", "hang yourself", "k i l l", "🔪", "💀", "☠️", "傻B"]
    + ["手*枪", "杀 人", "杀.人", "殺人", "手槍", "屍體", "三Ｋ党", "💣", "🖕🏽", "杀kill熊"],
)
def test_other_ways_to_write_them(word) -> None:
    assert KNOWN.find(word) and KNOWN.find(f"a bear {word} a cat") and KNOWN.find(f"小熊,{word},猫")


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("a bear with a knife", "拿着刀的小熊"),
        ("a dead kitten", "死了的小猫"),
        ("the kitten died", "小猫死了"),
        ("a bear without clothes", "没穿衣服的小熊"),
        ("he strips naked", "他脱光了"),
        ("she undresses", "她脱衣服"),
        ("a bare bottom", "光屁股"),
        ("a bloody bear", "带血的小熊"),
        ("blood all over", "满身血"),
        ("dog shit", "狗屎"),
        ("fuck you", "操你妈"),
        ("a cunt", "傻b"),
        ("a penis", "鸡巴"),
        ("shitty", "妈的"),
        ("a glass of wine", "一杯葡萄酒"),
        ("strangle a kitten", "掐小猫"),
        ("open fire", "开炮"),
        ("killed by a bomb", "炸死"),
        ("bitten to death", "咬死"),
        ("hangs himself", "吊死"),
        ("jumps off a bridge", "跳河"),
        ("to slaughter a pig", "屠宰小猪"),
        ("heroin", "白粉"),
        ("nigger", "黑鬼"),
        ("kidnapped", "绑架"),
        ("a bear with a toy gun", "拿着玩具枪的小熊"),
        ("a toy pistol", "玩具手枪"),
        ("a toy knife", "玩具刀"),
        ("a nerf gun", "软弹枪"),
        ("a kitchen knife", "菜刀"),
        ("a bear with a pocket knife", "拿着小刀的小熊"),
        ("you are stupid", "你是笨蛋"),
        ("a stupid bear", "大笨蛋小熊"),
        ("he was hanged", "他被吊死"),
        ("hanged from a tree", "吊死在树上"),
        ("covered in blood", "沾满血的小熊"),
        ("the soldiers open fire on the crowd", "士兵开枪"),
        ("he cuts himself", "他割腕"),
        ("a razor blade", "刀片"),
        ("a coffin", "棺材"),
        ("shoots at a cat", "射击小猫"),
        ("a murderer", "凶手"),
        ("stupidity", "愚蠢"),
        ("slavery", "奴隶制"),
    ],
)
def test_what_is_found_in_one_language_is_found_in_the_other(english, chinese) -> None:
    assert KNOWN.find(english) and KNOWN.find(chinese)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("a bear with a water pistol", "拿着水枪的小熊"),
        ("a bubble gun", "泡泡枪"),
        ("a starting pistol at the sports day", "运动会上的发令枪"),
        ("a fruit knife on a kitchen table", "厨房桌上的水果刀"),
        ("a scalpel", "手术刀"),
        ("a boxcutter", "美工刀"),
        ("a craft knife and paper", "裁纸刀和彩纸"),
        ("nail clippers", "指甲刀"),
        ("a sickle", "镰刀"),
        ("a butter knife", "黄油刀"),
        ("a cheese knife", "奶酪刀"),
        ("a cutlass", "弯刀"),
        ("a steak knife", "牛排刀"),
        ("snow white's poisoned apple", "白雪公主的毒苹果"),
        ("a razor for dad", "爸爸的剃须刀"),
        ("a silly bear", "傻乎乎的小熊"),
        ("hanging from a branch", "挂在树枝上"),
        ("blood vessels in a science book", "科学书里的血管"),
    ],
)
def test_what_passes_in_one_language_passes_in_the_other(english, chinese) -> None:
    assert (KNOWN.find(english), KNOWN.find(chinese)) == ((), ())


@pytest.mark.parametrize(
    "text",
    [
        "妈的",
        "妈 的",
        "小熊，妈的",
        "小熊 妈的",
        "bear妈的",
        "他妈的",
        "真妈的烦",
        "一只妈的熊",
        "媽的",
    ]
    + [
        "操你妈的",
        "狗屎",
        "一坨屎",
        "吸白粉",
        "一包白粉",
        "掐小猫",
        "互相掐",
        "拿着刀",
        "砍刀",
        "血",
    ]
    + ["满手血", "笨蛋", "open fire", "they open fire", "cut yourself", "cuts himself with glass"]
    + [
        "b l o o d m o o n g o r e",
        "cut herself a lot",
        "hanged on a hook",
        "hanged up by the neck",
    ]
    + ["hangs himself", "they hang themselves from a beam", "a spic", "the dog was hanged"],
)
def test_the_bad_meaning_beside_a_harmless_one_is_found(text) -> None:
    assert KNOWN.find(text)


def test_what_is_found_only_first_can_be_added_and_allowed() -> None:
    assert not KNOWN.find("猩猩妈的") and word_list(("妈的",)).find("猩猩妈的")
    assert not word_list((), ("妈的",)).find("妈的")


# ------------------------------------------------------------------------- words spelled apart
@pytest.mark.parametrize(
    "text",
    ["f u c k y o u", "i k i l l y o u", "g o t o h e l l", "k-i-l-l-b-e-a-r", "a d e a d c a t"]
    + ["x f u c k", "z k i l l", "h e l l o f u c k", "h e l l", "s h u t u p", "b.e.a.t u.p"]
    + ["d r a w h e l l", "d r a w a d e a d c a t", "d r a w a s h e l l x", "a s h e l l"]
    + ["b e a r s k i l l", "t h i s h e l l", "h e l l  o", "h-e l-l-o", "y o u r a s s"],
)
def test_a_word_spelled_apart_is_found_with_letters_beside_it(text) -> None:
    assert KNOWN.find(text) and KNOWN.find(f"a bear, {text}!")


def test_each_word_that_may_be_spelled_apart_needs_it_and_passes() -> None:
    words = LIST["harmless"]["en_spelled"]
    assert words == sorted(set(words))
    assert [w for w in words if KNOWN.find(w) or KNOWN.find(" ".join(w.replace(" ", "")))] == []
    strict = dataclasses.replace(KNOWN, harmless_spelled=frozenset())
    assert [w for w in words if not strict.find(" ".join(w.replace(" ", "")))] == []


def test_a_word_to_avoid_is_found_spelled_apart_though_the_list_has_it_as_harmless() -> None:
    mine = word_list(("hello",))
    assert not KNOWN.find("h e l l o") and mine.find("h e l l o") == ("horror", ALSO_AVOIDED)


gaps = st.sampled_from([" ", ".", "-", " . ", "_", "*", "..", "·", "~"])


@given(st.sampled_from(WORDS), gaps, st.sampled_from(["", "please draw ", "画"]))
def test_letters_spelled_apart_are_found(word, gap, before) -> None:
    assert KNOWN.find(before + gap.join(word) + ", thank you")


HARMLESS = {
    "".join(words[:-1] + [last])
    for words in map(str.split, LIST["harmless"]["en_spelled"])
    for last in inflected(words[-1])
}
stray = st.text("abcdefghijklmnopqrstuvwxyz", max_size=2)


@given(st.sampled_from([w for w in ENGLISH if len(w) <= 20]), gaps, stray, stray)
def test_stray_letters_beside_a_word_spelled_apart_hide_nothing(entry, gap, before, after) -> None:
    letters = before + re.sub("[^a-z0-9]", "", entry) + after
    if not HARMLESS & readings(letters):
        assert KNOWN.find(gap.join(letters))


@given(st.sampled_from(WORDS), st.data())
def test_full_width_capitals_and_long_letters_are_found(word, data) -> None:
    wide = st.tuples(st.booleans(), st.booleans(), st.sampled_from([1, 1, 1, 4]))
    written = ""
    for letter in word:
        full, capital, times = data.draw(wide)
        one = letter.upper() if capital else letter
        written += (chr(ord(one) + 0xFEE0) if full else one) * times
    if not re.search(r"(.)\1", word):  # two of a letter drawn out are one letter drawn out
        assert KNOWN.find(f"a bear with {written} and a hat")


@given(st.sampled_from(CHINESE + FIRST), st.data())
def test_chinese_is_found_with_gaps_and_in_traditional_characters(word, data) -> None:
    between = st.sampled_from(["", "", " ", ".", "*", "-", "\u200b", "　"])
    written = ""
    for character in word:
        traditional = data.draw(st.booleans())
        written += SIMPLE.get(character, character) if traditional else character
        written += data.draw(between)
    assert KNOWN.find(f"一只，{written}的熊")


@given(st.text(max_size=80))
def test_any_text_is_read(text) -> None:
    verdict = judge(text, DRAW_SOMETHING_KIND, "", KNOWN)
    assert verdict.words and verdict.kind == (not verdict.categories)


def test_a_long_text_takes_no_time() -> None:
    start = time.process_time()
    for text in ("a b c 1 1 1 k@ll!!! 小熊*** " * 80, "a " * LONGEST_TEXT):
        KNOWN.find(text)
    assert time.process_time() - start < 3
    with pytest.raises(ValueError, match="words has 2001 characters; 2000 are possible"):
        judge("a" * 2001, STOP, "", KNOWN)


# ---------------------------------------------------------------------------------- the answers
@pytest.mark.parametrize(("words", "language"), [("a bear with a gun", "en"), ("拿枪的小熊", "zh")])
def test_the_answer_is_in_the_language_of_the_words_and_does_not_repeat_them(
    words, language
) -> None:
    verdict = judge(words, DRAW_SOMETHING_KIND, "", KNOWN, "zh" if language == "en" else "en")
    assert verdict.words == SUBJECT[language] and not verdict.kind
    assert language_of(verdict.answer) == language and verdict.words in verdict.answer
    assert verdict.categories == ("weapons",)
    assert not KNOWN.find(verdict.answer)
    stopped = judge(words, STOP, "", KNOWN)
    assert stopped.words is None and language_of(stopped.answer) == language
    assert not KNOWN.find(stopped.answer) and stopped.answer != verdict.answer


def test_another_subject_is_drawn_instead() -> None:
    verdict = judge("bomb", DRAW_SOMETHING_KIND, " a cat with a kite ", KNOWN)
    assert verdict.words == "a cat with a kite"
    assert verdict.answer == "Let us draw something friendly: a cat with a kite."


IN_BOTH = "a cat with a kite · 放风筝的小猫"


@pytest.mark.parametrize(("words", "place"), [("a bear with a gun", 0), ("拿枪的小熊", 1)])
@pytest.mark.parametrize("instead", [IN_BOTH, "·".join(reversed(IN_BOTH.split("·")))])
def test_of_a_subject_in_both_languages_that_of_the_words_is_taken(words, place, instead) -> None:
    wanted = IN_BOTH.split(" · ")[place]
    for when in (DRAW_SOMETHING_KIND, STOP):
        answer = judge(words, when, instead, KNOWN).answer
        assert answer.rstrip(".。").endswith(wanted) and "·" not in answer
    verdict = judge("", STOP, instead, KNOWN, ("en", "zh")[place])
    assert verdict.words == wanted and language_of(verdict.answer) == ("en", "zh")[place]


@pytest.mark.parametrize("instead", ["哈利·波特", "a cat · a dog", "a · 猫 · b", "· 猫", "a cat"])
def test_a_dot_that_parts_no_languages_stays(instead) -> None:
    for words in ("bomb", "炸弹"):
        assert judge(words, DRAW_SOMETHING_KIND, instead, KNOWN).words == instead


@pytest.mark.parametrize("when", [DRAW_SOMETHING_KIND, STOP])
@pytest.mark.parametrize("words", ["", " \n\t　"])
def test_an_empty_box_is_no_error(words, when) -> None:
    assert judge(words, when, "", KNOWN, "zh").words == SUBJECT["zh"]
    verdict = judge(words, when, "a cat", KNOWN, "zh")
    assert (verdict.words, verdict.kind) == ("a cat", True)
    assert verdict.answer == "Nothing is written yet. Let us draw a cat."


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(ValueError, match="instead has something that the list avoids"):
        judge("a cat", STOP, "a cat with a gun", KNOWN)
    with pytest.raises(ValueError, match="when_found is 'perhaps': choose draw something kind"):
        judge("a cat", "perhaps", "", KNOWN)


# ------------------------------------------------------------------------------- what people add
@pytest.mark.parametrize(
    "text", ["spider, ghost", "spider\nghost", "spider、ghost", " spider，ghost,"]
)
def test_entries_stand_on_lines_or_between_commas(text) -> None:
    assert entries_of(text, "also_avoid") == ("spider", "ghost")


def test_added_words_are_found_with_their_endings_and_only_then() -> None:
    mine = word_list(("spider", "squid game", "gta 5", "哥斯拉", "🎃", "蛇"))
    for text in ("two Spiders", "s.p.i.d.e.r", "squid games", "GTA 5", "大哥斯拉", "🎃", "一条蛇"):
        assert mine.find(text) == (ALSO_AVOIDED,), text
        assert not KNOWN.find(text)
    assert not mine.find("a squid plays a game")


def test_allowed_words_pass_and_the_others_stay() -> None:
    mine = word_list((), ("zombie", "gun", "nightmare before christmas", "啤酒"))
    for text in ("big guns", "g.u.n", "the Nightmare before Christmas", "一杯啤酒"):
        assert KNOWN.find(text) and not mine.find(text), text
    for text in ("gunshot", "a nightmare", "啤酒和白酒", "pistol"):
        assert mine.find(text), text


def test_what_is_avoided_and_allowed_is_avoided() -> None:
    assert word_list(("beer",), ("beer",)).find("beers")
    assert word_list(("water gun",)).find("water guns") and word_list(("水枪",)).find("水枪")
    assert not word_list(("gun",)).find("a water gun")  # what is harmless stays harmless


@pytest.mark.parametrize("entry", ["a", "7", "!!!", ". 。", "x" * 61])
def test_an_entry_that_cannot_be_read_is_named_with_its_source(entry) -> None:
    with pytest.raises(ValueError, match=r"^also_avoid: .*[Ww]rite one word or phrase per line"):
        entries_of(f"spider\n{entry}", "also_avoid")


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(ValueError, match=f"{MOST_ENTRIES + 1} entries"):
        entries_of(",".join(f"word{n}" for n in range(MOST_ENTRIES + 1)), "allowed")


@given(st.text(min_size=2, max_size=20))
def test_whatever_can_be_added_is_found(entry) -> None:
    try:
        entries = entries_of(entry, "also_avoid")
    except ValueError:
        return
    for one in entries:
        assert word_list((one,)).find(one), one
