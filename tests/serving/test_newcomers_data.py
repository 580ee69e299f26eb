"""A newcomer's data and labels, and the runs that a newcomer can join."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from peft import PeftModel

from equality import assert_near
from fedmerge_peft import DataError, Personalized, RunError, federate, personalize
from fedmerge_peft.tasks.labels import relabel
from fedmerge_peft.util import checked
from serving.newcomer import QUEUES, newcomer, numbers, recipe

# ---- data and labels -----------------------------------------------------------------------------


def test_a_newcomer_with_some_of_the_runs_labels_keeps_their_numbers(run, tickets, tmp_path):
    assert run.task == {"labels": QUEUES, "format": None, "padding": "right"}
    some = tickets.filter(lambda row: row["queue"] in {"denim", "fuchsia"})
    some.to_csv(tmp_path / "Fen Water.csv")
    result = personalize(run, tmp_path / "Fen Water.csv", local=False)
    assert result.name == "Fen Water"
    assert isinstance(result, Personalized)
    assert {int(label) for label in newcomer(run, some).runtime.examples.columns["labels"]} == {
        3,
        5,
    }


@pytest.mark.parametrize(
    ("values", "feature", "labels", "expected"),
    [
        (["b", "c"], None, ["a", "b", "c"], [1, 2]),
        ([1, 2], None, ["0", "1", "2", "LABEL_3"], [1, 2]),
        ([3, 0], None, ["0", "1", "2", "LABEL_3"], [3, 0]),
        (["2"], None, ["0", "1", "2"], [2]),
        ([2, 1], None, ["cat", "dog", "fox"], [2, 1]),
        ([1, 3], None, ["1", "2", "3"], [0, 2]),
        ([0, 1], ClassLabel(names=["fox", "cat"]), ["cat", "dog", "fox"], [2, 0]),
        ([True, False], None, ["0", "1"], [1, 0]),
    ],
    ids=[
        "names",
        "numbers",
        "number beyond the data",
        "number as text",
        "ids",
        "names that are numbers",
        "other order",
        "truth values",
    ],
)
def test_labels_have_the_runs_numbers(values, feature, labels, expected):
    table = Dataset.from_dict({"text": ["x"] * len(values), "label": values})
    if feature is not None:
        table = table.cast_column("label", feature)
    again = relabel(table, "label", labels)
    assert again["label"] == expected
    assert again.features["label"].names == labels
    assert again.column_names == ["text", "label"]
    assert relabel(table.select([len(values) - 1]), "label", labels)["label"] == expected[-1:]


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (
            ["a", "bleu"],
            QUEUES,
            "row 0: column 'label': 'a' is not a known label; the labels are amber, blue",
        ),
        (
            ["amber", "bleu"],
            QUEUES,
            r"row 1: .*'bleu' is not a known label \(did you mean blue\?\)",
        ),
        ([0, 6], QUEUES, "row 1: .*'6' is not a known label"),
        ([0], ["1", "2"], "row 0: .*'0' is not a known label"),
        ([-1], QUEUES, r"row 0 \(from 0, .*\): label -1 in column 'label' is negative"),
        ([0.5], QUEUES, "a label is an integer from 0, or a name"),
        (
            ["amber", None],
            QUEUES,
            r"row 1 \(from 0, of the rows that the run uses\): column 'label' is empty \(null\)",
        ),
    ],
)
def test_unknown_labels_are_refused(values, labels, message):
    with pytest.raises(DataError, match=message):
        relabel(Dataset.from_dict({"label": values}), "label", labels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a text"], "data: found a list, expected a datasets.Dataset"),
        ({"text": ["a"]}, "found a section, expected a datasets.Dataset"),
        (b"a text", "found b'a text', expected a datasets"),
        (None, "found nothing, expected a datasets"),
        ("", "the path is empty or is the current folder"),
        ("a text" * 1000, "does not exist"),
        ("a\0b", "does not exist"),
    ],
)
def test_data_that_are_no_table_are_refused(data, message, run):
    with pytest.raises(DataError, match=message):
        personalize(run, data, local=False)


def test_a_newcomer_with_an_unseen_label_is_refused(run, tickets):
    table = tickets.map(
        lambda row, number: {"queue": "green" if number == 2 else row["queue"]}, with_indices=True
    )
    with pytest.raises(
        DataError,
        match=(
            "row 2: column 'queue': 'green' is not a known label; the labels are amber, blue, coral"
        ),
    ):
        personalize(run, table)


def test_the_recipes_split_column_selects_the_test_rows(tmp_path, tickets):
    import pandas as pd

    parts = np.array(["learn", "dev", "final", "learn"] * 6)
    frame = tickets.to_pandas().assign(part=parts)
    others = frame.assign(organisation=["A", "B"] * 12)
    pd.concat([others, others]).to_csv(tmp_path / "all.csv", index=False)
    names = [
        "data.split_column=part",
        "data.train_split=learn",
        "data.validation_split=dev",
        "data.test_split=final",
        "data.filter={}",
    ]
    run = federate(
        recipe(f"data.path={tmp_path / 'all.csv'}", *names, "data.partition.group=null"),
        tmp_path / "run",
    )
    frame.to_csv(tmp_path / "new.csv", index=False)
    assert personalize(run, tmp_path / "new.csv", local=False).examples == {"train": 18, "test": 6}
    frame.drop(columns="part").to_csv(tmp_path / "bare.csv", index=False)
    assert personalize(run, tmp_path / "bare.csv", local=False).examples == {"train": 17, "test": 7}
    frame[frame.part == "final"].to_csv(tmp_path / "final.csv", index=False)
    with pytest.raises(DataError, match="final: there are no training examples"):
        personalize(run, tmp_path / "final.csv")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("nowhere.csv", {}, "nowhere.csv does not exist"),
        ("here.csv", {"test_fraction": 1.0}, "test_fraction: found 1, expected a number"),
        ("here.csv", {}, r"there is no column 'queue'"),
        ("empty.csv", {}, r"empty.csv is empty; add a first row with the column names"),
        ("here.txt", {}, "has an unsupported format"),
    ],
)
def test_unsuitable_data_are_refused(run, tmp_path, monkeypatch, data, options, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "here.csv": "text,label\nhello,1\n",
        "empty.csv": "",
        "here.txt": "hello",
    }.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        personalize(run, data, **options)


# ---- runs that newcomers can join ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            "strategy=fedavg",
            (
                r"one adapter for all clients \(fedavg\), "
                r"so there are no weights to learn.*fedmerge or ifca.*strategy.adapters=5"
            ),
        ),
        ("strategy=local", "a run of local, whose adapters a new client cannot merge"),
        (
            "strategy={name: fedem, adapters: 2}",
            "a run of fedem, whose adapters a new client cannot merge",
        ),
    ],
)
def test_runs_without_a_common_soup_are_refused(tmp_path, engine, tickets, strategy, message):
    other = federate(recipe(strategy), tmp_path / "run", engine=engine)
    with pytest.raises(RunError, match=message):
        personalize(other.path, tickets)


def test_a_newcomer_of_a_federation_with_one_group_gets_its_adapter(tmp_path, engine, tickets):
    run = federate(
        recipe("strategy={name: fedmerge, adapters: 1}"), tmp_path / "run", engine=engine
    )
    newcomer = personalize(run, tickets, local=False)
    assert newcomer.weights.tolist() == [1.0]
    assert newcomer.row.tolist() == run.soup.rows[0].tolist()


def test_a_newcomer_may_merge_the_adapters_of_clusters(tmp_path, engine, tickets):
    run = federate(recipe("strategy={name: ifca, adapters: 2}"), tmp_path / "run", engine=engine)
    assert personalize(run, tickets, local=False).weights.shape == (2,)


def test_adapters_that_do_not_fit_the_model_are_refused(copy, tickets):
    text = checked.read_text(copy.path / "recipe.yaml")
    checked.write_text(copy.path / "recipe.yaml", text.replace("  r: 2\n", "  r: 4\n"))
    with pytest.raises(RunError, match="its adapters do not fit tiny:bert as loaded here"):
        personalize(copy.path, tickets)


def test_a_run_without_its_labels_is_refused(copy, tickets):
    (copy.path / "task.json").unlink()
    with pytest.raises(RunError, match=r"task\.json is missing"):
        personalize(copy, tickets)


def test_shared_factors_are_those_of_the_run(tmp_path, tickets):
    run = federate(recipe("lora.merge=shared_a"), tmp_path / "run")
    loaded = newcomer(run, tickets).backbone
    assert run.soup.shared.keys() == loaded.shared.keys()
    # the seed gives the same factors again
    assert all(torch.equal(value, loaded.shared[key]) for key, value in run.soup.shared.items())
    before = personalize(run, tickets, local=False)
    soup = run.soup
    # as if drawn by another device's generator
    soup.shared = {key: -3 * value for key, value in soup.shared.items()}
    soup.rows = soup.rows + 0.3
    soup.save(run.path / "soup.safetensors")
    after = personalize(run, tickets, local=False)
    assert numbers(after, "mean adapter").train_loss != numbers(before, "mean adapter").train_loss
    after.save(tmp_path / "new")
    loaded.load_shared(after.soup.shared)
    loaded.load_row(after.row)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = loaded.model(input_ids=tokens).logits
        plain = PeftModel.from_pretrained(loaded.model.unload(), tmp_path / "new").eval()
        assert_near(plain(input_ids=tokens).logits, ours)
