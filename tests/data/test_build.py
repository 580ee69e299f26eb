from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest

from fedmerge_peft.data import FederatedData, federate_data
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe

IID = {"scheme": "iid", "clients": 3}
SCHEMES = {
    "iid": IID,
    "dirichlet": {"scheme": "dirichlet", "clients": 3, "alpha": 1.0, "min_examples": 4},
    "clusters": {"scheme": "clusters", "clients": 4, "groups": 2, "classes_per_group": 2},
    "natural": {"scheme": "natural", "by": "task", "clients_per_value": 2},
    "shards": {"scheme": "shards", "clients": 4, "shards_per_client": 2},
}


def parts(client):
    return client.train, client.validation, client.test


def texts(data: FederatedData, rows):
    return set(data.table.select(rows)["text"])


@pytest.mark.parametrize("split_column", [None, "split"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_row_of_the_table_is_held_once(recipe, scheme, split_column):
    data = federate_data(recipe(partition=SCHEMES[scheme], split_column=split_column), "label", 0)
    held = np.concatenate([rows for client in data.clients for rows in parts(client)])
    np.testing.assert_array_equal(np.sort(held), np.arange(len(data.table)))
    assert held.dtype == np.int64
    if split_column:
        splits = np.array(data.table["split"])
        for client in data.clients:
            assert set(splits[client.train]) | set(splits[client.validation]) == {"train"}
            assert set(splits[client.test]) <= {"test"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_alone_decides_the_partition(recipe, scheme):
    def holdings(seed):
        data = federate_data(recipe(partition=SCHEMES[scheme], split_column="split"), "label", seed)
        return [[sorted(texts(data, rows)) for rows in parts(client)] for client in data.clients]

    first = holdings(1)
    np.random.default_rng(0).random()
    assert holdings(1) == first
    assert holdings(2) != first


def test_missing_splits_are_taken_from_each_clients_own_rows(recipe):
    data = federate_data(recipe(), "label", 0)
    assert [tuple(map(len, parts(client))) for client in data.clients] == [(12, 4, 4)] * 3
    data = federate_data(recipe(validation_fraction=0.0, test_fraction=0.5), "label", 0)
    assert [tuple(map(len, parts(client))) for client in data.clients] == [(10, 0, 10)] * 3
    data = federate_data(recipe(validation_fraction=0.01, test_fraction=0.01), "label", 0)
    assert [tuple(map(len, parts(client))) for client in data.clients] == [(18, 1, 1)] * 3


def test_max_train_counts_validation_and_max_test_does_not_touch_it(recipe):
    data = federate_data(
        recipe(max_train=10, max_test=3, split_column="split", partition=IID), "label", 0
    )
    assert [tuple(map(len, parts(client))) for client in data.clients] == [(8, 2, 3)] * 3
    assert len(data.table) == 39


def test_natural_clients_hold_their_value_in_every_split(recipe):
    data = federate_data(
        recipe(partition=SCHEMES["natural"] | {"group": "domain"}, split_column="split"), "label", 0
    )
    assert [client.name for client in data.clients] == [
        f"{task}-{i}" for task in ("snips", "subj", "trec6") for i in range(2)
    ]
    assert [client.group for client in data.clients] == ["speech"] * 2 + ["logic"] * 2 + [
        "speech"
    ] * 2
    for client in data.clients:
        for rows in parts(client):
            assert set(data.table.select(rows)["task"]) == {client.name[:-2]}


def test_the_group_of_a_natural_client_is_its_value_by_default(recipe):
    data = federate_data(recipe(partition={"scheme": "natural", "by": "label"}), None, 0)
    assert [(client.name, client.group) for client in data.clients] == [
        (str(i), str(i)) for i in range(4)
    ]


def test_class_label_names_are_client_names(tmp_path, table):
    named = table.cast_column(
        "label", datasets.ClassLabel(names=["north", "east", "south", "west"])
    )
    named.save_to_disk(str(tmp_path / "named"))
    data = federate_data(
        DataRecipe(path=str(tmp_path / "named"), partition={"scheme": "natural", "by": "label"}),
        "label",
        0,
    )
    assert [client.name for client in data.clients] == ["north", "east", "south", "west"]


def test_test_rows_follow_the_clients_training_labels(recipe):
    data = federate_data(
        recipe(partition=SCHEMES["clusters"], split_column="split", validation_fraction=0.0),
        "label",
        0,
    )
    labels = np.array(data.table["label"])
    for client in data.clients:
        assert set(labels[client.test]) <= set(labels[client.train])
    trained = np.concatenate([client.train for client in data.clients])
    assert (
        Counter(labels[np.concatenate([client.test for client in data.clients])]).keys()
        == Counter(labels[trained]).keys()
    )


def test_test_rows_of_labels_nobody_trains_on_are_dropped(tmp_path, table):
    test = datasets.Dataset.from_dict(
        table[:8] | {"label": [0, 1, 2, 3, 4, 4, 4, 4]}, features=table.features
    )
    datasets.DatasetDict(train=table, test=test).save_to_disk(str(tmp_path / "rows"))
    data = federate_data(
        DataRecipe(path=str(tmp_path / "rows"), partition=SCHEMES["dirichlet"]), "label", 0
    )
    assert len(data.table) == 64
    assert set(data.table["label"]) == {0, 1, 2, 3}


def test_clients_of_one_or_two_rows_train_on_all_of_them(recipe):
    data = federate_data(recipe(partition={"scheme": "iid", "clients": 30}), "label", 0)
    assert [tuple(map(len, parts(client))) for client in data.clients] == [(2, 0, 0)] * 30


def faults(recipe, label="label"):
    with pytest.raises(DataError) as raised:
        federate_data(recipe, label, 0)
    return str(raised.value)


def test_tasks_without_labels_need_a_column_to_partition_by(recipe):
    dirichlet = SCHEMES["dirichlet"]
    assert faults(recipe(partition=dirichlet), None) == (
        "data.partition.by: the task has no label column to partition by; "
        "write data.partition.by=COLUMN "
        "(the data have text, label, task, domain, split) or data.partition.scheme=iid"
    )
    assert len(federate_data(recipe(partition=dirichlet | {"by": "task"}), None, 0).clients) == 3
    assert len(federate_data(recipe(partition=IID), None, 0).clients) == 3


def test_missing_columns_are_named_with_those_present(recipe):
    present = "the data have text, label, task, domain, split"
    assert (
        faults(recipe(), "labels")
        == f"task.label: there is no column 'labels' (did you mean label?); {present}"
    )
    natural = {"scheme": "natural", "by": "hospital"}
    assert (
        faults(recipe(partition=natural))
        == f"data.partition.by: there is no column 'hospital'; {present}"
    )
    natural = {"scheme": "natural", "by": "task", "group": "domian"}
    assert (
        faults(recipe(partition=natural))
        == f"data.partition.group: there is no column 'domian' (did you mean domain?); {present}"
    )


def test_missing_labels_are_counted(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,yes\nb,\nc,no\nd,no\n", encoding="utf-8")
    fault = faults(DataRecipe(path=str(tmp_path / "rows.csv"), partition=IID))
    assert fault.startswith("task.label: the column label is empty in 1 of the 4 train rows; ")


def test_labels_must_be_plain_values(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a", "label": [0, 1]}]', encoding="utf-8")
    fault = faults(DataRecipe(path=str(tmp_path / "rows.json"), partition=IID))
    assert fault.startswith("task.label: the column label has the type list<")


def test_more_clients_than_examples_are_refused(recipe):
    fault = faults(recipe(partition={"scheme": "iid", "clients": 61}))
    assert fault.startswith(
        "data.partition.clients: 61 clients, but 60 training examples; lower data.partition.clients"
    )


def test_clients_without_training_examples_are_named(recipe):
    fault = faults(recipe(partition=SCHEMES["natural"] | {"clients_per_value": 21}))
    assert fault.startswith(
        "data.partition: 3 of 63 clients have no training examples (snips-20, subj-20, "
        "trec6-20); lower data.partition.clients_per_value"
    )


def test_set_aside_fractions_must_leave_something(recipe):
    fault = faults(recipe(validation_fraction=0.5, test_fraction=0.5))
    assert fault.startswith(
        "data: validation_fraction 0.5 and test_fraction 0.5 leave nothing to train on"
    )
    assert federate_data(
        recipe(validation_fraction=0.5, test_fraction=0.5, split_column="split"), "label", 0
    ).clients


def test_splits_with_different_columns_are_refused(tmp_path, table):
    test = table.remove_columns("domain").cast_column("label", datasets.Value("string"))
    datasets.DatasetDict(train=table, test=test).save_to_disk(str(tmp_path / "rows"))
    assert faults(DataRecipe(path=str(tmp_path / "rows"), partition=IID)) == (
        "data: the splits have different columns: label is int64 in train, string in test, "
        "domain is string in train, absent in test; "
        "give them the same columns and types"
    )


def test_a_client_in_two_groups_is_refused(recipe):
    fault = faults(recipe(partition={"scheme": "natural", "by": "domain", "group": "task"}))
    assert fault.startswith(
        "data.partition.group: the rows of domain speech have several values of task "
        "(snips, trec6), but a client belongs to one group"
    )


def test_text_classification_is_federated_by_task(shared_data):
    recipe = DataRecipe(
        path=str(shared_data / "textcls.parquet"),
        split_column="split",
        filter={"task": ["trec6", "snips", "subj"]},
        max_train=96,
        max_test=50,
        partition={"scheme": "natural", "by": "task", "clients_per_value": 3},
    )
    data = federate_data(recipe, "label_name", 0)
    assert [client.name for client in data.clients] == [
        f"{task}-{i}" for task in ("snips", "subj", "trec6") for i in range(3)
    ]
    assert {(client.size, len(client.validation), len(client.test)) for client in data.clients} == {
        (77, 19, 50)
    }
    assert len(data.table) == 9 * 146


def test_cifar_clusters_see_thirty_classes_each(shared_data):
    scheme = {"scheme": "clusters", "clients": 50, "groups": 5, "classes_per_group": 30}
    data = federate_data(
        DataRecipe(
            path=str(shared_data / "cifar100.parquet"), split_column="split", partition=scheme
        ),
        "fine_label",
        0,
    )
    labels = np.array(data.table["fine_label"])
    for group in range(5):
        mine = [client for client in data.clients if client.group == f"cluster-{group}"]
        assert len(mine) == 10
        assert len(set(labels[np.concatenate([client.train for client in mine])])) == 30


# ---- labels --------------------------------------------------------------------------------------


def labeled(labels, test=None, **keys):
    """Save splits with these labels, and build their clients."""
    splits = {"train": labels} if test is None else {"train": labels, "test": test}
    tables = {
        split: datasets.Dataset.from_dict({"text": ["a"] * len(part), "label": part})
        for split, part in splits.items()
    }

    def build(folder):
        datasets.DatasetDict(tables).save_to_disk(str(folder))
        partition = {"scheme": "natural", "by": "label"}
        return federate_data(DataRecipe(path=str(folder), partition=partition), "label", 0, **keys)

    return build


def test_one_label_is_refused_except_at_a_site(tmp_path):
    with pytest.raises(DataError, match=r"all training examples have the same value .*'parcel'"):
        labeled(["parcel"] * 6)(tmp_path / "one")
    assert len(labeled(["parcel"] * 6, whole=False)(tmp_path / "site").clients) == 1


def test_labels_of_a_split_that_training_lacks_are_counted_or_refused(tmp_path, caplog):
    with pytest.raises(DataError, match="no value of the column label in the test split occurs"):
        labeled(["1", "2"] * 3, ["01", "02"])(tmp_path / "all")
    labeled(["1", "2"] * 3, ["1", "02"])(tmp_path / "some")
    assert "1 of 2 test examples has a label that no training example has" in caplog.text
    labeled(["1", "2"] * 3, ["3", "4"], whole=False)(tmp_path / "site")
    assert "2 of 2 test examples have a label that no training example has" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1.0, 2.0, 2.0], ["1", "2"]),
        ([1.5, 2.0, 2.0], ["1.5", "2.0"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_whole_numbers_are_named_without_a_fraction(tmp_path, labels, names):
    assert [client.name for client in labeled(labels)(tmp_path / "rows").clients] == names


def test_whole_numbers_are_inferred_from_all_splits(tmp_path):
    clients = labeled([1.0, 2.0], [1.0, 2.5])(tmp_path / "rows").clients
    assert [(client.name, len(client.test)) for client in clients] == [("1.0", 1), ("2.0", 0)]


def test_numbers_that_stand_for_several_integers_are_refused(tmp_path):
    with pytest.raises(DataError, match="which is too large to be exact as double"):
        labeled([2.0**53, 1.0])(tmp_path / "rows")
    with pytest.raises(DataError, match="has inf, which cannot be a class"):
        labeled([float("inf"), 1.0])(tmp_path / "infinite")


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_numbers_of_all_widths_are_names(tmp_path, kind):
    labels = np.array([0.5, 1.5, 0.5], kind)
    names = [client.name for client in labeled(labels)(tmp_path / "rows").clients]
    assert names == ["0.5", "1.5"]


@pytest.mark.parametrize("blank", ["", "  ", "\u00a0"])
def test_blank_names_are_missing(tmp_path, blank):
    with pytest.raises(DataError, match="the column label is empty in 2 of the 4 train rows"):
        labeled(["a", "b", blank, blank])(tmp_path / "rows")


def test_missing_and_binary_values_are_refused(tmp_path):
    with pytest.raises(DataError, match="the column label is empty in 1 of the 3 train rows"):
        labeled([1.0, float("nan"), 2.0])(tmp_path / "nan")
    with pytest.raises(DataError, match="the column label has the type binary"):
        labeled([b"a", b"b"])(tmp_path / "bytes")


@pytest.mark.parametrize(
    ("column", "kind"), [("label", "task.label: labels"), ("task", "data.partition: clients")]
)
def test_names_that_look_alike_are_warned_about(column, kind, tmp_path, caplog):
    rows = {"label": ["a", "b"] * 6, "task": ["one", "two", "three"] * 4}
    rows[column] = [name if number else f"{name} " for number, name in enumerate(rows[column])]
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "rows.csv")
    federate_data(
        DataRecipe(path=str(tmp_path / "rows.csv"), partition={"scheme": "natural", "by": "task"}),
        "label",
        0,
    )
    found = "'a' and 'a '" if column == "label" else "'one' and 'one '"
    assert f"{kind} that look alike are counted as different ones: {found}" in caplog.text


@pytest.mark.parametrize(
    ("partition", "column"),
    [
        ({"scheme": "natural", "by": "task"}, "task"),
        ({"scheme": "dirichlet", "clients": 1, "alpha": 1, "min_examples": 1}, "label"),
        ({"scheme": "shards", "clients": 1, "shards_per_client": 1}, "label"),
        ({"scheme": "iid", "clients": 1}, None),
    ],
    ids=["natural", "dirichlet", "shards", "iid"],
)
def test_rows_of_classes_without_training_examples_are_counted(partition, column, tmp_path, caplog):
    (tmp_path / "train.csv").write_text("label,task\na,x\nb,x\na,y\nb,y\n")
    (tmp_path / "test.csv").write_text("label,task\na,x\nc,z\n")
    data = federate_data(DataRecipe(path=str(tmp_path), partition=partition), "label", 0)
    lost = (
        "1 of 2 test examples belongs to no client, because no training example has the same value "
        f"in the column {column}"
    )
    assert (lost in caplog.text) == (column is not None)
    assert sum(len(client.test) for client in data.clients) == (2 if column is None else 1)


def test_data_that_leave_nothing_to_score_are_warned_about(tmp_path, caplog):
    (tmp_path / "rows.csv").write_text("label,task\na,x\nb,x\na,y\nb,y\n")
    partition = {"scheme": "natural", "by": "task"}
    recipe = DataRecipe(path=str(tmp_path / "rows.csv"), partition=partition)
    federate_data(recipe, "label", 0)
    assert "no client has validation or test examples" in caplog.text
