"""Suggestions name what is close, or what other programs call by another word."""

import pytest

from fedmerge_peft.recipe.error_messages import _keys
from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.recipe.synonyms import _KEYS, _KEYS_BY_WORD
from fedmerge_peft.recipe.yaml_document import dotted
from fedmerge_peft.util.text import closest


@pytest.mark.parametrize(
    ("lines", "guess"),
    [
        ("lora: {rank: 8}", "r"),
        ("lora: {lora_alpha: 8}", "alpha"),
        ("training: {lr: 1e-3}", "learning_rate"),
        ("training: {LearningRate: 1e-3}", "learning_rate"),
        ("training: {num_train_epochs: 1}", "epochs"),
        ("training: {mu: 1}", "proximal"),
        ("training: {clip: 1}", "max_grad_norm"),
        ("training: {rank: 8}", "lora.r"),
        ("lr: 1e-3", "training.learning_rate"),
        ("num_rounds: 3", "rounds"),
        ("num_clients: 3", "data.partition.clients"),
        ("strategy: {name: fedmerge, num_adapters: 3}", "adapters"),
        ("strategy: fedMerge", "fedmerge"),
        ("strategy: fed_avg", "fedavg"),
        ("strategy: fedmegre", "fedmerge"),
        ("backbone: {model: x, dtype: bf16}", "bfloat16"),
        ("evaluation: {eval_batch_size: 3}", "batch_size"),
    ],
)
def test_words_of_other_programs_and_misspelled_words_are_understood(lines, guess, minimal, faults):
    text = (
        minimal.replace("backbone:\n  model: tiny:bert\n", "") if "backbone" in lines else minimal
    )
    (found,) = faults(f"{text}{lines}\n")
    assert found.endswith(f"did you mean '{guess}'?")


@pytest.mark.parametrize(
    ("written", "guess"),
    [
        ("text-classification", "sequence-classification"),
        ("sequence_classification", "sequence-classification"),
        ("CAUSAL_LM", "causal-lm"),
        ("text-generation", "causal-lm"),
        ("image-clasification", "image-classification"),
    ],
)
def test_tasks_are_known_by_their_other_names(written, guess, minimal, faults):
    (found,) = faults(minimal.replace("sequence-classification", written))
    assert f"did you mean '{guess}'?" in found


@pytest.mark.parametrize(
    "lines",
    [
        "lora: {q: 8}",
        "training: {x: 8}",
        "training: {power: 8}",
        "strategy: fedopt",
        "strategy: fedbn",
        "strategy: scaffold",
        "task: object-detection",
        "training: {optimizer: lion}",
    ],
)
def test_nothing_far_is_suggested(lines, minimal, faults):
    text = minimal.replace("task: sequence-classification\n", "") if "task" in lines else minimal
    (found,) = faults(f"{text}{lines}\n")
    assert "did you mean" not in found


def test_every_synonym_stands_for_a_key_and_is_not_one_there():
    keys = {dotted((*place, name)) for place, _, name in _keys(Recipe)}
    assert _KEYS.keys() <= keys
    for word, meant in _KEYS_BY_WORD.items():
        assert not {f"{place.rpartition('.')[0]}.{word}".lstrip(".") for place in meant} & keys


def test_closeness_is_measured_in_edits():
    assert closest("trainnig", ["testing", "training"]) == "training"
    assert closest("training", ["train", "test"]) == "train"
    assert closest("learing_rat", ["learning_rate"]) == "learning_rate"
    assert closest("token-cat", ["image-cat"]) is None
    assert closest("lr", ["r", "l"]) is None
    assert closest("rank", ["r", "rank_pattern"]) is None
    assert closest("x" * 10**6, ["x" * 199]) is None
