"""The adapters that groups of clients share, from a run directory."""

import pandas as pd

from fedmerge_peft.analysis import sharing


class Finished:
    """The parts of a run that the analysis reads."""

    clients = pd.DataFrame({"group": ["a", "a", "a", "b", "b", "c"]}, index=list("uvwxyz"))
    weights = pd.DataFrame(
        [
            [0.1, 0.9, 0.0],
            [0.2, 0.8, 0.0],
            [0.0, 0.1, 0.9],
            [0.0, 0.2, 0.8],
            [0.0, 0.0, 1.0],
            [0.5, 0.4, 0.1],
        ],
        index=list("uvwxyz"),
    )


def test_a_groups_adapter_is_the_one_that_most_of_its_clients_use_most():
    found = sharing(Finished())
    assert found["adapter"].to_dict() == {"a": 1, "b": 2, "c": 0}
    assert found["share"].round(3).to_dict() == {"a": 0.667, "b": 1.0, "c": 1.0}
    assert set(found["others"]) == {""}


def test_groups_on_one_adapter_name_each_other():
    run = Finished()
    run.weights = run.weights.assign(**{"0": 9.0})[["0"]]
    assert sharing(run)["others"].to_dict() == {"a": "b, c", "b": "a, c", "c": "a, b"}
