"""How a word can be written: its endings, digits for letters, letters drawn out or covered."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator

_VOWELS = "aeiou"
_DIGITS = {"0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g"}
_ASKING = (("", "please"), ("draw", "drawme"), ("", "a", "an", "the"))
_MOST_READINGS = 64  # of one word: "1111111111" stands for nothing
_CHOICE = re.compile(r"\(([^()]*)\)")
_RUN = re.compile(r"(.)\1{2,}")
_ASKED = frozenset(map("".join, itertools.product(*_ASKING)))
_MARKS = re.compile(r"(?<=[a-z])[\u0300-\u036f]+")


def folded(text: str, simplified: dict[int, str]) -> str:
    """One form for what looks alike: width, case, accents, traditional and unseen characters.

    `simplified` is a table for str.translate.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    text = _MARKS.sub("", unicodedata.normalize("NFD", text))
    text = unicodedata.normalize("NFC", text)
    seen = (c for c in text if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return "".join(seen).translate(simplified)


def expanded(entries: Iterable[str]) -> list[str]:
    """Entries of the list with each of their choices: "(a|the) gun" is "a gun" and "the gun"."""
    parts = ([part.split("|") for part in _CHOICE.split(entry)] for entry in entries)
    return ["".join(chosen) for entry in parts for chosen in itertools.product(*entry)]


def inflected(word: str) -> set[str]:
    """An English word with its usual endings. Some of them are no words; they do no harm."""
    stem, last = word[:-1], word[-1]
    if last == "e":
        return {word, f"{word}s", f"{word}d", f"{word}r", f"{word}rs", f"{stem}ing", f"{stem}ings"}
    if last == "y" and stem[-1:] not in _VOWELS:
        return {word, f"{word}ing", *(f"{stem}i{end}" for end in ("es", "ed", "er", "ers"))}
    stems, plural = {word}, "es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s"
    if re.fullmatch(r"(?:.*[^aeiou])?[aeiou][^aeiouwxy]", word):  # stab, kidnap: kidnapping
        stems.add(word + last)
    endings = ("ed", "er", "ers", "ing", "ings")
    return {word, word + plural, *(s + e for s in stems for e in endings)}


@functools.lru_cache(maxsize=4096)  # the same pieces come again and again in a text
def readings(token: str) -> frozenset[str]:
    """What a run of letters and digits may be meant as: k1ll, kiiill, gun2 (lower case)."""
    found = {token, token.strip("0123456789")} - {""}
    return frozenset(r for t in found for lettered in _lettered(t) for r in _shortened(lettered))


def _lettered(token: str) -> Iterator[str]:
    """Digits as the letters that they look like, where letters are half of it or more."""
    yield token
    digits = sum(c.isdigit() for c in token)
    if 0 < digits <= len(token) - digits:
        choices = itertools.product(*(_DIGITS.get(c, c) for c in token))
        yield from ("".join(letters) for letters in itertools.islice(choices, _MOST_READINGS))


def _shortened(token: str) -> Iterator[str]:
    """Three and more of the same letter as two and as one."""
    yield token
    runs = _RUN.findall(token)
    if runs:
        for lengths in itertools.islice(itertools.product((1, 2), repeat=len(runs)), 16):
            left = iter(lengths)
            yield _RUN.sub(lambda run, n=left: run.group(1) * next(n), token)


def covered(text: str, forms: Iterable[str]) -> Iterator[str]:
    """Forms that a word with asterisks for some of its letters stands for: k*ll."""
    for match in re.finditer(r"(?<![a-z0-9*])[a-z]+\*+[a-z]*(?![a-z0-9*])", text):
        word = match.group()
        if len(word) > 2 and word.count("*") * 2 <= len(word):
            pattern = re.compile(word.replace("*", "[a-z]"))
            yield from (form for form in forms if pattern.fullmatch(form))


def is_made_of(text: str, words: Container[str]) -> bool:
    """Whether `text` is some of `words`, one behind the other, and nothing else; behind what asks
    for a picture, if it does: "draw a"."""
    ends = [0, *(len(asked) for asked in _ASKED if text.startswith(asked))]
    for end in range(1, len(text) + 1):
        if any(text[start:end] in words for start in ends):
            ends.append(end)
    return ends[-1] == len(text)


def spans(part: str, text: str) -> list[tuple[int, int]]:
    """Where a part stands in a text, as (start, end); also where it overlaps itself."""
    found, start = [], text.find(part)
    while start >= 0:
        found.append((start, start + len(part)))
        start = text.find(part, start + 1)
    return found
