"""Checks that tokenizer, configuration and model match."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.row_names import row_name

logger = logging.getLogger(__name__)

_MANY_UNKNOWN = 0.2
"""Smallest share of unknown tokens that causes a warning."""
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls")
"""Special tokens that are added to texts, or replace parts of them."""
_MOST_RESERVED = 8
"""Largest number of rows by which a table of positions may exceed ``max_position_embeddings``."""


def check_vocabulary(tokenizer: Any, model: Any, name: str, *, reads_end: bool) -> int | None:
    """Check a tokenizer against a model; return the number of token ids that have an embedding.

    Return None if the model has no table of token embeddings.

    Args:
        tokenizer: Tokenizer.
        model: Model of transformers, with or without an adapter.
        name: Name of the model, for error messages.
        reads_end: True if the task generates texts, or if the head reads the end-of-sequence token.

    Raises:
        BackboneError: All tokens of the tokenizer are special; an ordinary token, or a special
            token in ``_NAMED``, has no embedding; ``reads_end`` is True, and the model treats an
            ordinary token, but not the tokenizer's end token, as the end of a text; the model
            treats an ordinary token as padding.
    """
    if not any(_is_ordinary(tokenizer, token_id) for token_id in range(len(tokenizer))):
        raise BackboneError(
            f"backbone.tokenizer: the tokenizer of {name} has no tokens but special ones, so its "
            "files (tokenizer.json, vocab.txt, ...) are probably missing; add them, or name "
            "another tokenizer in backbone.tokenizer"
        )
    size = _vocabulary_size(model)
    if size is not None and (beyond := _tokens_from(tokenizer, size)):
        token, token_id = beyond[-1]
        raise BackboneError(
            f"backbone.tokenizer: the tokenizer has {len(tokenizer)} tokens, such as {token!r} "
            f"({token_id}), but {name} has embeddings for {size}; name the model's own tokenizer, "
            "or resize the model with resize_token_embeddings and save it"
        )
    ends = set(_end_ids(model))
    if reads_end and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        for token_id in sorted(ends):
            if _is_ordinary(tokenizer, token_id):
                token = tokenizer.convert_ids_to_tokens(token_id)
                raise BackboneError(
                    f"backbone.model: {name} treats {token!r} ({token_id}) as the end of a text, "
                    f"but the end token of the tokenizer is {tokenizer.eos_token!r} "
                    f"({tokenizer.eos_token_id}); correct eos_token_id in the model's config.json "
                    "and generation_config.json, or name another tokenizer in backbone.tokenizer"
                )
    for _, table in _position_tables(model):
        padding = getattr(table, "padding_idx", None)
        if padding is not None and _is_ordinary(tokenizer, padding):
            token = tokenizer.convert_ids_to_tokens(padding)
            raise BackboneError(
                f"backbone.model: {name} treats {token!r} ({padding}) as padding and gives it no "
                "position, but the tokenizer uses it as an ordinary token; correct pad_token_id in "
                "config.json, or name another tokenizer in backbone.tokenizer"
            )
    return size


def reject_unknown_ids(rows: Sequence[Sequence[int]], size: int | None) -> None:
    """Raise ``DataError`` for the first row with a token id that has no embedding."""
    if size is None:
        return
    for row, ids in enumerate(rows):
        if ids and (highest := max(ids)) >= size:
            raise DataError(
                f"{row_name(row)}: token {highest} is not among the {size} that the "
                "model knows; the text or the chat template has a special token without an "
                "embedding; remove it"
            )


def warn_of_unknown(rows: Sequence[list[int]], tokenizer: Any) -> None:
    """Log a warning if at least a fifth of the tokens of texts are the unknown token.

    Tokenizers without a separate unknown token, such as byte-level tokenizers, are not checked.
    """
    unknown = tokenizer.unk_token_id
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if unknown is None or unknown in others:
        return
    special = set(tokenizer.all_special_ids) - {unknown}
    total = sum(token_id not in special for ids in rows for token_id in ids)
    count = sum(ids.count(unknown) for ids in rows)
    if count >= _MANY_UNKNOWN * max(1, total):
        logger.warning(
            "the tokenizer does not know %.0f %% of the texts' tokens, which become %s; choose a "
            "model for the language of the texts, or another tokenizer in backbone.tokenizer",
            100 * count / total,
            tokenizer.unk_token,
        )


def special_strings(tokenizer: Any) -> list[str]:
    """Return the special tokens of a tokenizer as they are written, the longest first."""
    strings = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(strings, key=lambda token: (-len(token), token))


def position_limit(config: Any) -> int | None:
    """Return the number of tokens that have positions; None if there is no limit.

    RoBERTa and its relatives number positions from the padding id plus 1, so fewer tokens than
    ``max_position_embeddings`` fit. The limit is therefore read from the position tables of a model
    that is created from the configuration, without weights. If it cannot be created, the limit is
    ``max_position_embeddings``.
    """
    positions = getattr(_text_config(config), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    from transformers import AutoModel

    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(config)
    except Exception:  # the model has no base class, or its code is missing
        return positions
    limits = [positions]
    for size, table in _position_tables(model):
        if positions <= size <= positions + _MOST_RESERVED:
            padding = getattr(table, "padding_idx", None)
            reserved = getattr(table, "offset", 0) if padding is None else padding + 1
            limits.append(size - reserved)
    return min(limits)


def _position_tables(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield the number of rows and the module of each table of absolute positions."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        weight = getattr(module, "weight", None)
        named = ("position" in last or last == "wpe") and not isinstance(module, nn.Linear)
        if named and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            yield len(weight), module


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    # The model has several text configurations, such as one for an encoder and one for a decoder,
    # or its configuration is not a class of transformers.
    except (AttributeError, ValueError):
        return config


def _vocabulary_size(model: Any) -> int | None:
    """Return the number of token embeddings; None if the model has no table of them."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if table is None:
        return None
    # An adapter may wrap the table.
    sizes = [part.num_embeddings for part in table.modules() if isinstance(part, nn.Embedding)]
    return min(sizes, default=None)


def _tokens_from(tokenizer: Any, size: int) -> list[tuple[str, int]]:
    """Return the tokens with ids of ``size`` or more, and their ids, in ascending order of ids.

    Special tokens that are not among ``_NAMED``, such as an image token, are left out.
    """
    named = {getattr(tokenizer, f"{name}_token_id", None) for name in _NAMED}
    spare = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    } - named
    beyond = [
        (token_id, token)
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= size and token_id not in spare
    ]
    return [(token, token_id) for token_id, token in sorted(beyond)]


def _end_ids(model: Any) -> Iterator[int]:
    """Yield the ids of the end tokens in a model's configurations."""
    for config in (
        model.config,
        _text_config(model.config),
        getattr(model, "generation_config", None),
    ):
        ids = getattr(config, "eos_token_id", None)
        yield from ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def _is_ordinary(tokenizer: Any, token_id: int) -> bool:
    """Return True if an id belongs to a token in the vocabulary that is not special."""
    if token_id in tokenizer.all_special_ids or not 0 <= token_id < len(tokenizer):
        return False
    added = tokenizer.added_tokens_decoder.get(token_id)
    return added is None or not added.special
