"""Sections of a recipe's callbacks, distinguished by ``name``."""

from __future__ import annotations

from typing import Annotated

from fedmerge_peft.plugins import CALLBACKS
from fedmerge_peft.recipe.registered import OneOf
from fedmerge_peft.recipe.section import Section


class CallbackRecipe(Section):
    """Base of a callback's section."""

    name: str = ""
    """Name of the callback."""


AnyCallback = Annotated[CallbackRecipe, OneOf(CALLBACKS)]
"""A section of any registered callback."""
