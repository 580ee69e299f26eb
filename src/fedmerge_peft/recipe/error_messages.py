"""Translation of pydantic's validation errors into messages about the text of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.registered import names_in, one_of
from fedmerge_peft.recipe.synonyms import closest_value, keys_for
from fedmerge_peft.recipe.yaml_document import MOST, Document, Fault, Mark, Where, dotted, refuse
from fedmerge_peft.util.text import closest


# ---- The shape of a recipe -----------------------------------------------------------------------
def required(annotation: Any) -> Any:
    """Return an annotation without its constraints and without the None of an optional value.

    A field with ``NameIn`` becomes a ``Literal``. An annotation with ``OneOf`` keeps this marker.
    """
    while get_origin(annotation) is Annotated and one_of(annotation) is None:
        annotation = names_in(annotation)
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        rest = tuple(option for option in get_args(annotation) if option is not NoneType)
        return required(rest[0]) if len(rest) == 1 else Union[rest]  # noqa: UP007 - of any number
    return annotation


class Kinds(NamedTuple):
    """Kinds of a section, such as ``iid``, and the key that holds the kind, such as ``scheme``."""

    what: str
    key: str
    names: tuple[str, ...]
    sections: tuple[type[BaseModel], ...]


def kinds_of(annotation: Any) -> Kinds | None:
    """Return the kinds of section that a field may hold; None for a field without ``OneOf``."""
    marker = one_of(required(annotation))
    if marker is None:
        return None
    registry, sections = marker.registry, marker.registry.sections()
    return Kinds(registry.kind, registry.key, tuple(sections), tuple(sections.values()))


def variants(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Return the section classes that a field may hold; empty for other fields, such as lists."""
    if kinds := kinds_of(annotation):
        return kinds.sections
    annotation = required(annotation)
    return (
        (annotation,) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()
    )


def field_annotation(info: FieldInfo) -> Any:
    """Return a field's type with its constraints."""
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _written(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[Where, Any, type[BaseModel]]:
    """Translate the location of a pydantic error to keys of the recipe.

    A location from pydantic also contains tags and names of types, such as ``iid`` in
    ``("data", "partition", "iid", "clients")``.

    Returns:
        The keys as written; the type expected at this place, None if the key is unknown; and the
        class of the enclosing section.
    """
    where: Where = ()
    annotation: Any = root
    section = root
    for step in loc:
        whole, annotation = annotation, required(annotation)
        if kinds := kinds_of(annotation):
            annotation = section = kinds.sections[kinds.names.index(str(step))]
        elif variants(annotation):
            section, info = annotation, annotation.model_fields.get(step)
            where, annotation = (*where, step), field_annotation(info) if info else None
        elif get_origin(annotation) in (list, dict):
            where, annotation = (*where, step), get_args(annotation)[-1]
        else:
            return where, whole, section
    return where, annotation, section


def _keys(annotation: Any, where: Where = ()) -> Iterator[tuple[Where, type[BaseModel], str]]:
    """Yield all keys of a recipe as (place of the section, class of the section, key).

    The keys of sections in lists, such as ``baselines``, are left out.
    """
    for section in variants(annotation):
        for key, info in section.model_fields.items():
            yield where, section, key
            yield from _keys(field_annotation(info), (*where, key))


# ---- Words ---------------------------------------------------------------------------------------
_INDENTED = "(indented lines of key: value)"
_PLAIN: dict[Any, tuple[str, str]] = {  # singular, plural
    str: ("text", "text"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    NoneType: ("null", "null"),
}


def expected(annotation: Any, many: bool = False) -> str:
    """Return a type in plain words, such as ``a whole number above 0``; plural if ``many``."""
    if one_of(annotation) is None:
        annotation = names_in(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if kinds := kinds_of(annotation):
        return f"{'sections' if many else 'a section'} with {kinds.key}: {_choice(kinds)}"
    if origin is Annotated:
        unit = "characters" if arguments[0] is str else "values"
        return expected(arguments[0], many) + _bounds(arguments[1:], unit)
    if variants(annotation) or origin is dict:
        return f"a section {_INDENTED}"
    if origin is Literal and len(arguments) == 1:
        return str(arguments[0])
    if origin is Literal:
        return f"{'any' if many else 'one'} of {', '.join(arguments)}"
    if origin is list:
        return f"a list of {expected(arguments[0], many=True)}"
    if origin in (Union, UnionType):
        options = [expected(option, many) for option in arguments]
        return f"{', '.join(options[:-1])}{',' if len(options) > 2 else ''} or {options[-1]}"
    if annotation not in _PLAIN:  # a type that only a plugin's section has
        return f"a value of type {getattr(annotation, '__name__', annotation)}"
    return _PLAIN[annotation][many]


def _bounds(constraints: Iterable[Any], unit: str) -> str:
    parts = [
        part
        for entry in constraints
        for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
    ]
    bounds = []
    shortest, longest = 0, None
    for part in parts:
        match part:
            case Gt(gt=bound):
                bounds.append(f"above {bound}")
            case Ge(ge=bound):
                bounds.append(f"at least {bound}")
            case Lt(lt=bound):
                bounds.append(f"below {bound}")
            case Le(le=bound):
                bounds.append(f"at most {bound}")
            case MinLen(min_length=length):
                shortest = length
            case MaxLen(max_length=length):
                longest = length
            case _:
                pass
    if longest is not None:
        lengths = f"{shortest} to {longest}" if shortest else f"at most {longest}"
        bounds.append(f"({lengths} {unit})")
    elif shortest:
        bounds.append(f"({shortest} or more {unit})")
    return " " + " and ".join(bounds) if bounds else ""


def found(value: Any) -> str:
    """Return a description of a value, such as ``text 'adam'`` or ``a list``.

    Numbers and booleans are written as in YAML. Long values are truncated.
    """
    match value:
        case None:
            return "nothing"
        case list():
            return "an empty list" if not value else "a list"
        case dict():
            return "an empty section" if not value else "a section"
        case str():
            return f"text {_cut(repr(value))}"
        case bool() | int() | float():
            return _cut(json.dumps(value)).replace("NaN", ".nan").replace("Infinity", ".inf")
        case _:
            return _cut(" ".join(repr(value).split()))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:56]} ..."


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return ``; did you mean '...'?`` with the closest word; an empty text if none is close."""
    guess = closest_value(word, words)
    return f"; did you mean '{guess}'?" if guess else ""


# ---- Faults --------------------------------------------------------------------------------------
def refuse_values(root: type[BaseModel], values: Any, error: ValidationError) -> RecipeError:
    """Return the error for values that come from Python, and therefore have no line numbers."""
    return refuse(explain(error, Document(values, {(): Mark(root.__name__)}), root))


def explain(error: ValidationError, document: Document, root: type[BaseModel]) -> list[Fault]:
    """Return one fault for each invalid value, even if pydantic reports several errors for it.

    At most ``MOST`` + 1 faults are returned.
    """
    faults: dict[Where, Fault] = {}
    for detail in error.errors(include_url=False):
        if len(faults) > MOST:
            break
        where, annotation, section = _written(detail["loc"], root)
        if detail["type"] == "value_error":
            where, text = _own_words(where, annotation, str(detail["ctx"]["error"]))
        elif detail["type"] == "extra_forbidden":
            text = _unknown(where, section, root)
        elif detail["type"] == "invalid_key":
            text = f"found the key {found(where[-1])}, expected text"
        elif detail["type"] == "missing":
            about = section.model_fields[str(where[-1])].description
            text = f"this required key is missing; expected {expected(annotation)}: {about}"
        else:
            where, text = _unfit(where, annotation, detail["type"], document.value)
        mark = document.mark(where)
        if mark.line is None:  # a value from overrides or from Python
            text = text.replace(_INDENTED, "(keys with values)")
        faults.setdefault(where, Fault(mark, where, text))
    return list(faults.values())


def _own_words(where: Where, section: Any, text: str) -> tuple[Where, str]:
    """Split a validator's message ``key: text`` into the place of the key and the text.

    The key may have parts, as in ``privacy.mode``. A message that does not begin with a key of the
    section is returned whole, with ``where``.
    """
    path, colon, rest = text.partition(": ")
    keys = path.split(".")
    return (
        ((*where, *keys), rest)
        if colon and any(keys[0] in kind.model_fields for kind in variants(section))
        else (where, text)
    )


def _unfit(where: Where, annotation: Any, problem: str, value: Any) -> tuple[Where, str]:
    for step in where:
        value = getattr(value, str(step)) if isinstance(value, BaseModel) else value[step]
    if (kinds := kinds_of(annotation)) and isinstance(value, str | dict):
        names = f"expected {_choice(kinds)}"
        if problem == "union_tag_not_found":
            return (*where, kinds.key), f"this required key is missing; {names}"
        if isinstance(value, dict):
            where, value = (*where, kinds.key), value[kinds.key]
        return (
            where,
            f"found {found(value)}, {names}{_closest(value, kinds.names)}{_hint(value, kinds)}",
        )
    choices = get_args(required(annotation)) if get_origin(required(annotation)) is Literal else ()
    return where, f"found {found(value)}, expected {expected(annotation)}{_closest(value, choices)}"


def _choice(kinds: Kinds) -> str:
    if kinds.names:
        return f"one of {', '.join(kinds.names)}"
    return f"a registered {kinds.what} (none is registered)"


def _hint(value: Any, kinds: Kinds) -> str:
    """Return advice on plugins if the name resembles no registered name."""
    if not isinstance(value, str) or did_you_mean(value, kinds.names):
        return ""
    return (
        f"; if a plugin registers this {kinds.what}, list the plugin's module under plugins "
        "(docs/extending.md describes how to write one)"
    )


def _closest(value: Any, words: Iterable[str]) -> str:
    return did_you_mean(value, words) if isinstance(value, str) else ""


def _unknown(where: Where, section: type[BaseModel], root: type[BaseModel]) -> str:
    key, here = str(where[-1]), where[:-1]
    if here[:1] == ("baselines",):
        here = ("strategy",)
    places = {(place, kind): name for place, kind, name in _keys(root) if name == key}
    siblings = [_kind(kind) for place, kind in places if place == here]
    if siblings:
        return f"not a key of {_kind(section)}, but of {' or '.join(siblings)}; remove it"
    if guess := _closest_key(key, here, section):
        return f"unknown key; did you mean '{guess}'?"
    if places:
        homes = dict.fromkeys(
            f"under {dotted(place)}" if place else "to the top level" for place, _ in places
        )
        return f"unknown key here; move it {' or '.join(homes)}"
    elsewhere = {name: dotted((*place, name)) for place, _, name in _keys(root)}
    if guess := next(iter(keys_for(key)), None) or elsewhere.get(closest(key, elsewhere) or ""):
        return f"unknown key; did you mean '{guess}'?"
    return f"unknown key; use one of {', '.join(section.model_fields)}"


def _closest_key(key: str, here: Where, section: type[BaseModel]) -> str | None:
    """Return the key of a section that an unknown key probably means; None if none is close."""
    meant = {place.rpartition(".")[::2] for place in keys_for(key)}
    synonyms = (name for place, name in meant if place == dotted(here))
    known = next((name for name in synonyms if name in section.model_fields), None)
    return known or closest(key, section.model_fields)


def _kind(section: type[BaseModel]) -> str:
    return str(next(iter(section.model_fields.values())).default)
