"""The clients, model and settings that this package and other frameworks train with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import decoder
import setting
from programs import EXAMPLES, START, contiguous
from safetensors.torch import save_file

from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe.backbone import BackboneRecipe

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
"""A decoder of 8 million parameters."""
LENGTH, LABELED = 64, 16
"""Tokens of a decoder's example, and those of them that have a loss."""


@contextmanager
def made(
    kind: str, clients: int, steps: int, batch_size: int, optimizer: str = "adamw"
) -> Iterator[Path]:
    """Write a workload to a temporary folder.

    Args:
        kind: encoder (MiniLM), decoder (of size ``SMALL``) or tiny (a decoder for tests).
        clients: Number of clients, all of which train in each round.
        steps: Optimizer steps of each in a round.
        batch_size: Examples of a step.
        optimizer: adamw or sgd.
    """
    with TemporaryDirectory(prefix="speed-") as scratch:
        folder = Path(scratch)
        if kind == "encoder":
            model = model_folder(BackboneRecipe(model=setting.MODEL), folder / "model")
        elif kind == "decoder":
            model = decoder.write(folder / "model", SMALL)
        else:
            from fedmerge_peft.models import tiny

            model = str(tiny.write("llama", folder / "model"))
        asked = {
            "kind": kind,
            "model": str(model),
            "clients": clients,
            "examples": steps * batch_size,
            "batch_size": batch_size,
            "optimizer": optimizer,
        }
        (folder / "ours.json").write_text(json.dumps(asked))
        _write(folder, engine(folder))
        yield folder


def engine(folder: Path) -> LocalEngine:
    """Return this package's engine for a workload."""
    asked = json.loads((folder / "ours.json").read_text())
    training = {
        "batch_size": asked["batch_size"],
        "optimizer": asked["optimizer"],
        "learning_rate": setting.RATE,
        "device": "cpu",
        "epochs": 1,
    }
    if asked["kind"] == "encoder":
        overrides = [f"training.{name}={value}" for name, value in training.items()]
        return setting.engine(asked["clients"], asked["examples"], *overrides, model=asked["model"])
    never = {"every": 100_000, "finetuned": False}
    return decoder.load(
        asked["model"],
        asked["clients"],
        asked["examples"],
        0,
        length=LENGTH,
        labeled=LABELED,
        training=training,
        evaluation=never,
        rounds=100_000,
    )


def _write(folder: Path, ours: LocalEngine) -> None:
    recipe, runtime, context = ours.recipe, ours.runtime, ours.strategy_context()
    batches = [runtime.task.collate(runtime.examples, client.train) for client in ours.clients]
    start = context.layout.state_dict(context.fresh_row(0))
    named = {
        f"{client}.{name}": tensor
        for client, batch in enumerate(batches)
        for name, tensor in batch.items()
    }
    save_file(contiguous(named), folder / EXAMPLES)
    save_file(contiguous(start), folder / START)
    asked = json.loads((folder / "ours.json").read_text())
    values: dict[str, Any] = {
        "model": asked["model"],
        "task_type": "SEQ_CLS" if asked["kind"] == "encoder" else "CAUSAL_LM",
        "lora": {
            "r": recipe.lora.r,
            "lora_alpha": recipe.lora.alpha,
            "target_modules": list(recipe.lora.target_modules or []),
        },
        "optimizer": asked["optimizer"],
        "learning_rate": setting.RATE,
        "batch_size": asked["batch_size"],
    }
    (folder / "setting.json").write_text(json.dumps(values))
