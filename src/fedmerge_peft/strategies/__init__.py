"""Server-side methods, one a file."""

from fedmerge_peft.recipe import schema
from fedmerge_peft.strategies.base import Reply, Start, Strategy
from fedmerge_peft.strategies.fedavg import FedAvg
from fedmerge_peft.strategies.fedmerge import FedMerge
from fedmerge_peft.strategies.local import Local
from fedmerge_peft.strategies.step import fedmerge_step

__all__ = ["FedAvg", "FedMerge", "Local", "Reply", "Start", "Strategy", "fedmerge_step", "make_strategy"]


def make_strategy(recipe: schema.FedMerge | schema.FedAvg | schema.Local, start: Start) -> Strategy:
    """The strategy that a recipe names, at its start."""
    match recipe:
        case schema.FedMerge():
            return FedMerge(recipe, start)
        case schema.FedAvg():
            return FedAvg(recipe, start)
        case schema.Local():
            return Local(start)
