"""The local-global gap, from a run directory."""

import pytest

from fedmerge_peft import Recipe, federate, local_global_gap

SMALL = [
    "data.max_train=8",
    "data.max_test=6",
    "data.filter.provider=[Alder]",
    "baselines=[]",
    "training.device=cpu",
    "rounds=3",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return federate(
        Recipe.load("smoke", [*SMALL, "strategy=fedavg"]), tmp_path_factory.mktemp("gap") / "run"
    )


def test_the_gap_is_between_a_clients_trained_and_next_served_adapter(run):
    gap = local_global_gap(run)
    records = run.records
    trained, after = records[0]["finetuned"]["clients"], records[1]["served"]["clients"]
    loss = [after[name]["test_loss"] - trained[name]["test_loss"] for name in trained]
    accuracy = [trained[name]["test_accuracy"] - after[name]["test_accuracy"] for name in trained]
    assert gap.loc[1, "loss"] == pytest.approx(sum(loss) / len(loss))
    assert gap.loc[1, "test_accuracy"] == pytest.approx(sum(accuracy) / len(accuracy))
    assert gap.loc[3].notna().all()  # the last round against the final state
    assert (gap["distance"] > 0).all()


def test_a_client_that_trains_alone_has_no_gap(tmp_path):
    alone = federate(Recipe.load("smoke", [*SMALL, "strategy=local"]), tmp_path / "run")
    gap = local_global_gap(alone)
    assert gap["distance"].tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert gap["loss"].tolist() == pytest.approx([0, 0, 0], abs=1e-4)


def test_rounds_without_evaluation_have_a_distance_alone(tmp_path):
    few = federate(
        Recipe.load("smoke", [*SMALL, "strategy=fedavg", "evaluation.finetuned=false"]),
        tmp_path / "run",
    )
    assert local_global_gap(few).columns.tolist() == ["distance"]
