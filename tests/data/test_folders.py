"""Every file of a folder is read, unless its names are those of splits; others are named."""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas as pd
import pytest
from PIL import Image

from fedmerge_peft.data import load_splits
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe


def write(folder, *paths):
    """Write a table or an image at each path. A row's text is the path."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".png"):
            Image.new("RGB", (2, 2)).save(folder / path)
        elif path.endswith(".parquet"):
            datasets.Dataset.from_dict({"text": [path], "label": [1]}).to_parquet(folder / path)
        else:
            (folder / path).write_text(f"text,label\n{path},1\n")


def load(folder, **keys):
    partition = {"scheme": "iid", "clients": 1}
    return load_splits(DataRecipe(path=str(folder), partition=partition, **keys))


@pytest.mark.parametrize(
    "splits",
    [
        {"train": ["north.csv", "south.csv", "train-station.csv"]},
        {"train": ["north.csv", "south.csv", "test-drive.csv", "validation-desk.csv"]},
        {"train": ["a/b/c.csv", "a/d.csv", "e.csv"]},
        {"train": ["train/north.csv", "train/test/x.csv"]},
        {"train": ["train.csv"], "test": ["test.csv"]},
        {"train": ["train.csv"], "validation": ["dev.csv"], "test": ["eval.csv"]},
        {"train": ["Train/a.csv", "Train/b/test.csv"], "test": ["TEST/c.csv"]},
        {"train": ["tickets_train.csv"], "test": ["tickets_test.csv"]},
        {"train": ["a_train.csv", "b_train.csv"], "test": ["a_test.csv", "b_test.csv"]},
        {"train": ["train_1.csv", "train_2.csv"], "test": ["test_1.csv"]},
        {
            "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "test": ["data/test-00000-of-00001.parquet"],
        },
    ],
)
def test_all_tables_are_read_into_the_splits_that_their_names_give(tmp_path, splits):
    write(tmp_path, *(path for paths in splits.values() for path in paths))
    loaded = load(tmp_path)
    assert {split: sorted(table["text"]) for split, table in loaded.items()} == splits


@pytest.mark.parametrize(
    "paths",
    [
        ["train.csv", "test.csv", "extra.csv"],
        ["north.csv", "test.csv"],
        ["train/a.csv", "test/a.csv", "extra/a.csv"],
        ["a_train.csv", "a_test.csv", "b.csv"],
        ["train/cat/0.png", "test/cat/0.png", "extra/cat/0.png"],
    ],
)
def test_splits_beside_other_names_are_refused(tmp_path, paths):
    write(tmp_path, *paths)
    with pytest.raises(DataError, match=r"and other names \((extra|north|b)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["car/0.png", "train/0.png", "truck/0.png"], {"train": ["car", "train", "truck"]}),
        (["car/train-0.png", "dog/1.png"], {"train": ["car", "dog"]}),
        (["train/dev/0.png", "train/test/0.png"], {"train": ["dev", "test"]}),
        (
            ["train/car/0.png", "train/dog/0.png", "val/dog/0.png"],
            {"train": ["car", "dog"], "validation": ["dog"]},
        ),
    ],
)
def test_all_images_are_read_with_the_names_of_their_folders(tmp_path, paths, labels):
    write(tmp_path, *paths)
    loaded = load(tmp_path)
    names = loaded["train"].features["label"].names
    assert {s: [names[label] for label in table["label"]] for s, table in loaded.items()} == labels


def test_images_without_a_label_are_refused(tmp_path):
    write(tmp_path, "train/0.png", "test/0.png")
    with pytest.raises(DataError, match=r"such as .*0\.png, have no labels"):
        load(tmp_path)
    write(tmp_path, "train/cat/0.png")
    with pytest.raises(DataError, match="files lie at different depths"):
        load(tmp_path)


def test_files_that_are_not_read_are_named(tmp_path, caplog):
    write(tmp_path, "north.csv", "notes.txt", "south.csv", ".hidden.csv", "__MACOSX/north.csv")
    assert load(tmp_path)["train"]["text"][:] == ["north.csv", "south.csv"]
    assert f"{tmp_path}: not read (1 of 3 files): notes.txt" in caplog.text


def test_metadata_files_describe_images(tmp_path, caplog):
    write(tmp_path, "train/a.png", "train/b.png", "test/a.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\na.png,cat\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\na.png,dog\n")
    loaded = load(tmp_path)
    assert loaded["train"][:] == {"image": [f"{tmp_path}/train/a.png"], "label": ["cat"]}
    assert loaded["test"][:] == {"image": [f"{tmp_path}/test/a.png"], "label": ["dog"]}
    assert "not read (1 of 5 files): train/b.png" in caplog.text


def test_files_with_other_columns_are_refused(tmp_path):
    write(tmp_path, "north.csv", "south.csv")
    (tmp_path / "south.csv").write_text("text,lable\na,1\n")
    with pytest.raises(DataError, match=r"south\.csv and .*north\.csv have different columns"):
        load(tmp_path)


def test_splits_within_the_folders_of_a_folder_are_joined(tmp_path):
    write(tmp_path, "en/train.csv", "en/test.csv", "de/train/0000.csv", "de/test/0000.csv")
    loaded = load(tmp_path)
    assert {split: sorted(table["text"][:]) for split, table in loaded.items()} == {
        "train": ["de/train/0000.csv", "en/train.csv"],
        "test": ["de/test/0000.csv", "en/test.csv"],
    }


def test_folders_with_splits_beside_others_without_are_refused(tmp_path):
    write(tmp_path, "en/train.csv", "en/test.csv", "de/north.csv")
    with pytest.raises(DataError, match=r"has files that are named as splits in en, but not in de"):
        load(tmp_path)


def test_one_training_folder_within_folders_is_no_split(tmp_path):
    write(tmp_path, "en/train.csv", "de/north.csv", "fr/training/a.csv")
    assert len(load(tmp_path)["train"]) == 3


def test_links_to_folders_above_do_not_repeat_files(tmp_path):
    write(tmp_path, "a/north.csv", "b/south.csv")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(load(tmp_path)["train"]) == 2


def test_a_data_set_card_decides_if_it_names_files(tmp_path):
    write(tmp_path, "north.csv", "south.csv", "other.csv")
    Path(tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: north.csv}\n  - {split: test, path: south.csv}\n---\n"
    )
    assert {split: table["text"][:] for split, table in load(tmp_path).items()} == {
        "train": ["north.csv"],
        "test": ["south.csv"],
    }


def test_tables_that_a_card_names_have_the_types_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    Path(tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: data/train-*}\n  - {split: test, path: data/test-*}\n---\n"
    )
    (tmp_path / "data" / "train-00000-of-00001.csv").write_text("code,text\n007,a\n012,b\n")
    (tmp_path / "data" / "test-00000-of-00001.csv").write_text("code,text\n100,c\n")
    loaded = load(tmp_path)
    assert loaded["train"]["code"][:] == ["007", "012"]
    assert loaded["test"]["code"][:] == ["100"]


@pytest.mark.parametrize("other", ["rows.json", "rows.csv.gz"])
def test_one_table_in_two_formats_is_refused(tmp_path, other):
    write(tmp_path, "data/rows.csv", f"data/{other}", "data/rows.v2.csv")
    with pytest.raises(DataError, match="same name in two formats, so their rows may count twice"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_relative_paths_of_images_are_looked_for_beside_the_table_first(
    tmp_path, monkeypatch, name
):
    write(tmp_path, "here/a.png", "there/tables/a.png", "here/b.png")
    table = tmp_path / "there" / "tables" / name
    frame = pd.DataFrame({"image": ["a.png", "b.png", None], "label": [1, 1, 2]})
    frame.to_csv(table, index=False) if name == "rows.csv" else frame.to_parquet(table)
    monkeypatch.chdir(tmp_path / "here")
    recipe = DataRecipe(path=f"../there/tables/{name}", partition={"scheme": "iid", "clients": 1})
    beside = str(tmp_path / "there" / "tables" / "a.png")
    images = load_splits(recipe, media="image")["train"]["image"][:]
    assert [image and str(Path(image).resolve()) for image in images[:1]] == [beside]
    assert images[1:] == ["b.png", None]
    assert load_splits(recipe)["train"]["image"][0] == "a.png"
