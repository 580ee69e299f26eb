"""Extractive question answering: windows of contexts, their labels, and the best answer span."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmerge_peft.data.columns import check_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.tokenization import more_tokens
from fedmerge_peft.util.library_errors import library_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.text_tasks import QuestionAnsweringRecipe


@dataclass(frozen=True)
class Answer:
    """A part of a context; an empty text stands for no answer."""

    text: str
    score: float
    """Start logit of the first token plus end logit of the last token; infinite for references."""
    probability: float
    """Softmax probability of the first token as the start, times that of the last token as the end,
    both over the window; 1 for references."""
    start: int = 0
    """Index of the answer's first character in the context; 0 if there is no answer."""


@dataclass(frozen=True)
class Window:
    """Tokens of a question and of a part of its context."""

    ids: list[int]
    types: list[int]
    """Token types; empty if the model does not read them or the tokenizer does not return them."""
    places: list[tuple[int, int]]
    """Begin and end of each token's characters in the context, end excluded; (-1, -1) for tokens
    outside of the context."""
    label: tuple[int, int]
    """Indices of the answer's first and last token; ``(none, none)`` if there is no answer, or if
    the window does not contain all of it."""
    none: int
    """Index of the token that stands for no answer."""


class AnswerWindows:
    """Splitter of contexts into overlapping windows, each preceded by the question.

    The division follows the question answering example of transformers.

    Args:
        tokenizer: Tokenizer that returns character offsets (``return_offsets_mapping``).
        length: Maximum length of a window in tokens.
        stride: Number of tokens of the context that consecutive windows share.
        limit: Limit of the model in tokens, if any.
        with_types: True if the model reads token types.

    Raises:
        DataError: ``stride`` is not less than ``longest_question``.
    """

    def __init__(
        self, tokenizer: Any, length: int, stride: int, limit: int | None, *, with_types: bool
    ) -> None:
        self._tokenizer = tokenizer
        self.length = length
        self._stride = stride
        self.with_types = with_types and "token_type_ids" in tokenizer.model_input_names
        special: int = tokenizer.num_special_tokens_to_add(pair=True)
        self.longest_question = (length - special) // 2
        """Maximum length of a question in tokens: half of a window minus its special tokens."""
        if stride >= self.longest_question:
            room = self.longest_question
            lower = f"set task.stride to less than {room}, or " if room > 0 else ""
            more = more_tokens(2 * stride + special + 1, limit)
            raise DataError(
                f"task.stride: windows of {length} tokens have too little room for a question and "
                f"{stride} shared tokens of the context; {lower}{more}"
            )

    def of_row(
        self, row: int, question: str, context: str, answers: Sequence[Answer]
    ) -> list[Window]:
        """Return the windows of a row, labeled with the first of its answers.

        A question of more than ``longest_question`` tokens is truncated (``is_cut``).

        Raises:
            DataError: The tokenizer fails.
        """
        with library_errors(
            lambda reason: DataError(
                f"{row_name(row)}: the tokenizer fails on the question {question[:80]!r} or the "
                f"context {context[:80]!r}: {reason}"
            )
        ):
            question = question.lstrip()
            places = self._question_places(question)
            if len(places) > self.longest_question:
                question = question[: places[self.longest_question - 1][1]]
            encoded = self._tokenizer(
                question,
                context,
                truncation="only_second",
                max_length=self.length,
                stride=self._stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
        answer = next(iter(answers), None)
        windows = []
        for number, ids in enumerate(encoded["input_ids"]):
            of_context = [part == 1 for part in encoded.sequence_ids(number)]
            pairs = zip(encoded["offset_mapping"][number], of_context, strict=True)
            places = [tuple(place) if inside else (-1, -1) for place, inside in pairs]
            none = self._none(ids)
            types = encoded["token_type_ids"][number] if self.with_types else []
            windows.append(Window(ids, types, places, _label(places, answer, none), none))
        return windows

    def is_cut(self, question: str) -> bool:
        """Return True if a question has more than ``longest_question`` tokens."""
        return len(self._question_places(question.lstrip())) > self.longest_question

    def _question_places(self, question: str) -> list[tuple[int, int]]:
        encoded = self._tokenizer(
            question, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        places: list[tuple[int, int]] = encoded["offset_mapping"]
        return places

    def _none(self, ids: Sequence[int]) -> int:
        """Return the index of the token for no answer: CLS, else BOS, else the first token."""
        for token in (self._tokenizer.cls_token_id, self._tokenizer.bos_token_id):
            if token is not None and token in ids:
                return ids.index(token)
        return 0

    def no_answer(self, logits: Tensor, ids: Tensor) -> Answer:
        """Return an empty answer with the score and the probability of no answer in a window.

        Args:
            logits: Start and end logits, ``(2, length)``.
            ids: Tokens of the window, ``(length,)``.
        """
        place = self._none(ids.tolist())
        chances = logits.softmax(dim=1)[:, place]
        return Answer("", float(logits[:, place].sum()), float(chances.prod()))

    def best_span(self, logits: Tensor, places: Tensor, context: str, longest: int) -> Answer:
        """Return the answer argmax s_i + e_j over spans (i, j) with 0 ≤ j − i < longest.

        A span begins and ends with tokens that contain characters of the context. Without such a
        token, the result is an empty answer with the score −∞.

        Args:
            logits: Start logits s and end logits e, ``(2, length)``.
            places: ``Window.places``, ``(length, 2)``.
            context: The whole context, into which ``places`` are indices.
            longest: Maximum number of tokens of an answer.
        """
        allowed = (places[:, 0] >= 0) & (places[:, 1] > places[:, 0])
        if not bool(allowed.any()):
            return Answer("", -torch.inf, 0.0)
        scores = logits[0][:, None] + logits[1][None]  # (first, last)
        spans = torch.ones_like(scores, dtype=torch.bool).triu().tril(longest - 1)
        scores = scores.masked_fill(~(spans & allowed[:, None] & allowed), -torch.inf)
        first, last = divmod(int(scores.argmax()), len(places))
        chances = logits.softmax(dim=1)
        begin, end = int(places[first, 0]), int(places[last, 1])
        text = context[begin:end]  # tokens may begin with a space
        return Answer(
            text.strip(),
            float(scores[first, last]),
            float(chances[0, first] * chances[1, last]),
            begin + len(text) - len(text.lstrip()),
        )


def _label(places: Sequence[tuple[int, int]], answer: Answer | None, none: int) -> tuple[int, int]:
    """Return ``Window.label`` for an answer: the indices of its first and last token."""
    inside = [number for number, (begin, _) in enumerate(places) if begin >= 0]
    if answer is None or not inside:
        return none, none
    end = answer.start + len(answer.text)
    if places[inside[0]][0] > answer.start or places[inside[-1]][1] < end:
        return none, none
    first = max(number for number in inside if places[number][0] <= answer.start)
    last = min(number for number in inside if places[number][1] >= end)
    return first, last


def read_answers(
    table: Dataset, recipe: QuestionAnsweringRecipe, contexts: Sequence[str]
) -> list[list[Answer]]:
    """Read the answers of each row; return empty lists if the recipe names no column of answers.

    An entry is ``{text: [...], answer_start: [...]}``, a list of ``{text, answer_start}``, or the
    JSON of either. Answers with an empty text are dropped. Recipes for predictions (``to_predict``)
    name no column.

    Raises:
        DataError: The column does not exist; an entry has another form; a text is not in its
            context at ``answer_start``; a row has no answer, and the recipe does not allow that.
    """
    column = recipe.answers
    if not column:
        return [[] for _ in contexts]
    check_column(table, column, "task.answers")
    answers = []
    for row, (value, context) in enumerate(zip(table[column], contexts, strict=True)):
        own = _parsed(value, f"{row_name(row)}: column {column!r}")
        for answer in own:
            if (
                context[answer.start : answer.start + len(answer.text)] != answer.text
                or answer.start < 0
            ):
                there = context[max(answer.start, 0) :][: len(answer.text)]
                pairs = zip(answer.text, there, strict=False)
                differ = (at for at, (own, other) in enumerate(pairs) if own != other)
                same = next(differ, len(there))
                begin = max(same - 40, 0)  # the message shows the first difference
                part = f" (shown from character {begin} of the answer on)" if begin else ""
                raise DataError(
                    f"{row_name(row)}: the context does not have the answer "
                    f"{answer.text[begin:][:80]!r} at answer_start {answer.start}"
                    f"{f', but {there[begin:][:80]!r}' if answer.start >= 0 else ''}{part}; "
                    "correct the row"
                )
        if not own and not recipe.no_answer:
            raise DataError(
                f"{row_name(row)}: there is no answer in column {column!r}; set "
                "task.no_answer: true for questions without one, or remove the row"
            )
        answers.append(own)
    return answers


def _parsed(value: Any, where: str) -> list[Answer]:
    expected = DataError(
        f"{where} has {str(value)[:80]!r}, expected {{text: [...], answer_start: [...]}}"
    )
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in value]
    except (TypeError, KeyError, ValueError):
        raise expected from None
    if not all(isinstance(text, str) and isinstance(start, int) for text, start in pairs):
        raise expected
    return [Answer(text, torch.inf, 1.0, start) for text, start in pairs if text]
