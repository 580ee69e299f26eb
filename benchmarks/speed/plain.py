"""The plain loop: PEFT and PyTorch, without a framework; adapters are averaged by tensor."""

from __future__ import annotations

import sys


def main(folder: str, rounds: str, address: str) -> None:
    """Run FedAvg: each client trains from the shared adapter in a loop of PyTorch."""
    from openfedllm import run_round
    from programs import load, new_model, save_end, train_in_loop
    from rivals import Turns

    setting = load(folder)
    model, shared, turns = new_model(setting), setting.start, Turns(address)
    turns.boundary()
    for _ in range(int(rounds)):
        shared = run_round(model, setting, shared, train_in_loop)
        turns.boundary()
    save_end(folder, "plain", shared)


if __name__ == "__main__":
    main(*sys.argv[1:])
