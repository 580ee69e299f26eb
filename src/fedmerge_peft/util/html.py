"""HTML for notebooks. Texts, which may come from data, are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fedmerge_peft.util.text import printable

_STYLE = """<style>
.fedmerge { font-size: 13px; line-height: 1.45; max-width: 60em; }
.fedmerge table { border-collapse: collapse; margin: .4em 0; font-variant-numeric: tabular-nums; }
.fedmerge th { font-weight: 600; opacity: .75; }
.fedmerge th, .fedmerge td { text-align: right; padding: .2em .7em; vertical-align: top; }
.fedmerge th { border-bottom: 1px solid #8886; }
.fedmerge th:first-child, .fedmerge td:first-child { text-align: left; }
.fedmerge .facts td { text-align: left; overflow-wrap: anywhere; }
.fedmerge .facts td:first-child { opacity: .75; white-space: nowrap; }
.fedmerge pre { font-size: 12px; overflow-x: auto; }
.fedmerge summary { cursor: pointer; opacity: .75; }
</style>"""


def page(title: str, *parts: str) -> str:
    """Join parts of HTML under a title, with the style sheet."""
    return f'<div class="fedmerge">{_STYLE}<b>{text(title)}</b>{"".join(parts)}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table with a header; cells are texts."""
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{_rows(rows)}</tbody></table>"


def facts(pairs: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of names and values."""
    return f'<table class="facts"><tbody>{_rows(pairs)}</tbody></table>'


def details(summary: str, content: str) -> str:
    """Return HTML content that a click on its summary opens."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def lines(content: str) -> str:
    """Return HTML that shows text with its line breaks and spaces."""
    return f"<pre>{chr(10).join(text(line) for line in content.splitlines())}</pre>"


def text(value: object) -> str:
    """Escape the special characters of HTML, and all characters that are not printable."""
    return escape(printable(str(value)))


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
