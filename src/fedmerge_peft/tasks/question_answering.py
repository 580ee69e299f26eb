"""Extractive question answering: the answer is a span of a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.tasks.answer_windows import Answer, AnswerWindows, read_answers
from fedmerge_peft.tasks.base import SEQUENCES, Batch, Examples, Padding
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.shown import Segment, ShownExample
from fedmerge_peft.tasks.text_generation import IGNORED
from fedmerge_peft.tasks.token_task import TokenTask
from fedmerge_peft.tasks.tokenization import (
    as_bytes,
    from_bytes,
    pad,
    pad_parts,
    ragged,
    read_texts,
    resolve_max_length,
    token_limit,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe
    from fedmerge_peft.recipe.text_tasks import QuestionAnsweringRecipe

DEFAULT_LENGTH = 384
"""Maximum length of a window in tokens if the recipe sets none and the model has no lower limit."""


class QuestionAnsweringTask(TokenTask):
    """Prediction of the first and the last token of an answer in a context.

    An example is a row of the table. Its context is divided into one or more overlapping windows.
    In a batch, fillers give all rows the same number of windows; a filler has no loss. Padding has
    no probability, so an example's loss does not depend on its batch.

    Args:
        recipe: Columns, lengths and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: ``max_length`` exceeds the model's limit, or ``stride`` is too large for the
            length of the windows.
        BackboneError: The tokenizer or the model's configuration cannot be loaded, or the tokenizer
            does not return character offsets.
    """

    auto_model: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_task_type: ClassVar[str | None] = "QUESTION_ANS"
    heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)
    config_options: ClassVar[Mapping[str, Any]] = {"num_labels": 2}
    paddings: ClassVar[Sequence[Padding]] = ("right",)
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

base = AutoModelForQuestionAnswering.from_pretrained({base}, num_labels=2, {options})
tokenizer = AutoTokenizer.from_pretrained({processor})
{load}
"""
    labels = ()

    def __init__(
        self,
        recipe: QuestionAnsweringRecipe,
        backbone: BackboneRecipe,
        table: Dataset,
        model_folder: str,
    ) -> None:
        config = self.prepare_tokens(recipe, backbone, model_folder)
        if not self.processor.is_fast:
            raise BackboneError(
                "backbone.tokenizer: the tokenizer does not return the character offsets of its "
                "tokens; use a fast tokenizer of transformers, which has a tokenizer.json"
            )
        limit = token_limit(self.processor, config)
        length = resolve_max_length(recipe.max_length, limit, DEFAULT_LENGTH) or DEFAULT_LENGTH
        types = (getattr(config, "type_vocab_size", None) or 0) > 1
        stride = min(128, length // 3) if recipe.stride is None else recipe.stride
        self._windows = AnswerWindows(self.processor, length, stride, limit, with_types=types)

    @classmethod
    def check_table(cls, recipe: QuestionAnsweringRecipe, table: Dataset) -> None:
        contexts = read_texts(table, recipe.context, "task.context")
        read_texts(table, recipe.question, "task.question")
        read_answers(table, recipe, contexts)

    @classmethod
    def probe_inputs(cls, recipe: QuestionAnsweringRecipe) -> list[Any]:
        return [("a", "a b"), ("which one", "another text, which is longer")]

    @classmethod
    def input_table(
        cls, recipe: QuestionAnsweringRecipe, labels: list[str], inputs: list[Any]
    ) -> Dataset:
        from datasets import Dataset

        keys = ("question", "context")
        pairs = [
            tuple(item.get(key) for key in keys) if isinstance(item, Mapping) else item
            for item in inputs
        ]
        unfit = [
            given
            for given, pair in zip(inputs, pairs, strict=True)
            if not isinstance(pair, tuple | list)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ]
        reject_inputs(unfit, "a question and a context: a pair, or a dictionary with both")
        return Dataset.from_dict(
            {name: [pair[side] for pair in pairs] for side, name in enumerate(recipe.texts)}
        )

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row into windows.

        ``Examples.cuts`` lists rows with a truncated question, several windows, an answer that no
        window contains, or an empty context.

        Raises:
            DataError: A column does not exist, has nulls, or is not text; the answers are not valid
                (``read_answers``); the tokenizer fails on a text; a text has tokens that the model
                does not have.
        """
        questions = read_texts(table, self.recipe.question, "task.question")
        contexts = read_texts(table, self.recipe.context, "task.context")
        answers = read_answers(table, self.recipe, contexts)
        rows = [
            self._windows.of_row(row, *texts)
            for row, texts in enumerate(zip(questions, contexts, answers, strict=True))
        ]
        ids = [[token for window in row for token in window.ids] for row in rows]
        self.check_ids(ids)
        columns = {
            "input_ids": ragged(ids),
            SEQUENCES: ragged([[len(window.ids) for window in row] for row in rows]),
            "labels": [torch.tensor([window.label for window in row]) for row in rows],
            "places": [
                torch.tensor([place for window in row for place in window.places]) for row in rows
            ],
            "context": as_bytes(contexts),
            "answers": as_bytes(["\0".join(answer.text for answer in own) for own in answers]),
        }
        if self._windows.with_types:
            columns["token_type_ids"] = ragged(
                [[kind for window in row for kind in window.types] for row in rows]
            )
        length, several = self._windows.length, [r for r, row in enumerate(rows) if len(row) > 1]
        lost = [
            number
            for number, (row, own) in enumerate(zip(rows, answers, strict=True))
            if own and all(window.label == (window.none, window.none) for window in row)
        ]
        cut = [row for row, question in enumerate(questions) if self._windows.is_cut(question)]
        return Examples(
            columns,
            {
                f"have a question cut to {self._windows.longest_question} tokens": cut,
                f"have more than {length} tokens and become several windows": several,
                "have an answer that no window contains (a larger task.stride may help)": lost,
                "have an empty context": [r for r, text in enumerate(contexts) if not text.strip()],
            },
        )

    def show(self, table: Dataset) -> list[ShownExample]:
        """Return the windows of each row.

        In a window without the answer, the token for no answer is shown as the answer.
        """
        columns = self.encode(table).columns
        shown = []
        for ids, lengths, labels in zip(
            columns["input_ids"], columns[SEQUENCES], columns["labels"], strict=True
        ):
            segments = []
            windows = torch.split(ids, lengths.tolist())
            for number, (own, (first, last)) in enumerate(zip(windows, labels, strict=True)):
                window = f"window {number}"
                segments += [
                    Segment.of(self.processor, window, own[:first]),
                    Segment.of(self.processor, "answer", own[first : last + 1], has_loss=True),
                    Segment.of(self.processor, window, own[last + 1 :]),
                ]
            shown.append(ShownExample([segment for segment in segments if segment.tokens]))
        return shown

    def probe(self) -> Examples:
        texts = ["a short text", "another text, which is longer than the first one"]
        windows = [self._windows.of_row(0, "which one", text, [])[0] for text in texts]
        ids = [window.ids for window in windows]
        types = [window.types for window in windows]
        columns = {"input_ids": ragged([*ids, [*ids[1][:1], *ids[1][-2:0:-1], *ids[1][-1:]]])}
        if self._windows.with_types:
            columns["token_type_ids"] = ragged([*types, types[1]])
        lengths = [[row.numel()] for row in columns["input_ids"]]
        labels = torch.zeros(3, 1, 2, dtype=torch.int64)
        return Examples({**columns, SEQUENCES: ragged(lengths), "labels": list(labels.unbind())})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Pad and stack the windows of examples.

        Returns:
            ``input_ids``, ``attention_mask`` and, if the model has token types, ``token_type_ids``,
            ``(batch · windows, longest)``, and ``labels`` ``(batch, windows, 2)``: the indices of
            the answer's first and last token in the window; -100 in filler windows.
        """
        rows = {
            name: [values[index] for index in indices] for name, values in examples.columns.items()
        }
        type_of_padding = self.processor.pad_token_type_id
        batch = pad_parts(rows, rows[SEQUENCES], self.pad_token_id, type_of_padding)
        batch["labels"] = pad(rows["labels"], IGNORED)
        return batch

    def forward(self, model: Any, inputs: Batch) -> Tensor:
        """Return the start and end logits of each token, ``(batch · windows, 2, longest)``.

        The logits of padding are the lowest number of the dtype.
        """
        output = model(**inputs)
        logits = torch.stack([output.start_logits, output.end_logits], dim=1)
        outside = ~inputs["attention_mask"].bool()[:, None]
        return logits.masked_fill(outside, torch.finfo(logits.dtype).min)

    def own_outputs(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        real = (batch["labels"][..., 0] != IGNORED).to(logits.device)
        inside = batch["attention_mask"].to(logits.device).bool().view(*real.shape, -1)
        by_row = zip(logits.view(*real.shape, 2, -1), inside & real[..., None], strict=True)
        return [own.movedim(1, 0)[:, mask] for own, mask in by_row]

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum, over an example's windows, the mean cross-entropy of the first and the last token.

        Args:
            logits: ``(batch · windows, 2, length)``.
            labels: ``(batch, windows, 2)``.

        Returns:
            Sum in nats and number of windows without fillers, both float32 ``(batch,)``.
        """
        windows, targets = logits.float().flatten(0, 1), labels.flatten()
        losses = functional.cross_entropy(windows, targets, ignore_index=IGNORED, reduction="none")
        counts = (labels[..., 0] != IGNORED).sum(dim=1).float()
        return losses.view(len(labels), -1).sum(dim=1) / 2, counts

    def count_terms(self, labels: Tensor) -> int:
        return int((labels[..., 0] != IGNORED).sum())

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return an empty mapping, because answers need the texts (``outputs``)."""
        return {}

    def outputs(
        self, logits: Tensor, labels: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Mapping[str, Compared]:
        texts = [answer["answer"] for answer in self.answers(logits, examples, indices)]
        held = (from_bytes(examples.columns["answers"][index]) for index in indices)
        return {"answers": (texts, [text.split("\0") for text in held])}

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the best answer in each context, its bounds, and its probability in its window.

        The score of a span is the start logit of its first token plus the end logit of its last
        token. The answer is the span of at most ``task.max_answer_length`` tokens with the highest
        score. If ``task.no_answer`` is set, each window also has a score for no answer: the sum of
        both logits of its token for no answer. If even the lowest of these scores is above the
        score of the best span, the answer is empty.
        """
        rows = logits.float().cpu().view(len(indices), -1, *logits.shape[1:])
        return [
            self._best(own, examples, int(index)) for own, index in zip(rows, indices, strict=True)
        ]

    def _best(self, logits: Tensor, examples: Examples, index: int) -> dict[str, Any]:
        columns = examples.columns
        lengths = columns[SEQUENCES][index].tolist()
        best, null = Answer("", -torch.inf, 0.0), Answer("", torch.inf, 0.0)
        context = from_bytes(columns["context"][index])
        for window, ids, places in zip(
            logits,
            torch.split(columns["input_ids"][index], lengths),
            torch.split(columns["places"][index], lengths),
            strict=False,
        ):
            own = window[:, : len(ids)]
            best = max(
                best,
                self._windows.best_span(own, places, context, self.recipe.max_answer_length),
                key=lambda answer: answer.score,
            )
            null = min(null, self._windows.no_answer(own, ids), key=lambda answer: answer.score)
        chosen = null if self.recipe.no_answer and null.score > best.score else best
        return {
            "answer": chosen.text,
            "score": chosen.probability,
            "start": chosen.start,
            "end": chosen.start + len(chosen.text),
        }
