from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from fedmerge_peft.data import load_splits
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe

IID = {"scheme": "iid", "clients": 3}


def load(path, **keys):
    return load_splits(DataRecipe(path=str(path), partition=IID, **keys))


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_single_files_are_the_training_split(tmp_path, table, suffix):
    path = tmp_path / f"rows.{suffix}"
    write = {"csv": table.to_csv, "parquet": table.to_parquet}.get(
        suffix, lambda path: table.to_json(path, lines=suffix == "jsonl")
    )
    write(str(path))
    splits = load(path)
    assert list(splits) == ["train"]
    assert splits["train"][:3] == table[:3]


def test_tab_separated_files_are_read(tmp_path):
    (tmp_path / "rows.tsv").write_text("text\tlabel\na, b\t1\n", encoding="utf-8")
    assert load(tmp_path / "rows.tsv")["train"][:] == {"text": ["a, b"], "label": [1]}


def test_words_like_none_stay_text_in_csv_files_and_empty_cells_are_missing(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nNA,None\n,null\n", encoding="utf-8")
    assert load(tmp_path / "rows.csv")["train"][:] == {
        "text": ["NA", None],
        "label": ["None", "null"],
    }


def test_saved_data_sets_are_read_and_not_written_to(tmp_path, table):
    table.with_format("numpy").save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select(range(5))).save_to_disk(
        str(tmp_path / "two")
    )
    before = sorted(tmp_path.rglob("*"))
    assert load(tmp_path / "one", filter={"task": "snips"})["train"][0] == table[0]
    assert {name: len(split) for name, split in load(tmp_path / "two").items()} == {
        "train": 60,
        "test": 5,
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_files_are_read_with_their_splits(tmp_path, table):
    table.to_csv(str(tmp_path / "train.csv"))
    table.select(range(7)).to_csv(str(tmp_path / "test.csv"))
    assert {name: len(split) for name, split in load(tmp_path).items()} == {"train": 60, "test": 7}


def test_image_folders_have_an_image_and_a_label(tmp_path):
    for split, label in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        (tmp_path / split / label).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(
            tmp_path / split / label / "0.png"
        )
    splits = load(tmp_path, filter={"label": "dog"})
    assert {name: split["label"][:] for name, split in splits.items()} == {
        "train": [1],
        "test": [1],
    }
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert splits["train"][0]["image"].size == (4, 4)


def test_the_embedded_tickets_are_text():
    train = load("embedded:support-tickets")["train"]
    assert train.column_names == ["organisation", "provider", "topic", "queue", "text"]
    assert all(isinstance(value, str) for value in train[0].values())


def test_the_embedded_subjects_are_those_of_the_tickets():
    tickets, subjects = (
        load(f"embedded:{name}")["train"].to_pandas()
        for name in ("support-tickets", "ticket-subjects")
    )
    expected = tickets.assign(text=tickets["text"].str.partition(": ")[0])
    assert subjects.equals(expected)


def test_progress_bars_are_restored(parquet):
    disabled = datasets.are_progress_bars_disabled()
    load(parquet)
    assert datasets.are_progress_bars_disabled() == disabled


def test_a_split_column_assigns_the_rows_of_a_single_file(parquet):
    splits = load(parquet, split_column="split")
    assert {name: len(split) for name, split in splits.items()} == {"train": 48, "test": 12}
    assert set(splits["test"]["split"]) == {"test"}


@pytest.mark.parametrize(("first", "second"), [("TRAIN", "train"), ("train", "train ")])
def test_split_names_that_differ_only_in_case_or_spaces_are_refused(tmp_path, first, second):
    path = tmp_path / "table.jsonl"
    path.write_text("".join(f'{{"split": "{name}"}}\n' for name in (first, second, "test")))
    assert faults(path, split_column="split") == (
        f"data.split_column: the column split has both {first!r} and {second!r}, which would be "
        "two splits; write the name of a split in the same way in all rows"
    )


def test_split_columns_may_use_other_names(parquet):
    splits = load(parquet, split_column="task", train_split="trec6", validation_split="subj")
    assert {name: set(split["task"]) for name, split in splits.items()} == {
        "train": {"trec6"},
        "validation": {"subj"},
    }


def test_a_split_serves_as_the_default_of_one_purpose_alone(tmp_path, table):
    datasets.DatasetDict(train=table, validation=table.select(range(5))).save_to_disk(
        str(tmp_path / "rows")
    )
    assert set(load(tmp_path / "rows")) == {"train", "validation"}
    assert set(load(tmp_path / "rows", test_split="validation")) == {"train", "test"}


def test_splits_that_are_not_used_are_named(tmp_path, table, caplog):
    datasets.DatasetDict(train=table, Test=table.select(range(9)), test=table).save_to_disk(
        str(tmp_path / "rows")
    )
    assert set(load(tmp_path / "rows")) == {"train", "test"}
    assert "not used, with their numbers of rows: Test (9); to use one, name it" in caplog.text
    caplog.clear()
    assert set(load(tmp_path / "rows", validation_split="Test")) == {"train", "validation", "test"}
    assert not caplog.records


def test_filters_keep_rows_that_match_all_columns(parquet):
    train = load(parquet, filter={"task": ["snips", "subj"], "label": [0, 1], "domain": "speech"})[
        "train"
    ]
    assert set(zip(train["task"], train["label"], train["domain"], strict=True)) == {
        ("snips", 0, "speech"),
        ("snips", 1, "speech"),
    }


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", "3"),
        ("id", 3),
        ("id", 3.0),
        ("name", 3),
        ("score", 3),
        ("kind", "three"),
        ("kind", 3),
        ("third", True),
        ("third", 1),
        ("third", "true"),
    ],
)
def test_filter_values_are_read_as_the_columns_type(tmp_path, column, value):
    kinds = datasets.ClassLabel(names=["zero", "one", "two", "three", "four"])
    features = datasets.Features(
        id=datasets.Value("int16"),
        name=datasets.Value("large_string"),
        score=datasets.Value("float32"),
        kind=kinds,
        third=datasets.Value("bool"),
    )
    rows = {
        "id": range(5),
        "name": [str(i) for i in range(5)],
        "score": [float(i) for i in range(5)],
        "kind": range(5),
        "third": [i == 3 for i in range(5)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "rows"))
    assert load(tmp_path / "rows", filter={column: value})["train"]["id"][:] == [3]
    assert "data.filter.third: no row has 2; the" in faults(tmp_path / "rows", filter={"third": 2})


def test_a_default_split_without_matching_rows_is_left_out(tmp_path, table):
    snips = table.select(np.arange(0, 60, 3))
    datasets.DatasetDict(train=table, test=snips).save_to_disk(str(tmp_path / "rows"))
    assert set(load(tmp_path / "rows", filter={"task": "subj"})) == {"train"}
    with pytest.raises(
        DataError,
        match=r"no row of the split test passes the filter; choose other values. In this "
        r"split, the columns have task: snips$",
    ):
        load(tmp_path / "rows", filter={"task": "subj"}, test_split="test")


def faults(path, **keys):
    with pytest.raises(DataError) as raised:
        load(path, **keys)
    return str(raised.value)


@pytest.mark.parametrize(
    "path", ["./rows.csv", "rows.parquet", "~/no-such-folder-at-all", "a/b/c", "/nowhere"]
)
def test_missing_local_paths_are_named_with_the_fix(path):
    fault = faults(path)
    assert re.search(
        r"data\.path: /.* does not exist; write data\.path=FILE \(\.csv, .*\), data\.path=FOLDER",
        fault,
    )
    assert "~" not in fault


@pytest.mark.parametrize("path", ["owner/name-v1.0", "imdb"])
def test_hub_failures_give_the_cause_in_one_line(monkeypatch, path):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub (offline)")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert faults(path) == (
        f"data.path: the hub's data set {path} cannot be loaded: ConnectionError: "
        "Couldn't reach the Hub (offline)"
    )


@pytest.fixture
def hub(monkeypatch):
    """``hub(folder)``: a folder in place of all hub data sets; returns what is asked of it."""

    def stand_in(folder):
        asked = []
        build, load = datasets.load_dataset_builder, datasets.load_dataset

        def download(name, **options):
            asked.append((name, options["repo_type"], options["revision"]))
            return str(folder)

        def described(function, name, config, *, revision):
            asked.append((name, config, revision))
            return function(str(folder), config)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(datasets, "load_dataset_builder", partial(described, build))
        monkeypatch.setattr(datasets, "load_dataset", partial(described, load))
        return asked

    return stand_in


def test_hub_data_without_a_card_are_read_as_folders_are(hub, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00002.csv").write_text("code,text\n007,a\n")
    (tmp_path / "data" / "train-00001-of-00002.csv").write_text("code,text\n010,b\n")
    (tmp_path / "data" / "test-00000-of-00001.csv").write_text("code,text\n008,c\n")
    asked = hub(tmp_path)
    loaded = load("owner/name", revision="main")
    assert loaded["train"]["code"][:] == ["007", "010"]
    assert loaded["test"]["code"][:] == ["008"]
    assert asked == [("owner/name", "dataset", "main")] * 2


def test_hub_data_are_loaded_with_configuration_and_revision(hub, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: small, data_files: rows.csv, sep: ';'}\n"
        "- {config_name: large, data_files: other.csv}\n---\n"
    )
    (tmp_path / "rows.csv").write_text("code;text\n007;a\n")
    asked = hub(tmp_path)
    assert load("owner/name", config="small", revision="main")["train"]["code"][:] == ["007"]
    assert asked[-1] == ("owner/name", "small", "main")
    assert "BuilderConfig 'big' not found" in faults("owner/name", config="big")


def test_types_that_a_card_declares_are_those_of_the_data(hub, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: code, dtype: string}\n"
        "  - {name: label, dtype: {class_label: {names: {'0': low, '1': high}}}}\n"
        "configs:\n- {config_name: default, data_files: rows.csv}\n---\n"
    )
    (tmp_path / "rows.csv").write_text("code,label\n007,1\n1.0,0\n")
    hub(tmp_path)
    for path in ("owner/name", str(tmp_path)):
        table = load(path)["train"]
        assert table[:] == {"code": ["007", "1.0"], "label": [1, 0]}
        assert table.features["label"].names == ["low", "high"]


def test_a_configuration_of_a_folder_without_a_card_is_refused(parquet):
    folder = Path(parquet).parent
    assert "has no README.md that names the files" in faults(folder, config="small")


def test_pickles_and_other_files_are_refused(tmp_path):
    (tmp_path / "rows.pkl").write_bytes(b"")
    assert "rows.pkl has an unsupported format; convert it to one of .csv" in faults(
        tmp_path / "rows.pkl"
    )


def test_broken_files_and_empty_folders_are_refused_with_the_cause(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    assert re.search(
        r"rows\.parquet cannot be loaded: ArrowInvalid: .*[Mm]agic bytes",
        faults(tmp_path / "rows.parquet"),
    )
    (tmp_path / "empty").mkdir()
    assert "empty has no table (.csv, .tsv, " in faults(tmp_path / "empty")


def test_unknown_embedded_data_are_named():
    assert faults("embedded:support-ticket") == (
        "data.path: there is no embedded:support-ticket (did you mean support-tickets?); "
        "the embedded data sets are support-tickets, ticket-subjects, assistants"
    )


def test_missing_splits_are_named_with_those_that_exist(parquet):
    assert faults(parquet, train_split="training") == (
        f"data.train_split: {parquet} has no split 'training' (did you mean train?); it has train"
    )
    assert faults(parquet, split_column="split", validation_split="dev") == (
        "data.validation_split: the column split has no split 'dev'; it has test, train"
    )


def test_evaluating_on_the_training_split_is_refused(parquet):
    assert "train is the training split" in faults(parquet, test_split="train")


def test_split_columns_must_exist_and_be_needed(tmp_path, parquet, table):
    assert faults(parquet, split_column="splits") == (
        "data.split_column: there is no column 'splits' (did you mean split?); "
        "the data have text, label, task, domain, split"
    )
    datasets.DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / "two"))
    assert "the data already have splits (train, test)" in faults(
        tmp_path / "two", split_column="split"
    )


def test_filters_that_match_nothing_list_the_columns_values(parquet):
    assert faults(parquet, filter={"task": "trec"}) == (
        "data.filter.task: no row has 'trec' (did you mean trec6?); "
        "the column task has snips, subj, trec6"
    )
    assert (
        faults(parquet, filter={"label": [0, 9]})
        == "data.filter.label: no row has 9; the column label has 0, 1, 2, 3"
    )
    assert (
        faults(parquet, filter={"label": "zero"})
        == "data.filter.label: no row has 'zero'; the column label has 0, 1, 2, 3"
    )
    assert "there is no column 'taks' (did you mean task?)" in faults(
        parquet, filter={"taks": "trec6"}
    )
    assert "the list is empty" in faults(parquet, filter={"task": []})
    assert "no row has 'x'; the column text has text 0, text 1, " in faults(
        parquet, filter={"text": "x"}
    )
    assert faults(parquet, filter={"text": "x"}).endswith("… and 40 more")


def test_filters_that_match_nothing_together_are_refused(parquet):
    fault = faults(parquet, filter={"task": "subj", "domain": "speech"})
    assert fault == (
        "data.filter: no row of the split train passes the filter; "
        "choose other values. In this split, the columns have task: snips, subj, trec6; "
        "domain: logic, speech"
    )
