"""Tokenized examples in readable form, with the tokens that have a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of an example with equal ``role``, ``has_loss`` and ``is_cut``."""

    role: str
    """Role of the message, or another name for this part of the example."""
    tokens: list[str]
    """Text of each token."""
    has_loss: bool = False
    """True for tokens with a loss."""
    is_cut: bool = False
    """True for tokens that truncation removes."""

    @classmethod
    def of(cls, tokenizer: Any, role: str, ids: Tensor, *, has_loss: bool = False) -> Segment:
        """Return a segment with the texts of token ids ``(n,)``, each decoded on its own."""
        return cls(role, [tokenizer.decode([token]) for token in ids.tolist()], has_loss)


@dataclass(frozen=True)
class ShownExample:
    """Readable form of a tokenized row. It may include tokens that truncation removes."""

    segments: list[Segment]
    label: str | None = None
    """Label of the row as text; None for tasks without labels."""

    def count(self, *, has_loss: bool | None = None, is_cut: bool = False) -> int:
        """Count the tokens that truncation keeps or, with ``is_cut``, those that it removes.

        ``has_loss`` restricts the count to tokens with or without a loss; None counts both.
        """
        return sum(
            len(segment.tokens)
            for segment in self.segments
            if segment.is_cut == is_cut and has_loss in (None, segment.has_loss)
        )


def split_into_segments(
    tokenizer: Any,
    ids: Sequence[int],
    roles: Sequence[str],
    labeled: Sequence[bool],
    kept: Sequence[int],
) -> list[Segment]:
    """Split an example into segments.

    Args:
        tokenizer: Tokenizer.
        ids: Token ids, before truncation.
        roles: Role of each token.
        labeled: True for each token with a loss.
        kept: Indices of the tokens that truncation keeps. The first kept token has no loss.
    """
    remaining = set(kept)

    def kind(place: int) -> tuple[str, bool, bool]:
        has_loss = labeled[place] and place in remaining and place != kept[0]
        return roles[place], has_loss, place not in remaining

    return [
        Segment(role, [tokenizer.decode([ids[place]]) for place in places], has_loss, is_cut)
        for (role, has_loss, is_cut), places in groupby(range(len(ids)), key=kind)
    ]
