"""BLEU and chrF of generated texts, by sacrebleu, as fractions from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence


def bleu(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the BLEU of a corpus (Papineni 2002; tokenizer 13a of sacrebleu, Post 2018)."""
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score([*generated], [[*references]]).score) / 100


def chrf(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the chrF of a corpus: n-grams of 6 characters, β = 2 (Popović 2015)."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score([*generated], [[*references]]).score) / 100
