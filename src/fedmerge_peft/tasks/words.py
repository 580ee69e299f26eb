"""Words of texts in any script, for metrics that compare texts by words."""

from __future__ import annotations

import re
from functools import cache
from unicodedata import category, name, normalize

_UNSPACED = (
    "CJK",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TAI",
    "NEW TAI",
    "JAVANESE",
    "BALINESE",
    "YI SYLLABLE",
    "TANGUT",
    "NUSHU",
    "KHITAN",
    "EGYPTIAN",
    "CUNEIFORM",
)
"""Beginnings of the Unicode names of letters whose scripts have no spaces between words."""

_ZERO_WIDTH_SPACE = "\u200b"


def words(text: str) -> list[str]:
    """Return the words of a text, with case folded and Unicode normalized (NFKC).

    A word is a run of letters, digits and the marks on them. Letters of scripts without spaces
    between words (Chinese, Japanese, Thai, ...) and symbols such as emoji are a word each, together
    with their marks. Punctuation and mathematical signs separate words. For texts in ASCII, these
    are the words of ``rouge_score``.
    """
    folded = normalize("NFKC", normalize("NFKC", text).casefold())
    joined = "".join(character for character in folded if _role(character) != "joiner")
    roles = "".join(_role(character) for character in joined)
    return [joined[slice(*match.span())] for match in re.finditer(r"[LM]+|SM*", roles)]


@cache
def _role(character: str) -> str:
    """Return the role of a character.

    Roles are L for a letter or digit, M for a mark, S for a word of one character, ``joiner`` for
    an invisible format character, and a space for a separator of words.
    """
    kind = category(character)
    if kind == "Cf" and character != _ZERO_WIDTH_SPACE:  # also marks of direction
        return "joiner"
    if kind[0] == "M":
        return "M"
    if kind in ("So", "Co", "Cn") or name(character, "").startswith(_UNSPACED):
        return "S"
    return "L" if kind[0] in "LN" else " "
