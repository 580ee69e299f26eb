"""A random decoder of the size of SmolLM2-135M, and row b: its head at labeled positions only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import Row, faster, race

from fedmerge_peft import Recipe
from fedmerge_peft.data import Client, FederatedData
from fedmerge_peft.engines.local import LocalEngine

SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}
"""SmolLM2-135M."""
EXAMPLES, LENGTH, LABELED = 16, 128, 32
"""Examples, tokens of each, and those of them that have a loss."""


def write(folder: Path, sizes: Mapping[str, int] = SIZES, dtype: Any = None) -> str:
    """Write a Llama with random weights, float32 by default, and the tokenizer of the tiny one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedmerge_peft.models import tiny

    tiny.write("llama", folder)
    config = LlamaConfig.from_pretrained(folder)
    config.update({**sizes, "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]})
    config.update({"tie_word_embeddings": True, "max_position_embeddings": 2048})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype or torch.float32).save_pretrained(folder)
    return str(folder)


def load(
    model: str,
    clients: int,
    examples: int,
    tests: int,
    last: int | None = None,
    *,
    length: int = LENGTH,
    labeled: int = LABELED,
    **sections: Any,
) -> LocalEngine:
    """Return an engine whose clients hold prompts with completions, of equal length.

    Args:
        model: Folder from ``write``.
        clients: Number of clients.
        examples: Training examples of each.
        tests: Test examples of each.
        last: Number of layers with adapters; None for all.
        length: Tokens of an example.
        labeled: Tokens of a completion.
        sections: Values of the recipe's sections.
    """
    import json

    import numpy as np
    from datasets import Dataset

    depth = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    lora: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    if last is not None:
        lora["layers_to_transform"] = list(range(depth - last, depth))
    values: dict[str, dict[str, Any]] = {
        "task": {"name": "causal-lm", "loss": "completion", "max_length": length},
        "backbone": {"model": model},
        "lora": lora,
        "data": {"path": "unused", "partition": {"scheme": "iid", "clients": clients}},
        "strategy": {"name": "fedavg"},
        "training": {"device": "cpu", "learning_rate": 1e-3, "epochs": 1},
    }
    merged = {name: {**value, **sections.get(name, {})} for name, value in values.items()}
    extra = {name: value for name, value in sections.items() if name not in values}
    recipe = Recipe.model_validate({"name": "decoder", "baselines": [], **merged, **extra})
    generator = np.random.default_rng(0)
    count = clients * (examples + tests)
    # The tokenizer has a token for each digit, and adds one at the beginning and one at the end.
    digits = length - labeled - 2
    prompts = ["".join(generator.choice(list("01234567"), digits)) for _ in range(count)]
    table = Dataset.from_dict({"prompt": prompts, "completion": ["9" * labeled] * count})
    rows = np.arange(count).reshape(clients, examples + tests)
    held = [
        Client(f"client {number}", own[:examples], own[:0], own[examples:])
        for number, own in enumerate(rows)
    ]
    return LocalEngine.from_data(recipe, FederatedData(table, held))


def rows() -> Iterator[Row]:
    """b. Evaluation of a decoder of 30 layers and 49 152 words; a quarter of the tokens labeled."""
    from fedmerge_peft.training.evaluation import evaluate

    with TemporaryDirectory() as folder:
        model = write(Path(folder))
        for what, last in (("adapters in the last 3 layers", 3), ("adapters in all layers", None)):
            engine = load(model, 1, 1, EXAMPLES, last, training={"device": "cpu"})
            runtime, tests = engine.runtime, engine.clients[0].test
            row = engine.strategy_context().fresh_row(0)
            heads = {"labeled positions": runtime.head, "all positions": None}
            peaks: dict[str, float] = {}

            def score(name: str) -> None:
                runtime.head = heads[name]  # noqa: B023 - called in this iteration
                before = _reset_peak()
                evaluate(runtime, row, tests, EXAMPLES)  # noqa: B023
                peaks[name] = _peak() - before  # noqa: B023

            sides = {name: (lambda name=name: score(name)) for name in heads}
            taken = race(sides, 3, clock=time.process_time)
            yield faster(
                f"b. evaluation with logits at the labeled positions over all; {what}",
                taken,
                *heads,
                "≥ 2",
            )
            if last is None:  # memory that the first model has left would hide the difference
                continue
            ratio = peaks["labeled positions"] / peaks["all positions"]
            megabytes = ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in peaks.items())
            yield Row(
                f"b. additional memory of the same; {what}", ratio, ratio, ratio, megabytes, "≤ 0.5"
            )


POSITIONS = 1024
"""Labeled positions of a training step."""


def step() -> Iterator[Row]:
    """b. A training step of a small decoder with 1024 labeled positions and 49 152 words."""
    import torch

    from fedmerge_peft.models.adapter_slot import AdapterSlot
    from fedmerge_peft.training.gradients import accumulate

    with TemporaryDirectory() as folder:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        model = write(Path(folder), {**SIZES, **sizes, **heads})
        engine = load(model, 1, POSITIONS // LABELED, 1)
    runtime, rows = engine.runtime, engine.clients[0].train
    assert runtime.head is not None
    slot = AdapterSlot(runtime.backbone, engine.strategy_context().fresh_row(0))
    peaks: dict[str, float] = {}

    def train(name: str) -> None:
        runtime.head.unchanged = name == "chunks"
        before = _reset_peak()
        with torch.enable_grad(), slot.applied():
            accumulate(runtime, slot, [[rows]])
        peaks[name] = _peak() - before

    sides = {name: (lambda name=name: train(name)) for name in ("chunks", "whole logits")}
    taken = race(sides, 5, clock=time.process_time)
    what = "a training step with losses in chunks over whole logits; 1024 positions, width 64"
    yield faster(f"b. {what}", taken, *sides)
    ratio = peaks["chunks"] / peaks["whole logits"]
    megabytes = ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in peaks.items())
    yield Row("b. additional memory of the same", ratio, ratio, ratio, megabytes, "≤ 0.5")


def _reset_peak() -> float:
    """Reset the peak of this process's memory; return the bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return 1024 * float(status.split("VmHWM:")[1].split()[0])
