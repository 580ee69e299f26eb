"""Reading recipes from files with ``key.sub=value`` overrides, and writing them as YAML.

Overrides take precedence over the file, and the file over the defaults. This module does not import
torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_origin

from pydantic import ValidationError

from fedmerge_peft.errors import PluginError, RecipeError
from fedmerge_peft.plugins import import_installed, import_modules
from fedmerge_peft.recipe import yaml_document
from fedmerge_peft.recipe.error_messages import (
    did_you_mean,
    expected,
    explain,
    field_annotation,
    found,
    kinds_of,
    required,
    variants,
)
from fedmerge_peft.recipe.python_values import OVERRIDES, check_source, listed_overrides
from fedmerge_peft.recipe.section import FOREIGN, Section
from fedmerge_peft.recipe.yaml_document import Document, Fault, Mark, Where, dotted, refuse
from fedmerge_peft.util.text import is_encodable, printable

LARGEST = 256 * 1024
"""Maximum size of a recipe file in bytes."""

RUN_REMEDY = (
    "if you trust this run, allow it with --trust-remote-code, or in Python with "
    "trust_remote_code=True"
)
"""Advice in errors about code that a run directory names."""


class Consent(NamedTuple):
    """Modules that a recipe from an untrusted source may import, besides those already imported."""

    modules: Sequence[str]
    remedy: str
    """Advice on how to allow further modules, for errors."""


Plugins = Literal["import", "ignore"] | Consent
"""Treatment of the modules that a recipe lists under ``plugins``: ``import`` them, ``ignore`` them,
or import those that a ``Consent`` allows and refuse a recipe that lists others. An import runs
code, so a recipe from an untrusted source must not cause an import without consent."""

R = TypeVar("R", bound=Section)
"""Class of the recipe. Callers pass it, so that this module need not import the schema."""


class Shipped(NamedTuple):
    """A recipe that comes with the package."""

    name: str
    path: Path
    about: str
    """Summary, which is the first comment line of the file."""


# ---- Files ---------------------------------------------------------------------------------------
def shipped() -> list[Shipped]:
    """Return the recipes that come with the package, sorted by name."""
    package = Path(__file__).parents[1]
    folders = package / "shipped_recipes", package.parents[1] / "recipes"
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    paths = sorted(folder.glob("*.yaml"))
    return [
        Shipped(path.stem, path, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        for path in paths
    ]


def find(source: str | os.PathLike[str]) -> Path:
    """Return the path of a shipped recipe, given by its name, or of a file, given by its path.

    A bare name refers to the shipped recipe; ``name.yaml`` refers to a file of that name, or to the
    shipped recipe if there is none. Raises ``RecipeError`` if neither exists, or if ``source`` is
    neither a text nor a path.
    """
    check_source(source)
    text = os.fspath(source)
    known = {recipe.name: recipe.path for recipe in shipped()}
    if text in known:
        return known[text]
    try:
        if text and Path(text).exists():
            return Path(text)
    except (OSError, ValueError):  # not a valid file name
        pass
    name = text.removesuffix(".yaml")
    if name in known:
        return known[name]
    guess = did_you_mean(name, list(known))
    raise RecipeError(
        printable(
            f"{text or repr(text)}: no such file or shipped recipe{guess} "
            "(fedmerge ls lists the shipped recipes)"
        )
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except IsADirectoryError:
        raise RecipeError(printable(f"{path}: is a directory; give a YAML file")) from None
    except OSError as error:
        raise RecipeError(printable(f"{path}: cannot be read: {error.strerror}")) from None
    if len(content) > LARGEST:
        raise RecipeError(
            printable(f"{path}: exceeds the limit of {LARGEST // 1024} KiB; give a recipe file")
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        mark = Mark(str(path), content.count(b"\n", 0, error.start) + 1)
        raise refuse(
            [
                Fault(
                    mark,
                    (),
                    f"invalid UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8",
                )
            ]
        ) from None


# ---- Recipes -------------------------------------------------------------------------------------
def load(
    model: type[R],
    source: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    plugins: Plugins = "import",
    *,
    foreign: bool = False,
) -> R:
    """Read a shipped recipe by name, or a YAML file by path, then apply the overrides.

    ``loads`` describes the other arguments. Raises ``RecipeError`` with all faults, one per line,
    such as ``file:line: dotted.path: found ..., expected ...``.
    """
    path = find(source)
    return loads(model, _read(path), str(path), overrides, plugins=plugins, foreign=foreign)


def loads(
    model: type[R],
    text: str,
    source: str,
    overrides: Iterable[str] = (),
    *,
    plugins: Plugins = "import",
    foreign: bool = False,
) -> R:
    """Read YAML text, then apply the overrides.

    Args:
        model: Class of the recipe.
        text: YAML.
        source: Name of the file in error messages.
        overrides: ``key.sub=value``, applied in this order; those of ``plugins`` come first.
        plugins: Treatment of the modules that the recipe lists.
        foreign: True if the text comes from an untrusted source, such as a run directory or a
            message. Keys that can read a file, such as a chat template, then reject file names.

    Raises:
        RecipeError: The text is not a valid recipe. The error lists all faults, as in ``load``.
    """
    document = yaml_document.parse(text, Mark(source, 1))
    if document.value is None:
        raise refuse(
            [
                *document.faults,
                Fault(Mark(source), (), "is empty; set at least name, task, backbone and data"),
            ]
        )
    if not isinstance(document.value, dict):
        mark = document.mark(())
        raise refuse(
            [
                *document.faults,
                Fault(
                    mark,
                    (),
                    f"found {found(document.value)}, expected lines of key: value at the top level",
                ),
            ]
        )
    return _validate(model, document, overrides, plugins, foreign=foreign)


def override(recipe: R, overrides: Iterable[str]) -> R:
    """Return a copy with overrides applied. Raises ``RecipeError`` with all faults.

    A preset sets only keys that a recipe does not set. A complete recipe sets all keys, so an
    override with a new preset is an error.
    """
    written = Mark(f"recipe {getattr(recipe, 'name', '')}".rstrip())
    result = _validate(type(recipe), Document(recipe.model_dump(), {(): written}), overrides)
    before, after = (
        getattr(getattr(version, "strategy", None), "preset", None) for version in (recipe, result)
    )
    if after not in (None, before):
        where = ("strategy", "preset")
        text = (
            "has no effect on a complete recipe; set it in the recipe's file, or as an override of "
            "fedmerge run or Recipe.load"
        )
        raise refuse([Fault(OVERRIDES, where, text)])
    return result


def dump(recipe: Section) -> str:
    """Return the recipe as YAML with all defaults; ``loads`` returns an equal recipe from it."""
    return yaml_document.write(recipe.model_dump())


def _validate(
    model: type[R],
    document: Document,
    overrides: Iterable[str],
    plugins: Plugins = "import",
    *,
    foreign: bool = False,
) -> R:
    overrides = listed_overrides(overrides)
    import_installed()
    chosen = [(text.partition("=")[0].strip() == "plugins", text) for text in overrides]
    for text in [text for first, text in chosen if first]:
        _apply(model, text, document)
    if plugins != "ignore":
        _import_plugins(document, plugins)
    for text in [text for first, text in chosen if not first]:
        _apply(model, text, document)
    try:
        recipe: R = model.__pydantic_validator__.validate_python(
            document.value, context={FOREIGN: foreign}
        )
    except ValidationError as error:
        known = {fault.where for fault in document.faults}
        document.faults += [
            fault for fault in explain(error, document, model) if fault.where not in known
        ]
    if document.faults:
        raise refuse(document.faults)
    return recipe


def _import_plugins(document: Document, plugins: Plugins) -> None:
    """Import the modules that a recipe lists.

    Raises ``RecipeError`` if a module cannot be imported, or if its import is not allowed.
    """
    modules = document.value.get("plugins")
    faults = []
    for number, module in enumerate(modules if isinstance(modules, list) else ()):
        if not isinstance(module, str):
            continue  # reported by the validation
        where = ("plugins", number)
        if isinstance(plugins, Consent) and module not in {*plugins.modules, *sys.modules}:
            text = f"the import of {module!r} would run its code; {plugins.remedy}"
            faults.append(Fault(document.mark(where), where, text))
            continue
        try:
            import_modules([module])
        except PluginError as error:
            faults.append(Fault(document.mark(where), where, str(error)))
    if faults:  # do not report the names that these modules would register
        raise refuse([*document.faults, *faults])


# ---- Overrides -----------------------------------------------------------------------------------
def _apply(model: type[Section], text: str, document: Document) -> None:
    """Apply one override ``key.sub=value``; errors are added to the document's faults."""
    key, equals, value_text = text.partition("=")
    where = _place(model, key.strip())
    if not equals or not all(where) or not is_encodable(text):
        document.faults.append(
            Fault(
                OVERRIDES,
                (),
                f"found {text!r}, expected key=value, such as training.learning_rate=1e-4",
            )
        )
        return
    try:
        value = yaml_document.parse(value_text, OVERRIDES)
    except RecipeError as error:
        reason = error.faults[0].removeprefix(f"{OVERRIDES}: ")
        document.faults.append(Fault(OVERRIDES, where, reason))
        return
    if part := yaml_document.dropped(value_text):
        text = f"YAML would drop {part}; write the value in double quotes, inside the shell's own"
        document.faults.append(Fault(OVERRIDES, where, text))
        return
    document.faults += [Fault(OVERRIDES, where + fault.where, fault.text) for fault in value.faults]
    section = _section(model, where[:-1], document)
    if isinstance(section, str):
        document.faults.append(Fault(OVERRIDES, where, section))
        return
    section[str(where[-1])] = value.value
    document.marks = {
        known: mark for known, mark in document.marks.items() if known[: len(where)] != where
    }
    document.marks[where] = OVERRIDES
    _forget_other_kind(model, where, section, document)


def _annotation(model: type[Section], where: Where) -> Any:
    """Return the type of a key in any kind of its section; None if no kind has the key."""
    annotation: Any = model
    for step in where:
        infos = (section.model_fields.get(str(step)) for section in variants(annotation))
        annotation = next((field_annotation(info) for info in infos if info), None)
    return annotation


def _place(model: type[Section], key: str) -> Where:
    """Split a key at its dots, except within keys of dictionaries, such as names of columns."""
    steps = key.split(".")
    for depth in range(1, len(steps)):
        if get_origin(required(_annotation(model, tuple(steps[:depth])))) is dict:
            return (*steps[:depth], ".".join(steps[depth:]))
    return tuple(steps)


def _section(model: type[Section], where: Where, document: Document) -> dict[str, Any] | str:
    """Return the section at a place, or the reason why it cannot exist; create it if missing."""
    section: dict[str, Any] = document.value
    for depth, step in enumerate(where, start=1):
        here = where[:depth]
        annotation = _annotation(model, here)
        if (
            annotation is not None
            and not variants(annotation)
            and get_origin(required(annotation)) is not dict
        ):
            return (
                f"{dotted(here)} is not a section; "
                f"write {dotted(here)}=VALUE with {expected(annotation)}"
            )
        if step not in section:
            document.marks[here] = OVERRIDES
        inner, kinds = section.get(str(step)), kinds_of(annotation)
        if inner is None:
            default = model.model_fields[str(step)].default if kinds and depth == 1 else None
            inner = (
                {kinds.key: getattr(default, kinds.key)}
                if kinds and isinstance(default, Section)
                else {}
            )
        elif isinstance(inner, str) and kinds:
            inner = {kinds.key: inner}
        elif not isinstance(inner, dict):
            remedy = "write a section in the recipe"
            if document.mark(here) == OVERRIDES:
                remedy = f"set single keys instead, as in {dotted(here)}.KEY=VALUE"
            return f"{dotted(here)} is {found(inner)}, not a section; {remedy}"
        section[str(step)] = inner
        section = inner
    return section


def _forget_other_kind(
    model: type[Section], where: Where, section: dict[str, Any], document: Document
) -> None:
    """Remove keys of the file that do not exist in the kind that the overrides select."""
    kinds, value = kinds_of(_annotation(model, where[:-1])), section[str(where[-1])]
    if not kinds or where[-1] != kinds.key or value not in kinds.names:
        return
    for key in set(section) - set(kinds.sections[kinds.names.index(value)].model_fields):
        if document.mark((*where[:-1], key)) != OVERRIDES:
            del section[key]
