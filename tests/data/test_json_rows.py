"""JSON files have one type per column, or give one error with file, row and column."""

from __future__ import annotations

import json

import pytest

from fedmerge_peft.data import load_splits
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe

IID = {"scheme": "iid", "clients": 3}


@pytest.fixture
def read(tmp_path):
    def make(text, name="rows.jsonl", **keys):
        (tmp_path / name).write_text(text, encoding="utf-8")
        keys = {"path": str(tmp_path / name), "partition": IID} | keys
        return load_splits(DataRecipe(**keys))["train"][:]

    return make


def test_one_object_is_one_row_and_a_warning(read, caplog):
    assert len(read(json.dumps({"data": [{"a": 1}, {"a": 2}]}), "rows.json")["data"]) == 1
    assert "rows.json has one object, which is read as one row" in caplog.text
    caplog.clear()
    read(json.dumps({"a": 1}))
    read(json.dumps([{"a": 1}]), "rows.json")
    assert not caplog.text


def lines(values):
    return "\n".join(json.dumps({"id": number, "x": x}) for number, x in enumerate(values)) + "\n"


ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y\u2028z"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "\r\n\r\n".join(json.dumps(row) for row in ROWS),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "\ufeff" + json.dumps(ROWS),
    ],
)
def test_lists_and_objects_one_after_the_other_are_rows(read, suffix, text):
    assert read(text, f"rows.{suffix}") == {"a": [1, 2], "b": ["x", "y\u2028z"]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, "1"], "rows.jsonl:2: the column 'x' is text (\"1\"), but a number (1) in "),
        (["1", None, 1], "rows.jsonl:3: the column 'x' is a number (1), but text (\"1\") in "),
        ([1, True], "rows.jsonl:2: the column 'x' is a boolean (true), but a number (1) in "),
        ([0.5, False], "rows.jsonl:2: the column 'x' is a boolean (false), but a number (0.5) in "),
        (["a", ["a"]], "rows.jsonl:2: the column 'x' is a list ([\"a\"]), but text"),
        ([{"a": 1}, [1]], "rows.jsonl:2: the column 'x' is a list ([1]), but an object"),
        ([1, 2**70], "rows.jsonl:2: the column 'x' has 1180591620717411303424, which is too large"),
        ([0.5, 2**60], "rows.jsonl:2: the column 'x' has 1152921504606846976, which is too large"),
        (["a", "\ud800"], "rows.jsonl:2: the column 'x' has half of a character"),
    ],
)
def test_mixed_columns_are_one_error_with_file_row_and_column(read, values, expected):
    with pytest.raises(DataError, match=r"^data\.path: ") as raised:
        read(lines(values))
    assert expected in str(raised.value)
    with pytest.raises(DataError, match=r"rows\.json, row [23]: the column 'x'"):
        read(json.dumps([{"x": value} for value in values]), "rows.json")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ([2**63 - 1, 1], [2**63 - 1, 1]),
        (["2024-01-31", "12"], ["2024-01-31", "12"]),
        ([float("nan"), 1], [None, 1]),
        ([{"a": 1}, {"b": [1]}], [{"a": 1, "b": None}, {"a": None, "b": [1]}]),
        ([{"a": 1}, {"a": "x"}], ['{"a": 1}', '{"a": "x"}']),
        ([[1], ["a"]], ["[1]", '["a"]']),
    ],
)
def test_columns_have_one_type(read, values, expected):
    assert read(lines(values))["x"] == expected


def test_mixed_types_are_found_across_files_and_splits(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines([0, 1]))
    (tmp_path / "test.jsonl").write_text(lines(["0", "1"]))
    with pytest.raises(DataError, match=r"test.jsonl:1: the column 'x' is text .*train.jsonl:1"):
        load_splits(DataRecipe(path=str(tmp_path), partition=IID))


def test_keys_that_an_object_lacks_are_missing_values(read):
    assert read('{"a": 1}\n{"b": 2}\n') == {"a": [1, None], "b": [None, 2]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": 2\n{"a": 3}\n', "rows.jsonl:3: invalid JSON: Expecting ',' delimiter"),
        ('{"a": 1}\n{"a": 2},\n', "rows.jsonl:2: invalid JSON"),
        (
            '{"a": 1, "a": 2}\n',
            "rows.jsonl:1: invalid JSON in the value that begins here: an object",
        ),
        ('{"a": 1}\n[1]\n', "rows.jsonl:2: a row is a list, not an object"),
        ("[1, 2]", "rows.jsonl, row 1: a row is a number, not an object"),
        ("[" * 100_000, "rows.jsonl:1: invalid JSON in the value that begins here: nested"),
        (
            '{"a": ' + "1" * 5000 + "}",
            "rows.jsonl:1: invalid JSON in the value that begins",
        ),
    ],
)
def test_other_texts_are_one_error_with_the_line(read, text, expected):
    with pytest.raises(DataError) as raised:
        read(text)
    assert expected in str(raised.value)


def test_columns_in_one_object_are_refused_with_the_form_of_rows(read):
    columns = {"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 0}}
    with pytest.raises(DataError, match=r"one object of columns.*orient='records'"):
        read(json.dumps(columns), "rows.json")
