"""Confusion matrices of the clients' served models on their test examples."""

from __future__ import annotations

from fedmerge_peft import distributed
from fedmerge_peft.engines.assignments import Assignments
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.evaluation import confusion
from fedmerge_peft.training.plan import Served

Confusion = dict[str, list[list[int]]]
"""Rows [true class, predicted class, count] of each client, by the client's name. The count is the
number of test examples or words with this pair of classes."""


def confusion_matrices(engine: Engine, served: Assignments[Served]) -> Confusion | None:
    """Count the true and predicted classes of test examples by client, without training.

    Args:
        engine: Engine of the clients. Its backbone must already have the ΔW of these models
            (``Model.set_base``).
        served: Clients and their served models.

    Returns:
        Counts by the client's name. None if the outputs are not classes, no client has test
        examples, or the clients are at sites, which report only scores.
    """
    if not (isinstance(engine, LocalEngine) and engine.task.names_classes):
        return None
    tested = [client for client in served.clients if len(engine.clients[client].test)]
    own = tested[distributed.rank() :: distributed.world_size()]

    def count() -> Confusion:
        return {
            engine.clients[client].name: confusion(
                engine.runtime,
                served.make(client),
                engine.clients[client].test,
                engine.recipe.evaluation.batch_size,
            )
            for client in own
        }

    parts = distributed.all_gather(count)
    by_name = {name: counts for part in parts for name, counts in part.items()}
    names = [engine.clients[client].name for client in tested]
    return {name: by_name[name] for name in names} or None
