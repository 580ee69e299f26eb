"""NVIDIA FLARE's simulator with a PEFT client: the script of a client, which keeps its model."""

from __future__ import annotations

import sys

import nvflare.client as flare
import torch
from programs import adapter, load, new_model, set_adapter, size, train_in_loop


def main(folder: str) -> None:
    """Train the received adapter in each round."""
    setting = load(folder)
    model = new_model(setting)
    flare.init()
    number = int(flare.get_site_name().rsplit("-", 1)[1]) - 1  # site-1 is the first
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        set_adapter(
            model, {name: torch.as_tensor(value) for name, value in received.params.items()}
        )
        train_in_loop(model, setting, number)
        flare.send(
            flare.FLModel(
                params=adapter(model), meta={"NUM_STEPS_CURRENT_ROUND": size(setting, number)}
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
