"""An engine from outside the package: ``federate`` needs the members of the protocol alone."""

import torch

from fedmerge_peft import federate
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.errors import ClientError
from fedmerge_peft.strategies import Reply

MEMBERS = {name for name in vars(Engine) if not name.startswith("_")}


class Wrapped:
    """An engine that has only the members of the protocol, and may lose one client's replies."""

    def __init__(self, engine, lost=None):
        self.inner, self.lost = engine, lost

    def __getattr__(self, name):
        if name not in MEMBERS:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def train_clients(self, round, assignments):
        replies = list(self.inner.train_clients(round, assignments))
        for plan, reply in reversed(replies):
            if isinstance(reply, Reply) and reply.client == self.lost:
                yield plan, ClientError(self.clients[self.lost].name, round, "lost")
            else:
                yield plan, reply


def test_a_run_with_an_outside_engine_equals_that_of_the_engine_in_it(
    smoke, smoke_engine, tmp_path
):
    recipe = smoke("strategy=fedavg")
    own = federate(recipe, tmp_path / "own", engine=smoke_engine)
    other = federate(recipe, tmp_path / "other", engine=Wrapped(smoke_engine))
    assert torch.equal(own.soup.rows, other.soup.rows)
    assert own.summary["final"]["served"] == other.summary["final"]["served"]


def test_a_client_that_the_engine_loses_is_skipped_and_named(smoke, smoke_engine, tmp_path):
    recipe = smoke("strategy=fedavg", "clients.failures=skip")
    run = federate(recipe, tmp_path / "run", engine=Wrapped(smoke_engine, lost=1))
    name = smoke_engine.clients[1].name
    assert [record["failures"] for record in run.records] == [{name: "lost"}] * recipe.rounds
