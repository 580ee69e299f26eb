"""Fixtures of federations."""

import pytest

from federation.small_recipe import recipe
from fedmerge_peft.engines.local import LocalEngine


@pytest.fixture(scope="module")
def engine():
    """The engine that ``recipe()`` loads."""
    return LocalEngine.from_recipe(recipe())
