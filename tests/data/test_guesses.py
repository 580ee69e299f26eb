"""Guesses of the columns of tables."""

from datasets import Dataset

from fedmerge_peft.data.guesses import describe, guess_client, guess_label


def test_columns_named_like_clients_are_no_labels_whatever_their_case():
    table = Dataset.from_dict(
        {"Hospital": ["north", "south"] * 6, "finding": ["none", "mild", "severe"] * 4}
    )
    columns = describe(table)
    assert guess_label(columns, 12, ()) == "finding"
    assert guess_client(columns, 12, ["finding"]) == "Hospital"
