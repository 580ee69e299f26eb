"""Rows e: more clients, with the same examples or the same cohort; more and larger adapters."""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from timing import Row, seconds

CLIENTS = (10, 1000, 10_000)
EXAMPLES = 20_000
ROUNDS = 5
MANY = (10**3, 10**4, 10**5)
"""Clients in the rows on the server with one size of cohorts."""
COHORT, NUMBERS, SERVED = 100, 10_000, 10
"""Clients per round, numbers in an adapter, and rounds in these rows."""
ASKED = 4
"""Clients per round in the rows on the size of adapters."""
SIZES = ((8, 10**5), (8, 10**6), (8, 10**7), (1, 10**7), (1, 10**8))
"""Adapters, and numbers in each; the last two are the largest that fit on the machine."""
ADAPTERS = (1, 2, 4, 8, 16, 32)
MOST = 6e9
"""Memory limit of a process in bytes; larger sizes are skipped."""
STRATEGIES = {"fedmerge": "{name: fedmerge, adapters: 8, start: warm}", "fedavg": "fedavg"}


def rows() -> Iterator[Row]:
    """e. 20 000 examples on a tiny model, five rounds with a run directory; a process per size."""
    for name, strategy in STRATEGIES.items():
        found = {clients: _measured(strategy, clients, 2) for clients in CLIENTS}
        for clients in CLIENTS[1:]:
            (memory, each), (least, fewest) = found[clients], found[CLIENTS[0]]
            ratios = [a / b for a, b in zip(memory, least, strict=True)]
            asked = max(1, clients // 100)
            sides = (
                f"{median(memory):.0f} MB, 10 clients {median(least):.0f} MB; "
                f"a round {seconds(median(each))} for {asked} "
                f"client{'s' * (asked > 1)}, 10 clients {seconds(median(fewest))} for 1"
            )
            wanted = "≤ 1.1" if clients == CLIENTS[-1] else ""
            yield Row.of(
                f"e. {name}: peak memory of {clients} clients over 10",
                ratios,
                sides,
                wanted,
            )


def server() -> Iterator[Row]:
    """e. The server's rounds with 100 clients each, saved; 8 adapters of 10^4 numbers, no model."""
    for name in ("fedmerge", "ifca"):
        found = {clients: _measured(f"server:{name}", clients, 2) for clients in MANY}
        (least, fewest) = found[MANY[0]]
        for clients in MANY[1:]:
            memory, each = found[clients]
            ratios = [a / b for a, b in zip(each, fewest, strict=True)]
            sides = (
                f"{seconds(median(each))} of processor time and {median(memory):.0f} MB, "
                f"10^3 clients {seconds(median(fewest))} and {median(least):.0f} MB"
            )
            yield Row.of(
                f"e. {name}: a round of 10^{round(math.log10(clients))} clients over 10^3",
                ratios,
                sides,
            )


def sizes() -> Iterator[Row]:
    """e. The server in a round of FedMerge: four adapters merged, four replies stored, one step."""
    found = {
        size: _measured(*size, 2)
        for size in {*SIZES, *((each, 10**6) for each in ADAPTERS)}
        if _needed(*size) <= MOST
    }
    for small, large in (
        *(((1, 10**6), (each, 10**6)) for each in ADAPTERS[1:]),
        *((a, b) for a, b in pairwise(SIZES) if a[0] == b[0]),
    ):
        if large in found:
            (_, less), (memory, more) = found[small], found[large]
            ratios = [a / b for a, b in zip(more, less, strict=True)]
            sides = (
                f"{seconds(median(more))} and {median(memory):.0f} MB, "
                f"{_named(*small)} {seconds(median(less))}"
            )
            yield Row.of(
                f"e. {_named(*large)} over {_named(*small)}",
                ratios,
                sides,
            )


def _named(adapters: int, size: int) -> str:
    return f"{adapters} adapter{'s' * (adapters > 1)} of 10^{round(math.log10(size))}"


def _needed(adapters: int, size: int) -> float:
    """Estimate the bytes: Θ, its gradient, two copies in the optimizer, centered Θ, replies."""
    return 4 * size * (6 * adapters + ASKED + 2)


def _measured(first: object, second: object, repeats: int) -> tuple[list[float], list[float]]:
    """Return peak memory (MB) and seconds per round, for each of ``repeats`` processes.

    Args:
        first: A strategy, ``server:`` and its name, or a number of adapters.
        second: The number of clients, or of numbers in an adapter.
        repeats: Number of processes.
    """
    command = [sys.executable, __file__, str(first), str(second)]
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        for _ in range(repeats)
    ]
    return [float(output[-2]) for output in outputs], [float(output[-1]) for output in outputs]


def _run(strategy: str, clients: int) -> tuple[float, float]:
    from setting import engine

    from fedmerge_peft import Callback, federate

    overrides = [f"strategy={strategy}", f"rounds={ROUNDS}", "clients.fraction=0.01"]
    steps = ["training.steps=1", "training.batch_size=2"]
    loaded = engine(clients, EXAMPLES // clients, *overrides, *steps, model="tiny:bert")
    times: list[float] = []
    with TemporaryDirectory() as folder:
        federate(
            loaded.recipe,
            Path(folder) / "run",
            engine=loaded,
            callbacks=[Callback(on_round=lambda _: times.append(time.perf_counter()))],
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, median(
        b - a for a, b in pairwise(times)
    )


def _serve_many(name: str, clients: int) -> tuple[float, float]:
    import torch

    from fedmerge_peft.adapters.layout import AdapterLayout
    from fedmerge_peft.runs.writer import RunWriter
    from fedmerge_peft.testing import FormulaClients

    shapes = [("layer.lora_A.weight", (100, NUMBERS // 100), "lora")]
    made = FormulaClients(1, AdapterLayout.from_tensors(shapes))
    made.sizes = [10] * clients
    made.centers = _Centers()  # those of 10^5 clients would take 4 GB
    strategy = f"strategy={{name: {name}, adapters: 8}}"
    cohort = f"clients.fraction={COHORT / clients}"
    federation = made.federation(strategy, cohort, f"rounds={SERVED}")
    times = []
    with TemporaryDirectory() as folder, torch.no_grad():
        run, rounds = RunWriter(Path(folder), federation.recipe), federation.rounds()
        for _ in range(SERVED):
            begin = time.process_time()  # without the wait for the disk
            run.append(next(rounds), federation.strategy)
            times.append(time.process_time() - begin)
    # FedMerge groups the clients after the third round.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, median(times[3:])


class _Centers:
    """Minima of the clients' losses, ``(P,)`` each: that of a group, plus noise of the client."""

    def __getitem__(self, client: int) -> Any:
        import torch

        of_group, own = (
            torch.randn(NUMBERS, generator=torch.Generator().manual_seed(seed))
            for seed in (client % 8, 8 + client)
        )
        return of_group + 0.5 * own


def _serve(adapters: int, size: int) -> tuple[float, float]:
    import torch

    from fedmerge_peft.adapters.layout import AdapterLayout
    from fedmerge_peft.recipe.strategies import FedMergeRecipe
    from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
    from fedmerge_peft.util.row_buffer import RowBuffer

    layout = AdapterLayout.from_tensors([("layer.lora_A.weight", (100, size // 100), "lora")])
    generator = torch.Generator().manual_seed(0)
    strategy = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=adapters, start="independent"),
        StrategyContext(ASKED, layout, lambda _: torch.randn(size, generator=generator)),
    )
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        kept = RowBuffer(expected_calls=ASKED)
        replies = [
            Reply(client, kept.append(0.01 * strategy.plan(client).sent), 10, 1.0, 0.0)
            for client in range(ASKED)
        ]
        strategy.update(replies)
        times.append(time.perf_counter() - begin)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, median(times[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("first", help="a strategy, server:NAME, or the number of adapters")
    parser.add_argument("second", type=int, help="number of clients, or numbers in an adapter")
    options = parser.parse_args()
    if options.first.isdigit():
        found = _serve(int(options.first), options.second)
    elif options.first.startswith("server:"):
        found = _serve_many(options.first.removeprefix("server:"), options.second)
    else:
        found = _run(options.first, options.second)
    print(*found)
