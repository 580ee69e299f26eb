"""Runs on examples that Python passes, instead of files."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from federation.small_recipe import recipe
from fedmerge_peft import (
    Callback,
    DataError,
    Recipe,
    ResumeError,
    SweepError,
    federate,
    personalize,
    resume,
    sweep,
)
from fedmerge_peft.data import loading, take_data
from fedmerge_peft.data.in_memory import fingerprint, read_parts

FILE = Path(loading.__file__).parent / "embedded" / "ticket_subjects.csv"


def tickets():
    return pd.read_csv(FILE, keep_default_na=False)


def by_client(frame):
    return {name: part.drop(columns="organisation") for name, part in frame.groupby("organisation")}


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "run"
    return federate(recipe(f"data.path={FILE}", "rounds=1", "baselines=[fedavg]"), path)


def content(left_behind, folder):
    """The contents of a run directory, without the place of its data, and the sum over it."""
    files = left_behind(folder)
    return {
        name: re.sub(rb"  path: \S+\n|# sha256: \w+\n", b"", value)
        if isinstance(value, bytes)
        else _pathless(value)
        for name, value in files.items()
    }


def _pathless(value):
    return json.loads(
        re.sub(r'"data.path": "[^"]*"', '"data.path": ""', json.dumps(value, default=repr))
    )


@pytest.mark.equality
@pytest.mark.parametrize(
    "passed",
    [
        tickets,
        lambda: Dataset.from_pandas(tickets()),
        lambda: DatasetDict(train=Dataset.from_pandas(tickets())),
        lambda: by_client(tickets()),
        lambda: dict(list(tickets().groupby("organisation"))),
        lambda: dict(list(tickets().groupby(["organisation"]))),
    ],
    ids=["frame", "dataset", "dataset dict", "clients", "groupby", "groupby list"],
)
def test_a_run_equals_one_on_the_same_data_from_a_file(passed, from_file, tmp_path, left_behind):
    run = federate(recipe("rounds=1", "baselines=[fedavg]"), tmp_path / "run", data=passed())
    assert run.recipe.data.path.startswith("memory:")
    assert content(left_behind, run.path) == content(left_behind, from_file.path)


def test_the_fingerprint_depends_on_values_alone():
    frame = tickets()
    expected = fingerprint({"train": Dataset.from_pandas(frame)})
    section = recipe().data
    same = [
        frame[sorted(frame.columns)],
        frame.astype({"queue": "category"}),
        Dataset.from_pandas(pd.concat([frame, frame], ignore_index=True)).select(range(len(frame))),
    ]
    for data in same:
        assert fingerprint(read_parts(data, section)) == expected
    changed = frame.copy()
    changed.loc[600, "text"] += "."
    others = [changed, frame[1:], frame.rename(columns={"topic": "subject"}), frame[::-1]]
    for data in others:
        assert fingerprint(read_parts(data, section)) != expected


def test_clients_take_the_place_of_the_partition():
    iid = recipe("data.partition={scheme: iid, clients: 3}").data
    clients = {"a": tickets()[:4], "b": tickets()[4:9]}
    section, splits = take_data(iid, clients)
    assert (section.partition.scheme, section.partition.by) == ("natural", "client")
    assert splits["train"]["client"] == ["a"] * 4 + ["b"] * 5


def test_pairs_are_training_and_test_examples(tmp_path):
    frame = tickets()
    pairs = {
        name: (part[5:].drop(columns="topic"), part[:5].drop(columns="topic"))
        for name, part in frame.groupby("organisation")
    }
    run = federate(recipe("data.max_test=20"), tmp_path / "run", data=pairs)
    assert (run.clients["test"] == 5).all()


def stopped(path, **given):
    def stop(record):
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(recipe("rounds=2"), path, callbacks=[Callback(on_round=stop)], **given)


def test_a_resumed_run_needs_the_same_data(tmp_path, left_behind):
    whole = federate(recipe("rounds=2"), tmp_path / "whole", data=tickets())
    stopped(tmp_path / "run", data=tickets())
    with pytest.raises(ResumeError, match=r"without its examples.*data=\.\.\."):
        resume(tmp_path / "run")
    with pytest.raises(
        ResumeError, match=r"the fingerprint memory:\w{16}, those passed now have memory"
    ):
        resume(tmp_path / "run", data=tickets()[1:])
    assert len(resume(tmp_path / "run", data=tickets()).records) == 2
    assert left_behind(tmp_path / "run") == left_behind(whole.path)


def test_a_run_from_a_file_is_resumed_without_data(tmp_path):
    stopped(tmp_path / "run")
    with pytest.raises(ResumeError, match="embedded:ticket-subjects; resume it without data"):
        resume(tmp_path / "run", data=tickets())


def test_an_engine_has_its_own_data(engine, tmp_path):
    with pytest.raises(DataError, match="either data or engine"):
        federate(recipe(), tmp_path / "run", engine=engine, data=tickets())


def test_a_recipe_may_ask_for_data_in_memory(tmp_path):
    asks = recipe("data.path=memory")
    with pytest.raises(DataError, match=r"data.path: memory: .*federate\(recipe, data=\.\.\.\)"):
        federate(asks, tmp_path / "run")
    assert len(federate(asks, tmp_path / "run", data=tickets()).records) == 2


def test_a_sweep_takes_data(tmp_path):
    recipes = {"a": recipe("rounds=1"), "b": recipe("rounds=1", "seed=1")}
    runs = sweep(recipes, tmp_path, data=by_client(tickets()))
    assert [run.recipe.data for run in runs.values()] == [runs["a"].recipe.data] * 2
    again = sweep(recipes, tmp_path, data=by_client(tickets()))
    assert [run.path for run in again.values()] == [run.path for run in runs.values()]
    without = {"c": recipe("data.path=memory")}
    with pytest.raises(SweepError, match=r"data=\.\.\."):
        sweep(without, tmp_path)


def test_a_newcomer_may_be_in_memory(from_file):
    frame = tickets()[:24]
    found = personalize(from_file, frame, local=False, seed=0)
    same = personalize(
        from_file,
        Dataset.from_pandas(frame),
        local=False,
        seed=0,
        metrics=lambda predictions, references: {"tested": len(references)},
    )
    assert {method.test.pop("tested") for method in same.methods} == {same.examples["test"]}
    assert found.logits.tolist() == same.logits.tolist()
    pair = personalize(from_file, (frame[:20], frame[20:]), local=False)
    assert pair.examples == {"train": 20, "test": 4}
    with pytest.raises(DataError, match="no rows"):
        personalize(from_file, frame[:0])


# ---- faults --------------------------------------------------------------------------------------


def nameless():
    return tickets().drop(columns="organisation")


def faulty(**changes):
    """Clients a and b; b's frame has other columns."""
    return {"a": nameless()[:8], "b": nameless()[8:16].assign(**changes)}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ([1], "data: found a list, expected a datasets.Dataset, a pandas frame"),
        ({"a": {"text": ["x"]}}, "data['a']: found a section, expected a datasets.Dataset"),
        (lambda: tickets()[:0], "data: there are no rows"),
        ({}, "the dictionary is empty"),
        (lambda: {1: tickets(), "1": tickets()}, "the keys 1 and '1' name the same client, 1; "),
        (lambda: {"a": nameless(), None: nameless()}, "a client has no name (None, NaN or blank)"),
        (lambda: {"a": nameless(), float("nan"): nameless()}, "a client has no name"),
        (lambda: {"a": nameless(), " ": nameless()}, "a client has no name"),
        (
            lambda: {"a": nameless(), "\ud800": nameless()},
            "the client name '\\ud800' has half of a character",
        ),
        (
            lambda: {"a": Dataset.from_pandas(nameless()).with_transform(dict)},
            "data['a']: the data set has a transform (set_transform, with_transform)",
        ),
        (
            lambda: {"train": tickets(), "test": tickets()},
            "the keys of a dictionary are clients, but here they are names of splits (test, train)",
        ),
        (lambda: {"a": nameless(), "b": nameless()[:0]}, "data['b'] has no training rows"),
        (
            lambda: {"a": nameless(), "b": (nameless(), nameless())},
            "data['b'] has the splits train, test, but data['a'] has train",
        ),
        (
            lambda: faulty(age=3),
            "data['b']: train and data['a']: train have different columns (age",
        ),
        (lambda: faulty(queue=3), "string in data['a']: train, but int64 in data['b']: train"),
        (
            lambda: faulty(queue=[None, *["red"] * 7]),
            "data['b']: task.label: the column queue is empty in 1 of the 8 train rows",
        ),
        (lambda: faulty(text=[3, *["red"] * 7]), "data['b'] cannot be loaded: Arrow"),
        (
            lambda: faulty(organisation="c"),
            "data['b']: the column organisation names the client, but it has 'c'",
        ),
        (
            lambda: faulty(organisation=""),
            "data['b']: the column organisation names the client, but it has ''",
        ),
        (
            lambda: faulty(organisation=None),
            "data['b']: the column organisation names the client, but it has None",
        ),
        (
            lambda: pd.concat([tickets(), tickets()], axis=1),
            "data: two columns are named 'organisation'",
        ),
        (
            lambda: tickets().drop(columns="queue"),
            "task.label: there is no column 'queue'",
        ),
    ],
)
def test_faults_name_client_and_column(data, fault, tmp_path):
    with pytest.raises(DataError, match=re.escape(fault)):
        federate(
            recipe("data.filter={}"), tmp_path / "run", data=data() if callable(data) else data
        )
    assert not (tmp_path / "run").exists()


def test_periods_are_named_as_pandas_names_them():
    days = pd.period_range("2026-01", periods=8, freq="M")
    _, splits = take_data(recipe().data, nameless()[:8].assign(organisation=days))
    assert splits["train"]["organisation"][:2] == ["2026-01", "2026-02"]


def test_integers_and_decimals_of_clients_become_decimals():
    section, splits = take_data(recipe().data, faulty(age=1.5) | {"a": faulty(age=2)["b"]})
    assert splits["train"].features["age"].dtype == "float64"
    assert Recipe.load("smoke").data.partition.by in splits["train"].column_names
    assert section.partition == recipe().data.partition
