"""Examples and their partition among clients.

``federate_data`` creates the clients of a recipe. ``loading`` reads the splits, and ``in_memory``
converts tables that a Python program passes. ``partition`` assigns row numbers to clients and
depends only on numpy. ``build`` combines splits and row numbers into one table with its clients.
``summary`` counts the rows of each client.
"""

from fedmerge_peft.data.build import federate_data
from fedmerge_peft.data.clients import Client, FederatedData, Indices
from fedmerge_peft.data.in_memory import take_data
from fedmerge_peft.data.loading import load_splits
from fedmerge_peft.data.summary import client_table, terminal_chart

__all__ = [
    "Client",
    "FederatedData",
    "Indices",
    "client_table",
    "federate_data",
    "load_splits",
    "take_data",
    "terminal_chart",
]
