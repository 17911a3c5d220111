"""Finds what a child's picture should not be about, in English and in Chinese, and answers kindly.

A list of words is no guarantee: it knows no meaning. It is made to let ordinary wishes pass.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .word_forms import covered, expanded, folded, inflected, is_made_of, readings, spans

DRAW_SOMETHING_KIND, STOP = "draw something kind", "stop"
WHEN_FOUND = (DRAW_SOMETHING_KIND, STOP)
ALSO_AVOIDED = "words to avoid"  # the category of what people add
LONGEST_ENTRY, MOST_ENTRIES = 60, 1000
LONGEST_TEXT = 2000  # characters of a child's words: a wish, no book

SUBJECT = {"en": "a little bear with a balloon", "zh": "一只拿着气球的小熊"}
FOUND = {"en": "Let us draw something friendly: {}.", "zh": "我们来画点友好的吧：{}。"}
EMPTY = {"en": "Nothing is written yet. Let us draw {}.", "zh": "还没有写字。我们先来画{}吧。"}
STOPPED = {
    "en": "Let us think of something friendly to draw, such as {}.",
    "zh": "我们想一个友好的主意吧，比如{}。",
}

_FILE = Path(__file__).with_suffix(".json")
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_TOKEN = re.compile(r"[a-z0-9]+")
_LATIN = re.compile(r"[a-z0-9][a-z0-9 '&/._-]*")
_SEPARATORS = re.compile(r"[,;、，；\n\r]+")
_ENDS = frozenset(",;!?。、:\n\r")  # a Chinese word does not go on behind them
_MOST_PIECES = 20  # that a word or phrase is spelled apart into
_LONGEST_RUN = 60  # letters of harmless words spelled apart, one behind the other
_WIDEST_GAP = 3  # characters between two of them
# Read once as separators, and once as the letters that they look like.
_SYMBOLS = str.maketrans({"@": "a", "$": "s", "€": "e", "!": "i", "|": "l"})
_SYMBOL_IN_WORD = re.compile(r"[@$€]+(?=[a-z])|(?<=[a-z])[@$€]+|(?<=[a-z])[!|]+(?=[a-z])")


class Verdict(NamedTuple):
    """What becomes of a child's words. `words` is None where the run shall stop."""

    words: str | None
    answer: str  # empty if there is nothing to say
    kind: bool  # nothing was found
    categories: tuple[str, ...] = ()


class _Piece(NamedTuple):
    """A run of letters and digits, and what stands between it and the one before."""

    text: str
    gap: str


def language_of(text: str) -> str:
    """zh if there is a Chinese character in it, else en."""
    return "zh" if _CHINESE.search(text) else "en"


def entries_of(text: str, source: str) -> tuple[str, ...]:
    """Words and phrases, one per line or between commas. `source` is where they were written.

    Raises ValueError: a sentence that names the source and the entry that cannot be read.
    """
    found = tuple(dict.fromkeys(e for part in _SEPARATORS.split(text) if (e := part.strip())))
    if len(found) > MOST_ENTRIES:
        raise ValueError(f"{source} has {len(found)} entries; {MOST_ENTRIES} are possible.")
    for entry in found:
        letters = [c for c in _folded(entry) if _counts(c)]
        if len(entry) > LONGEST_ENTRY:
            raise ValueError(
                f"{source}: the entry that begins with {entry[:20]!r} is longer than "
                f"{LONGEST_ENTRY} characters. Write one word or phrase per line."
            )
        if not letters or (len(letters) == 1 and letters[0].isascii()):
            raise ValueError(
                f"{source}: {entry!r} is no word that can be looked for. Write one word or phrase "
                "per line, with two letters or one Chinese character at least."
            )
    return found


@functools.cache
def list_digest() -> str:
    """SHA-256, in hexadecimal, of the list of the pack."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()


@functools.cache
def _content() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


@functools.cache
def _simplified() -> dict[int, str]:
    pairs = " ".join(_content()["traditional"]).split()
    return {ord(traditional): simple for traditional, simple in pairs}


def _folded(text: str) -> str:
    return folded(text, _simplified())


@dataclass(frozen=True)
class WordList:
    """What to look for, by category, and what is harmless. All of it folded."""

    forms: Mapping[str, str]  # an English word in one of its forms -> category
    phrases: Mapping[tuple[str, ...], str]
    parts: Mapping[str, str]  # Chinese and other text, found wherever it stands -> category
    openings: frozenset[str]  # those of them that no Chinese character may stand before
    harmless_phrases: Mapping[str, Sequence[tuple[str, ...]]]  # by their first word
    harmless_parts: frozenset[str]
    harmless_spelled: frozenset[str]  # words that an entry may be a part of, letter by letter

    def find(self, text: str) -> tuple[str, ...]:
        """The categories of what stands in `text`, each once."""
        text = _folded(text)
        texts = dict.fromkeys((text, _SYMBOL_IN_WORD.sub(_letter, text)))
        found = [c for reading in texts for c in self._in_words(reading)]
        found += [self.forms[form] for form in covered(text, self.forms)]
        return tuple(dict.fromkeys(found + self._in_parts(text)))

    def _in_words(self, text: str) -> list[str]:
        pieces, found = _pieces(text), []
        harmless = self._harmless(pieces)
        for first in range(len(pieces)):
            for last in range(first, min(first + _MOST_PIECES, len(pieces))):
                if last > first and not _is_gap(pieces[last].gap):
                    break
                category = self._category(pieces, first, last)
                if category and not any(a <= first and last <= b for a, b in harmless):
                    found.append(category)
        return found

    def _category(self, every: list[_Piece], first: int, last: int) -> str | None:
        """Of what some pieces make together, if they make a word or phrase of the list."""
        pieces = every[first : last + 1]
        if len(pieces) == 1:
            known = (self._of_one(reading) for reading in sorted(readings(pieces[0].text)))
            return next((category for category in known if category), None)
        words = tuple(piece.text for piece in pieces)
        if words in self.phrases:
            return self.phrases[words]
        known = (self._of_one(reading) for reading in sorted(readings("".join(words))))
        category = next((category for category in known if category), None)
        if not category or pieces[0].gap.endswith("'"):  # there is no "s hot" in "it's hot"
            return None
        if not _is_spelled_apart(pieces) or self._is_harmless_run(every, first, last):
            return None
        return category

    def _of_one(self, word: str) -> str | None:
        return self.forms.get(word) or self.phrases.get((word,))

    def _is_harmless_run(self, pieces: list[_Piece], first: int, last: int) -> bool:
        """Whether single letters are a part of harmless words, as "h e l l" is in "h e l l o".

        All letters beside them count: "h e l l" is not, in "h e l l o x".
        """
        run = "".join(piece.text for piece in _run(pieces, first, last))
        if not last - first + 1 < len(run) <= _LONGEST_RUN:
            return False
        return any(is_made_of(reading, self.harmless_spelled) for reading in readings(run))

    def _harmless(self, pieces: list[_Piece]) -> list[tuple[int, int]]:
        """Where harmless phrases stand: first and last piece."""
        words = [piece.text for piece in pieces]
        return [
            (first, first + len(phrase) - 1)
            for first in range(len(words))
            for phrase in self.harmless_phrases.get(words[first], ())
            if tuple(words[first : first + len(phrase)]) == phrase
        ]

    def _in_parts(self, text: str) -> list[str]:
        places = _places(text)
        dense = "".join(text[place] for place in places)
        harmless = [span for part in self.harmless_parts for span in spans(part, dense)]
        return [
            category
            for part, category in self.parts.items()
            for start, end in spans(part, dense)
            if not any(a <= start and end <= b for a, b in harmless)
            and not (part in self.openings and _CHINESE.match(text[: places[start]][-1:]))
        ]


def _letter(match: re.Match[str]) -> str:
    return match.group().translate(_SYMBOLS)


def _pieces(text: str) -> list[_Piece]:
    found, end = [], 0
    for match in _TOKEN.finditer(text):
        found.append(_Piece(match.group(), text[end : match.start()]))
        end = match.end()
    return found


def _is_gap(gap: str) -> bool:
    """Whether a word may go on behind it."""
    return len(gap) <= _WIDEST_GAP and not any(c.isalnum() or c in "'\n\r" for c in gap)


def _is_spelled_apart(pieces: list[_Piece]) -> bool:
    """Whether these are pieces of one word rather than words: "k i ll" is, "pen is" is not.

    Single letters are. Others are if one of them has no vowel, or if hyphens and the like join
    them, or if they are three and more without spaces; but not across a pause: "Sh, it sleeps".
    """
    texts, gaps = [piece.text for piece in pieces], [piece.gap for piece in pieces[1:]]
    if all(len(text) == 1 for text in texts):
        return True
    if any(c.isdigit() for text in texts for c in text) or any(map(_is_pause, gaps)):
        return False
    if any(not set("aeiouy") & set(text) for text in texts):
        return True
    if all(set(gap) <= set("-_*~·•") for gap in gaps):
        return True
    return len(gaps) > 1 and not any(c.isspace() for gap in gaps for c in gap)


def _run(pieces: list[_Piece], first: int, last: int) -> list[_Piece]:
    """Single letters with those beside them in the same gaps; nothing if they are no such run."""
    gaps = {piece.gap for piece in pieces[first + 1 : last + 1]}
    if len(gaps) > 1 or any(len(piece.text) > 1 for piece in pieces[first : last + 1]):
        return []
    while first and pieces[first].gap in gaps and len(pieces[first - 1].text) == 1:
        first -= 1
    while last + 1 < len(pieces) and pieces[last + 1].gap in gaps:
        if len(pieces[last + 1].text) > 1:
            break
        last += 1
    return pieces[first : last + 1]


def _is_pause(gap: str) -> bool:
    return any(c.isspace() for c in gap) and not (_ENDS | {"."}).isdisjoint(gap)


def _places(text: str) -> list[int]:
    """Where letters, characters, emoji and ends of clauses stand: the rest hides nothing."""
    return [place for place, c in enumerate(text) if c in _ENDS or _counts(c)]


def _dense(text: str) -> str:
    return "".join(text[place] for place in _places(text))


def _counts(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) == "So"


@functools.lru_cache(maxsize=16)
def word_list(also_avoid: tuple[str, ...] = (), allowed: tuple[str, ...] = ()) -> WordList:
    """The list of the pack, with what people add. What both of them name is avoided."""
    builder = _Builder()
    for category, lists in _content()["categories"].items():
        builder.avoid(expanded(lists["en"]), category, endings=True)
        builder.avoid(expanded([*lists["en_as_written"], *lists["zh"]]), category, endings=False)
        builder.avoid_first(lists.get("zh_first", []), category)
    for category, emoji in _content()["emoji"].items():
        builder.avoid(emoji, category, endings=False)
    harmless = _content()["harmless"]
    builder.allow(expanded([*harmless["en"], *harmless["zh"]]), remove=False)
    builder.allow_spelled(harmless["en_spelled"])
    builder.allow(allowed, remove=True)
    builder.avoid(also_avoid, ALSO_AVOIDED, endings=True)
    return builder.list()


class _Builder:
    """Sorts entries by how they are looked for; a later one takes the place of an earlier one."""

    def __init__(self) -> None:
        self.forms: dict[str, str] = {}
        self.phrases: dict[tuple[str, ...], str] = {}
        self.parts: dict[str, str] = {}
        self.openings: set[str] = set()
        self.spelled: set[str] = set()
        self.harmless_phrases: set[tuple[str, ...]] = set()
        self.harmless_parts: set[str] = set()

    def avoid(self, entries: Iterable[str], category: str, endings: bool) -> None:
        """Look for these entries."""
        for entry in map(_folded, entries):
            words = _words(entry)
            if words is None:
                self.parts[_dense(entry)] = category
                self.openings.discard(_dense(entry))
                self.harmless_parts.discard(_dense(entry))
                continue
            for phrase in _endings(words, endings):
                self.harmless_phrases.discard(phrase)
                self.spelled.discard("".join(phrase))
                if len(phrase) == 1:
                    self.forms[phrase[0]] = category
                else:
                    self.phrases[phrase] = self.phrases[("".join(phrase),)] = category

    def avoid_first(self, entries: Sequence[str], category: str) -> None:
        """Look for these where no Chinese character stands before them."""
        self.avoid(entries, category, endings=False)
        self.openings.update(_dense(_folded(entry)) for entry in entries)

    def allow_spelled(self, entries: Iterable[str]) -> None:
        """Harmless letter by letter, though letters in them make an entry of the list."""
        for words in filter(None, map(_words, map(_folded, entries))):
            self.spelled.update("".join(phrase) for phrase in _endings(words, True))

    def allow(self, entries: Iterable[str], remove: bool) -> None:
        """Harmless where they stand; with `remove`, entries of the list that are equal go."""
        for entry in map(_folded, entries):
            words = _words(entry)
            if words is None:
                self.harmless_parts.add(_dense(entry))
                continue
            for phrase in _endings(words, True):
                self.harmless_phrases.add(phrase)
                if remove:
                    self.forms.pop(phrase[0] if len(phrase) == 1 else "", None)

    def list(self) -> WordList:
        """What was built."""
        harmless: dict[str, list[tuple[str, ...]]] = {}
        for phrase in sorted(self.harmless_phrases):
            harmless.setdefault(phrase[0], []).append(phrase)
        return WordList(
            self.forms,
            self.phrases,
            self.parts,
            frozenset(self.openings),
            harmless,
            frozenset(self.harmless_parts),
            frozenset(self.spelled - self.forms.keys()),
        )


def _words(entry: str) -> tuple[str, ...] | None:
    """The words of an entry in Latin letters; None for Chinese, emoji and the rest."""
    return tuple(_TOKEN.findall(entry)) if _LATIN.fullmatch(entry) else None


def _endings(words: tuple[str, ...], wanted: bool) -> Iterable[tuple[str, ...]]:
    """A phrase with the endings of its last word."""
    lasts = inflected(words[-1]) if wanted and words[-1].isalpha() else {words[-1]}
    return [(*words[:-1], last) for last in lasts]


def judge(
    words: str, when_found: str, instead: str, known: WordList, language: str = "en"
) -> Verdict:
    """What becomes of a child's words.

    `instead` is drawn in place of what the list avoids; empty: a subject of the pack, in the
    language of the words, as is one that is given in both languages with a · between them.
    `language` is that of an answer to an empty box. Raises ValueError for a choice or an `instead`
    that cannot be used, and for words that are no wish but a book.
    """
    if len(words) > LONGEST_TEXT:
        raise ValueError(
            f"words has {len(words)} characters; {LONGEST_TEXT} are possible. Write a shorter wish."
        )
    if when_found not in WHEN_FOUND:
        raise ValueError(f"when_found is {when_found!r}: choose {' or '.join(WHEN_FOUND)}.")
    if known.find(instead):
        raise ValueError(
            "The subject in instead has something that the list avoids. Write another one, or put "
            "the word into allowed."
        )
    if not words.strip():
        subject = _subject(instead, language)
        return Verdict(subject, EMPTY[language_of(subject)].format(subject), True)
    found = known.find(words)
    if not found:
        return Verdict(words, "", True)
    language = language_of(words)
    subject = _subject(instead, language)
    if when_found == STOP:
        return Verdict(None, STOPPED[language].format(subject), False, found)
    return Verdict(subject, FOUND[language].format(subject), False, found)


def _subject(instead: str, language: str) -> str:
    """What is drawn instead, in a language where there is a choice of two."""
    parts = [part.strip() for part in instead.split("·")]
    in_both = {language_of(part): part for part in parts if part}
    if len(parts) == len(in_both) == 2:  # no choice: a dot in a Chinese name
        return in_both[language]
    return instead.strip() or SUBJECT[language]
