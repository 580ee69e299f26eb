"""Sentence embeddings: vectors of texts, trained to be near the vectors of related texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.tasks.base import SEQUENCES, Batch, Examples, Padding
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.shown import Segment, ShownExample
from fedmerge_peft.tasks.token_task import TokenTask
from fedmerge_peft.tasks.tokenization import (
    pad_tokens,
    ragged,
    read_texts,
    reject_empty,
    resolve_max_length,
    token_limit,
    truncated,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe
    from fedmerge_peft.recipe.text_tasks import SentenceEmbeddingRecipe


class SentenceEmbeddingTask(TokenTask):
    """Embedding of texts by mean pooling, with a contrastive loss on pairs or triplets.

    The vector of an anchor is compared with the vectors of the positives and negatives in its
    client's batch. Texts of other clients are never candidates, even in a shared forward pass.

    Args:
        recipe: Columns, length, scale and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: ``max_length`` exceeds the model's limit.
        BackboneError: The tokenizer or the model's configuration cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModel"
    peft_task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    pipeline: ClassVar[str] = "feature-extraction"
    unused: ClassVar[tuple[str, ...]] = ("pooler",)
    in_batch: ClassVar[bool] = True
    mixes: ClassVar[bool] = False  # each model has its own vector space
    paddings: ClassVar[Sequence[Padding]] = ("right",)
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

base = AutoModel.from_pretrained({base}, {options})
tokenizer = AutoTokenizer.from_pretrained({processor})
{load}
"""
    labels = ()

    def __init__(
        self,
        recipe: SentenceEmbeddingRecipe,
        backbone: BackboneRecipe,
        table: Dataset,
        model_folder: str,
    ) -> None:
        config = self.prepare_tokens(recipe, backbone, model_folder)
        self.smallest_batch = 2 if recipe.negative is None else 1
        self.max_length = resolve_max_length(recipe.max_length, token_limit(self.processor, config))

    @classmethod
    def check_table(cls, recipe: SentenceEmbeddingRecipe, table: Dataset) -> None:
        for key, column in recipe.columns.items():
            read_texts(table, column, f"task.{key}")

    @classmethod
    def input_table(
        cls, recipe: SentenceEmbeddingRecipe, labels: list[str], inputs: list[Any]
    ) -> Dataset:
        from datasets import Dataset

        reject_inputs([text for text in inputs if not isinstance(text, str)], "a text")
        return Dataset.from_dict({recipe.anchor: inputs})

    @classmethod
    def pipeline_options(cls, recipe: Any, backbone: BackboneRecipe, folder: str) -> dict[str, Any]:
        return {**super().pipeline_options(recipe, backbone, folder), "truncation": True}

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row.

        The ``labels`` of a row are the numbers of its texts. Equal texts in the table have the same
        number.

        Raises:
            DataError: A column does not exist, has nulls, or is not text; a text has no tokens, or
                tokens that the model does not have; the tokenizer reads a part of a text as a
                special token.
        """
        columns, long, empty = [], set(), set()
        tokens: list[list[list[int]]] = []
        for key, column in self.recipe.columns.items():
            texts = read_texts(table, column, f"task.{key}")
            encoded, cut = truncated(self.processor, texts, max_length=self.max_length)
            ids = encoded.get("input_ids", [])
            reject_empty(ids, texts, column)
            self.check_ids(ids)
            tokens.append(ids)
            columns.append(texts)
            long |= {*cut}
            empty |= {row for row, text in enumerate(texts) if not text.strip()}
        number = {text: place for place, text in enumerate(dict.fromkeys(chain(*columns)))}
        rows = list(zip(*tokens, strict=True))
        return Examples(
            {
                "input_ids": ragged([[*chain(*row)] for row in rows]),
                SEQUENCES: ragged([[len(ids) for ids in row] for row in rows]),
                "labels": ragged([[number[text] for text in row] for row in zip(*columns)]),  # noqa: B905
            },
            {
                f"have a text of more than {self.max_length} tokens, truncated": sorted(long),
                "have an empty text": sorted(empty),
            },
        )

    def show(self, table: Dataset) -> list[ShownExample]:
        columns = self.encode(table).columns
        rows = zip(columns["input_ids"], columns[SEQUENCES], strict=True)
        return [
            ShownExample(
                [
                    Segment.of(self.processor, key, own)
                    for key, own in zip(
                        self.recipe.columns, torch.split(ids, lengths.tolist()), strict=True
                    )
                ]
            )
            for ids, lengths in rows
        ]

    def probe(self) -> Examples:
        texts = ["a short text", "another text, which is longer than the first one"]
        ids = self.processor(texts)["input_ids"]
        columns = ragged([*ids, [*ids[1][:1], *ids[1][-2:0:-1], *ids[1][-1:]]])
        lengths = ragged([[len(row)] for row in columns])
        return Examples({"input_ids": columns, SEQUENCES: lengths, "labels": lengths})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Pad and stack the texts of examples.

        Returns:
            ``input_ids`` and ``attention_mask``, ``(batch · texts, longest)``, and ``labels``
            ``(batch, texts)``: the number of each text.
        """
        columns = examples.columns
        texts = [
            text
            for index in indices
            for text in torch.split(columns["input_ids"][index], columns[SEQUENCES][index].tolist())
        ]
        batch = pad_tokens(texts, self.pad_token_id, "right")
        return {**batch, "labels": torch.stack([columns["labels"][index] for index in indices])}

    def forward(self, model: Any, inputs: Batch) -> Tensor:
        """Return the mean of the last hidden states of each text, ``(batch · texts, width)``."""
        states: Tensor = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def own_outputs(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        return list(logits.view(len(batch["labels"]), -1).unbind())

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``-log softmax_c(s · cos(a, c))[positive]`` of each example in float32.

        The factor s is ``task.scale``. The candidates c of an anchor a are the positives and
        negatives of the batch, each distinct text once. The target is the anchor's own positive.
        Apart from the target, texts that equal the anchor or one of its positives in the batch are
        not candidates. This loss is InfoNCE (van den Oord 2018). Without repeated texts, it equals
        MultipleNegativesRankingLoss of sentence-transformers.

        Args:
            logits: Vectors, ``(batch · texts, width)``.
            labels: Numbers of the texts, ``(batch, texts)``: anchor, positive and, for triplets,
                negative.

        Returns:
            Losses in nats and ones, both float32 ``(batch,)``.
        """
        rows, texts = labels.shape
        units = functional.normalize(logits.float(), dim=-1).view(rows, texts, -1)
        candidates = units[:, 1:].transpose(0, 1).flatten(0, 1)  # positives before negatives
        numbers = labels[:, 1:].T.flatten()
        scores = self.recipe.scale * units[:, 0] @ candidates.T
        repeated = (numbers[:, None] == numbers).tril(-1).any(dim=1)
        anchors = labels[:, 0]
        # (anchor, candidate): texts that are known to belong to the anchor
        belongs = (anchors[:, None] == anchors).float() @ (labels[:, 1:2] == numbers).float() > 0
        hidden = repeated | belongs | (anchors[:, None] == numbers)
        own = torch.arange(rows, device=labels.device)
        hidden[own, own] = False
        losses = functional.cross_entropy(
            scores.masked_fill(hidden, -torch.inf), own, reduction="none"
        )
        return losses, torch.ones_like(losses)

    def count_terms(self, labels: Tensor) -> int:
        return len(labels)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return each anchor's unit vector, and the numbers and unit vectors of its row's texts."""
        units = functional.normalize(logits.float(), dim=-1).view(*labels.shape, -1).cpu().numpy()
        held = zip(labels.tolist(), units, strict=True)
        return {"vectors": ([*units[:, 0]], [(numbers, vectors) for numbers, vectors in held])}

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the unit vector of each text."""
        units = functional.normalize(logits, dim=-1)
        return [{"embedding": vector} for vector in units.tolist()]
