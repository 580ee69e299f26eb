"""Base of tasks whose models read tokens: tokenizer, padding id, vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedmerge_peft.tasks.base import Task
from fedmerge_peft.tasks.tokenization import get_pad_token_id, load_tokenizer, pipeline_tokenizer
from fedmerge_peft.tasks.vocabulary import check_vocabulary, reject_unknown_ids, warn_of_unknown

if TYPE_CHECKING:
    from fedmerge_peft.recipe.backbone import BackboneRecipe


class TokenTask(Task):
    """Task with a tokenizer, which ``prepare_tokens`` loads."""

    splits_special: ClassVar[bool] = True
    """True if special tokens that are written in a text, such as ``</s>``, are read as characters.
    """
    recipe: Any
    pad_token_id: int

    def prepare_tokens(self, recipe: Any, backbone: BackboneRecipe, model_folder: str) -> Any:
        """Set the recipe and load the tokenizer; return the configuration of the model.

        Raises ``BackboneError`` if the tokenizer or the configuration cannot be loaded, or if the
        tokenizer has neither a pad token nor an end-of-sequence token.
        """
        self.recipe = recipe
        self.metrics = recipe.metrics
        self._model = backbone.model
        self._vocabulary: int | None = None
        self.processor, config = load_tokenizer(backbone, model_folder)
        if self.splits_special:
            self.processor.split_special_tokens = True
        self.pad_token_id = get_pad_token_id(self.processor)
        return config

    @classmethod
    def probe_inputs(cls, recipe: Any) -> list[Any]:
        return ["a", "another text, which is longer"]

    @classmethod
    def pipeline_options(cls, recipe: Any, backbone: BackboneRecipe, folder: str) -> dict[str, Any]:
        tokenizer = pipeline_tokenizer(backbone, folder, recipe.max_length)
        if cls.splits_special:
            tokenizer.split_special_tokens = True
        return {"tokenizer": tokenizer}

    def reads_end(self, model: Any) -> bool:
        """Return True if the model generates texts, or its head reads the end-of-sequence token."""
        return self.generates

    def match_inputs(self, model: Any) -> None:
        """Check the tokenizer against the model."""
        self._vocabulary = check_vocabulary(
            self.processor, model, self._model, reads_end=self.reads_end(model)
        )

    def check_ids(self, rows: Sequence[list[int]]) -> None:
        """Check the token ids of rows, and warn if many of them are the unknown token.

        Raises ``DataError`` for a token without an embedding.
        """
        reject_unknown_ids(rows, self._vocabulary)
        warn_of_unknown(rows, self.processor)
