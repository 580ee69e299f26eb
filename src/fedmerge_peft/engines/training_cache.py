"""Cache of trained adapters, so that strategies that share an engine train the same job once.

The outcome of a job that trains alone is a deterministic function of its plan (with the starting
adapter), its seed, the client's examples, ``recipe.training`` with the job's hyperparameters, and
the frozen weights. The seed follows from the recipe's seed, the round and the client. In the first
round, strategies have the same jobs if they train the common initial adapter in the same way, as
``fedavg`` and ``local`` do. A site clears the cache when a run opens its job, so there only the
run's baselines benefit from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fedmerge_peft.training.loop import Job
from fedmerge_peft.training.plan import Trained
from fedmerge_peft.util.digest import digest

MAX_BYTES = 2**28
"""Default limit on the bytes of the trained adapters in a cache."""


@dataclass(frozen=True)
class TimedTraining:
    """One trained adapter, and the seconds that its training took."""

    trained: Trained
    seconds: float


class TrainingCache:
    """Cache of the outcomes of jobs that train alone, for one model and one ``recipe.training``.

    Jobs that share a forward pass are not cached, because their dropout masks depend on all jobs of
    the pass.

    Args:
        max_bytes: Limit on the bytes of trained adapters. A full cache keeps its entries and takes
            no new ones, because most of the jobs that strategies have in common are in early
            rounds.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._bytes_left = max_bytes
        self._known: dict[bytes, TimedTraining] = {}

    def get_or_train(self, job: Job, train: Callable[[], Trained]) -> TimedTraining:
        """Return the job's outcome, with the seconds of the original training.

        Args:
            job: Job that trains alone.
            train: Function that trains the job. It is called if the outcome is not in the cache.
        """
        key = _key(job)
        if (known := self._known.get(key)) is not None:
            return _copy(known)
        begin = time.perf_counter()
        trained = train()
        timed = TimedTraining(trained, time.perf_counter() - begin)
        size = trained.row.nbytes
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._known[key] = _copy(timed)
        return timed


def _key(job: Job) -> bytes:
    """Return a digest of everything in the job that determines its outcome."""
    plan = job.train  # its privacy is left out: it applies to the update after training
    return digest(
        [
            job.seed,
            job.hyperparameters.learning_rate,
            job.hyperparameters.epochs,
            torch.from_numpy(job.indices),
            plan.row,
            plan.proximal,
            plan.anchor,
            plan.example_weights,
            *([plan.alignment.centroids, plan.alignment.strength] if plan.alignment else [None]),
            plan.logits,
            *plan.phases,
        ]
    )


def _copy(known: TimedTraining) -> TimedTraining:
    return replace(known, trained=replace(known.trained, row=known.trained.row.clone()))
