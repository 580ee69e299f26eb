"""Conversion of YAML text to plain values, with the line of each value, and back.

The reader follows YAML 1.2's core schema: ``1e-4`` is a number, and ``no`` is text. Duplicate keys,
anchors, unknown tags and deep nesting are rejected. Because there are no anchors, the time to read
a file is linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.util.text import is_encodable, printable, printable_lines

Where = tuple[str | int, ...]
"""Keys from the top of the document to a value: ``("baselines", 0, "adapters")``."""

DEEPEST = 32
"""Maximum depth of nesting."""

LONGEST = 2**20
"""Maximum number of characters in a document. A run's recipe contains all defaults, so this limit
is above the limit of a recipe file (``loading.LARGEST``)."""

MOST = 50
"""Maximum number of faults that one error lists."""

_NO_ALIASES = "anchors (&) and aliases (*) are not supported; quote text that starts with & or *"
_TAG = "tag:yaml.org,2002:"
_CORE: dict[str, tuple[str, str]] = {  # tag: (pattern, possible first characters)
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_SHAPES = {tag: re.compile(rf"(?:{pattern})\Z") for tag, (pattern, _) in _CORE.items()}

_LEADING_ZERO = re.compile(r"[-+]?0[0-9]")


def dotted(where: Where) -> str:
    """Return a place in a document as text, such as ``baselines[0].adapters``."""
    return "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in where
    ).removeprefix(".")


@dataclass(frozen=True)
class Mark:
    """Origin of a value: a source, such as a file or overrides, and its line if known."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def at(self, line: int) -> Mark:
        """Return the mark of another line of the same source; this mark if it has no line."""
        return self if self.line is None else Mark(self.source, line)


@dataclass(frozen=True)
class Fault:
    """One error in a recipe, which is printed on one line."""

    mark: Mark
    where: Where
    text: str

    def __str__(self) -> str:
        return printable(
            ": ".join(part for part in (str(self.mark), dotted(self.where), self.text) if part)
        )


def refuse(faults: list[Fault]) -> RecipeError:
    """Return an error that lists the first ``MOST`` faults by line.

    Faults without a line number come last.
    """
    lines = [
        str(fault) for fault in sorted(faults, key=lambda fault: fault.mark.line or float("inf"))
    ]
    more = ["... and more"] if len(lines) > MOST else []
    return RecipeError(*lines[:MOST], *more)


@dataclass
class Document:
    """Plain values of a YAML document, their marks by place, and the faults found so far."""

    value: Any
    marks: dict[Where, Mark]
    faults: list[Fault] = field(default_factory=list)

    def mark(self, where: Where) -> Mark:
        """Return the mark of a value or, if it is missing, of the nearest enclosing section."""
        while where not in self.marks:
            where = where[:-1]
        return self.marks[where]


class _Core:
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _Loader(_Core, yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem=_NO_ALIASES, problem_mark=event.start_mark)
        if self.depth == DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {DEEPEST} levels deep", problem_mark=event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(_Core, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_, _first) in _CORE.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _tag, _SHAPES[_tag], [c.strip("\0") for c in _first])


# ---- Text to values ------------------------------------------------------------------------------
def parse(text: str, mark: Mark) -> Document:
    """Parse one YAML document; ``mark`` is the origin of its first line.

    The value of an empty text is None. Raises ``RecipeError`` if the text is too long, is not valid
    YAML, has several documents or anchors, or is nested too deeply. Other faults, such as duplicate
    keys and numbers that are too large, are added to the document's ``faults``.
    """
    if len(text) > LONGEST:
        raise refuse([Fault(Mark(mark.source), (), f"exceeds the limit of {LONGEST} characters")])
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if problem.startswith(("while scanning an alias", "while scanning an anchor")):
            problem = _NO_ALIASES
        hint = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        raise refuse(
            [Fault(mark.at(place.line + 1 if place else 1), (), f"not valid YAML: {problem}{hint}")]
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise refuse(
            [
                Fault(
                    mark.at(line), (), f"not valid YAML: invalid character {chr(error.character)!r}"
                )
            ]
        ) from None
    except (ValueError, OverflowError):
        # raised by PyYAML for an escape such as "\UFFFFFFFF" or a huge version number
        raise refuse([Fault(mark, (), "not valid YAML: invalid escape or number")]) from None
    document = Document(None, {(): mark})
    if node is not None:
        document.value = _value(node, (), document, mark)
    return document


def dropped(text: str) -> str | None:
    """Return what YAML drops from a valid text: a comment, a line break in unquoted text, or None.

    In a file, this is intended. A value on the command line loses a part of its content.
    """
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        if "#" in text[end : token.start_mark.index]:
            return "a comment, which begins with #"
        end = token.end_mark.index
        plain = isinstance(token, yaml.ScalarToken) and token.plain
        if plain and "\n" in text[token.start_mark.index : end]:
            return "a line break in unquoted text"
    return None


def _value(node: Any, where: Where, document: Document, mark: Mark) -> Any:
    here = document.marks.setdefault(where, mark.at(node.start_mark.line + 1))
    if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in {"str", *_CORE}:
        return _scalar(node, where, document, here)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_value(item, (*where, i), document, mark) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, where, document, mark)
    document.faults.append(
        Fault(
            here,
            where,
            f"the tag {node.tag.replace(_TAG, '!!')} is not supported; remove it",
        )
    )
    return None


def _scalar(node: yaml.ScalarNode, where: Where, document: Document, here: Mark) -> Any:
    text, tag = str(node.value), node.tag.removeprefix(_TAG)
    if tag != "str" and not _SHAPES[tag].match(text):
        document.faults.append(Fault(here, where, f"{text!r} does not match its tag !!{tag}"))
        return None
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        if _LEADING_ZERO.match(text):
            fault = f"{text} begins with a zero; leave it out, or quote the value if it is text"
            document.faults.append(Fault(here, where, fault))
            return 1
        if len(text) <= 70:
            number = int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
            if -(2**63) <= number < 2**63:
                return number
        document.faults.append(Fault(here, where, "the number does not fit into 64 bits"))
        return 1
    if tag == "float":
        return float(text.replace(".", "") if text[-1].isalpha() else text)
    if not is_encodable(text):
        document.faults.append(
            Fault(
                here,
                where,
                f"found the unpaired surrogate {printable(text)}, expected Unicode text",
            )
        )
        return "?"
    return text


def _mapping(
    node: yaml.MappingNode, where: Where, document: Document, mark: Mark
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = mark.at(key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            document.faults.append(Fault(here, where, "found a key that is not text; quote it"))
            continue
        if not is_encodable(key_node.value):
            unpaired = f"found a key with the unpaired surrogate {printable(key_node.value)}"
            document.faults.append(Fault(here, where, f"{unpaired}, expected Unicode text"))
            continue
        key = str(key_node.value)
        if key in values:
            first = document.marks[*where, key]
            place = "" if first.line is None else f", first at {first}"
            document.faults.append(
                Fault(here, (*where, key), f"given twice{place}; keep one of them")
            )
            continue
        document.marks[*where, key] = here
        values[key] = _value(value_node, (*where, key), document, mark)
    return values


# ---- Values to text ------------------------------------------------------------------------------
_YAML_1_1 = yaml.resolver.Resolver()


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Return the node of a text, in quotes if necessary.

    Quotes are necessary for unprintable characters, and for text that YAML 1.1 reads as another
    type (``no``, ``1_000``, ``2026-01-01``).
    """
    style = None
    if not text.isprintable():
        style = '"'
    elif _YAML_1_1.resolve(yaml.ScalarNode, text, (True, False)) != _TAG + "str":  # type: ignore[no-untyped-call]
        style = "'"
    return dumper.represent_scalar(_TAG + "str", text, style)


def _list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence(
        _TAG + "seq", items, flow_style=not any(isinstance(item, dict | list) for item in items)
    )


_DUMPS: dict[type, Callable[..., Any]] = {str: _text, list: _list}
for _type, _dump in _DUMPS.items():
    _Dumper.add_representer(_type, _dump)


def write(value: dict[str, Any]) -> str:
    """Return YAML of printable characters, from which ``parse`` reads equal values."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=10**9,
    )
    return printable_lines(text)
