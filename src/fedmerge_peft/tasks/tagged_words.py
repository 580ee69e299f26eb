"""Tagged words of texts: their bounds in the text, and their first tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.labels import blank_table, is_text
from fedmerge_peft.tasks.lists import encode_lists, infer_list_labels, read_lists, relabel_lists
from fedmerge_peft.tasks.row_names import row_name

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.label_tasks import TokenClassificationRecipe


@dataclass(frozen=True)
class TaggedText:
    """A text with tags of its words."""

    text: str
    bounds: NDArray[np.int64]
    """Begin and end of each word in the text, ``(words, 2)``, in ascending order."""
    tags: Sequence[int]
    """Id of each word's tag."""


@dataclass(frozen=True)
class TagSource(ABC):
    """Reader of columns with texts and tags. It also determines the form of predictions."""

    recipe: TokenClassificationRecipe
    key: ClassVar[str]
    """Recipe key of the column with tags."""
    probes: ClassVar[Sequence[Any]]
    """Two inputs that all models of the task accept."""

    @property
    def column(self) -> str:
        """Column with tags."""
        return str(getattr(self.recipe, self.key.removeprefix("task.")))

    @abstractmethod
    def infer_tags(self, table: Dataset) -> list[str]:
        """Return the names of the tags in the order of their ids.

        Raises ``DataError`` if the column does not match the recipe.
        """

    @abstractmethod
    def read(self, table: Dataset, labels: Sequence[str]) -> list[TaggedText]:
        """Return the tagged text of each row. Raises ``DataError`` for unsuitable columns."""

    @abstractmethod
    def relabel(self, table: Dataset, labels: Sequence[str]) -> Dataset:
        """Convert the tags of a table to ids, which are indices in ``labels``.

        Raises ``DataError`` for a tag that is not in ``labels``.
        """

    @abstractmethod
    def blank(self, labels: Sequence[str]) -> tuple[Any, Any]:
        """Return the feature type of the column with these tags, and a value without tags."""

    @abstractmethod
    def input_table(self, labels: list[str], inputs: list[Any]) -> Dataset:
        """Convert inputs of predictions to rows. Raises ``DataError`` for unsuitable inputs."""

    @abstractmethod
    def answer(
        self,
        bounds: NDArray[np.int64],
        tags: Sequence[str | None],
        scores: Sequence[float | None],
    ) -> dict[str, Any]:
        """Convert the tags of a text's words to a prediction.

        Args:
            bounds: Begin and end of each word in the text, ``(words, 2)``.
            tags: Most likely tag of each word; None for a word without tokens.
            scores: Probability of each tag; None for a word without tokens.
        """


class ListedTags(TagSource):
    """Reader of a column of lists of words, and a column of lists of their tags.

    The words of a row are joined with spaces.
    """

    key: ClassVar[str] = "task.tags"
    probes: ClassVar[Sequence[Any]] = [["a"], ["another", "text,", "which", "is", "longer"]]

    def infer_tags(self, table: Dataset) -> list[str]:
        return infer_list_labels(table, self.column, self.key)

    def read(self, table: Dataset, labels: Sequence[str]) -> list[TaggedText]:
        column = read_lists(table, self.recipe.words, "task.words")
        if len(column.values) and not is_text(column.values.type):
            raise DataError(
                f"task.words: column {self.recipe.words!r} has lists of {column.values.type}, "
                "expected lists of texts; choose another column"
            )
        words = column.rows(column.values.to_pylist())
        tags = encode_lists(table, self.column, self.key, labels)
        for row, (own, marks) in enumerate(zip(words, tags, strict=True)):
            if len(own) != len(marks):
                raise DataError(
                    f"{row_name(row)}: {len(own)} word{'s' * (len(own) != 1)} in column "
                    f"{self.recipe.words!r}, but {len(marks)} tag{'s' * (len(marks) != 1)} in "
                    f"column {self.column!r}; write one tag for each word"
                )
        return [
            TaggedText(" ".join(own), joined_bounds(own), marks)
            for own, marks in zip(words, tags, strict=True)
        ]

    def relabel(self, table: Dataset, labels: Sequence[str]) -> Dataset:
        return relabel_lists(table, self.column, self.key, labels)

    def blank(self, labels: Sequence[str]) -> tuple[Any, Any]:
        from datasets import ClassLabel, List

        return List(ClassLabel(names=list(labels))), []

    def input_table(self, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import List, Value

        unfit = [
            words
            for words in inputs
            if not isinstance(words, list | tuple)
            or not all(isinstance(word, str) for word in words)
        ]
        reject_inputs(unfit, "a list of words")
        tag = labels.index("O") if "O" in labels else 0
        types = {self.recipe.words: List(Value("string")), self.column: self.blank(labels)[0]}
        return blank_table(types, [[list(words), [tag] * len(words)] for words in inputs], {})

    def answer(
        self,
        bounds: NDArray[np.int64],
        tags: Sequence[str | None],
        scores: Sequence[float | None],
    ) -> dict[str, Any]:
        """Return the most likely tag of each word, and its probability."""
        return {"tags": list(tags), "scores": list(scores)}


def joined_bounds(words: Sequence[str]) -> NDArray[np.int64]:
    """Return begin and end of each word after words are joined with spaces, ``(words, 2)``."""
    ends = np.array([*accumulate((len(word) + 1 for word in words), initial=-1)][1:], np.int64)
    return np.stack([ends - np.array([len(word) for word in words], np.int64), ends], axis=1)


def first_tokens(
    bounds: NDArray[np.int64], offsets: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """Return the index of the first token of each word; -1 for words without tokens.

    Args:
        bounds: Begin and end of each word, ``(words, 2)``.
        offsets: Begin and end of each token in the text; begin equals end for tokens that are not
            in the text. A token belongs to the word that contains its last character, even if the
            token begins with the space before the word.

    Returns:
        Indices of tokens, ``(words,)``.
    """
    begins, ends = bounds[:, 0], bounds[:, 1]
    first = np.full(len(bounds), -1, dtype=np.int64)
    for place, (begin, end) in enumerate(offsets):
        word = int(np.searchsorted(ends, end - 1, side="right")) if end > begin else len(bounds)
        if word < len(bounds) and end > begins[word] and first[word] < 0:
            first[word] = place
    return first
