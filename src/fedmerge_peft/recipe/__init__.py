"""What a run is asked to be."""

from fedmerge_peft.recipe.schema import Recipe

__all__ = ["Recipe"]
