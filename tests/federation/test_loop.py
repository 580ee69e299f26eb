"""The round loop and the local engine together, on tiny random models."""

import pytest
import torch

from equality import assert_near
from federation.small_recipe import recipe
from fedmerge_peft import ClientError, Federation, RecipeError
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.training.plan import Train


def same(one, two):
    return torch.equal(one.strategy.soup.rows, two.strategy.soup.rows) and torch.equal(
        one.strategy.weights, two.strategy.weights
    )


@pytest.mark.equality
def test_same_seed_same_bits_from_loading_to_the_last_round():
    first, second = Federation(recipe()), Federation(recipe())
    ours, theirs = list(first.rounds()), list(second.rounds())
    assert same(first, second)
    assert [record.served for record in ours] == [record.served for record in theirs]


def test_another_seed_gives_another_federation(engine):
    first, second = Federation(recipe(), engine), Federation(recipe("seed=1"))
    assert not torch.equal(first.strategy.soup.rows, second.strategy.soup.rows)
    assert [client.name for client in first.engine.clients] == [
        client.name for client in second.engine.clients
    ]


@pytest.mark.parametrize(
    "override", ["training.learning_rate=0.5", "seed=1", "lora.r=4", "evaluation.finetuned=false"]
)
def test_an_engine_loaded_for_another_recipe_is_refused(engine, override):
    with pytest.raises(
        RecipeError,
        match=(
            rf"{override.split('.')[0].split('=')[0]}: "
            r"the engine was loaded for a recipe with other values"
        ),
    ):
        Federation(recipe(override), engine)


@pytest.mark.equality
def test_a_clients_training_does_not_depend_on_the_other_clients(engine):
    row = engine.strategy_context().fresh_row(0)
    _, alone = next(engine.train_clients(1, [(2, Assignment(Train(row)))]))
    plans = [(client, Assignment(Train(row), row)) for client in (0, 1, 2)]
    _, among = list(engine.train_clients(1, plans))[2]
    assert torch.equal(alone.delta, among.delta)


@pytest.mark.equality
def test_one_adapter_equals_fedavg_over_a_whole_run(engine):
    one, fedavg = (
        Federation(recipe("strategy.adapters=1"), engine),
        Federation(recipe("strategy=fedavg"), engine),
    )
    list(one.rounds())
    list(fedavg.rounds())
    torch.testing.assert_close(one.strategy.adapter(0), fedavg.strategy.adapter(0))


@pytest.mark.equality
def test_identical_starts_stay_fedavg_through_real_training(engine):
    sgd = ["training.optimizer=sgd", "training.learning_rate=0.1"]
    recipes = recipe("strategy.start=identical", *sgd), recipe("strategy=fedavg", *sgd)
    same_start, fedavg = (Federation(each, engine.with_recipe(each)) for each in recipes)
    start = fedavg.strategy.adapter(3).clone()
    list(same_start.rounds())
    list(fedavg.rounds())
    assert_near(same_start.strategy.adapter(3), fedavg.strategy.adapter(3), start)
    torch.testing.assert_close(same_start.strategy.weights, torch.full((6, 3), 1 / 3))


def test_served_scores_are_of_sent_adapters_and_finetuned_scores_of_trained_ones(engine):
    federation = Federation(recipe(), engine)
    sent = dict(
        engine.evaluate_clients(
            (client, federation.strategy.adapter(client)) for client in range(6)
        )
    )
    record = next(federation.rounds())
    assert record.served.clients == {
        engine.clients[client].name: scores for client, scores in sent.items()
    }
    assert record.finetuned.clients != record.served.clients
    values = [scores["test_accuracy"] for scores in record.served.clients.values()]
    assert record.served.mean == pytest.approx(sum(values) / 6)
    assert (
        record.served.worst_client_score
        == min(values)
        == record.served.clients[record.served.worst_client]["test_accuracy"]
    )


def test_only_one_adapter_travels_each_way(engine):
    record = next(Federation(recipe(), engine).rounds())
    assert record.bytes_down == record.bytes_up == 6 * 4 * engine.backbone.layout.size
    assert next(Federation(recipe("strategy=local"), engine).rounds()).bytes_down == 0


def test_a_fraction_of_the_clients_is_sampled_each_round(engine):
    federation = Federation(recipe("clients.fraction=0.5", "rounds=6"), engine)
    cohorts = [federation.cohort(number) for number in range(1, 7)]
    assert all(len(cohort) == 3 for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert [record.clients for record in federation.rounds()] == [
        [engine.clients[i].name for i in cohort] for cohort in cohorts
    ]


def test_rounds_without_evaluation_have_no_scores(engine):
    records = list(Federation(recipe("rounds=5", "evaluation.every=3"), engine).rounds())
    assert [record.served is not None for record in records] == [True, False, True, False, True]


def test_a_failing_client_is_named_with_its_round_and_cause(engine, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("fedmerge_peft.engines.local.train", fail)
    with pytest.raises(
        ClientError, match=r"client Harbour Clinic, round 1: ZeroDivisionError: no luck"
    ) as caught:
        list(Federation(recipe(), engine).rounds())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_client_that_cannot_be_evaluated_is_named_with_the_completed_rounds(engine, monkeypatch):
    federation = Federation(recipe("rounds=2", "evaluation.every=5"), engine)
    list(federation.rounds())
    engine.clear_caches()

    def fail(*_):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("fedmerge_peft.engines.scoring.evaluate_parts", fail)
    with pytest.raises(
        ClientError,
        match=(
            r"client Harbour Clinic, round 2: evaluation after the round: "
            r"ZeroDivisionError: no luck"
        ),
    ) as caught:
        federation.evaluate()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.round == 2


def test_an_adapter_that_is_not_finite_never_reaches_the_soup():
    federation = Federation(
        recipe(
            "training.learning_rate=100",
            "training.optimizer=sgd",
            "training.momentum=0.99",
            "training.weight_decay=10",
            "training.epochs=20",
            "training.max_grad_norm=null",
        )
    )
    with pytest.raises(
        ClientError, match=r"not finite after training; lower training\.learning_rate"
    ):
        list(federation.rounds())
    assert federation.strategy.soup.rows.isfinite().all()


def test_a_run_that_ends_during_warm_up_has_a_warning(engine):
    records = list(
        Federation(recipe("strategy.start=warm", "strategy.warm_rounds=3"), engine).rounds()
    )
    assert records[-1].warnings == [
        "until clients are grouped after round 3, all share one adapter, as in FedAvg; "
        "completed rounds: 2"
    ]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gpt2", ["lora.target_modules=[c_attn]"]),
        ("llama", ["lora.target_modules=[q_proj, v_proj]"]),
    ],
)
def test_decoders_can_classify(kind, overrides):
    federation = Federation(recipe("rounds=1", f"backbone.model=tiny:{kind}", *overrides))
    assert next(federation.rounds()).served.mean >= 0


@pytest.mark.parametrize("merge", ["factor", "shared_a"])
def test_both_merge_modes_train(merge):
    federation = Federation(recipe("rounds=2", f"lora.merge={merge}"))
    before = federation.strategy.soup.rows.clone()
    list(federation.rounds())
    assert not torch.equal(federation.strategy.soup.rows, before)
    assert (len(federation.strategy.soup.shared) > 0) == (merge == "shared_a")
