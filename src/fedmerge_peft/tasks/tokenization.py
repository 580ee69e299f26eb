"""What tasks on text share: the tokenizer, its limit, columns of text, ragged tensors and their padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedmerge_peft.data.columns import read_column
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.classification import is_text, reject_nulls

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import BackboneRecipe

_ROWS_AT_ONCE = 1000

_NO_LIMIT = 1_000_000
"""Tokenizers that know no limit say 1e30; positions beyond a million are taken for that."""

_OFFSET_POSITIONS = {"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"}
"""Architectures whose first positions are taken by the padding, so that two fewer tokens fit than positions are counted."""


def load_tokenizer(backbone: BackboneRecipe, model_folder: str) -> tuple[Any, Any]:
    """The tokenizer and the configuration of the model.

    Args:
        backbone: Says where the tokenizer is (default: with the model), the model's revision, whether its code is trusted.
        model_folder: Local folder or hub id of the model.

    Raises:
        BackboneError: Where either cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    elsewhere = backbone.tokenizer is not None
    tokenizer = load_pretrained(
        AutoTokenizer,
        backbone.tokenizer or model_folder,
        backbone,
        None if elsewhere else backbone.revision,
    )
    return tokenizer, load_pretrained(AutoConfig, model_folder, backbone, backbone.revision)


def load_pretrained(
    auto: Any, source: str, backbone: BackboneRecipe, revision: str | None, **options: Any
) -> Any:
    """``auto.from_pretrained(source)``, with the recipe's trust. Raises ``BackboneError`` from what transformers raised."""
    try:
        return auto.from_pretrained(
            source, revision=revision, trust_remote_code=backbone.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        what, reason = auto.__name__.removeprefix("Auto"), str(error).strip().partition("\n")[0]
        raise BackboneError(
            f"{what} of {source} cannot be loaded: {reason}; backbone.tokenizer may name another folder or hub id"
        ) from error


def get_pad_token_id(tokenizer: Any) -> int:
    """The id to pad with: the pad token, or the end-of-sequence token of decoders that have none.

    Raises:
        BackboneError: Where the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BackboneError(
        "the tokenizer has neither a pad nor an end-of-sequence token; name another one in backbone.tokenizer"
    )


def token_limit(tokenizer: Any, config: Any) -> int | None:
    """The most tokens the model takes, special tokens included: the smaller of what tokenizer and model say, None for no limit."""
    limits = [
        limit for limit in (tokenizer.model_max_length,) if limit is not None and limit < _NO_LIMIT
    ]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - 2 if config.model_type in _OFFSET_POSITIONS else positions)
    return min(limits, default=None)


def resolve_max_length(
    max_length: int | None, limit: int | None, default: int | None = None
) -> int | None:
    """The longest example in tokens: what the recipe says, else the model's limit, at most ``default``.

    Raises:
        DataError: Where the recipe asks for more than the model takes.
    """
    if max_length is not None:
        if limit is not None and max_length > limit:
            raise DataError(
                f"task.max_length: {max_length} tokens are more than this model takes, which is {limit}"
            )
        return max_length
    return min((length for length in (limit, default) if length is not None), default=None)


def read_texts(table: Dataset, column: str, key: str) -> list[str]:
    """A column of text; ``key`` is the recipe's key that names it. Raises ``DataError`` where it is absent, no text, or has a null."""
    values = read_column(table, column, key)
    if not is_text(values.type) and len(values):
        raise DataError(
            f"{key}: column {column!r} holds {values.type}, not text, such as {values[0].as_py()!r} in row 0"
        )
    reject_nulls(values, column)
    texts: list[str] = values.to_pylist()
    return texts


def chunks(*columns: Sequence[Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """Some rows at a time of columns of one length: what is worth one call of a tokenizer."""
    for start in range(0, len(columns[0]), _ROWS_AT_ONCE):
        yield tuple(column[start : start + _ROWS_AT_ONCE] for column in columns)


def ragged(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """One int64 tensor a row, all of them views of one piece of memory."""
    lengths = [len(row) for row in rows]
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=sum(lengths))
    return list(torch.split(torch.from_numpy(flat), lengths)) if rows else []


def pad(rows: Sequence[Tensor], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Rows of different lengths as one tensor ``(batch, longest)``, padded with ``value``."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
