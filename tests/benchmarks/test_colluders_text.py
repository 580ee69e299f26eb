"""Colluders on real texts: attacks change the colluders' updates and examples, and no others."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from fedmerge_peft import Recipe
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.federation.loop import Federation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HOSTILE = [1, 4]


@pytest.fixture(scope="module")
def programs():
    """The modules of the program."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS / "quality"))
        patch.syspath_prepend(str(BENCHMARKS / "robustness"))
        import colluders_text
        import text_clients

        yield colluders_text, text_clients
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            sys.modules.pop(name)


@pytest.fixture(scope="module")
def made(programs, tiny_models, tmp_path_factory):
    """Engine and model of six clients of two tasks; the model is kept alive."""
    program, clients = programs
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "bert")
    embeddings = torch.randn(len(tokenizer), 16, generator=torch.Generator().manual_seed(0))
    model = clients.take_model(clients.AveragedWords(embeddings, 7), tokenizer=tokenizer)
    rows = [
        {"text": f"ticket {n} about it", "label": n % 3, "task": "snips", "split": split}
        for split, count in (("train", 60), ("test", 24))
        for n in range(count)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    recipe = program.recipe("fedavg", ["snips"], model.name, 0, str(path)).replace(
        ["data.partition.clients_per_value=6", "data.max_train=6", "rounds=1"]
    )
    assert isinstance(recipe, Recipe)
    return LocalEngine.from_recipe(recipe), model


def updates(engine):
    """The updates of the first round, by client."""
    federation = Federation(engine.recipe, engine)
    plan = federation.strategy.plan
    pairs = [(i, Assignment(plan(i))) for i in range(len(engine.clients))]
    return {reply.client: reply.deltas[0] for _, reply in engine.train_clients(1, pairs)}


def test_only_colluders_send_other_updates_and_they_agree(made, programs):
    program, clients = programs
    engine, _ = made
    before = updates(engine)
    attack = clients.Attack(HOSTILE, **program.COLLUSIONS["identical vectors"])
    after = updates(clients.attacked(engine, attack, 0))
    changed = [client for client in before if not torch.equal(before[client], after[client])]
    assert changed == HOSTILE
    assert torch.equal(after[1], after[4])
    assert float(after[1] @ (before[1] + before[4])) < 0


def test_a_backdoor_is_in_half_of_the_colluders_training_examples_alone(made, programs):
    _, clients = programs
    engine, _ = made
    poisoned = clients.with_trigger(engine, HOSTILE)
    before, after = (each.runtime.examples.columns for each in (engine, poisoned))
    changed = [
        row
        for row, (old, new) in enumerate(zip(before["input_ids"], after["input_ids"], strict=True))
        if len(old) != len(new)
    ]
    half = np.concatenate([engine.clients[client].train[:3] for client in HOSTILE])
    assert changed == sorted(half.tolist())
    assert {int(after["labels"][row]) for row in changed} == {clients.TARGET}


def test_a_takeover_trains_on_the_examples_of_the_victims(made, programs):
    _, clients = programs
    engine, _ = made
    poisoned = clients.of_the_victims("snips")(engine, HOSTILE)
    assert poisoned.clients[1].train.tolist() == engine.clients[0].train.tolist()
    assert poisoned.clients[0] is engine.clients[0]
    assert poisoned.clients[1].test.tolist() == engine.clients[1].test.tolist()
