"""OpenFedLLM's manner: one model in one process, and a new Trainer for each client.

The loop is that of ``main_sft.py`` in OpenFedLLM with ``fed_alg=fedavg``, except that examples are
tokenized once and the Trainer is that of transformers, from which TRL's SFTTrainer is derived.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from programs import (
    Setting,
    State,
    adapter,
    load,
    new_model,
    save_end,
    set_adapter,
    size,
    train_with_trainer,
)


def run_round(
    model: Any,
    setting: Setting,
    shared: State,
    train: Callable[[Any, Setting, int], object] = train_with_trainer,
) -> State:
    """Train all clients from the shared adapter; return the weighted mean of their adapters."""
    states = []
    for client in range(len(setting.clients)):
        set_adapter(model, shared)
        train(model, setting, client)
        states.append(adapter(model))
    sizes = [size(setting, client) for client in range(len(setting.clients))]
    weights = torch.tensor(sizes) / sum(sizes)
    mean = {
        name: torch.tensordot(weights, torch.stack([state[name] for state in states]), dims=1)
        for name in shared
    }
    set_adapter(model, mean)
    return mean


def main(folder: str, rounds: str, address: str) -> None:
    """Run the loop."""
    from rivals import Turns

    setting = load(folder)
    model, shared, turns = new_model(setting), setting.start, Turns(address)
    turns.boundary()
    for _ in range(int(rounds)):
        shared = run_round(model, setting, shared)
        turns.boundary()
    save_end(folder, "openfedllm", shared)


if __name__ == "__main__":
    main(*sys.argv[1:])
