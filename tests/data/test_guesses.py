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


def test_numbers_are_clients_only_if_their_column_is_named_so():
    ages, sites = {"age": [30, 41, 52] * 6}, {"place": ["north", "south"] * 9}
    assert guess_client(describe(Dataset.from_dict(ages)), 18, ()) is None
    assert guess_client(describe(Dataset.from_dict(ages | sites)), 18, ()) == "place"
    numbered = Dataset.from_dict({"hospital": [1, 2, 3] * 6} | sites)
    assert guess_client(describe(numbered), 18, ()) == "hospital"
