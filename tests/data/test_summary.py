from __future__ import annotations

import datasets
import numpy as np
import pytest
from rich.console import Console

from fedmerge_peft.data import (
    Client,
    FederatedData,
    client_table,
    federate_data,
    terminal_chart,
)
from fedmerge_peft.errors import DataError


@pytest.fixture
def data(recipe):
    return federate_data(
        recipe(partition={"scheme": "natural", "by": "task"}, split_column="split"), "label", 0
    )


@pytest.fixture
def large():
    """200 clients with a long name, 150 labels."""
    labels = np.arange(200 * 12) * 7 % 150
    clients = [
        Client(f"a-rather-long-client-name-{i:03}", rows[:8], rows[8:10], rows[10:])
        for i, rows in enumerate(np.split(np.arange(len(labels)), 200))
    ]
    return FederatedData(
        datasets.Dataset.from_dict({"label": [f"label {i:03} $x" for i in labels]}), clients
    )


def printed(renderable, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def test_the_table_counts_training_rows_by_label_and_rows_by_split(data):
    table = client_table(data, "domain")
    assert table.index.tolist() == ["snips", "subj", "trec6"]
    assert table["labels"].columns.tolist() == ["logic", "speech"]
    for client in data.clients:
        sizes = table.loc[client.name, "examples"]
        assert sizes.tolist() == [client.size, len(client.validation), len(client.test)]
        assert table.loc[client.name, "labels"].sum() == client.size
    assert table["labels"].loc["subj"].tolist() == [data.clients[1].size, 0]


def test_without_a_column_the_table_has_sizes_only(data):
    assert client_table(data, None).columns.tolist() == [
        ("examples", split) for split in ("train", "validation", "test")
    ]
    assert any("trec6" in line for line in printed(terminal_chart(data, None)))


def test_summaries_of_missing_columns_name_those_present(data):
    with pytest.raises(DataError, match=r"there is no column 'labl' \(did you mean label\?\)"):
        client_table(data, "labl")


def test_the_figure_has_one_row_per_client_and_one_block_per_label(data):
    lines = printed(terminal_chart(data, "domain"))
    subj = next(line for line in lines if line.startswith("subj"))
    assert subj.rstrip().endswith("█")
    assert lines[-1].startswith("3 clients, ")
    assert not any("more" in line and "…" in line for line in lines)


def test_the_figure_of_many_clients_and_labels_is_clipped_with_a_note(large):
    lines = printed(terminal_chart(large, "label", width=80, height=30))
    assert len(lines) <= 30 + 8
    assert max(map(len, lines)) <= 80
    assert any("… and 170 more clients" in line for line in lines)
    assert any("more labels to the right" in line for line in lines)
    assert any(line.startswith("a-rather-long-clie…e-007") for line in lines)
