"""Registries of all parts that recipes refer to by name, and plugins that extend them.

A plugin is a Python module that registers its parts when it is imported (``register_strategy`` and
the other decorators of ``recipe/registration.py``). A plugin is imported if it is named

- in the entry-point group ``fedmerge_peft.plugins`` of an installed package;
- in a recipe: ``plugins: [my_module]``;
- in the option ``--plugin`` of ``fedmerge ls`` or ``fedmerge schema``.

The built-in strategies, tasks, partition schemes, metrics and aggregation rules are in the same
registries. Modules in ``recipe/`` register them with the import paths of their code, so that
reading a recipe does not import torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from traceback import extract_tb
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedmerge_peft.errors import FedMergeError, PluginError

log = logging.getLogger(__name__)

GROUP = "fedmerge_peft.plugins"
"""The entry-point group of plugins; each entry point names a module."""


@dataclass(frozen=True)
class RegistryEntry:
    """A registered part, such as a strategy or a metric."""

    name: str
    code: Any
    """The class or function, or its import path ``package.module:attribute``."""
    recipe: type[BaseModel] | None = None
    """Class of the part's section in recipes; None for parts without one, such as metrics."""
    about: str = ""
    """One sentence for listings."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts, such as the outputs that a metric compares."""

    @property
    def module(self) -> str:
        """Name of the module that contains the code."""
        if isinstance(self.code, str):
            return self.code.partition(":")[0]
        return str(self.code.__module__)

    @property
    def origin(self) -> str:
        """``built-in``, or the module of the plugin."""
        built_in = self.module.partition(".")[0] == __package__
        return "built-in" if built_in else self.module

    def load(self) -> Any:
        """Return the class or function; import its module if needed."""
        if not isinstance(self.code, str):
            return self.code
        module, _, attribute = self.code.partition(":")
        return getattr(import_module(module), attribute)

    @contextmanager
    def named_in_errors(self, kind: str) -> Iterator[None]:
        """Convert an error inside the context to ``PluginError``.

        The message names the part, and the file and line that failed. A ``FedMergeError``
        and errors of built-in parts are raised unchanged.
        """
        try:
            yield
        except FedMergeError:
            raise
        except Exception as error:
            if self.origin == "built-in":
                raise
            source = getattr(sys.modules.get(self.module), "__file__", None)
            frames = extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename == source] or frames
            raise PluginError(
                f"the {kind} {self.name!r} of {self.module} failed at {own[-1].filename}:"
                f"{own[-1].lineno}: {type(error).__name__}: {error}"
            ) from error


class Registry:
    """All parts of one kind, such as all strategies, by their names in recipes.

    Args:
        kind: Singular noun for messages, such as ``partition scheme``.
        plural: Plural of the noun.
        key: Key under which a section of a recipe names the part, such as ``scheme``.
    """

    def __init__(self, kind: str, plural: str, key: str = "name") -> None:
        self.kind = kind
        self.plural = plural
        self.key = key
        self._entries: dict[str, RegistryEntry] = {}

    def add(
        self,
        name: str,
        code: Any,
        *,
        recipe: type[BaseModel] | None = None,
        about: str | None = None,
        **facts: Any,
    ) -> None:
        """Register a part under a name.

        The section ``recipe`` has a field that names the part (the registry's ``key``). The name
        becomes the default and the only allowed value of this field. A module may register a name
        again, so that a notebook cell can run twice.

        Args:
            name: The name in recipes.
            code: A class or function, or its import path ``package.module:attribute``.
            recipe: Class of the part's section in recipes; None for a part without one.
            about: One sentence for listings. Default: the first paragraph of the docstring of the
                section, else of the code.
            facts: Further facts about the part.

        Raises:
            PluginError: Another module has registered the name, or the section belongs to another
                name.
        """
        entry = RegistryEntry(
            name, code, recipe, about or _first_paragraph(recipe) or _first_paragraph(code), facts
        )
        known = self._entries.get(name)
        if known is not None and known.module != entry.module:
            raise PluginError(
                f"the {self.kind} {name!r} of {entry.module} is already registered by "
                f"{known.module}; choose another name"
            )
        if recipe is not None:
            other = next((e.name for e in self if e.recipe is recipe and e.name != name), None)
            if other is not None:
                raise PluginError(
                    f"the {self.kind} {name!r} of {entry.module} has the section "
                    f"{recipe.__name__}, which belongs to {other!r}; derive a separate class"
                )
            _tag(recipe, self.key, name)
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Remove a part. Raises ``KeyError`` if the name is not registered."""
        del self._entries[name]

    def sections(self) -> dict[str, type[Any]]:
        """Return the classes of recipe sections by name, without parts that have no section."""
        return {entry.name: entry.recipe for entry in self if entry.recipe is not None}

    def __getitem__(self, name: str) -> RegistryEntry:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[RegistryEntry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)


def _tag(recipe: type[BaseModel], key: str, name: str) -> None:
    """Replace the field ``key`` of a section by ``key: Literal[name] = name``."""
    literal: Any = Literal[name]
    tag = FieldInfo.from_annotated_attribute(literal, name)
    tag.description = recipe.model_fields[key].description
    recipe.model_fields[key] = tag
    recipe.model_rebuild(force=True)


def _first_paragraph(documented: Any) -> str:
    text = None if isinstance(documented, str) else getattr(documented, "__doc__", None)
    return " ".join((text or "").strip().partition("\n\n")[0].split())


STRATEGIES = Registry("strategy", "strategies")
TASKS = Registry("task", "tasks")
PARTITIONS = Registry("partition scheme", "partition schemes", key="scheme")
METRICS = Registry("metric", "metrics")
AGGREGATIONS = Registry("aggregation rule", "aggregation rules")
CALLBACKS = Registry("callback", "callbacks")

REGISTRIES = (STRATEGIES, TASKS, PARTITIONS, METRICS, AGGREGATIONS, CALLBACKS)


# ---- Discovery -----------------------------------------------------------------------------------
@cache
def import_installed() -> None:
    """Import the plugins of installed packages, once per process.

    A plugin that cannot be imported causes a warning with the reason and is skipped.
    """
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            point.load()
        except (Exception, SystemExit) as error:  # a plugin may raise any exception
            package = point.dist.name if point.dist else "an installed package"
            log.warning(
                "the plugin %s (%s) of %s cannot be imported: %s: %s; update or remove the package",
                point.name,
                point.value,
                package,
                type(error).__name__,
                error,
            )


def import_modules(names: Iterable[str]) -> None:
    """Import plugins by the names of their modules.

    Raises:
        PluginError: A name is not a valid module name, the module is missing, or its import fails.
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise PluginError(
                f"{name!r} is not the name of a module; name a plugin as in an import "
                "statement (my_plugin), not as a path"
            )
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            absent = error.name or ""
            if name != absent and not name.startswith(f"{absent}."):
                remedy = f"; install the package that has {absent!r}" if absent else ""
                raise PluginError(f"{name} cannot be imported: {error}{remedy}") from error
            raise PluginError(
                f"there is no module {absent!r}; install the package that has it, or add the "
                "folder that contains it to PYTHONPATH (PYTHONPATH=. for the current folder)"
            ) from error
        except (Exception, SystemExit) as error:
            cause = str(error) if isinstance(error, PluginError) else _named(error)
            raise PluginError(f"{name} cannot be imported: {cause}") from error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
