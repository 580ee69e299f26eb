"""Usual columns of tasks, by which ``fedmerge init`` recognizes a table and suggests columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("image", "choices", "named", "number", "list", "label", "text")
"""Kinds of columns, the most specific first. A table is for the task with the most specific ones.

choices: one of lists with a usual name, or several such as ending0 and ending1; named: any column
with a usual name; number: one of fractions; list: one of lists; label: one with few values.
"""


@dataclass(frozen=True)
class UsualColumn:
    """A column that a task reads, as it usually is."""

    kind: str
    """One of ``KINDS``."""
    names: str = ""
    """Usual names in lower case, the best first, with spaces between them."""
    optional: bool = False
    """True if a table may be for the task although no such column is recognized."""
    of: str = ""
    """Kind of the values of a named column: list; or varied for other values than few labels if the
    name is a usual one of labels. Any if empty."""


UsualColumns = Mapping[str, UsualColumn]
"""Columns by key of a section."""
_LABELS = "label labels category class target intent topic sentiment queue tag y"
_TEXTS = "text body sentence message content review question comment description title"
IMAGE = UsualColumn("image")
TEXT = UsualColumn("text", _TEXTS, optional=True)
LABEL = UsualColumn("label", _LABELS)
LABELS = UsualColumn("list", _LABELS)
NUMBER = UsualColumn("number", f"score similarity rating {_LABELS}")


def named(names: str, of: str = "", *, optional: bool = False) -> UsualColumn:
    """Return a column that is recognized by its name, and perhaps by the kind of its values."""
    return UsualColumn("named", names, optional, of)
