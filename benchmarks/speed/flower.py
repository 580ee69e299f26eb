"""Row c: whole rounds against Flower's simulation, if flwr[simulation] is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from statistics import median

import numpy as np
from setting import Plain, engine, rounds
from timing import Row, faster, race

CLIENTS, EXAMPLES, TESTS, BATCH = 16, 8, 4, 8
ROUNDS = 3


def rows() -> Iterator[Row]:
    """c. A round of 16 clients against Flower's simulation: same work, one core, cached models."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        return
    for batch in (1, BATCH):
        ours = engine(
            CLIENTS, EXAMPLES, f"training.batch_size={batch}", "evaluation.every=1", tests=TESTS
        )
        federation = rounds(ours).rounds()
        next(federation)
        before = race({"round": partial(next, federation)}, ROUNDS, warm=False)["round"]
        theirs = simulated(batch)
        after = race({"round": partial(next, federation)}, ROUNDS, warm=False)["round"]
        taken = {
            "round": [median(pair) for pair in zip(before, after, strict=True)],
            "Flower": theirs,
        }
        many = ours.clients_per_batch
        yield faster(
            f"c. a round of 16 clients over Flower's simulation; batch {batch}, "
            f"{many} client{'s' * (many > 1)} a pass",
            taken, "round", "Flower", "≥ 3",
        )  # fmt: skip


def simulated(batch: int) -> list[float]:
    """Return the seconds of each round except the first, in which the workers load the model."""
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    ended: list[float] = []

    class Timed(FedAvg):
        def aggregate_fit(self, *arguments):  # type: ignore[no-untyped-def]
            aggregated = super().aggregate_fit(*arguments)
            ended.append(time.perf_counter())
            return aggregated

    def server(_):  # type: ignore[no-untyped-def]
        plain = _loaded(batch)[0]
        first = ndarrays_to_parameters([tensor.numpy() for tensor in plain.state().values()])
        everyone = {
            "min_fit_clients": CLIENTS,
            "min_available_clients": CLIENTS,
            "fraction_evaluate": 0.0,
            "initial_parameters": first,
        }
        return ServerAppComponents(
            strategy=Timed(**everyone), config=ServerConfig(num_rounds=ROUNDS + 1)
        )

    class Client(NumPyClient):
        def __init__(self, number: int) -> None:
            self.plain, self.clients = _loaded(batch)
            self.own = self.clients[number]

        def fit(self, parameters, config):  # type: ignore[no-untyped-def]
            import torch

            self.plain.load(
                {
                    name: torch.from_numpy(np.array(value))
                    for name, value in zip(self.plain.state(), parameters, strict=True)
                }
            )
            accuracy = self.plain.evaluate([int(row) for row in self.own.test])
            self.plain.train([int(row) for row in self.own.train])
            return (
                [tensor.numpy() for tensor in self.plain.state().values()],
                self.own.size,
                {"accuracy": accuracy},
            )

    def client(context):  # type: ignore[no-untyped-def]
        return Client(int(context.node_config["partition-id"])).to_client()

    backend = {
        "init_args": {"num_cpus": 1, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(client_fn=client),
        num_supernodes=CLIENTS,
        backend_config=backend,
    )
    return [after - before for before, after in pairwise(ended)]


_KEPT: dict[int, tuple[Plain, list]] = {}


def _loaded(batch: int):  # type: ignore[no-untyped-def]
    """Load model and examples once per process."""
    if batch not in _KEPT:
        ours = engine(CLIENTS, EXAMPLES, f"training.batch_size={batch}", tests=TESTS)
        _KEPT[batch] = Plain(ours), list(ours.clients)
    return _KEPT[batch]
