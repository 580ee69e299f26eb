"""A small table of examples, and a cache that is deleted after each test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from fedmerge_peft.recipe.data import DataRecipe

TASKS = ("snips", "subj", "trec6")
IID = {"scheme": "iid", "clients": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(count: int = 60) -> dict[str, list[Any]]:
    """Three tasks in two domains, four labels, four fifths train and one fifth test."""
    return {
        "text": [f"text {i}" for i in range(count)],
        "label": [i % 4 for i in range(count)],
        "task": [TASKS[i % 3] for i in range(count)],
        "domain": ["logic" if i % 3 == 1 else "speech" for i in range(count)],
        "split": ["test" if i % 5 == 4 else "train" for i in range(count)],
    }


@pytest.fixture
def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict(rows())


@pytest.fixture
def parquet(tmp_path: Path, table: datasets.Dataset) -> str:
    path = tmp_path / "rows.parquet"
    table.to_parquet(str(path))
    return str(path)


@pytest.fixture
def recipe(parquet: str) -> Any:
    """Recipes on the small table: ``recipe(filter={...}, partition={...})``."""

    def make(**keys: Any) -> DataRecipe:
        return DataRecipe(**{"path": parquet, "partition": IID} | keys)

    return make
