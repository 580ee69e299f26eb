"""Tokenization shared by text tasks: tokenizer, length limit, text columns, padding."""

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

_ROWS_PER_CALL = 1000

_NO_LIMIT = 1_000_000
"""Lengths from here on mean no limit. Tokenizers without a limit have ``model_max_length`` 1e30."""

_OFFSET_POSITIONS = {"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"}
"""Architectures that reserve the first two positions, so that two fewer tokens fit."""


def load_tokenizer(backbone: BackboneRecipe, model_folder: str) -> tuple[Any, Any]:
    """Load the tokenizer and the configuration of the model.

    Args:
        backbone: Location of the tokenizer (default: the model's), revision of the model, and
            ``trust_remote_code``.
        model_folder: Local folder or hub id of the model.

    Raises:
        BackboneError: The tokenizer or the configuration cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    separate = backbone.tokenizer is not None
    tokenizer = load_pretrained(
        AutoTokenizer,
        backbone.tokenizer or model_folder,
        backbone,
        None if separate else backbone.revision,
    )
    return tokenizer, load_pretrained(AutoConfig, model_folder, backbone, backbone.revision)


def load_pretrained(
    auto: Any, source: str, backbone: BackboneRecipe, revision: str | None, **options: Any
) -> Any:
    """Call ``auto.from_pretrained(source)`` with the recipe's ``trust_remote_code``.

    Raises:
        BackboneError: Transformers cannot load the object.
    """
    try:
        return auto.from_pretrained(
            source, revision=revision, trust_remote_code=backbone.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        kind, reason = auto.__name__.removeprefix("Auto"), str(error).strip().partition("\n")[0]
        raise BackboneError(
            f"{kind} of {source} cannot be loaded: {reason}; backbone.tokenizer may name another "
            "folder or hub id"
        ) from error


def get_pad_token_id(tokenizer: Any) -> int:
    """Return the id of the pad token or, if there is none, of the end-of-sequence token.

    Raises:
        BackboneError: The tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BackboneError(
        "the tokenizer has neither a pad token nor an end-of-sequence token; name another "
        "tokenizer in backbone.tokenizer"
    )


def token_limit(tokenizer: Any, config: Any) -> int | None:
    """Return the maximum number of tokens, including special tokens, or None for no limit.

    The limit is the smaller of the limits of the tokenizer and the model.
    """
    limits = [
        limit for limit in (tokenizer.model_max_length,) if limit is not None and limit < _NO_LIMIT
    ]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - 2 if config.model_type in _OFFSET_POSITIONS else positions)
    return min(limits, default=None)


def pipeline_tokenizer(backbone: BackboneRecipe, folder: str, max_length: int | None) -> Any:
    """Return the tokenizer of a transformers pipeline, which truncates to ``max_length`` tokens."""
    tokenizer, config = load_tokenizer(backbone, folder)
    limit = resolve_max_length(max_length, token_limit(tokenizer, config))
    if limit is not None:
        tokenizer.model_max_length = limit
    tokenizer.pad_token_id = get_pad_token_id(tokenizer)
    return tokenizer


def resolve_max_length(
    max_length: int | None, limit: int | None, default: int | None = None
) -> int | None:
    """Return the maximum length of an example in tokens.

    Args:
        max_length: Setting of the recipe, or None.
        limit: Limit of the model, or None.
        default: Upper bound if the recipe has no setting.

    Raises:
        DataError: The setting exceeds the model's limit.
    """
    if max_length is not None:
        if limit is not None and max_length > limit:
            raise DataError(
                f"task.max_length: {max_length} tokens exceed the model's limit of {limit}"
            )
        return max_length
    return min((length for length in (limit, default) if length is not None), default=None)


def read_texts(table: Dataset, column: str, key: str) -> list[str]:
    """Read a column of text.

    Args:
        table: Rows.
        column: Column.
        key: Recipe key that names the column, for error messages.

    Raises:
        DataError: The column does not exist, is not text, or has nulls.
    """
    values = read_column(table, column, key)
    if not is_text(values.type) and len(values):
        raise DataError(
            f"{key}: column {column!r} has the type {values.type}, not text, "
            f"such as {values[0].as_py()!r} in row 0"
        )
    reject_nulls(values, column)
    texts: list[str] = values.to_pylist()
    return texts


def chunks(*columns: Sequence[Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """Yield chunks of parallel columns, each for one call of a tokenizer."""
    for start in range(0, len(columns[0]), _ROWS_PER_CALL):
        yield tuple(column[start : start + _ROWS_PER_CALL] for column in columns)


def ragged(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Convert rows to int64 tensors that are views of one contiguous tensor."""
    lengths = [len(row) for row in rows]
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=sum(lengths))
    return list(torch.split(torch.from_numpy(flat), lengths)) if rows else []


def pad(rows: Sequence[Tensor], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Pad rows with ``value`` and stack them, ``(batch, longest)``."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
