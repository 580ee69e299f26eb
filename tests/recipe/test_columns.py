"""A task reads each column once."""

import pytest

from fedmerge_peft import Recipe
from fedmerge_peft.errors import RecipeError


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ({"name": "sequence-classification", "text": "label"}, "text and label both name"),
        ({"name": "sequence-classification", "text_pair": "text"}, "text and text_pair both name"),
        ({"name": "multi-label-classification", "labels": ["a", "a"]}, "labels names .* a twice"),
        ({"name": "multiple-choice", "choices": ["a", "label"]}, "choices and label both name"),
        ({"name": "sentence-embedding", "negative": "positive"}, "positive and negative both"),
        ({"name": "image-regression", "target": "image"}, "image and target both name"),
    ],
)
def test_a_column_that_is_read_twice_is_refused(task, fault):
    with pytest.raises(RecipeError, match=f"task: {fault}.*; name another column"):
        Recipe(
            name="mine",
            task=task,
            backbone={"model": "tiny:bert"},
            data={"path": "rows.csv", "partition": {"scheme": "iid", "clients": 2}},
        )
