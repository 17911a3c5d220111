"""Lists of prompts in files: text with one prompt per line, or a table with a column of prompts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

POSITIVE_NAMES = ("prompt", "text", "positive")
NEGATIVE_NAME = "negative"
SUFFIXES = (".txt", ".csv", ".tsv")
LARGEST_FILE_BYTES = 16 << 20
_SEPARATORS = (",", ";", "\t")
_COMMENT = "#"
_Row = tuple[int, list[str]]  # the line it ends in, and its cells


class PromptListError(ValueError):
    """A file that cannot be read as a list of prompts; the message names the remedy."""


def read_prompts(path: Path) -> list[str]:
    """Every prompt of a .txt, .csv or .tsv file, each once. Raises PromptListError."""
    if path.suffix.lower() not in SUFFIXES:
        raise PromptListError(
            f"{path.name} is no list of prompts: use a file that ends in {', '.join(SUFFIXES)}."
        )
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= LARGEST_FILE_BYTES else b""
    except OSError as error:
        raise PromptListError(
            f"Cannot read {path.name} ({error.strerror}): give its full path, "
            "or put it into ComfyUI's input folder and give its name."
        ) from error
    if size > LARGEST_FILE_BYTES:
        raise PromptListError(
            f"{path.name} has {size / 1e6:.0f} MB, more than {LARGEST_FILE_BYTES / 1e6:.0f}: "
            "split it into several lists."
        )
    text = _decoded(data, path.name)
    found = lines_of(text) if path.suffix.lower() == ".txt" else table_of(text, path.name)
    if not found:
        raise PromptListError(f"{path.name} has no prompts: write one per line.")
    return found


def lines_of(text: str) -> list[str]:
    """One prompt per line; empty lines and those that begin with # are left out."""
    lines = (line.strip() for line in text.splitlines())
    return unique(line for line in lines if line and not line.startswith(_COMMENT))


def table_of(text: str, name: str) -> list[str]:
    """The prompts of a table, row by row. Raises PromptListError.

    They stand in the columns that the first row calls prompt, text or positive, and negative; if
    it calls none so, it is no heading, and the first column counts. Rows that begin with # are
    left out.
    """
    declared, body = _declared_separator(text)
    rows, has_heading = _rows(body, declared, name)
    if declared:
        rows = [(line + 1, cells) for line, cells in rows]
    if not rows:
        return []
    _refuse_ragged(rows, name)
    if not has_heading:
        _refuse_prose(rows, name)
        return unique(cell for _, row in rows if (cell := row[0].strip()))
    heading = _names(rows[0][1])
    positive = next((heading.index(n) for n in POSITIVE_NAMES if n in heading), None)
    negative = heading.index(NEGATIVE_NAME) if NEGATIVE_NAME in heading else None
    found: list[str] = []
    for _, row in rows[1:]:
        cells = [cell.strip() for cell in row] + [""] * (len(heading) - len(row))
        if positive is not None and cells[positive]:
            found.append(cells[positive])
        if negative is not None:  # an empty negative prompt is encoded, too
            found.append(cells[negative])
    return unique(found)


def unique(prompts: Iterable[str]) -> list[str]:
    """Each once, in the order of the first time."""
    return list(dict.fromkeys(prompts))


def _decoded(data: bytes, name: str) -> str:
    """UTF-8, or UTF-16 where the file says so by its first bytes, as Excel's Unicode text does."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptListError(
            f"{name}, line {line}: not UTF-8. Save the file as UTF-8 "
            '(in Excel: "CSV UTF-8"; in Notepad: Encoding, UTF-8).'
        ) from error


def _declared_separator(text: str) -> tuple[str | None, str]:
    """The separator that Excel's first line `sep=;` declares, and the text without that line."""
    first, _, rest = text.partition("\n")
    first = first.rstrip("\r")
    if first[:4].lower() == "sep=" and first[4:] in _SEPARATORS:
        return first[4:], rest
    return None, text


def _rows(text: str, declared: str | None, name: str) -> tuple[list[_Row], bool]:
    """The rows by the separator that fits, and whether the first one is a heading."""
    readings: list[list[_Row]] = []
    failures: list[PromptListError] = []
    for separator in [declared] if declared else _SEPARATORS:
        try:
            readings.append(_read(text, separator, name))
        except PromptListError as error:
            failures.append(error)
    if not readings:
        raise failures[0]
    titled = [rows for rows in readings if rows and _is_heading(rows[0][1])]
    # The separator that splits anything is the one in use; where none does, there is one column.
    best = max(titled or readings, key=lambda rows: max((len(row) for _, row in rows), default=0))
    return best, bool(titled)


def _read(text: str, separator: str, name: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[_Row] = []
    try:
        for row in reader:
            comment = row[:1] and row[0].lstrip().startswith(_COMMENT) and not _is_heading(row)
            if any(cell.strip() for cell in row) and not comment:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise PromptListError(
            f"{name}, line {reader.line_num}: {error}. Close every quotation mark, "
            "and double those inside of a prompt."
        ) from error
    return rows


def _refuse_ragged(rows: list[_Row], name: str) -> None:
    """A row with more cells than the first holds an unquoted separator: a prompt would be cut."""
    wanted = len(rows[0][1])
    for line, row in rows:
        if len(row) > wanted:
            raise PromptListError(
                f"{name}, line {line}: {len(row)} columns where the first row has {wanted}. Put "
                "prompts with a separator inside into quotation marks, or save the list as .txt."
            )


def _refuse_prose(rows: list[_Row], name: str) -> None:
    """Without a heading, what follows a comma and a space is rather the rest of a prompt."""
    for line, row in rows:
        if any(cell.startswith(" ") and cell.strip() for cell in row[1:]):
            raise PromptListError(
                f"{name}, line {line}: a separator and a space, as inside of a prompt. Put prompts "
                "into quotation marks, give the column the heading prompt, or save the list as "
                ".txt."
            )


def _names(row: list[str]) -> list[str]:
    return [cell.strip().lower() for cell in row]


def _is_heading(row: list[str]) -> bool:
    return bool({*POSITIVE_NAMES, NEGATIVE_NAME} & set(_names(row)))
