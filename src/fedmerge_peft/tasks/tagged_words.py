"""Words of texts with a tag each, and the tokens at which they begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.labels import is_text
from fedmerge_peft.tasks.lists import encode_lists, read_lists

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.label_tasks import TokenClassificationRecipe


def read_words(
    recipe: TokenClassificationRecipe, table: Dataset, labels: Sequence[str]
) -> tuple[list[list[str]], list[list[int]]]:
    """Return the words of each row, and the ids of their tags."""
    column = read_lists(table, recipe.words, "task.words")
    if len(column.values) and not is_text(column.values.type):
        raise DataError(f"task.words: column {recipe.words!r} has lists of {column.values.type}")
    words = column.rows(column.values.to_pylist())
    tags = encode_lists(table, recipe.tags, "task.tags", labels)
    for row, (own, marks) in enumerate(zip(words, tags, strict=True)):
        if len(own) != len(marks):
            raise DataError(
                f"row {row} (of the rows in use): {len(own)} words in column {recipe.words!r}, "
                f"but {len(marks)} tags in column {recipe.tags!r}"
            )
    return words, tags


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the first token of each word of a text joined with spaces; -1 for words without.

    Args:
        words: Words.
        offsets: Begin and end of each token in the text; equal for tokens that are not in it. A
            token that begins with the space before a word belongs to the word.

    Returns:
        Places of tokens, ``(words,)``.
    """
    ends = np.array([*accumulate((len(word) + 1 for word in words), initial=-1)][1:])
    begins = ends - np.array([len(word) for word in words], dtype=np.int64)
    first = np.full(len(words), -1, dtype=np.int64)
    for place, (begin, end) in enumerate(offsets):
        word = int(np.searchsorted(ends, end - 1, side="right")) if end > begin else len(words)
        if word < len(words) and end > begins[word] and first[word] < 0:
            first[word] = place
    return first
