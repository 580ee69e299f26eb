"""Effect of ``training.prefix_dtype`` on the updates of two clients in their first round.

    python benchmarks/speed/half_states.py            # quickstart and assistants
    python benchmarks/speed/half_states.py RECIPE [OVERRIDES]

Prints, for each number format: the size of the states in memory, their largest absolute value, and
the difference of the updates and losses from those with exact states.
"""

from __future__ import annotations

import sys

import torch

from fedmerge_peft import Recipe
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.plan import Train

USUAL = ["baselines=[]", "training.prefix_disk=0", "training.clients_per_batch=1", "seed=0"]
RUNS = {
    "quickstart": ["training.learning_rate=0.005", "training.epochs=1"],
    "assistants": [
        "lora.layers_to_transform=[28,29]",
        "data.max_train=6",
        "data.max_test=4",
        "training.learning_rate=0.001",
        "training.epochs=1",
    ],
}


def updates(name, overrides, dtype):
    """Return the updates and losses of two clients, and the bytes and largest value of states."""
    chosen = [] if dtype is None else [f"training.prefix_dtype={dtype}"]
    engine = LocalEngine.from_recipe(Recipe.load(name, [*USUAL, *overrides, *chosen]))
    row = engine.strategy_context().fresh_row(0)
    assigned = Assignments.of([(client, Assignment(Train(row))) for client in range(2)])
    replies = [reply for _, reply in engine.train_clients(1, assigned)]
    cache = engine.runtime.cache
    if cache is None or not cache.used:
        raise SystemExit(f"{name}: no layers precede the adapters, or the model has no prefix")
    largest = max(float(states.abs().max()) for states in cache._states.values())
    deltas = torch.cat([reply.delta for reply in replies])
    return deltas, torch.tensor([reply.train_loss for reply in replies]), cache.nbytes, largest


def main(name, overrides):
    exact, losses, size, largest = updates(name, overrides, None)
    print(f"{name}: {size / 1e6:.2f} MB of states, up to {largest:.5g}")
    for dtype in ("float16", "bfloat16"):
        found, other, size, _ = updates(name, overrides, dtype)
        error = float((found - exact).norm() / exact.norm())
        loss = float(((other - losses) / losses).abs().max())
        print(f"  {dtype}: {size / 1e6:.2f} MB, updates {error:.1%}, losses {loss:.1g}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1], sys.argv[2:])
    else:
        for name, overrides in RUNS.items():
            main(name, overrides)
