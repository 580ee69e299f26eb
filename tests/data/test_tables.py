"""Parquet and Arrow files of all types, and readers that raise any error."""

from __future__ import annotations

import builtins
import re
import uuid

import datasets
import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from fedmerge_peft.cli import main
from fedmerge_peft.data import load_splits, local_files, tables
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe

IID = {"scheme": "iid", "clients": 2}


def load(path, **keys):
    return load_splits(DataRecipe(path=str(path), partition=IID, **keys))["train"]


COLUMNS = {
    "string_view": (pa.array(["a", None], pa.string_view()), ["a", None]),
    "dictionary": (pa.array(["a", None]).dictionary_encode(), ["a", None]),
    "runs": (pa.array(["a", "a"]).cast(pa.string()), ["a", "a"]),
    "json": (
        pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "null"])),
        [{"a": 1}, None],
    ),
    "json_text": (pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"a"', None])), ["a", None]),
    "views": (pa.array([["a"], []], pa.list_(pa.string_view())), [["a"], []]),
    "list_view": (pa.array([[1], []], pa.list_view(pa.int32())), [[1], []]),
    "struct": (pa.array([{"a": "b"}] * 2, pa.struct({"a": pa.string_view()})), [{"a": "b"}] * 2),
    "uuid": (
        pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([uuid.UUID(int=1).bytes] * 2, pa.binary(16))
        ),
        [str(uuid.UUID(int=1))] * 2,
    ),
    "large": (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
}


def write_stream(table, path):
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_columns_of_all_types_are_read(tmp_path, name, suffix):
    column, values = COLUMNS[name]
    path, table = tmp_path / f"rows.{suffix}", pa.table({"x": column, "y": [1, 2]})
    if suffix == "parquet" and pa.types.is_list_view(column.type):
        pytest.skip("Parquet has no list views")
    {"parquet": parquet.write_table, "arrow": write_stream, "feather": feather.write_feather}[
        suffix
    ](table, str(path))
    read = load(path)
    assert read[:] == {"x": values, "y": [1, 2]}
    assert read.filter(lambda row: row["y"] == 2)[:] == {"x": values[1:], "y": [2]}


def test_columns_of_types_without_a_counterpart_are_left_out_and_named(tmp_path, caplog):
    table = pa.table({"x": ["a"], "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32()))})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet")[:] == {"x": ["a"]}
    assert "the column m is left out, as its type is not supported: map<" in caplog.text


def test_the_names_of_classes_are_kept_and_compared(tmp_path):
    for name, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        features = datasets.Features(label=datasets.ClassLabel(names=names))
        table = datasets.Dataset.from_dict({"label": [0, 1]}, features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")
    assert load(tmp_path / "a.parquet").features["label"].names == ["cat", "dog"]
    with pytest.raises(DataError, match=r"'label' is ClassLabel\(cat, dog\) in .*a.parquet, but C"):
        load(tmp_path)


def test_names_of_classes_that_differ_late_are_told_apart(tmp_path):
    for name, more in (("a", ["x"]), ("b", ["y"]), ("c", [])):
        names = ["p", "q", "r", "s", "t", "u", *more]
        features = datasets.Features(label=datasets.ClassLabel(names=names))
        table = datasets.Dataset.from_dict({"label": [0, 1]}, features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"7 names, from 0; name 6 is x\).*; name 6 is y\) in"):
        load(tmp_path)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(DataError, match=r"name 6 is x\) in .*\(6 names, from 0; no name 6\) in"):
        load(tmp_path)


def test_types_of_several_files_must_have_a_common_type(tmp_path):
    parquet.write_table(pa.table({"x": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"x": pa.array([2], pa.int64())}), tmp_path / "b.parquet")
    for name in ("0", "c"):  # a column of nulls has no type, and is never at fault
        parquet.write_table(pa.table({"x": pa.nulls(1)}), tmp_path / f"{name}.parquet")
    assert load(tmp_path)["x"][:] == [None, 1, 2, None]
    (tmp_path / "d.csv").write_text("x\nA1\n")
    with pytest.raises(DataError, match=r"'x' is int32 in .*a\.parquet, but string in .*d\.csv"):
        load(tmp_path)


def test_columns_with_the_same_name_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table([[1], [2]], names=["x", "x"]), path)
    with pytest.raises(DataError, match=r"rows\.parquet: two columns are named 'x'"):
        load(path)


ARGUMENTS = {
    "ExceptionGroup": ("broken", [ValueError("broken")]),
    "UnicodeDecodeError": ("utf-8", b"a", 0, 1, "broken"),
    "UnicodeEncodeError": ("utf-8", "a", 0, 1, "broken"),
    "UnicodeTranslateError": ("a", 0, 1, "broken"),
}
ERRORS = {
    kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


@pytest.mark.parametrize(
    ("reader", "suffix"),
    [("read_text", ".csv"), ("_read_parquet", ".parquet"), ("_read_arrow", ".arrow"), ("walk", "")],
)
def test_whatever_a_reader_raises_is_one_error_with_the_file(tmp_path, monkeypatch, reader, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"text,label\na,b\n") if suffix else path.mkdir()
    for kind in ERRORS:

        def broken(*_, kind=kind):
            raise kind(*ARGUMENTS.get(kind.__name__, ("broken",)))

        monkeypatch.setattr(tables if suffix else local_files, reader, broken)
        message = f"rows{suffix} cannot be loaded: {kind.__name__}: "
        with pytest.raises(DataError, match=re.escape(message)):
            load(path)


def test_the_command_line_reports_a_broken_reader_in_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "rows.csv").write_text("text,queue\na,b\n")

    def broken(*_):
        raise KeyError("broken")

    monkeypatch.setattr(tables, "read_text", broken)
    with pytest.raises(SystemExit) as exited:
        main(["data", "quickstart", f"data.path={tmp_path}/rows.csv"])
    assert exited.value.code == 2
    shown = capfd.readouterr().err
    assert "rows.csv cannot be loaded: KeyError: 'broken'" in shown.replace("\n", " ")
    assert "Traceback" not in shown
