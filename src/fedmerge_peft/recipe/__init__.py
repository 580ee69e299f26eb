"""Recipes: the settings of a run, checked before it starts."""

from fedmerge_peft.recipe.schema import Recipe

__all__ = ["Recipe"]
