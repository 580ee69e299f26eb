"""Text that a terminal can print safely."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape every non-printable character, including control characters and line feeds."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def is_encodable(text: str) -> bool:
    """Return True if the text has no surrogates, which escapes and file names can introduce."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
