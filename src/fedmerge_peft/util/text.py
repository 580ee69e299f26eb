"""Text as a terminal can show it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with every character that could steer a terminal written as an escape; line feeds too."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def is_encodable(text: str) -> bool:
    """Whether this is Unicode text, without the halves of surrogate pairs that escapes and file names can bring."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
