"""Models that a Python program passes to a run; the run cannot be used with another model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmerge_peft.errors import BackboneError, ResumeError
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.in_memory import is_here, is_passed

if TYPE_CHECKING:
    from fedmerge_peft.engines.base import Engine
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.tasks.in_memory import PassedModel


def with_model(recipe: Recipe, model: PassedModel | None, engine: Engine | None = None) -> Recipe:
    """Return the recipe with this model as its backbone; without a model, return it unchanged.

    Raises:
        BackboneError: Both a model and an engine are passed.
    """
    if model is None:
        return recipe
    if engine is not None:
        raise BackboneError("model: the engine has its own model; pass either model or engine")
    own = {
        "model": model.name,
        "revision": None,
        "gguf_file": None,
        "tokenizer": None,
        "trust_remote_code": False,
    }
    return recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update=own)})


def check_model(run: RunDirectory, given: Recipe, *, needed: bool = True) -> None:
    """Raise ``ResumeError`` if ``given`` has another model, or a needed model is not in memory.

    Args:
        run: The run.
        given: The run's recipe. If the program passes a model in this call, this is its backbone.
        needed: True if the model will be loaded. If a program passed it to the run, it must then be
            in memory.
    """
    expected, now = run.recipe.backbone.model, given.backbone.model
    if expected != now and not is_passed(expected):
        raise ResumeError(
            f"{run.path} loads its model from backbone.model: {expected}; do not pass a model"
        )
    if expected != now:
        raise ResumeError(
            f"{run.path} cannot be used with another model: it had {expected}, this is {now} "
            "(digests of structure, configuration, weights and tokenizer or image processor); pass "
            "the same model, unchanged"
        )
    if needed and is_passed(expected) and not is_here(expected):
        raise ResumeError(
            f"{run.path} needs its model, which a Python program passed and the run does not "
            f"store; in Python, pass it again with model=..., and tokenizer=... or processor=..."
        )
