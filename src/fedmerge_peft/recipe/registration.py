"""The public decorators that register a plugin's parts.

Each decorator takes the name of the part in recipes. The decorators of strategies, tasks, partition
schemes and callbacks also take the class of the recipe section with the part's settings. These
parts get the section, an instance of that class, as their first argument, ``recipe``. Parts are
called as follows:

    strategy     ``Mine(recipe, context)``, a ``strategies.Strategy``
    task         ``Mine(recipe, backbone, table, model_folder)``, a ``tasks.Task``
    partition    ``mine(recipe, splits)``, returns the clients' rows, see ``data.schemes``
    metric       ``mine(predicted, expected)``, or ``mine(loss)``; returns a number
    aggregation  ``mine(deltas, weights, recipe)``, returns one update for each adapter
    callback     ``Mine(recipe)``, a ``Callback``
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from inspect import isclass
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, create_model

from fedmerge_peft.errors import PluginError
from fedmerge_peft.plugins import (
    AGGREGATIONS,
    CALLBACKS,
    METRICS,
    PARTITIONS,
    STRATEGIES,
    TASKS,
    Registry,
)
from fedmerge_peft.recipe.callbacks import CallbackRecipe
from fedmerge_peft.recipe.data import PartitionRecipe
from fedmerge_peft.recipe.error_messages import field_annotation, variants
from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.recipe.section import Section
from fedmerge_peft.recipe.strategy_base import StrategyRecipe
from fedmerge_peft.recipe.tasks import TaskRecipe

Code = TypeVar("Code", bound=Callable[..., object])

Output = Literal[
    "classes",
    "class_scores",
    "tokens",
    "texts",
    "answers",
    "tags",
    "values",
    "label_sets",
    "label_scores",
    "vectors",
    "rewards",
    "loss",
]


def register_strategy(
    name: str, *, recipe: type[StrategyRecipe] | None = None
) -> Callable[[Code], Code]:
    """Register a subclass of ``Strategy`` under a name.

        @register_strategy("mine", recipe=MineRecipe)
        class Mine(Strategy): ...

    Args:
        name: The value of ``strategy.name`` in recipes.
        recipe: Class of the section with the strategy's settings and facts. Default: a section
            without settings.

    Raises:
        PluginError: Another module has registered the name, the section belongs to another name, an
            argument is invalid, or the decorated object is not a class.
    """
    return _section_of(STRATEGIES, name, recipe, StrategyRecipe)


def register_task(name: str, *, recipe: type[TaskRecipe]) -> Callable[[Code], Code]:
    """Register a subclass of ``Task`` under a name, the value of ``task.name`` in recipes.

    ``recipe`` is the class of the section with the task's columns and settings. Raises
    ``PluginError`` in the cases that ``register_strategy`` lists.
    """
    return _section_of(TASKS, name, recipe, TaskRecipe)


def register_partition(
    name: str, *, recipe: type[PartitionRecipe] | None = None
) -> Callable[[Code], Code]:
    """Register, under a name, a function that assigns rows to clients.

    The name is the value of ``data.partition.scheme`` in recipes. ``recipe`` is the class of the
    scheme's section; by default, a section without settings. The function takes the section and the
    ``Splits``. It returns, by name of the split, a list with the ``ClientRows`` of each client, in
    the same order for all splits. Only ``train`` is required; splits that the function does not
    return are partitioned in the proportions of ``train``.

    Raises ``PluginError`` if another module has registered the name, if the section belongs to
    another name, or if an argument is invalid.
    """
    return _section_of(PARTITIONS, name, recipe, PartitionRecipe)


def register_callback(
    name: str, *, recipe: type[CallbackRecipe] | None = None
) -> Callable[[Code], Code]:
    """Register a subclass of ``Callback`` under a name, for the list ``callbacks`` of recipes.

    ``recipe`` is the class of the section with the callback's settings; by default, a section
    without settings. Raises ``PluginError`` in the cases that ``register_strategy`` lists.
    """
    return _section_of(CALLBACKS, name, recipe, CallbackRecipe)


def register_metric(
    name: str,
    *,
    of: Output | tuple[Output, ...] = "classes",
    greater_is_better: bool = True,
    range: tuple[float, float] = (-math.inf, math.inf),
    per_example: bool = False,
) -> Callable[[Code], Code]:
    """Register, under a name for ``task.metrics``, a function that scores predictions.

        @register_metric("balanced_accuracy")
        def balanced_accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float: ...

    Args:
        name: The name in recipes, tables and files.
        of: Kind of output that the function compares, or several kinds, of which it gets the first
            that the task has. ``classes``: predicted and expected ids of classification tasks.
            ``class_scores``: for each example a list with the probability of each class, and
            expected ids. ``tokens``: predicted and expected ids of language models. ``texts``:
            generated and reference texts. ``answers``: for each question the predicted text, and
            the list of accepted texts. ``tags``: for each text the predicted and the expected list
            of tag names. ``values``: predicted and expected numbers. ``label_sets``: for each
            example the predicted and the expected list, with 1 for each label that applies and 0
            for each other label. ``label_scores``: for each example a list with the probability of
            each label, and the expected list. ``vectors``: for each row the unit vector of its
            anchor, and a pair with the ids and the unit vectors of all its texts (anchor, positive
            and, if there is one, negative; equal texts have the same id). ``rewards``: for each
            pair the reward of the chosen and of the rejected completion. ``loss``: the mean loss
            in nats, the only argument.
        greater_is_better: True if larger values are better.
        range: Smallest and largest value. Across sites, scores outside this range are refused. In
            figures, metrics with the range 0 to 1 have this range as their axis.
        per_example: True if the metric is the fraction of examples that are predicted correctly.
            Tables then show confidence intervals.

    Raises:
        PluginError: The name is ``loss``, another module has registered the name, or an argument is
            invalid.
    """
    outputs = (of,) if isinstance(of, str) else of
    unknown = set(outputs) - set(get_args(Output))
    if unknown or not outputs:
        raise PluginError(
            f"the metric {name!r}: of={', '.join(sorted(unknown)) or of}, expected any of "
            f"{', '.join(get_args(Output))}"
        )
    if name == "loss":
        raise PluginError(
            "the metric 'loss': every task already has that score; choose another name"
        )
    try:
        low, high = map(float, range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise PluginError(
            f"the metric {name!r}: range={range!r}, expected the smallest and the largest value"
        )
    facts = {
        "greater_is_better": greater_is_better,
        "range": (low, high),
        "per_example": per_example,
    }
    return _named(METRICS, name, of=outputs, **facts)


def register_aggregation(name: str) -> Callable[[Code], Code]:
    """Register an aggregation rule under a name, the value of ``robustness.aggregation``.

    The function takes the updates δ ``(k, P)``, the weights ``(k, d)`` in float64, and the section
    ``RobustnessRecipe``. Each column of the weights sums to 1, or is zero if no client uses the
    adapter. The function returns one update for each adapter, ``(d, P)``, in the dtype of δ.

    Raises ``PluginError`` if another module has registered the name, or the name is invalid.
    """
    return _named(AGGREGATIONS, name)


def _section_of(
    registry: Registry, name: str, recipe: type[Section] | None, base: type[Section]
) -> Callable[[Code], Code]:
    _check_name(registry, name)
    if recipe is not None and not (
        isclass(recipe) and issubclass(recipe, base) and recipe is not base
    ):
        raise PluginError(
            f"the {registry.kind} {name!r}: recipe={getattr(recipe, '__name__', repr(recipe))}, "
            f"expected a class that is derived from {base.__name__}"
        )

    def register(code: Code) -> Code:
        if registry is not PARTITIONS and not isclass(code):
            raise PluginError(
                f"the {registry.kind} {name!r}: {getattr(code, '__name__', repr(code))} is not a "
                "class; decorate a class"
            )
        section = recipe or create_model(
            f"{name}Recipe", __base__=base, __doc__=code.__doc__, __module__=code.__module__
        )
        registry.add(name, code, recipe=section)
        rebuild(Recipe)
        return code

    return register


def _named(registry: Registry, name: str, **facts: Any) -> Callable[[Code], Code]:
    _check_name(registry, name)

    def register(code: Code) -> Code:
        registry.add(name, code, **facts)
        rebuild(Recipe)
        return code

    return register


def _check_name(registry: Registry, name: object) -> None:
    """Raise ``PluginError`` if a name is not text, or has characters that are not allowed."""
    if not isinstance(name, str):
        raise PluginError(
            f"the {registry.kind} {getattr(name, '__name__', repr(name))} has no name; pass a "
            f'name to the decorator, as in @register_{registry.kind.split()[0]}("mine")'
        )
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise PluginError(
            f"the {registry.kind} {name!r}: a name has letters, digits, '_', '-' and '.', and "
            "begins with a letter, a digit or '_'; choose another"
        )


def rebuild(section: type[BaseModel]) -> None:
    """Build the schemas of a section and of all sections in it from the current registries."""
    for info in section.model_fields.values():
        for inner in variants(field_annotation(info)):
            rebuild(inner)
    section.model_rebuild(force=True)
