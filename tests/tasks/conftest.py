from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.tasks import Task, make_task


@pytest.fixture
def task_of(tiny_models: Path) -> Callable[..., Any]:
    """``task_of(kind, table, name=..., **options)``: a recipe's task on a tiny model."""

    def build(
        kind: str,
        table: Dataset,
        *,
        backbone: dict[str, Any] | None = None,
        folder: Path | None = None,
        **task: Any,
    ) -> Task:
        recipe = Recipe.model_validate(
            {
                "name": "test",
                "task": task,
                "backbone": {"model": f"tiny:{kind}", **(backbone or {})},
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
            }
        )
        return make_task(recipe, table, str(folder or tiny_models / kind))

    return build
