"""Where examples come from, and which client holds which.

``federate_data`` is the whole way from a recipe to clients: ``sources`` reads the splits, ``partition`` deals their row numbers
(numpy alone), ``federate`` joins both into one table and its clients, ``summary`` shows who holds what.
"""

from fedmerge_peft.data.build import federate_data
from fedmerge_peft.data.clients import Client, FederatedData, Indices
from fedmerge_peft.data.loading import load_splits
from fedmerge_peft.data.summary import client_table, plot, terminal_chart

__all__ = [
    "Client",
    "FederatedData",
    "Indices",
    "client_table",
    "federate_data",
    "load_splits",
    "terminal_chart",
    "plot",
]
