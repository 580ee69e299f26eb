"""Row c: whole rounds against Flower's simulation, if flwr[simulation] is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from timing import Row

REPEATS = 3
STEPS = 10
"""Steps of a client in a round, as in Flower's example FlowerTune LLM."""


def rows() -> Iterator[Row]:
    """c. Rounds against Flower's simulation: a kept model, or one that each client loads."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        return
    from rivals import compared
    from workload import made

    kept, written = (
        "c. rounds over Flower's simulation, model kept",
        "c. rounds over Flower's simulation, as in its LLM example",
    )
    rivals = {kept: ("flower.py", "kept"), written: ("flower.py", "written")}
    for what, kind, clients, batch in (
        ("MiniLM, 8 clients, batch 1", "encoder", 8, 1),
        ("MiniLM, 2 clients, batch 8", "encoder", 2, 8),
        ("decoder, 2 clients, batch 4", "decoder", 2, 4),
    ):
        wanted = {written: "≥ 5", **({kept: "≥ 3"} if batch == 1 else {})}
        with made(kind, clients, STEPS, batch) as folder:
            yield from compared(folder, what, rivals, wanted, REPEATS)


def main(folder: str, rounds: str, address: str, manner: str) -> None:
    """Run FedAvg, one client at a time.

    A client keeps the model of its worker and trains in a loop (``kept``), or loads the model and
    makes a Trainer, as in FlowerTune LLM (``written``).
    """
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - the name that Ray reads
    import programs
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from rivals import Turns

    setting = programs.load(folder)
    clients = len(setting.clients)
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        if manner == "kept":
            model, own = programs.kept(folder)
            work = programs.train_in_loop
        else:
            own = programs.load(folder)
            model, work = programs.new_model(own), programs.train_with_trainer
        number = int(context.node_config["partition-id"])
        programs.set_adapter(model, message.content["arrays"].to_torch_state_dict())
        work(model, own, number)
        metrics = MetricRecord({"num-examples": programs.size(own, number)})
        arrays = ArrayRecord(programs.adapter(model))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        turns = Turns(address)
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        result = strategy.start(
            grid,
            ArrayRecord(dict(setting.start)),
            num_rounds=int(rounds),
            evaluate_fn=lambda *_: turns.boundary(),  # called before round 1 and after each round
        )
        programs.save_end(folder, f"flower-{manner}", result.arrays.to_torch_state_dict())

    backend = {
        "init_args": {"num_cpus": 1, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app, client_app, clients, backend_config=backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
