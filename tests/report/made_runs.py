"""Run directories with made records, for reports: any number of clients, any metric."""

from __future__ import annotations

import math

import numpy as np
import torch
from peft import LoraConfig

from fedmerge_peft import Recipe, Run, load_run
from fedmerge_peft.runs.formats import FORMAT
from fedmerge_peft.util import checked

TEXTS = [
    "task={name: causal-lm, prompt: text, completion: queue}",
    "backbone.model=builtin:llama",
    "data.partition={scheme: natural, by: organisation, group: provider}",
]
"""Overrides of a recipe with perplexities."""

NAMES = [f"{place} clinic" for place in "abcdefghijkl"]


def write(folder, overrides, names, scores, metric, groups=None, labels="abcd", tests=20) -> Run:
    """Write a run: final and earlier scores ``(rounds + 1, clients)``, of a metric."""
    rounds, random = len(scores) - 1, np.random.default_rng(0)
    split, _, name = metric.partition("_")
    folder.mkdir(parents=True)
    recipe = Recipe.load("smoke", ["baselines=[]", f"rounds={rounds}", *overrides])
    checked.write_text(folder / "recipe.yaml", recipe.to_yaml())
    checked.write_document(folder / "environment.json", {"format": FORMAT})
    checked.write_document(
        folder / "task.json", {"labels": list(labels), "format": None, "padding": "right"}
    )
    write_adapter_config(folder, head=bool(labels))
    groups = groups or [None] * len(names)
    clients = [
        {"name": name, "group": group, "train": 30, "validation": 8, "test": tests}
        for name, group in zip(names, groups, strict=True)
    ]
    checked.write_document(folder / "clients.json", {"clients": clients})
    if labels:
        counts = random.integers(1, 20, (len(names), len(labels)))
        for row, group in enumerate(groups):
            counts[row, hash_of(group) % len(labels)] += 30
        document = {"labels": list(labels), "counts": counts.tolist()}
        checked.write_document(folder / "labels.json", document)
    better = (max, min) if name != "perplexity" else (min, max)

    def of(values, loss):
        values = [float(value) for value in values]
        worst = better[1](values)
        return {
            "metric": metric,
            "mean": sum(values) / len(values),
            "worst": worst,
            "worst_client": names[values.index(worst)],
            "worst_client_score": worst,
            "validation_loss": loss,
            "clients": {
                client: {metric: value, f"{split}_loss": loss, "validation_loss": loss}
                for client, value in zip(names, values, strict=True)
            },
        }

    own = recipe.strategy.shared_soup
    adapters = getattr(recipe.strategy, "adapters", 1 if recipe.strategy.federated else len(names))
    adapters = adapters if isinstance(adapters, int) else 4
    (folder / "weights").mkdir()
    known = sorted({group or "" for group in groups})
    digest, metrics = "", folder / "metrics.jsonl"
    metrics.touch()
    for done in range(rounds):
        logits = torch.tensor(random.normal(size=(len(names), adapters)))
        for row, group in enumerate(groups):
            logits[row, known.index(group or "") % adapters] += 0.6 * done
        weights = torch.softmax(logits, dim=1).float()
        if not own:
            weights = torch.eye(len(names))[:, :adapters] if adapters > 1 else weights
        checked.write_tensors(
            folder / "weights" / f"round-{done + 1:05}.safetensors", {"weights": weights}
        )
        shares = (weights + 1e-9).double()
        entropy = float(-(shares * shares.log()).sum(dim=1).mean() / math.log(max(adapters, 2)))
        record = {
            "round": done + 1,
            "rounds": rounds,
            "seconds": 2.5,
            "train_loss": 1.35 * 0.8**done + 0.1,
            "served": of(scores[done], 1.35 * 0.88**done + 0.02 * done),
            "finetuned": of(0.5 * (scores[done] + scores[-1]), 1.0),
            "gap": 2.0 / (done + 1),
            "weights_entropy": entropy if own and adapters > 1 else None,
            "adapter_mass": weights.mean(dim=0).tolist() if own and adapters > 1 else None,
            "update_norm": 1.0,
            "epsilon": None,
            "noise": None,
            "bytes_down": 150_000 * len(names) * recipe.strategy.federated,
            "bytes_up": 150_000 * len(names) * recipe.strategy.federated,
            "clients": list(names),
            "failures": {},
            "warnings": [],
            "decisions": [],
        }
        _, digest = checked.append_record(metrics, record, digest)
    checked.write_tensors(folder / "weights.safetensors", {"weights": weights})
    last = {"after_round": rounds, "served": of(scores[-1], 0.7)}
    summary = {
        "rounds": rounds,
        "seconds": 2.5 * rounds,
        "bytes_down": 1,
        "bytes_up": 1,
        "final": last,
        "last": last,
        "warnings": [],
    }
    checked.write_document(folder / "summary.json", summary)
    return load_run(folder)


def write_adapter_config(folder, *, head):
    """Write the configuration of adapters of the queries, with a head or without one."""
    heads = ["classifier"] if head else None
    config = LoraConfig(target_modules=["query"], modules_to_save=heads).to_dict()
    document = {key: [*value] if isinstance(value, set) else value for key, value in config.items()}
    checked.write_document(folder / "adapter_config.json", document)


def hash_of(name) -> int:
    return sum(map(ord, name or ""))


def family(folder, names, *, groups=None, perplexity=False, tests=20, rounds=8, adapters=4, seed=0):
    """Write a run of fedmerge with the baselines fedavg and local."""
    random = np.random.default_rng(seed)
    start = np.full(len(names), 0.2)
    level = random.uniform(0.45, 0.8, len(names))
    final = {
        "fedmerge": np.clip(level + random.normal(0.08, 0.07, len(names)), 0, 1),
        "fedavg": np.clip(level - 0.1 + random.normal(0, 0.06, len(names)), 0, 1),
        "local": np.clip(level - 0.02 + random.normal(0, 0.08, len(names)), 0, 1),
    }
    shared = TEXTS if perplexity else []
    common = [*shared, f"seed={seed}"]
    made = {
        "fedmerge": [*common, f"strategy={{name: fedmerge, adapters: {adapters}}}"],
        "fedavg": [*common, "strategy=fedavg"],
        "local": [*common, "strategy=local"],
    }
    made["fedmerge"].append("baselines=[fedavg, local]")
    for method, overrides in made.items():
        steps = 1 - 0.7 ** np.arange(rounds + 1)[:, None]
        values = start + (final[method] - start) * steps
        values = np.exp(3.2 * (1 - values)) if perplexity else np.round(values * tests) / tests
        path = folder if method == "fedmerge" else folder / "baselines" / method
        metric = "test_perplexity" if perplexity else "test_accuracy"
        labels = "" if perplexity else ["billing", "returns", "delivery", "complaints"]
        write(path, overrides, names, values, metric, groups, labels, tests)
    return load_run(folder)


def chosen(reason, reduced_loss):
    return {"learning_rate": {"value": 0.003, "reason": reason, "reduced_loss": reduced_loss}}
