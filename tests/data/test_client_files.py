"""One file or folder for each client."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from fedmerge_peft import DataError
from fedmerge_peft.data import federate_data
from fedmerge_peft.data.loading import load_splits
from fedmerge_peft.recipe.data import DataRecipe


def recipe(path, by="client"):
    return DataRecipe.model_validate(
        {"path": str(path), "partition": {"scheme": "natural", "by": by}}
    )


@pytest.fixture
def write(tmp_path):
    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)
        return tmp_path

    return write


ROWS = "text,queue\n" + "a,red\nb,blue\n" * 5


@pytest.mark.parametrize("by", ["client", "hospital"])
def test_each_file_is_a_client(write, by):
    folder = write(north_csv=ROWS, south_csv=ROWS + "c,red\n", other_txt="")
    data = federate_data(recipe(folder / "*.csv", by), "queue", seed=0)
    assert [client.name for client in data.clients] == ["north", "south"]
    sizes = [len(c.train) + len(c.validation) + len(c.test) for c in data.clients]
    assert sizes == [10, 11]
    assert {data.table[int(row)][by] for row in data.clients[1].train} == {"south"}


def test_types_are_inferred_from_all_files(write):
    folder = write(a_csv="code,queue\n7,red\n", b_csv="code,queue\n007,red\n")
    splits = load_splits(recipe(folder / "*.csv"))
    assert splits["train"]["code"][:] == ["7", "007"]


def test_names_of_clients_have_dots(tmp_path):
    for name in ("st. john.csv", "st. mary.CSV", "north.2024.csv.gz"):
        content = gzip.compress(ROWS.encode()) if name.endswith("gz") else ROWS.encode()
        (tmp_path / name).write_bytes(content)
    data = federate_data(recipe(tmp_path / "*", "client"), "queue", seed=0)
    assert [client.name for client in data.clients] == ["north.2024", "st. john", "st. mary"]


def test_each_folder_of_tables_is_a_client(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(json.dumps([{"text": name + split}]))
    splits = load_splits(recipe(tmp_path / "*"))
    assert {split: table["text"][:] for split, table in splits.items()} == {
        "train": ["atrain", "btrain"],
        "test": ["atest", "btest"],
    }


def test_each_folder_of_images_is_a_client(tmp_path):
    for client, label in [("a", "cat"), ("a", "dog"), ("b", "dog"), ("b", "eel")]:
        (tmp_path / client / label).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / client / label / "1.png")
    table = load_splits(recipe(tmp_path / "*"))["train"]
    assert table["label"][:] == ["cat", "dog", "dog", "eel"]
    assert table["client"][:] == ["a", "a", "b", "b"]
    assert table[0]["image"].size == (2, 2)


def test_class_numbers_without_a_name_become_missing_values(tmp_path):
    names = datasets.ClassLabel(names=["ann", "bob"])
    features = datasets.Features(text=datasets.Value("string"), label=names, by=names)
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 0], "by": [1, -1, None]}
    for client in ("x", "y"):
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / client / "train.parquet")
    read = load_splits(recipe(tmp_path / "*"))
    assert read["train"]["label"][:] == ["ann", "bob", "ann"] * 2
    assert read["train"]["by"][:] == ["bob", None, None] * 2


def test_errors_of_files_have_the_key_whatever_the_name_of_a_file(write, monkeypatch):
    monkeypatch.chdir(write(**{"data[1]_csv": ROWS, "data[2]_csv": "client,text,queue\nz,a,b\n"}))
    files = recipe("*.csv")
    with pytest.raises(DataError, match=r"^data\.path: data\[2\]\.csv and data\[1\]\.csv have"):
        load_splits(files)
    for name in ("data[1].csv", "data[2].csv"):
        Path(name).write_text("client,text\nz,x\n")
    with pytest.raises(DataError, match=r"^data\.path: data\[1\]\.csv: the column client names"):
        load_splits(files)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, "nothing matches"),
        ({"a_csv": ROWS, "a_tsv": "text\tqueue\nx\tred\n"}, "both belong to the client a"),
        ({"a_csv": ROWS, "b_txt": "x"}, "b.txt, which is not a table"),
        ({"a_csv": ROWS, "b_csv": "text\nx\n"}, r"different columns \(queue"),
        ({"a_csv": ROWS, "b_csv": "text,queue\n"}, "b.csv has no rows"),
        (
            {"a_csv": "client,text\nz,x\n"},
            "the column client names the client, but it has 'z'",
        ),
    ],
)
def test_faults_name_the_file(write, files, fault):
    with pytest.raises(DataError, match=fault):
        load_splits(recipe(write(**files) / "*"))
