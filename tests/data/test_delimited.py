"""Files with separators give all of their rows, with the types of all values, or one error."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge_peft.data import load_splits
from fedmerge_peft.data.column_types import type_texts
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe

IID = {"scheme": "iid", "clients": 3}


@pytest.fixture
def read(tmp_path):
    """Write a file and read it: ``read("a,b\\n1,2\\n", "rows.csv")``."""

    def make(content, name="rows.csv", **keys):
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
        keys = {"path": str(tmp_path / name), "partition": IID} | keys
        return load_splits(DataRecipe(**keys))["train"][:]

    return make


def fault(read, *arguments, **keys):
    with pytest.raises(DataError) as raised:
        read(*arguments, **keys)
    return str(raised.value)


# ---- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-2", ""], [1, -2, None]),
        (["0.5", "1.0", ""], [0.5, 1.0, None]),
        (["true", "false"], [True, False]),
        (["9223372036854775807"], [2**63 - 1]),
    ],
)
def test_columns_of_numbers_and_booleans_have_their_types(read, cells, values):
    assert read("id,x\n" + "".join(f"a,{cell}\n" for cell in cells))["x"] == values


@pytest.mark.parametrize(
    "cells",
    [
        ["007", "7"],
        ["1", "01"],
        ["1.10", "1.1"],
        ["+1", "2"],
        ["1e3", "2"],
        ["1", "A1"],
        ["-0", "1"],
        [" 1", "2"],
        ["2024-01-31", "2024-02-01"],
        ["1,234", "5"],
        ["9223372036854775808", "1"],
        ["1234567890123456789.0", "2.0"],
        ["nan", "1.5"],
        ["inf", "1.5"],
        ["True", "False"],
        ["0x10", "1"],
        ["1_000", "1"],
    ],
)
def test_values_that_a_number_would_not_keep_are_text(read, cells):
    assert read("id\tx\n" + "".join(f"a\t{cell}\n" for cell in cells), "rows.tsv")["x"] == cells


@given(st.lists(st.text(alphabet="0123456789.-+eE tru", min_size=1, max_size=6), min_size=1))
def test_no_conversion_loses_anything(cells):
    import pyarrow as pa

    values = type_texts(pa.chunked_array([cells])).to_pylist()
    write = (lambda value: str(value).lower()) if values[0] in (True, False) else str
    assert [cell if isinstance(cell, str) else write(cell) for cell in values] == cells


def test_types_are_inferred_from_the_whole_file(read):
    cells = ["A1"] + ["7"] * 20_000 + ["007"] * 20_000
    assert read("x,y\n" + "".join(f"{cell},\n" for cell in cells))["x"] == cells


def test_types_are_inferred_from_all_files_and_splits_together(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "test.csv").write_text("label,text\n01,c\n")
    splits = load_splits(DataRecipe(path=str(tmp_path), partition=IID))
    assert splits["train"]["label"][:] == ["1", "2"]
    assert splits["test"][:] == {"text": ["c"], "label": ["01"]}


# ---- quoting and separators ----------------------------------------------------------------------


def test_quotation_marks_of_a_tsv_file_that_enclose_nothing_are_text(read, caplog):
    rows = ['"where is it\tparcel', "lost\tparcel", '"money back\trefund']
    assert read("text\tlabel\n" + "\n".join(rows) + "\n", "rows.tsv") == {
        "text": ['"where is it', "lost", '"money back'],
        "label": ["parcel", "parcel", "refund"],
    }
    assert "rows.tsv: quotation marks are read as text, as they do not enclose" in caplog.text


def test_lines_that_may_be_one_field_or_several_rows_are_an_error(read):
    text = "text,label\n" + '"a,1\nb,2\nc",3\n'
    for separator, name in ((",", "rows.csv"), ("\t", "rows.tsv")):
        assert fault(read, text.replace(",", separator), name).endswith(
            f"{name}:2: a quotation mark opens a field that ends in line 4, but each of these "
            "lines is also a complete row; set data.quoting=none if quotation marks are text, or "
            "data.quoting=double if fields may span lines"
        )
    assert read(text, quoting="none")["text"] == ['"a', "b", 'c"']
    assert read(text, quoting="double")["text"] == ["a,1\nb,2\nc"]


def test_quoted_fields_hold_separators_quotation_marks_and_lines(read):
    text = 'text,label\r\n"a, b, ""c""\r\n\r\nd",1\r\n\r\ne,2\r\n'
    assert read(text) == {"text": ['a, b, "c"\r\n\r\nd', "e"], "label": [1, 2]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('t,l\na,1\n"b,2\n', "rows.csv:3: a quotation mark opens a field that does not end"),
        ('t,l\na,1\n"b" c,2\n', "rows.csv:3: a quoted field is followed by text"),
        (r"t,l" + "\n" + r'"say \"b\"",2' + "\n", "rows.csv:2: a quoted field is followed by text"),
        ("t,l\na,1\nb\n", "rows.csv:3: the row has 1 field, but the first row names 2 columns"),
        ("t,l\na,1\nb, c,2\n", "rows.csv:3: the row has 3 fields"),
        ('t,l\n"a\nb",1\nb,2,3\n', "rows.csv:4: the row has 3 fields"),
        ("t;l\na, b;1\nc;2\n", "if ';' separates the fields, set data.separator=';'"),
        ("t,t\na,1\n", "rows.csv:1: two columns are named 't'; rename one"),
        ("t, t\na, 1\n", "rows.csv:1: two columns are named 't'; rename one"),
        ("t,l\na,1\nt,l\nb,2\n", "rows.csv:3: the row equals the first one, which names"),
        ("t,l\na,1\n\ufefft,l\nb,2\n", "rows.csv:3: the row equals the first one, which names"),
        ("sep=;\r\nt;l\r\na;1\r\n", "rows.csv:1: 'sep=;' is a hint for spreadsheets, not a row"),
        ("", "rows.csv is empty; add a first row with the column names"),
        (",".join(map(str, range(5_001))) + "\n", "has 5,001 columns, and at most 5,000 are"),
        (f"t,{'l' * 1001}\na,1\n", "has a column with a name of 1,001 characters ('lll"),
    ],
)
def test_malformed_files_are_one_error_with_the_line(read, text, expected):
    assert expected in fault(read, text)


def test_a_text_may_be_the_name_of_its_column(read):
    assert read("text\na\ntext\n") == {"text": ["a", "text"]}
    assert read("\ufeff\ufefftext,label\na,1\n") == {"text": ["a"], "label": [1]}


def test_other_separators_are_set_in_the_recipe(read):
    assert read("t;l\na, b;1\n", separator=";") == {"t": ["a, b"], "l": [1]}
    assert read("t\tl\na, b\t1\n", separator=r"\t") == {"t": ["a, b"], "l": [1]}
    assert "with the separator ';', the first row is a single field, 't,l'" in fault(
        read, "t,l\na,1\n", separator=";"
    )


def test_spaces_around_names_are_no_part_of_them(read):
    assert read('text , "label"\na , "b, c"\n') == {"text": ["a "], "label": ["b, c"]}


def test_unnamed_columns_and_empty_rows_are_no_fault(read):
    assert read(",text\n0,a\n1,b\n,\n\n") == {"Unnamed: 0": [0, 1], "text": ["a", "b"]}


def test_fields_may_be_long(read):
    assert read(f"text,label\n{'x' * 200_000},1\n")["text"] == ["x" * 200_000]


# ---- encodings and compression -------------------------------------------------------------------

TEXT = "name,größe\nJosé,1\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark_are_read(read, encoding):
    assert read(TEXT.encode(encoding)) == {"name": ["José"], "größe": [1]}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "cp437"])
def test_other_encodings_are_refused_until_they_are_named(read, encoding):
    raw = TEXT.encode(encoding)
    message = fault(read, raw)
    assert "rows.csv:1: " in message
    assert "data.encoding=" in message
    assert read(raw, encoding=encoding) == {"name": ["José"], "größe": [1]}
    assert "the bytes are not valid utf-8" in fault(read, "é".encode("cp1252"), encoding="utf-8")


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (gzip.compress(TEXT.encode(), mtime=0), "compressed with gzip; name it .gz"),
        (b"PK\x03\x04\x14\0", "a zip archive, as spreadsheets and PyTorch files are; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html>\n<html><body>404, not found</body></html>", "a web page"),
        (b"PAR1\x15\x04", "a parquet file; name it .parquet"),
    ],
)
def test_files_of_another_kind_are_named(read, raw, kind):
    assert f"rows.csv is {kind}" in fault(read, raw)
    assert "rows.csv is " not in fault(read, b"PAR1,BZh\n1\n")


def test_one_nul_character_is_no_utf_16(read):
    assert "rows.csv:2: the text has a NUL character, which is not text" in fault(
        read, "name,x\nJos\0e,1\n"
    )


def test_a_table_without_rows_names_its_columns(read):
    assert "has no rows (its columns: name, x); add some" in fault(read, "name,x\n")
    assert "first row names 1 column (# made in 2024);" in fault(read, "# made in 2024\na,b\n")


def test_compressed_files_are_read_and_damaged_ones_refused(read):
    raw = gzip.compress(TEXT.encode())
    assert read(raw, "ROWS.CSV.GZ") == read(raw, "rows.csv.gz") == {"name": ["José"], "größe": [1]}
    assert "rows.csv.gz cannot be loaded: " in fault(read, raw[:-10], "rows.csv.gz")
    assert "rows.parquet.gz has an unsupported format" in fault(read, raw, "rows.parquet.gz")
