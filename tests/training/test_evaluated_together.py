"""Evaluating several adapters in one pass equals evaluating them one after another."""

import logging
from functools import partial

import numpy as np
import pytest
import torch

from equality import assert_near, tolerance
from fedmerge_peft.recipe.evaluation import EvaluationRecipe
from fedmerge_peft.training.batching import evaluated_together
from fedmerge_peft.training.evaluation import (
    evaluate_parts,
    evaluate_together,
    example_losses,
    losses_together,
)
from fedmerge_peft.training.first_token import cut_to_first_token
from fedmerge_peft.training.labeled_head import labeled_head
from tasks.made_examples import KINDS, MADE
from training.stack_bench import ROWS, Bench

CACHED = {"lora": {"layers_to_transform": [1]}, "cached": True}
CASES = {
    "bert": {},
    "gpt2": {"kind": "gpt2"},
    "llama": {"kind": "llama"},
    "a decoder that classifies": {"kind": "llama-classifier"},
    "vit": {"kind": "vit"},
    "the prefix cache": CACHED,
    "the prefix cache of a decoder": {"kind": "llama", **CACHED},
    "question answering": {"kind": "bert-question-answering"},
    **{task: {"kind": f"{KINDS[task]}-{task}"} for task in MADE},
}
PARTS = [[ROWS[:3], ROWS[5:10]], [ROWS[[4]]], [ROWS[[]], ROWS[[15, 2]]], [ROWS[10:15], ROWS[3:6]]]
"""Sets of one to eight examples, in another order than by length; one is empty."""


@pytest.fixture
def make_bench(tiny_models, table_and_task):
    """``make_bench("gpt2", lora={...})``."""
    return partial(Bench, tiny_models, table_and_task)


@pytest.fixture(params=CASES)
def runtime_and_rows(request, make_bench):
    """A runtime with all that may shorten a pass, and four adapters."""
    bench = make_bench(**CASES[request.param])
    runtime = bench.runtime
    runtime.first_token = cut_to_first_token(runtime, ROWS)
    runtime.head = labeled_head(runtime, ROWS)
    return runtime, torch.stack([bench.row(seed) for seed in range(4)])


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_scores_of_several_adapters_equal_those_of_each(runtime_and_rows):
    runtime, rows = runtime_and_rows
    held = [[part for part in own if len(part)] for own in PARTS]
    alone = [evaluate_parts(runtime, row, own, 4) for row, own in zip(rows, held, strict=True)]
    together = evaluate_together(runtime, rows, held)
    assert len({scores["loss"] for own in alone for scores in own}) == 6
    for one, other in zip(together, alone, strict=True):
        assert len(one) == len(other)
        for found, expected in zip(one, other, strict=True):
            assert found == pytest.approx(expected, rel=tolerance(torch.float32), nan_ok=True)


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_losses_of_several_adapters_equal_those_of_each(runtime_and_rows):
    runtime, rows = runtime_and_rows
    held = [np.concatenate(own) for own in PARTS]
    together = losses_together(runtime, rows, held)
    for row, own, found in zip(rows, held, together, strict=True):
        assert_near(found, example_losses(runtime, row, own, 4))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_adapter_generates_its_own_texts(tiny_models, table_and_task, monkeypatch, kind):
    def generating(*given):
        table, section = table_and_task(*given)
        return table, {**section, "metrics": ["rougeL"], "max_new_tokens": 4}

    bench = Bench(tiny_models, generating, kind)
    runtime, texts = bench.runtime, []
    generate = bench.task.generate
    monkeypatch.setattr(
        bench.task, "generate", lambda *given: texts.append(generate(*given)) or texts[-1]
    )
    rows = torch.stack([bench.row(seed) for seed in range(3)])
    held = [[ROWS[:3]], [ROWS[4:6]], [ROWS[[9]]]]
    together = evaluate_together(runtime, rows, held)
    (shared,) = texts
    for number, (row, own) in enumerate(zip(rows, held, strict=True)):
        alone = evaluate_parts(runtime, row, own, 4)
        assert alone == [pytest.approx(together[number][0], rel=tolerance(torch.float32))]
        pairs = list(zip(*shared, strict=True))[3 * number :][: len(own[0])]
        assert sorted(pairs) == sorted(zip(*texts[-1], strict=True))
    assert len({tuple(completions) for completions, _ in texts}) == 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bert-sentence-embedding", "the task compares the examples of a client")],
)
def test_tasks_that_compare_examples_evaluate_one_at_a_time(make_bench, caplog, kind, reason):
    bench = make_bench(kind)
    section = EvaluationRecipe(clients_per_batch=4)
    with caplog.at_level(logging.INFO):
        assert evaluated_together(bench.runtime, section, ROWS) == 1
    assert caplog.records[-1].getMessage() == f"clients are evaluated one at a time: {reason}"


def test_the_number_is_the_recipes_or_one_on_a_cpu(make_bench):
    runtime = make_bench().runtime
    counts = {"auto": 1, 1: 1, 5: 5}
    for chosen, expected in counts.items():
        section = EvaluationRecipe(clients_per_batch=chosen)
        assert evaluated_together(runtime, section, ROWS) == expected
    assert runtime.sharing_trial is not None
