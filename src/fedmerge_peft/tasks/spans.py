"""Entities as spans of characters: conversion to tags of words, and predictions from tags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedmerge_peft.data.columns import check_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.labels import blank_table, reject_nulls, unknown_label, with_column
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.tagged_words import TaggedText, TagSource
from fedmerge_peft.tasks.tokenization import read_texts

if TYPE_CHECKING:
    from datasets import Dataset

_WORD = re.compile(r"\w+|[^\w\s]")


class Span(NamedTuple):
    """Entity of a text: its characters from ``start`` to ``end``, end excluded."""

    start: int
    end: int
    label: str


class SpanTags(TagSource):
    """Reader of a column of texts, and a column of lists of spans ``{start, end, label}``.

    A word is a run of letters, digits and underscores, or one other character that is not a space.
    Borders of spans divide words. A word has the tag B-X at the beginning of a span with the label
    X, I-X inside it, and O elsewhere.
    """

    key: ClassVar[str] = "task.spans"
    probes: ClassVar[Sequence[Any]] = ["a", "another text, which is longer"]

    def infer_tags(self, table: Dataset) -> list[str]:
        names = self._class_names(table)
        if names is None:
            names = sorted({span.label for spans in self._rows(table) for span in spans})
        if not names:
            raise DataError(
                f"task.spans: column {self.column!r} has no spans to infer labels from; add some, "
                "or name another column"
            )
        return ["O", *(f"{mark}-{name}" for name in names for mark in "BI")]

    def read(self, table: Dataset, labels: Sequence[str]) -> list[TaggedText]:
        texts = read_texts(table, self.recipe.text, "task.text")
        ids = {name: number for number, name in enumerate(labels)}
        rows = []
        for row, (text, spans) in enumerate(zip(texts, self._rows(table), strict=True)):
            try:
                bounds, tags = tag_words(text, spans)
                rows.append(TaggedText(text, bounds, [ids[tag] for tag in tags]))
            except KeyError as error:
                name = str(error.args[0])[2:]
                raise self._fault(row, unknown_label(name, entity_names(labels))) from None
            except ValueError as error:
                raise self._fault(row, f"{error}; correct or remove it") from None
        return rows

    def relabel(self, table: Dataset, labels: Sequence[str]) -> Dataset:
        from datasets import Features

        names = entity_names(labels)
        ids: list[list[dict[str, Any]]] = []
        for row, spans in enumerate(self._rows(table)):
            if unknown := next((span.label for span in spans if span.label not in names), None):
                raise self._fault(row, unknown_label(unknown, names))
            ids.append([{**span._asdict(), "label": names.index(span.label)} for span in spans])
        kind, _ = self.blank(labels)
        (field,) = Features({self.column: kind}).arrow_schema
        return with_column(table, self.column, pa.array(ids, field.type), kind)

    def blank(self, labels: Sequence[str]) -> tuple[Any, Any]:
        from datasets import ClassLabel, List, Value

        label = ClassLabel(names=entity_names(labels))
        return List({"start": Value("int64"), "end": Value("int64"), "label": label}), []

    def input_table(self, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import Value

        reject_inputs([item for item in inputs if not isinstance(item, str)], "a text")
        text = {self.recipe.text: Value("string")}
        return blank_table(text, [[item] for item in inputs], {self.column: self.blank(labels)})

    def answer(
        self,
        bounds: NDArray[np.int64],
        tags: Sequence[str | None],
        scores: Sequence[float | None],
    ) -> dict[str, Any]:
        """Return the predicted spans, each with the mean probability of its words' tags."""
        spans: list[dict[str, Any]] = []
        parts: list[list[float]] = []
        before = "O"
        for (start, end), tag, score in zip(bounds.tolist(), tags, scores, strict=True):
            tag = tag or "O"
            if tag != "O" and (tag.startswith("B-") or before[2:] != tag[2:]):
                spans.append({"start": start, "end": end, "label": tag[2:]})
                parts.append([])
            if tag != "O":
                spans[-1]["end"] = end
                parts[-1].append(score or 0.0)
            before = tag
        pairs = zip(spans, parts, strict=True)
        return {"spans": [{**span, "score": sum(part) / len(part)} for span, part in pairs]}

    def _rows(self, table: Dataset) -> Iterator[list[Span]]:
        """Yield the spans of each row, ascending. Raises ``DataError`` for unsuitable values."""
        check_column(table, self.column, self.key)
        column = table.select_columns([self.column]).with_format("arrow")[:].column(self.column)
        reject_nulls(column, self.column)
        names = self._class_names(table)
        for row, value in enumerate(column.to_pylist()):
            try:
                yield sorted(_spans(value, names))
            except (KeyError, TypeError, ValueError, IndexError):
                raise self._fault(
                    row, f"expected a list of {{start, end, label}}, found {str(value)[:80]}"
                ) from None

    def _class_names(self, table: Dataset) -> list[str] | None:
        kind = table.features.get(self.column)
        fields = getattr(kind, "feature", kind)
        label = fields.get("label") if isinstance(fields, dict) else None
        return getattr(getattr(label, "feature", label), "names", None)

    def _fault(self, row: int, reason: str) -> DataError:
        return DataError(f"{row_name(row)}: column {self.column!r}: {reason}")


def tag_words(text: str, spans: Sequence[Span]) -> tuple[NDArray[np.int64], list[str]]:
    """Divide a text into words, and tag them.

    Args:
        text: Text.
        spans: Spans of the text, ascending.

    Returns:
        Begin and end of each word, ``(words, 2)``, and their tags.

    Raises:
        ValueError: A span does not end after its start, is not inside the text, contains no word,
            or overlaps another.
    """
    end = 0
    for span in spans:
        if span.end <= span.start:
            raise ValueError(
                f"the span from {span.start} to {span.end} does not end after its start"
            )
        if span.start < 0 or span.end > len(text):
            raise ValueError(
                f"the span from {span.start} to {span.end} is not inside the text of {len(text)} "
                f"character{'s' * (len(text) != 1)}"
            )
        if span.start < end:
            raise ValueError(f"the span from {span.start} to {span.end} overlaps another one")
        end = span.end
    borders = sorted({border for span in spans for border in span[:2]})
    words = []
    for word in _WORD.finditer(text):
        inner = [border for border in borders if word.start() < border < word.end()]
        edges = [word.start(), *inner, word.end()]
        words += list(pairwise(edges))
    tags = ["O"] * len(words)
    for span in spans:
        own = [place for place, (begin, _) in enumerate(words) if span.start <= begin < span.end]
        if not own:
            raise ValueError(f"the span from {span.start} to {span.end} has no word, only spaces")
        for place in own:
            tags[place] = f"{'B' if place == own[0] else 'I'}-{span.label}"
    return np.array(words, dtype=np.int64).reshape(-1, 2), tags


def entity_names(labels: Sequence[str]) -> list[str]:
    """Return the labels X of spans from the tags O, B-X and I-X, in the order of the tags."""
    return [label[2:] for label in labels if label.startswith("B-")]


def _spans(value: Any, names: Sequence[str] | None) -> Iterator[Span]:
    """Yield the spans in a list of records, or in a record of lists."""
    if isinstance(value, dict):
        value = [
            dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)
        ]
    for entry in value:
        label = entry["label"]
        if isinstance(label, int) and names is not None:
            if not 0 <= label < len(names):
                raise ValueError
            label = names[label]
        if not isinstance(label, str) or not label:
            raise TypeError
        yield Span(_place(entry["start"]), _place(entry["end"]), label)


def _place(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)
