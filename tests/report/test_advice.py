"""Advice: each finding has its cause, and none is wrong for perplexity."""

import pytest

from fedmerge_peft import load_run
from fedmerge_peft.report.advice import advice
from fedmerge_peft.util import checked
from report.made_runs import NAMES, chosen, family, write_adapter_config


def test_clients_that_local_training_would_serve_better_are_named(write_run, tmp_path):
    path = write_run("mine", ["baselines=[local]"], [[0.1, 0.1, 0.1], [0.6, 0.4, 0.5]])
    local = write_run("other", ["strategy=local"], [[0.1, 0.1, 0.1], [0.5, 0.7, 0.7]])
    (path / "baselines").mkdir()
    local.rename(path / "baselines" / "local")
    clients = [
        {"name": f"client {number}", "group": None, "train": 9, "validation": 1, "test": 40}
        for number in range(3)
    ]
    checked.write_document(path / "clients.json", {"clients": clients})
    write_adapter_config(path, head=True)
    from fedmerge_peft.report.advice import _worse_than_baselines

    found = [each.finding for each in _worse_than_baselines(load_run(path))]
    assert found[0].startswith("local has the better mean test accuracy: 0.633 against 0.500")
    assert found[1] == (
        "the test accuracy of 2 of 3 clients is worse than with local training alone (beyond the "
        "95 % interval for 2 of them): client 1, client 2"
    )


@pytest.mark.parametrize(
    ("head", "methods"), [(True, "strategy=ditto or strategy=fedrep"), (False, "strategy=ditto")]
)
def test_strategies_with_private_heads_are_advised_only_if_there_is_a_head(tmp_path, head, methods):
    made = family(tmp_path / "run", NAMES)
    write_adapter_config(made.path, head=head)
    (action,) = [each.action for each in advice(made) if "training alone" in each.finding]
    assert action.endswith(f"keeps a part of the model private: {methods}")


@pytest.fixture
def advised(write_run, write_records):
    """``advised(overrides, ...)``: findings and actions on a run of a round for each loss."""

    def find(overrides=(), losses=(1.0, 1.0), groups=("",) * 4, labels="abcd", **files):
        scores = [[0.5] * len(groups)] * (len(losses) + 1)
        path = write_run("run", ["baselines=[]", *overrides], scores)
        records = [
            {**record, "train_loss": loss, "warnings": files.get("warnings", [])}
            for record, loss in zip(load_run(path).records, losses, strict=True)
        ]
        write_records(path / "metrics.jsonl", records)
        checked.write_document(
            path / "task.json", {"labels": list(labels), "format": None, "padding": "right"}
        )
        clients = [
            {"name": f"client {number}", "group": group, "train": 9, "validation": 1, "test": 40}
            for number, group in enumerate(groups)
        ]
        checked.write_document(path / "clients.json", {"clients": clients})
        if decisions := files.get("decisions"):
            checked.write_document(path / "decisions.json", decisions)
        return {each.finding: each.action for each in advice(load_run(path))}

    return find


@pytest.mark.parametrize(
    ("overrides", "decisions", "action"),
    [
        ([], None, "set training.learning_rate to auto"),
        (["training.learning_rate=auto"], chosen("between two rates", True), "use more rounds"),
        (["training.learning_rate=auto"], chosen("none of 5 rates", False), "check that labels"),
        (["training.learning_rate=auto"], chosen("not tested", None), "raise training.learning_"),
    ],
)
def test_a_training_loss_near_that_of_guessing_is_found(advised, overrides, decisions, action):
    found = advised(overrides, losses=(1.4, 1.3), decisions=decisions)
    finding = (
        "the training loss of the last round is 1.30, near the loss of guessing one of 4 labels"
    )
    (advice_on_it,) = [found[each] for each in found if each.startswith(finding)]
    assert advice_on_it.startswith(action)


def test_a_training_loss_below_that_of_guessing_is_no_finding(advised):
    assert not [finding for finding in advised(losses=(1.4, 1.2)) if "guessing" in finding]


@pytest.mark.parametrize(
    ("losses", "found"), [((2.0, 1.99), True), ((2.0, 1.5), False), ((0.01, 0.01), False)]
)
def test_a_flat_training_loss_is_found_without_labels(advised, losses, found):
    findings = advised(losses=losses, labels="")
    assert any(each.startswith("the training loss hardly fell") for each in findings) == found


def test_advice_on_perplexities_takes_lower_ones_for_better(tmp_path):
    made = family(tmp_path / "run", NAMES, perplexity=True)
    found = [f"{each.finding}: {each.cause}; {each.action}" for each in advice(made)]
    local = made.baselines["local"].clients["test_perplexity"]
    worse = (made.clients["test_perplexity"] > local).sum()
    assert f"test perplexity of {worse} of {len(NAMES)} clients is worse" in "\n".join(found)
    for words in ("correct answer", "score lower", "interval", "accuracy"):
        assert words not in "\n".join(found)


def test_finetuning_that_lowers_the_perplexity_is_found(tmp_path):
    made = family(tmp_path / "run", NAMES, perplexity=True, rounds=2)
    (found,) = [each for each in advice(made) if "round of local training" in each.finding]
    assert "still lowers the test perplexity" in found.finding


def test_overfitting_names_its_cause(tmp_path):
    made = family(tmp_path / "run", NAMES)
    (made.path / "best").mkdir()
    best = {"after_round": 3, "served": made.summary["final"]["served"]}
    checked.write_document(made.path / "best" / "scores.json", best)
    (found,) = [each for each in advice(load_run(made.path)) if "lowest" in each.finding]
    assert found.cause.startswith("overfitting: the training loss fell over the run")


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        ("{name: fedmerge, start: warm, warm_rounds: 2}", True),
        ("{name: fedmerge, start: warm, warm_rounds: 1}", False),
        ("{name: fedmerge, start: independent, warm_rounds: 2}", False),
        ("{name: flhc, warm_rounds: 2}", True),
        ("fedavg", False),
    ],
)
def test_a_run_that_ends_with_its_warm_rounds_is_found(advised, strategy, found):
    warnings = ["until clients are grouped after round 2, all equals FedAvg"]
    findings = advised([f"strategy={strategy}"], warnings=warnings)
    assert any("all 2 rounds are warm rounds" in each for each in findings) == found
    assert any("until clients are grouped" in each for each in findings) != found


@pytest.mark.parametrize(
    ("adapters", "groups", "found"),
    [(2, "aabbcc", True), (3, "aabbcc", False), (2, "aabbcd", False), (2, "abcdef", False)],
)
def test_fewer_adapters_than_known_groups_are_found(advised, adapters, groups, found):
    strategy = f"strategy={{name: ifca, adapters: {adapters}}}"
    findings = advised([strategy], groups=groups)
    assert ("3 known groups of clients share 2 adapters" in findings) == found
