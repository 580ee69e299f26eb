from collections.abc import Callable
from pathlib import Path

import pytest

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import Recipe

MINIMAL = """\
name: first
seed: 1
task: sequence-classification
backbone:
  model: tiny:bert
data:
  path: embedded:support-tickets
  partition:
    scheme: iid
    clients: 4
"""


@pytest.fixture
def minimal() -> str:
    """A short valid recipe of ten lines."""
    return MINIMAL


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | bytes], Path]:
    """Write a recipe's text to a file, always the same one."""
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"

    def write(content: str | bytes) -> Path:
        path.write_bytes(
            content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        )
        return path

    return write


@pytest.fixture
def faults(recipe_file: Callable[[str | bytes], Path]) -> Callable[..., list[str]]:
    """The errors in a recipe's text, without the folder's name."""

    def read(content: str | bytes, *overrides: str) -> list[str]:
        path = recipe_file(content)
        with pytest.raises(RecipeError) as caught:
            Recipe.load(path, overrides)
        return [fault.replace(f"{path.parent}/", "") for fault in caught.value.faults]

    return read
