"""A training loop with a time limit, shared by both pretraining programs."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
"""True if the processor computes in bfloat16, which is about twice as fast."""

WARMUP = 0.1
"""Fraction of the time over which the learning rate rises."""


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options of both programs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument(
        "--out", type=Path, default=HERE / "models" / out, help="folder for the model"
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="training time")
    parser.add_argument("--rows", type=int, help="rows of the data, for a trial; default: all")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    return parser


def fit(
    model: nn.Module,
    draw: Callable[[], Iterator[Any]],
    loss_of: Callable[[Any], Tensor],
    minutes: float,
    learning_rate: float = 1e-3,
) -> None:
    """Train for a fixed time, with a learning rate that follows the clock (warmup, half cosine).

    Muon (Jordan et al. 2024) trains the matrices of the layers; it learns about twice as fast as
    AdamW. Its bfloat16 products are slow on processors that do not compute in bfloat16, where AdamW
    trains the matrices as well. AdamW trains all other parameters (embeddings, norms, biases,
    heads).

    Args:
        model: The model; its first ModuleList is the stack of layers.
        draw: Returns the batches of one epoch.
        loss_of: Returns the loss of a batch; called under autocast.
        minutes: Training time.
        learning_rate: Peak learning rate of AdamW.
    """
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    rest = [
        parameter
        for parameter in model.parameters()
        if all(parameter is not matrix for matrix in matrices)
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05)
        if BFLOAT16
        else torch.optim.AdamW(matrices, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98)),
        torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98)),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    begin, steps, reported = time.monotonic(), 0, 0
    model.train()
    while True:
        for batch in draw():
            done = (time.monotonic() - begin) / (60 * minutes)
            if done >= 1:
                return
            factor = (
                done / WARMUP
                if done < WARMUP
                else 0.5 + 0.5 * math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                loss = loss_of(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * factor
                optimizer.step()
                optimizer.zero_grad()
            steps += 1
            if int(10 * done) > reported:
                reported = int(10 * done)
                print(f"{done:4.0%}  step {steps}  loss {loss.item():.3f}", flush=True)
