"""Tokenization shared by text tasks: tokenizer, length limit, text columns, padding."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedmerge_peft.data.column_types import as_text
from fedmerge_peft.data.columns import read_column
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.in_memory import passed_model, passed_processor
from fedmerge_peft.tasks.labels import is_text, reject_nulls
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.vocabulary import position_limit, special_strings
from fedmerge_peft.util.library_errors import STOPS, library_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe

logger = logging.getLogger(__name__)

_ROWS_PER_CALL = 1000

_NO_LIMIT = 1_000_000
"""Smallest ``model_max_length`` of a tokenizer that means no limit. Transformers sets it to 1e30
for tokenizers without a limit."""


def load_tokenizer(backbone: BackboneRecipe, model_folder: str) -> tuple[Any, Any]:
    """Return the tokenizer and the configuration of the model.

    They are loaded. If a Python program passes the model, they are copies of the passed tokenizer
    and of the model's configuration (None for a model without one).

    Args:
        backbone: Location of the tokenizer (default: the model's), revision of the model, and
            ``trust_remote_code``.
        model_folder: Local folder or hub id of the model.

    Raises:
        BackboneError: The tokenizer or the configuration cannot be loaded, or the program passes an
            object that is not a tokenizer of transformers.
    """
    from transformers import AutoConfig, AutoTokenizer

    if (passed := passed_model(backbone.model)) is not None:
        tokenizer = passed_processor(backbone.model)
        if not hasattr(tokenizer, "get_vocab"):
            raise BackboneError(
                f"tokenizer: found {type(passed.processor).__name__}, expected a tokenizer of "
                "transformers, because the task reads texts; pass tokenizer=..."
            )
        return tokenizer, deepcopy(getattr(passed.model, "config", None))
    # The configuration is loaded first, because the tokenizer reads it too.
    config = load_pretrained(AutoConfig, model_folder, backbone, backbone.revision)
    separate = backbone.tokenizer is not None
    tokenizer = load_pretrained(
        AutoTokenizer,
        backbone.tokenizer or model_folder,
        backbone,
        None if separate else backbone.revision,
    )
    return tokenizer, config


def load_pretrained(
    auto: Any, source: str, backbone: BackboneRecipe, revision: str | None, **options: Any
) -> Any:
    """Call ``auto.from_pretrained(source)`` with the recipe's ``trust_remote_code``.

    Raises:
        BackboneError: Transformers cannot load the object.
    """
    part = auto.__name__.removeprefix("Auto")
    key, remedy = (
        ("backbone.model", "correct config.json, or choose another model")
        if part == "Config"
        else ("backbone.tokenizer", "backbone.tokenizer may name another folder or hub id")
    )

    def fault(reason: str) -> BackboneError:
        own_code = "custom code" in reason or "trust_remote_code" in reason
        advice = "read the code; if you trust it, set backbone.trust_remote_code=true"
        return BackboneError(
            f"{key}: {part} of {source} cannot be loaded: {reason}; "
            f"{advice if own_code else remedy}"
        )

    with library_errors(fault):
        return auto.from_pretrained(
            source, revision=revision, trust_remote_code=backbone.trust_remote_code, **options
        )


def get_pad_token_id(tokenizer: Any) -> int:
    """Return the id of the pad token or, if there is none, of the end-of-sequence token.

    Raises:
        BackboneError: The tokenizer has neither token.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BackboneError(
        "the tokenizer has neither a pad token nor an end-of-sequence token; name another "
        "tokenizer in backbone.tokenizer"
    )


def token_limit(tokenizer: Any, config: Any) -> int | None:
    """Return the maximum number of tokens, including special tokens; None if there is no limit.

    The limit is the smaller of the limits of the tokenizer and the model.

    Raises:
        BackboneError: The tokenizer's limit is not a positive number.
    """
    length = tokenizer.model_max_length
    if length is not None and not (isinstance(length, int | float) and length >= 1):
        raise BackboneError(
            f"backbone.tokenizer: model_max_length in the tokenizer's settings is {length!r}, "
            "expected a number of tokens, at least 1; correct it (in a folder: in "
            "tokenizer_config.json)"
        )
    limits = [int(length)] if length is not None and length < _NO_LIMIT else []
    positions = position_limit(config)
    return min([*limits, *([] if positions is None else [positions])], default=None)


def pipeline_tokenizer(backbone: BackboneRecipe, folder: str, max_length: int | None) -> Any:
    """Return a tokenizer for a transformers pipeline. It truncates to ``max_length`` tokens.

    Without ``max_length``, the model's limit applies.
    """
    tokenizer, config = load_tokenizer(backbone, folder)
    limit = resolve_max_length(max_length, token_limit(tokenizer, config))
    if limit is not None:
        tokenizer.model_max_length = limit
    tokenizer.pad_token_id = get_pad_token_id(tokenizer)
    return tokenizer


def resolve_max_length(
    max_length: int | None,
    limit: int | None,
    default: int | None = None,
    key: str = "task.max_length",
) -> int | None:
    """Return the maximum length of an example in tokens; None if there is no limit.

    Args:
        max_length: Setting of the recipe, if any.
        limit: Limit of the model, if any.
        default: Upper bound if the recipe has no setting.
        key: Recipe key of the setting, for the error message.

    Raises:
        DataError: The setting exceeds the model's limit.
    """
    if max_length is not None:
        if limit is not None and max_length > limit:
            raise DataError(
                f"{key}: {max_length} tokens exceed the model's limit of {limit}; lower {key}, or "
                "use a model with a higher limit"
            )
        return max_length
    return min((length for length in (limit, default) if length is not None), default=None)


def more_tokens(length: int, limit: int | None) -> str:
    """Return advice on texts that need more than ``length`` tokens, given the model's limit."""
    may_raise = limit is None or length < limit
    return "raise task.max_length" if may_raise else "use a model with a higher limit"


def read_texts(table: Dataset, column: str, key: str) -> list[str]:
    """Read a column of text. Integers and booleans are converted to text, with a warning.

    Args:
        table: Rows.
        column: Column.
        key: Recipe key that names the column, for error messages.

    Raises:
        DataError: The column does not exist, is not text, or has nulls.
    """
    values = read_column(table, column, key)
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        logger.warning(
            "%s: column %r has the type %s, and is read as text", key, column, values.type
        )
        values = as_text(values)
    if not is_text(values.type) and values.null_count < len(values):
        row = next(row for row, value in enumerate(values) if value.is_valid)
        raise DataError(
            f"{key}: column {column!r} has the type {values.type}, such as "
            f"{values[row].as_py()!r} in row {row}, and is not text; choose a column of text"
        )
    reject_nulls(values, column)
    texts: list[str] = values.to_pylist()
    return texts


def tokenized(tokenizer: Any, *columns: Sequence[str], **options: Any) -> Iterator[dict[str, Any]]:
    """Tokenize parallel columns of texts; yield the outputs for each row, such as ``input_ids``.

    Args:
        tokenizer: Tokenizer.
        columns: Texts, or first and second texts of pairs.
        options: Arguments of the tokenizer.

    Raises:
        DataError: The tokenizer fails on a text. The message names the row.
    """
    for start in range(0, len(columns[0]), _ROWS_PER_CALL):
        chunk = [list(column[start : start + _ROWS_PER_CALL]) for column in columns]
        try:
            encoded = tokenizer(*chunk, verbose=False, **options)
        except STOPS:
            raise
        except BaseException:  # row by row, to find the fault; a Rust panic is not an Exception
            yield from (
                _tokenized_row(tokenizer, start + row, texts, options)
                for row, texts in enumerate(zip(*chunk, strict=True))
            )
            continue
        for row in range(len(chunk[0])):
            yield {name: values[row] for name, values in encoded.items()}


def _tokenized_row(
    tokenizer: Any, row: int, texts: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Any]:
    with library_errors(
        lambda reason: DataError(
            f"{row_name(row)}: the tokenizer fails on {texts[0][:80]!r}: {reason}; "
            "correct the text, or remove it"
        )
    ):
        return dict(tokenizer(*texts, verbose=False, **options))


def truncated(
    tokenizer: Any,
    *columns: Sequence[str],
    max_length: int | None,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[dict[str, list[Any]], list[int]]:
    """Tokenize parallel columns of texts, and truncate long rows.

    Args:
        tokenizer: Tokenizer.
        columns: Texts, or first and second texts of pairs.
        max_length: Maximum length in tokens; None if there is no limit.
        call: Function that calls the tokenizer; None to call it directly.
        options: Arguments of the tokenizer.

    Returns:
        Values of each output of the tokenizer by row, and the indices of the truncated rows.

    Raises:
        DataError: The tokenizer fails on a text, or reads a part of a text as a special token.
    """
    tokenize = call or tokenizer
    rows: dict[str, list[Any]] = {}
    special = SpecialTokens(tokenizer)
    usual = special.count(tokenize(*["a"] * len(columns))["input_ids"])
    long = []
    for row, encoded in enumerate(tokenized(tokenize, *columns, **options)):
        texts = [column[row] for column in columns]
        if max_length is not None and len(encoded["input_ids"]) > max_length:
            encoded = tokenize(*texts, truncation=True, max_length=max_length, **options)
            long.append(row)
        written = next(filter(None, map(special.first_in, texts)), None)
        if written and special.count(encoded["input_ids"]) > usual:
            raise DataError(
                f"{row_name(row)}: the tokenizer takes {written!r} in the text "
                "for a special token; remove it from the text"
            )
        for name, values in encoded.items():
            rows.setdefault(name, []).append(values)
    return rows, long


def reject_empty(rows: Sequence[Sequence[int]], texts: Sequence[str], column: str) -> None:
    """Raise ``DataError`` for the first text that has no tokens."""
    if (row := next((row for row, ids in enumerate(rows) if not ids), None)) is not None:
        raise DataError(
            f"{row_name(row)}: the text in column {column!r} has no "
            f"tokens: {texts[row]!r}; change the text, or remove it"
        )


class SpecialTokens:
    """Search for special tokens that are written in texts, such as ``</s>``.

    Args:
        tokenizer: Tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        strings = special_strings(tokenizer)
        self._written = re.compile("|".join(map(re.escape, strings))) if strings else None
        self._ids = set(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._ids.discard(tokenizer.unk_token_id)

    def first_in(self, text: str) -> str | None:
        """Return the first special token that is written in a text; None if there is none."""
        match = self._written.search(text) if self._written else None
        return match.group() if match else None

    def count(self, ids: Sequence[int]) -> int:
        """Count the special tokens among ids, except the unknown token."""
        return sum(token_id in self._ids for token_id in ids)


def ragged(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Convert rows to int64 tensors that are views of one contiguous tensor."""
    lengths = [len(row) for row in rows]
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=sum(lengths))
    return list(torch.split(torch.from_numpy(flat), lengths)) if rows else []


def as_bytes(texts: Sequence[str]) -> list[Tensor]:
    """Convert texts to uint8 tensors, so that columns of ``Examples`` can store them."""
    return [torch.tensor([*text.encode()], dtype=torch.uint8) for text in texts]


def from_bytes(tensor: Tensor) -> str:
    """Convert a tensor from ``as_bytes`` to its text."""
    return bytes(tensor.tolist()).decode()


def pad(rows: Sequence[Tensor], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Pad rows with ``value`` and stack them, ``(batch, longest)``."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def pad_tokens(
    rows: Sequence[Tensor], pad_token_id: int, side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """Pad rows of token ids; return ``input_ids`` and ``attention_mask``, ``(batch, longest)``."""
    return {
        "input_ids": pad(rows, pad_token_id, side),
        "attention_mask": pad([torch.ones_like(ids) for ids in rows], 0, side),
    }


def pad_parts(
    columns: Mapping[str, Sequence[Tensor]],
    lengths: Sequence[Tensor],
    pad_token_id: int,
    pad_token_type_id: int,
) -> dict[str, Tensor]:
    """Split examples into their sequences; pad and stack the sequences.

    Examples with fewer sequences than others get further sequences of a single token, so that all
    examples have the same number of sequences.

    Args:
        columns: ``input_ids`` and, if needed, ``token_type_ids`` of each example: its sequences,
            concatenated. Other columns are ignored.
        lengths: Lengths of the sequences of each example.
        pad_token_id: Id of padding.
        pad_token_type_id: Type of padding.

    Returns:
        ``input_ids``, ``attention_mask`` and, if needed, ``token_type_ids``, all ``(examples ·
        sequences, longest)``.
    """
    most = max(map(len, lengths))
    counts = torch.cat([functional.pad(own, (0, most - len(own)), value=1) for own in lengths])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    batch = {"attention_mask": mask.long()}
    for name, value in (("input_ids", pad_token_id), ("token_type_ids", pad_token_type_id)):
        parts: list[Tensor] = []
        for row, own in zip(columns.get(name, []), lengths, strict=False):
            parts += [*torch.split(row, own.tolist()), *[row[:1]] * (most - len(own))]
        if parts:
            batch[name] = pad(parts, value)
    return batch
