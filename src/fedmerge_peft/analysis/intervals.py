"""Confidence intervals of scores on few examples."""

from __future__ import annotations

from typing import Any

from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import facts_of

LEVEL = 0.95
"""Confidence level."""


def score_intervals(
    run: RunDirectory, scores: dict[str, Any]
) -> dict[str, tuple[float, float]] | None:
    """Return the Wilson interval of each client's score, at a confidence of ``LEVEL``.

    With s of n examples predicted correctly and z = Φ⁻¹(0.975), the interval is (Wilson 1927)

    (s + z²/2 ± z √(s (n − s) / n + z²/4)) / (n + z²).

    Args:
        run: The run.
        scores: Its scores, such as ``summary["final"]["served"]``.

    Returns:
        Lower and upper limit by client; clients without a score are omitted. None if the metric is
        not the fraction of correct examples: the intervals of other metrics need the scores of
        single examples, which runs do not store.
    """
    from scipy.stats import binomtest

    split, facts = scores["metric"].partition("_")[0], facts_of(scores["metric"])
    of_tokens = "tokens" in facts.get("of", ()) and run.recipe.task.label_column is None
    if not facts.get("per_example") or of_tokens:
        return None
    sizes = run.clients[split]
    intervals = {}
    for client, values in scores["clients"].items():
        size = int(sizes.get(client, 0))
        score = values.get(scores["metric"])
        if size and score is not None and 0 <= score <= 1:
            test = binomtest(round(score * size), size)
            interval = test.proportion_ci(confidence_level=LEVEL, method="wilson")
            intervals[client] = (float(interval.low), float(interval.high))
    return intervals
