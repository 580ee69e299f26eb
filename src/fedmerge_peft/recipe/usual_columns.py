"""Usual columns of tasks, from which ``fedmerge init`` suggests a table's task and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("image", "choices", "named", "number", "list", "label", "text")
"""Kinds of columns, the most specific first. ``init`` suggests the task with the most specific
columns.

image: a column of images or of names of image files; choices: a column of lists or records with a
usual name, or several columns such as ending0 and ending1; named: any column with a usual name;
number: a column with a usual name and numbers that are not all whole; list: a column of lists with
a usual name; label: a column with few values, best with a usual name; text: a column of texts with
a usual name, else the one with the longest texts.
"""


@dataclass(frozen=True)
class UsualColumn:
    """Usual kind and names of a column that a task reads."""

    kind: str
    """One of ``KINDS``."""
    names: str = ""
    """Usual names in lower case, separated by spaces, the best first."""
    optional: bool = False
    """True if ``init`` may suggest the task although no such column is recognized."""
    of: str = ""
    """Values that a column of the kind ``named`` must have. list: lists. varied: many different
    values, which are required only if the column's name is usual for labels. Empty: any values."""


UsualColumns = Mapping[str, UsualColumn]
"""Usual columns by key of a task's section."""
_LABELS = "label labels category class target intent topic sentiment queue tag y"
_TEXTS = "text body sentence message content review question comment description title"
IMAGE = UsualColumn("image")
TEXT = UsualColumn("text", _TEXTS, optional=True)
LABEL = UsualColumn("label", _LABELS)
LABELS = UsualColumn("list", _LABELS)
NUMBER = UsualColumn("number", f"score similarity rating {_LABELS}")


def named(names: str, of: str = "", *, optional: bool = False) -> UsualColumn:
    """Return a column that is recognized by its name and, with ``of``, by its values."""
    return UsualColumn("named", names, optional, of)
