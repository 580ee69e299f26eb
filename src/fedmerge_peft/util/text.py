"""Text that a terminal can print safely, and words that are spelled alike."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from unicodedata import category

_SHORTEST = 3
"""Length of the shortest word that is compared with other words letter by letter."""

_LONGEST = 200
"""Length of the longest word that is compared with other words letter by letter."""

_SEPARATORS = re.compile(r"[-_. ]")
_PUNCTUATION = str.maketrans("", "", "-_. ")


def printable(text: str) -> str:
    """Escape every non-printable character, including control characters and line feeds."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def printable_lines(text: str) -> str:
    """Escape every non-printable character but line feeds."""
    return "\n".join(map(printable, text.split("\n")))


def reason(error: Exception) -> str:
    """Return the operating system's words for a failed file operation, or the error's own text."""
    return getattr(error, "strerror", None) or str(error)


def count_of(number: int, noun: str) -> str:
    """Return a number and a regular noun, such as ``1 client`` or ``3 clients``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def spreadsheet_cell(text: str) -> str:
    """Return text that a spreadsheet shows as it is, instead of evaluating it as a formula.

    A text that begins like a formula is prefixed with an apostrophe, as OWASP recommends for CSV.
    """
    cell = printable(text)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def is_encodable(text: str) -> bool:
    """Return True if the text has no surrogates, which escapes and file names can introduce."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def shortened(text: str, length: int) -> str:
    """Return at most ``length`` characters of a text; … marks a text that was cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def folded_form(name: str) -> str:
    """Normalize a name: Unicode form NFC, no case, no invisible characters, no surplus spaces.

    Names with equal results look alike, such as ``Zürich`` in the forms NFC and NFD.
    """
    visible = "".join(c for c in unicodedata.normalize("NFC", name) if category(c) != "Cf")
    return " ".join(visible.casefold().split())


def lookalikes(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of different names that look alike (``folded_form``)."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(folded_form(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def closest(word: str, words: Iterable[str]) -> str | None:
    """Return the word that a misspelled word most likely stands for; None if none is close.

    Close words are equal except for case and punctuation, or differ by at most one edit per four
    letters, or one is the beginning of the other. Words of three letters may differ by one edit,
    shorter words by none. An edit inserts, deletes or replaces a letter, or exchanges two neighbors
    (optimal string alignment). Each part of a compound has to be close: ``token-cat`` is not close
    to ``image-cat``.
    """
    candidates = list(dict.fromkeys(words))
    for candidate in candidates:
        if folded(word) == folded(candidate) or folded_form(word) == folded_form(candidate):
            return candidate
    ranked = [(_edits(word.casefold(), option.casefold()), option) for option in candidates]
    edits, best = min(ranked, key=lambda pair: pair[0], default=(math.inf, ""))
    if edits < math.inf:
        return best
    return next((option for option in candidates if _is_beginning(word, option)), None)


def folded(word: str) -> str:
    """Return a word without case, and without hyphens, underscores, dots and spaces."""
    return word.casefold().translate(_PUNCTUATION)


def _is_beginning(one: str, other: str) -> bool:
    """Return True if one word begins with the other.

    The shorter word must have at least four letters. The longer word must have at most twice as
    many letters as the shorter word.
    """
    short, long = sorted((one.casefold(), other.casefold()), key=len)
    return long.startswith(short) and len(short) >= 4 and len(long) <= 2 * len(short)


def _edits(one: str, other: str) -> float:
    """Return the number of edits between two close words; infinite if they are not close."""
    parts, others = (_SEPARATORS.split(word) for word in (one, other))
    if len(parts) == len(others) > 1:
        return sum(map(_edits, parts, others))
    most = max(1, len(one) // 4) if _SHORTEST <= len(one) <= _LONGEST else 0
    edits = _distance(one, other) if abs(len(one) - len(other)) <= most else math.inf
    return edits if edits <= most else math.inf


def _distance(one: str, other: str) -> int:
    """Return the number of edits between two words."""
    before: list[int] = []
    above = list(range(len(other) + 1))
    for i, letter in enumerate(one):
        row = [i + 1]
        for j, wanted in enumerate(other):
            edits = min(above[j + 1] + 1, row[j] + 1, above[j] + (letter != wanted))
            if i and j and letter == other[j - 1] and one[i - 1] == wanted:
                edits = min(edits, before[j - 1] + 1)
            row.append(edits)
        before, above = above, row
    return above[-1]
