"""Multiple choice: selection of the right text among several that may follow a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.tasks.base import SEQUENCES, Batch, Examples, Padding
from fedmerge_peft.tasks.choices import is_row, read_rows
from fedmerge_peft.tasks.encoder import EncoderTask
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.shown import Segment, ShownExample
from fedmerge_peft.tasks.tokenization import pad_parts, ragged, reject_empty

if TYPE_CHECKING:
    from datasets import Dataset


class MultipleChoiceTask(EncoderTask):
    """Multiple choice with one logit for each pair of a context and a choice.

    Arguments are those of ``EncoderTask``. In a batch, fillers give all rows the same number of
    choices. A filler is a single token, which ``forward`` recognizes by its mask. Its logit is the
    lowest number of the dtype.
    """

    auto_model: ClassVar[str] = "AutoModelForMultipleChoice"
    peft_task_type: ClassVar[str | None] = None
    heads: ClassVar[tuple[str, ...]] = ("classifier", "logits_proj")
    paddings: ClassVar[Sequence[Padding]] = ("right",)
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoModelForMultipleChoice, AutoTokenizer

base = AutoModelForMultipleChoice.from_pretrained({base}, {options})
tokenizer = AutoTokenizer.from_pretrained({processor})
{load}
"""

    @property
    def reads_pairs(self) -> bool:
        return True

    @classmethod
    def output_names(cls, recipe: Any, table: Dataset) -> list[str]:
        return []  # the head's only output does not belong to a label

    @classmethod
    def check_table(cls, recipe: Any, table: Dataset) -> None:
        read_rows(table, recipe)

    @classmethod
    def probe_inputs(cls, recipe: Any) -> list[Any]:
        own = {"context": "a", "choices": ["b", "c"], **({"start": "d"} if recipe.start else {})}
        return [own, {**own, "choices": ["another text, which is longer", "b", "c"]}]

    @classmethod
    def input_table(cls, recipe: Any, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import Dataset

        (wanted, _) = cls.probe_inputs(recipe)
        unfit = [given for given in inputs if not is_row(given, wanted.keys())]
        reject_inputs(unfit, f"a dictionary such as {wanted}")
        return Dataset.from_list([{**given, recipe.label: 0} for given in inputs])

    def encode(self, table: Dataset) -> Examples:
        """Tokenize the context with each choice.

        ``Examples.cuts`` lists rows with truncated texts, choices with the same tokens, or an empty
        context.

        Raises:
            DataError: The columns do not match the recipe; the tokenizer fails on a text, or reads
                a part of it as a special token; a context and a choice together have fewer than two
                tokens; a text has tokens that the model does not have.
        """
        contexts, choices, right = read_rows(table, self.recipe)
        tokens: dict[str, list[list[Any]]] = {name: [[] for _ in right] for name in self._columns}
        long: set[int] = set()
        # Each call has one choice of every row, so that errors name the row.
        for place in range(max(map(len, choices), default=0)):
            own = [texts[place] if place < len(texts) else "" for texts in choices]
            encoded, truncated = self.tokenize([contexts, own])
            there = [row for row, texts in enumerate(choices) if place < len(texts)]
            long |= {*truncated} & {*there}
            for name, rows in tokens.items():
                for row in there:
                    rows[row].append(encoded[name][row])
        ids = tokens["input_ids"]
        reject_empty([min(own, key=len)[1:] for own in ids], contexts, self.recipe.context)
        flat = {name: [[*chain(*own)] for own in rows] for name, rows in tokens.items()}
        self.check_ids(flat["input_ids"])
        return Examples(
            {
                **{name: ragged(rows) for name, rows in flat.items()},
                SEQUENCES: ragged([[*map(len, own)] for own in ids]),
                "labels": list(torch.tensor(right).unbind()),
            },
            {
                f"have a context and a choice that together exceed {self.max_length} tokens and "
                "were truncated": sorted(long),
                "have choices with the same tokens": [
                    row for row, own in enumerate(ids) if len({*map(tuple, own)}) < len(own)
                ],
                "have an empty context": [r for r, text in enumerate(contexts) if not text.strip()],
            },
        )

    def show(self, table: Dataset) -> list[ShownExample]:
        columns = self.encode(table).columns
        rows = zip(columns["input_ids"], columns[SEQUENCES], columns["labels"], strict=True)
        return [
            ShownExample(
                [
                    Segment.of(self.processor, f"choice {place}", own)
                    for place, own in enumerate(torch.split(ids, lengths.tolist()))
                ],
                str(int(label)),
            )
            for ids, lengths, label in rows
        ]

    def probe(self) -> Examples:
        columns = super().probe().columns
        lengths = ragged([[len(ids)] * 2 for ids in columns["input_ids"]])
        twice = {name: [own.repeat(2) for own in columns[name]] for name in self._columns}
        return Examples({**twice, SEQUENCES: lengths, "labels": columns["labels"]})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Pad and stack the choices, ``(batch, choices, longest)``, and ``labels`` ``(batch,)``."""
        rows = {name: [own[index] for index in indices] for name, own in examples.columns.items()}
        type_id = self.processor.pad_token_type_id
        parts = pad_parts(rows, rows[SEQUENCES], self.pad_token_id, type_id)
        batch = {name: own.view(len(indices), -1, own.shape[1]) for name, own in parts.items()}
        return {**batch, "labels": torch.stack(rows["labels"])}

    def forward(self, model: Any, inputs: Batch) -> Tensor:
        """Return the logit of each choice, ``(batch, choices)``; the lowest number for a filler.

        Inputs of the shape ``(batch, length)`` have one choice per row.
        """
        shaped = {name: rows if rows.ndim == 3 else rows[:, None] for name, rows in inputs.items()}
        absent = shaped["attention_mask"].sum(dim=-1) <= 1
        read = {  # the first choice replaces fillers: Longformer needs separators in each text
            name: torch.where(absent[..., None], rows[:, :1], rows) for name, rows in shaped.items()
        }
        logits: Tensor = model(**read).logits
        return logits.masked_fill(absent.to(logits.device), torch.finfo(logits.dtype).min)

    def own_outputs(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        return [own[own != torch.finfo(own.dtype).min] for own in logits]

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each example's cross-entropy over the choices (nats), and ones, ``(batch,)``."""
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        return losses, torch.ones_like(losses)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return the indices of the most likely and the right choice of each example."""
        return {"classes": (logits.argmax(dim=-1).tolist(), labels.tolist())}

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the index and probability of the likeliest choice, and all probabilities."""
        counts = [len(examples.columns[SEQUENCES][index]) for index in indices]
        every = [own[:n].softmax(dim=0).tolist() for own, n in zip(logits, counts, strict=True)]
        return [{"choice": own.index(max(own)), "score": max(own), "scores": own} for own in every]
