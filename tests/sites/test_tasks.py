"""Federations across sites on tasks whose examples do not have one label each."""

import pytest
import torch

from fedmerge_peft import Recipe, Run, federate
from fedmerge_peft.sites.server.job import run_job
from tasks.made_examples import made
from tasks.made_sounds import write_folder, write_wav2vec2
from tasks.test_spans import as_spans


def of_texts(task, tiny_models, folder):
    """Rows of texts, and sections of the recipe."""
    table, section = made(task, 18)
    lora = {"r": 2, "target_modules": ["query", "value"]}
    return table, section, {"model": str(tiny_models / "bert")}, lora


def of_single_labels(task, tiny_models, folder):
    """Rows that have a label or not."""
    table, section, backbone, lora = of_texts(task, tiny_models, folder)
    labels = [["late"] * (number % 2) for number in range(len(table))]
    return table.remove_columns("labels").add_column("labels", labels), section, backbone, lora


def of_spans(task, tiny_models, folder):
    table, section, backbone, lora = of_texts(task, tiny_models, folder)
    return (
        as_spans(table),
        {**section, "spans": "spans", "class_weights": "balanced"},
        backbone,
        lora,
    )


def of_sounds(task, tiny_models, folder):
    from datasets import Dataset

    table = Dataset.from_list(write_folder(folder / "sounds", 18))
    model = write_wav2vec2(folder / "model")
    return (
        table, {"name": task}, {"model": str(model)},
        {"r": 2, "target_modules": ["q_proj"]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("token-classification", of_spans),
        ("multi-label-classification", of_texts),
        ("multi-label-classification", of_single_labels),
        ("audio-classification", of_sounds),
    ],
)
def test_a_federation_of_two_sites_equals_one_machine(
    task, make, tiny_models, federation_of, connect, tmp_path
):
    table, section, backbone, lora = make(task, tiny_models, tmp_path)
    table = table.add_column("client", [f"client {n // 2 % 3}" for n in range(18)])
    table.to_parquet(tmp_path / "table.parquet")
    recipe = Recipe.model_validate(
        {
            "name": "sites",
            "rounds": 2,
            "task": section,
            "backbone": backbone,
            "lora": lora,
            "data": {
                "path": str(tmp_path / "table.parquet"),
                "test_fraction": 0.34,
                "partition": {"scheme": "natural", "by": "client"},
            },
            "strategy": {"name": "fedmerge", "adapters": 2, "start": "independent"},
            "training": {
                "learning_rate": 0.01,
                "batch_size": 2,
                "steps": 1,
                "device": "cpu",
                "clients_per_batch": 1,
            },
        }
    )
    kit, trainers = federation_of(recipe, 2)
    outcome = run_job(kit, connect(trainers), lambda: None, lambda line: None)
    assert outcome.state == "ended", outcome.error
    run, local = Run.open(kit / "run"), federate(recipe, tmp_path / "local")
    (soup, weights), (expected, expected_weights) = run.state(), local.state()
    assert torch.equal(soup.rows, expected.rows)
    assert torch.equal(weights, expected_weights)
    assert run.summary["final"] == local.summary["final"]
    assert run.task["labels"] == local.task["labels"]
    assert (run.label_counts is None) == (local.label_counts is None)
    if local.label_counts is not None:
        assert run.label_counts.equals(local.label_counts)
    assert not (run.path / "confusion.json").exists()  # sites report scores alone
