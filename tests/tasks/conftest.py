from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.tasks import Task, make_task
from tasks.chat_templates import POSITIONS


@pytest.fixture(scope="session")
def long_llama(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama and a limit of 4096 tokens, for chat templates of real size."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("long-llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_models / "llama")
    model.config.max_position_embeddings = POSITIONS
    model.save_pretrained(folder)
    return folder


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
