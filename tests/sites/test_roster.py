"""The roster of a federation: clients that return, sites with labels of their own, and formats."""

import re

import pytest

from fedmerge_peft.errors import WireError
from fedmerge_peft.sites import fields as kinds
from fedmerge_peft.sites.server.roster import Roster, sites_beyond
from sites.test_ranges import MESSAGES


@pytest.mark.parametrize(
    ("change", "counts", "difference"),
    [
        ({"train": 4}, [1, 2], ": 3 train examples, now 4;"),
        ({"group": "north"}, [1, 2], ": group south, now north;"),
        ({}, [2, 1], ": other label counts;"),
        ({"test": 5, "group": "north"}, [1, 2], "; group south, now north;"),
    ],
    ids=str,
)
def test_a_client_that_changed_is_refused_with_each_difference(change, counts, difference):
    fields = {"name": "c", "group": "south", "train": 3, "validation": 0, "test": 1}
    roster = Roster()
    roster.add_clients([kinds.EnrolledClient(**fields)], [[1, 2]])
    with pytest.raises(WireError, match=re.escape(difference)):
        roster.add_clients([kinds.EnrolledClient(**fields | change)], [counts])
    roster.add_clients([kinds.EnrolledClient(**fields)], [[1, 2]])


def test_the_site_with_the_most_labels_of_its_own_is_left_out():
    labels = {"a": ["x", "y"], "b": ["x", "y", "z"], "c": ["x", "1", "2", "3"]}
    assert sites_beyond(labels, 6) == {}
    assert list(sites_beyond(labels, 5)) == ["c"]
    assert list(sites_beyond(labels, 2)) == ["c", "b"]


def test_sites_agree_on_the_columns_and_format_of_most_of_them(smoke):
    def summary(**changes):
        fields = {**MESSAGES["enrolled"].fields, **changes}
        return kinds.Enrolled.model_validate(fields)

    summaries = {"a": summary(columns=["odd"]), "b": summary(), "c": summary()}
    roster = Roster()
    assert roster.agree_on_format(summaries, smoke()) == {}
    assert roster.columns == ["text", "label"]
