"""Digest of the clients' encoded examples, to notice that data or tokenizer have changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fedmerge_peft.data import Client
from fedmerge_peft.tasks import Examples
from fedmerge_peft.util.digest import digest


def examples_digest(clients: Sequence[Client], examples: Examples) -> str:
    """Return a hexadecimal digest of the examples of all clients, split by split.

    It does not depend on the positions of examples in the table. Of columns of computed numbers,
    such as the features of sounds or the scores of a reference model, it has only the shapes,
    because their rounding depends on the machine. Labels count in full.
    """
    return digest(_parts(clients, examples)).hex()


def _parts(clients: Sequence[Client], examples: Examples) -> Iterator[Tensor | int | str]:
    columns = sorted(examples.columns.items())
    for client in clients:
        for split in (client.train, client.validation, client.test):
            yield client.name
            yield len(split)
            for name, values in columns:
                for row in split:
                    value = values[row]
                    computed = value.is_floating_point() and name != "labels"
                    yield str(tuple(value.shape)) if computed else value
