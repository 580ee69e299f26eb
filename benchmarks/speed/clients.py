"""Rows a, b and c: the time of training clients, and of whole rounds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import shares
from setting import Plain, averaged, engine, rounds
from timing import Row, faster, race

from fedmerge_peft.engines.local import LocalEngine


def overhead() -> Iterator[Row]:
    """a. One client at a time, in rounds, against one centralized loop on the same examples."""
    ours = engine(4, 16, "training.batch_size=8", "training.clients_per_batch=1")
    plain, federation = Plain(ours), rounds(ours).rounds()
    epoch = plain.prepared([int(row) for client in ours.clients for row in client.train])
    taken = race({"rounds": lambda: next(federation), "plain loop": epoch}, 9)
    what = (
        "a. rounds of 4 clients, one at a time, over a centralized PEFT + Accelerate loop; batch 8"
    )
    yield faster(what, taken, "rounds", "plain loop", "≥ 0.98")


def together() -> Iterator[Row]:
    """b. K clients in one pass against one at a time."""
    for batch in (1, 4, 8, 16):
        steps = max(1, 4 // batch)
        ours = engine(
            16, batch * steps, f"training.batch_size={batch}", "training.clients_per_batch=1"
        )
        sequential = rounds(ours).rounds()
        sides = {"one at a time": partial(next, sequential)}
        for count in (4, 8, 16):
            several = ours.with_recipe(ours.recipe.replace([f"training.clients_per_batch={count}"]))
            assert several is not None
            assert several.clients_per_batch == count
            sides[f"{count} together"] = partial(next, rounds(several).rounds())
        taken = race(sides, 3)
        for count in (4, 8, 16):
            wanted = {(8, 1): "≥ 2.2", (8, 8): "≥ 1.3"}.get((count, batch), "")
            yield faster(
                f"b. {count} clients in one pass over one at a time; batch {batch}",
                taken,
                f"{count} together",
                "one at a time",
                wanted,
            )
        if batch in (1, 8):
            for name in ("one at a time", "8 together"):
                yield shares.row(
                    f"b. operations of the 16 clients, {name}; batch {batch}, processor time",
                    [shares.by_operation(sides[name], shares.TRAINING)],
                )


def prefix() -> Iterator[Row]:
    """b. LoRA on the last third of the layers."""
    layers = "lora.layers_to_transform=[4,5]"
    cached, recomputed = (
        engine(
            4,
            16,
            "training.batch_size=8",
            "training.clients_per_batch=1",
            layers,
            f"training.prefix_cache={gigabytes}",
        )
        for gigabytes in (2, 0)
    )
    first, second = rounds(cached).rounds(), rounds(recomputed).rounds()
    taken = race({"cached": lambda: next(first), "recomputed": lambda: next(second)}, 7)
    yield faster(
        "b. LoRA on the last third of the layers: cached prefix over recomputed prefix; batch 8",
        taken,
        "cached",
        "recomputed",
        "≥ 2",
    )


def plain_round(plain: Plain, ours: LocalEngine) -> None:
    """Run a round with plain PEFT: load each client's state, evaluate, train, average by tensor."""
    start = plain.state()
    states = []
    for client in ours.clients:
        plain.load(start)
        plain.evaluate([int(row) for row in client.test])
        plain.train([int(row) for row in client.train])
        states.append(plain.state())
    plain.load(averaged(states, [client.size for client in ours.clients]))


def whole_rounds() -> Iterator[Row]:
    """c. Rounds of 16 clients, each evaluated and trained, against a loop over state dicts."""
    for batch, examples in ((1, 4), (8, 8)):
        ours = engine(16, examples, f"training.batch_size={batch}", "evaluation.every=1", tests=4)
        plain, federation = Plain(ours), rounds(ours).rounds()
        taken = race(
            {"round": partial(next, federation), "loop": partial(plain_round, plain, ours)}, 3
        )
        many = ours.clients_per_batch
        yield faster(
            f"c. a round of 16 clients over a loop that loads their state dicts; batch {batch}, "
            f"{many} client{'s' * (many > 1)} a pass",
            taken, "round", "loop",
        )  # fmt: skip
