"""Error messages for YAML documents that are not valid recipes."""

import pytest

from fedmerge_peft.recipe.strategies import STRATEGIES

METHODS = ", ".join([entry.name for entry in STRATEGIES])
TWO_LISTS = (
    "found {}, expected text, a whole number, a number, true or false, or a list of text, "
    "whole numbers, numbers, or true or false"
)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("rounds: twelve", "rounds: found text 'twelve', expected a whole number above 0"),
        ("rounds: 0", "rounds: found 0, expected a whole number above 0"),
        ("rounds: 2.0", "rounds: found 2.0, expected a whole number above 0"),
        ("rounds: true", "rounds: found true, expected a whole number above 0"),
        ("rounds:", "rounds: found nothing, expected a whole number above 0"),
        ("rounds: [1]", "rounds: found a list, expected a whole number above 0"),
        (
            "lora: {dropout: 1}",
            "lora.dropout: found 1, expected a number at least 0.0 and below 1.0",
        ),
        (
            "lora: {dropout: .nan}",
            "lora.dropout: found .nan, expected a number at least 0.0 and below 1.0",
        ),
        (
            "training: {learning_rate: .inf}",
            "training.learning_rate: found .inf, expected a number above 0 and at most 100 or auto",
        ),
        (
            "training: {learning_rate: fast}",
            "found text 'fast', expected a number above 0 and at most 100 or auto",
        ),
        (
            "training: {epochs: 0.5}",
            "found 0.5, expected a whole number above 0 and at most 1000000 or auto",
        ),
        ("training: {device: 3}", "training.device: found 3, expected text"),
        ("training: 3", "training: found 3, expected a section (indented lines of key: value)"),
        ("training:", "training: found nothing, expected a section (indented lines of key: value)"),
        (
            "evaluation: {finetuned: maybe}",
            "evaluation.finetuned: found text 'maybe', expected true or false",
        ),
        (
            "lora: {bias: lora}",
            "lora.bias: found text 'lora', expected one of none, all, lora_only",
        ),
        (
            "training: {optimizer: adam}",
            "found text 'adam', expected one of adamw, sgd, adamw_8bit, paged_adamw_32bit, "
            "paged_adamw_8bit; did you mean 'adamw'?",
        ),
        (
            "lora: {target_modules: 3}",
            "lora.target_modules: found 3, expected a list of text, text, or null",
        ),
        (
            "lora: {target_modules: [1, a]}",
            "lora.target_modules: found a list, expected a list of text, text, or null",
        ),
        (
            "lora: {layers_to_transform: x}",
            "found text 'x', expected a list of whole numbers, a whole number, or null",
        ),
        ("lora: {modules_to_save: [a, 1]}", "lora.modules_to_save[1]: found 1, expected text"),
        (
            "lora: {rank_pattern: {q.*: 0}}",
            "lora.rank_pattern.q.*: found 0, expected a whole number above 0",
        ),
        (
            "strategy: fedmerg",
            "strategy: found text 'fedmerg', expected one of METHODS; did you mean 'fedmerge'?",
        ),
        (
            "strategy: {name: fedmerg}",
            "strategy.name: found text 'fedmerg', expected one of METHODS; did you mean",
        ),
        ("strategy: {name: [a]}", "strategy.name: found a list, expected one of METHODS"),
        (
            "strategy: {adapters: 3}",
            "strategy.name: this required key is missing; expected one of METHODS",
        ),
        ("strategy: 3", "strategy: found 3, expected a section with name: one of METHODS"),
        (
            "strategy: {name: fedavg, server_lr: 0}",
            "strategy.server_lr: found 0, expected a number above 0",
        ),
        (
            "strategy: {name: fedavg, adapters: 3}",
            "strategy.adapters: not a key of fedavg, but of fedmerge",
        ),
        (
            "baselines: fedavg",
            "baselines: found text 'fedavg', expected a list of sections with name: one of METHODS",
        ),
        (
            "baselines: [fedav]",
            "baselines[0]: found text 'fedav', expected one of METHODS; did you mean 'fedavg'?",
        ),
        (
            "baselines: [local, {name: fedavg, adapters: 3}]",
            "baselines[1].adapters: not a key of fedavg, but of fedmerge",
        ),
        (
            "baselines: [local, local]",
            "baselines: found more than once: local",
        ),
        (
            "lora: {target_modules: all-linear, layers_to_transform: [1]}",
            "lora.layers_to_transform: selects layers of modules that are listed by name, but "
            "target_modules is 'all-linear'; list names",
        ),
        (
            "lora: {trainable_token_indices: []}",
            "lora.trainable_token_indices: found an empty list, expected",
        ),
        (
            "lora: {init_lora_weights: pissa}",
            "lora.init_lora_weights: 'pissa' is not supported: merging requires",
        ),
        ("traning: {}", "traning: unknown key; did you mean 'training'?"),
        (
            "training: {learnin_rate: 1}",
            "training.learnin_rate: unknown key; did you mean 'learning_rate'?",
        ),
        (
            "training: {learning-rate: 1}",
            "training.learning-rate: unknown key; did you mean 'learning_rate'?",
        ),
        ("learning_rate: 1e-3", "learning_rate: unknown key here; move it under training"),
        (
            "batch_size: 8",
            "batch_size: unknown key here; move it under training or under evaluation",
        ),
        ("lora: {rounds: 8}", "lora.rounds: unknown key here; move it to the top level"),
        ("learnin_rate: 1e-3", "learnin_rate: unknown key; did you mean 'training.learning_rate'?"),
        (
            "evaluation: {xyzzy: 1}",
            "evaluation.xyzzy: unknown key; use one of batch_size, clients_per_batch, every",
        ),
        ("<<: {rounds: 3}", "<<: unknown key"),
    ],
)
def test_each_error_is_listed_once_with_line_key_and_expectation(lines, fault, minimal, faults):
    (found,) = faults(f"{minimal}{lines}\n")
    assert found.startswith("recipe.yaml:11: ")
    assert fault.replace("METHODS", METHODS) in found


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "clients: 4",
            "clients: four",
            (
                "recipe.yaml:10: data.partition.clients: "
                "found text 'four', expected a whole number above 0"
            ),
        ),
        (
            "clients: 4",
            "client: 4",
            (
                "recipe.yaml:8: data.partition.clients: this required key is "
                "missing; expected a whole number above 0 and at most 1000000: "
                "Number of clients."
            ),
        ),
        (
            "clients: 4",
            "clients: 4\n    alpha: 1",
            "recipe.yaml:11: data.partition.alpha: not a key of iid, but of dirichlet",
        ),
        (
            "scheme: iid",
            "scheme: idd",
            (
                "recipe.yaml:9: data.partition.scheme: "
                "found text 'idd', expected one of iid, dirichlet,"
            ),
        ),
        (
            "scheme: iid",
            "by: a",
            (
                "recipe.yaml:8: data.partition.scheme: this required key is missing; "
                "expected one of iid, dirichlet, clusters, natural, shards"
            ),
        ),
        (
            "  path: embedded:support-tickets\n",
            "",
            "recipe.yaml:6: data.path: this required key is missing; expected text (1 or more "
            "characters): A hub id",
        ),
        (
            "name: first\n",
            f"name: {'a' * 201}\n",
            f"recipe.yaml:1: name: found text '{'a' * 55} ..., expected text (1 to 200 characters)",
        ),
        (
            "name: first\n",
            "",
            "recipe.yaml:1: name: this required key is missing; expected text (1 to 200 "
            "characters): Name of the run",
        ),
        (
            "path:",
            "filter: {task: [a, [b]]}\n  path:",
            f"recipe.yaml:7: data.filter.task: {TWO_LISTS.format('a list')}",
        ),
        (
            "path:",
            "filter: {task: .nan}\n  path:",
            f"recipe.yaml:7: data.filter.task: {TWO_LISTS.format('.nan')}",
        ),
        (
            "task: sequence-classification",
            "task: {name: causal-lm, num_labels: 2}",
            "task.num_labels: not a key of causal-lm, but of",
        ),
        (
            "task: sequence-classification",
            "task: {name: causal-lm, metrics: []}",
            "task.metrics: found an empty list, expected a list",
        ),
        (
            "task: sequence-classification",
            "task: {name: causal-lm, metrics: [acuracy]}",
            "task.metrics[0]: found text 'acuracy'",
        ),
    ],
)
def test_an_error_names_the_line_and_path_in_the_file(old, new, fault, minimal, faults):
    assert old in minimal
    assert any(fault in found for found in faults(minimal.replace(old, new)))


def test_all_errors_are_listed_in_the_order_of_lines(minimal, faults):
    found = faults(
        minimal.replace("seed: 1", "seed: -1")
        + "strategy: {name: fedavg, adapters: 1}\nrounds: x\nsead: 1\nlora: {r: 0}\n",
        "training.epochs=0",
    )
    assert [fault.partition(": ")[0] for fault in found] == [
        *(f"recipe.yaml:{line}" for line in (2, 11, 12, 13, 14)),
        "overrides",
    ]


def test_control_characters_never_reach_the_terminal(minimal, faults):
    found = faults(minimal + 'rounds: "\\e[31m\\u202e\\nx"\n"\\e]0;a\\a": 1\n')
    assert len(found) == 2
    assert all(fault.isprintable() for fault in found)


def test_long_values_are_truncated(minimal, faults):
    (fault,) = faults(minimal + f"rounds: {'x' * 5000}\n")
    assert len(fault) < 200
