"""Plugins of the benchmark programs stay in the tests of their module."""

import sys

import pytest

from fedmerge_peft.plugins import REGISTRIES
from fedmerge_peft.recipe.registration import rebuild
from fedmerge_peft.recipe.schema import Recipe


@pytest.fixture(autouse=True, scope="module")
def own_registries():
    before = [dict(registry._entries) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)
    rebuild(Recipe)
    sys.modules.pop("partitions", None)
