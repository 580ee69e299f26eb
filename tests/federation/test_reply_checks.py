"""Failed clients are named with round and cause, and skipped as if they took no part."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge_peft import ClientError, Recipe, RecipeError, TooFewClientsError
from fedmerge_peft.federation.reply_checks import validate_reply
from fedmerge_peft.recipe.strategies import STRATEGIES
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Train

SKIP = "clients.failures=skip"


def changed(**fields):
    """Replace fields of a client's reply; functions compute them from the reply."""

    def change(reply):
        return [
            dataclasses.replace(
                reply, **{name: make(getattr(reply, name)) for name, make in fields.items()}
            )
        ]

    return change


def error(reply):
    return [ClientError(str(reply.client), 1, "ZeroDivisionError: no luck")]


FAULTS = {
    "raises": (error, "ZeroDivisionError: no luck"),
    "NaN": (changed(deltas=lambda d: d * torch.nan), "its update is not finite"),
    "one infinite number": (
        changed(deltas=lambda d: d.index_fill(1, torch.tensor([3]), torch.inf)),
        "its update is not finite",
    ),
    "shape": (changed(deltas=lambda d: d[:, :-1]), "its update is a float32 tensor"),
    "too many rows": (
        changed(deltas=lambda d: torch.cat([d, d])),
        "its update is a float32 tensor",
    ),
    "scalar": (changed(deltas=lambda _: torch.tensor(0.0)), r"its update is a float32 tensor \(\)"),
    "dtype": (changed(deltas=lambda d: d.half()), "its update is a float16 tensor"),
    "layout": (changed(deltas=lambda d: d.to_sparse()), "its update is sparse_coo on cpu"),
    "device": (changed(deltas=lambda d: d.to("meta")), "its update is strided on meta"),
    "no tensor": (changed(deltas=lambda d: d.tolist()), "its update is of type list"),
    "too slow": (changed(seconds=lambda _: 61.0), r"it took 61\.0 s, but clients\.timeout is 60 s"),
    "endless": (changed(seconds=lambda _: torch.nan), "it took nan s"),
    "loss": (changed(train_loss=lambda _: float("inf")), "its training loss is inf"),
    "validation": (
        changed(validation=lambda _: (1.0, 1.0, 1.0)),
        "its number of validation losses is 3, expected 2",
    ),
    "more examples than it has": (
        changed(size=lambda n: 1000 * n),
        "its reported number of training examples is 10000, expected 10",
    ),
    "stale": (changed(round=lambda _: 0), "its reply belongs to round 0"),
    "twice": (lambda reply: [reply, reply], "it replied more than once"),
    "once well and once not": (
        lambda reply: [reply, *FAULTS["NaN"][0](reply)],
        "it replied more than once",
    ),
    "silent": (lambda _: [], "it did not reply"),
}


def federation(case, name, culprit, fault, *overrides):
    """The round loop on formula clients, with a fault in one client's replies."""
    found = case.federation(f"strategy.name={name}", "clients.timeout=60", *overrides)
    train_clients = found.engine.train_clients

    def faulty(number, assignments):
        for plan, reply in train_clients(number, assignments):
            answers = fault(reply) if reply.client == culprit else [reply]
            yield from ((plan, answer) for answer in answers)

    found.engine.train_clients = faulty
    return found


@pytest.mark.parametrize("kind", FAULTS)
def test_a_failing_client_is_named_in_record_and_log(formulas, kind, caplog):
    fault, cause = FAULTS[kind]
    record = next(federation(formulas(4), "fedmerge", 2, fault, SKIP).rounds())
    assert record.clients == ["0", "1", "3"]
    assert list(record.failures) == ["2"]
    assert cause.replace("\\", "") in record.failures["2"]
    assert f"client 2, round 1: {record.failures['2']}; skipped" in caplog.text
    assert "1 failed" in str(record)


@pytest.mark.parametrize("kind", FAULTS)
def test_without_skip_the_first_failure_ends_the_run(formulas, kind):
    fault, cause = FAULTS[kind]
    with pytest.raises(ClientError, match=f"client 2, round 1: {cause}"):
        next(federation(formulas(4), "fedmerge", 2, fault).rounds())


@pytest.mark.parametrize("name", [entry.name for entry in STRATEGIES])
def test_a_failing_client_changes_nothing(formulas, name, monkeypatch):
    case = formulas(6)
    faulty = federation(case, name, 2, FAULTS["NaN"][0], SKIP, "rounds=4")
    without = case.federation(f"strategy.name={name}", "rounds=4")
    monkeypatch.setattr(without, "cohort", lambda _: [0, 1, 3, 4, 5])
    for record, other in zip(faulty.rounds(), without.rounds(), strict=True):
        assert (record.clients, record.train_loss, record.bytes_up) == (
            other.clients,
            other.train_loss,
            other.bytes_up,
        )
        assert torch.equal(faulty.strategy.soup.rows, without.strategy.soup.rows)
        assert torch.equal(faulty.strategy.weights, without.strategy.weights)
        ours, theirs = faulty.strategy.state_dict(), without.strategy.state_dict()
        assert all(
            torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key]))
            for key in ours
            if ours[key] is not None
        )


def test_unknown_clients_are_ignored(formulas):
    case = formulas(4)
    found = case.federation(SKIP, "clients.fraction=0.5")
    (stranger,) = {0, 1, 2, 3} - {*found.cohort(1), min({0, 1, 2, 3} - {*found.cohort(1)})}
    train_clients = found.engine.train_clients
    plan = Train(case.fresh_row(0))
    found.engine.train_clients = lambda number, assignments: [
        *train_clients(number, assignments),
        (plan, case.reply(stranger, plan)),
    ]
    record = next(found.rounds())
    assert record.failures == {str(stranger): "it was not selected for this round"}
    assert record.clients == [str(client) for client in found.cohort(1)]


def test_too_few_clients_end_the_run_and_change_nothing(formulas):
    found = federation(formulas(4), "fedmerge", 2, error, SKIP, "clients.min_clients=4")
    before = found.strategy.soup.rows.clone()
    with pytest.raises(
        TooFewClientsError,
        match=(
            r"round 1: 3 of 4 clients sent valid replies, .* Failures: 2: "
            r"ZeroDivisionError: no luck"
        ),
    ):
        next(found.rounds())
    assert torch.equal(found.strategy.soup.rows, before)
    assert found.completed == 0


def test_a_round_in_which_all_fail_is_too_few(formulas):
    found = formulas(3).federation(SKIP)
    found.engine.train_clients = lambda *_: []
    with pytest.raises(TooFewClientsError, match="0 of 3 clients"):
        next(found.rounds())


def test_a_small_poisson_sample_must_reply_as_a_whole(formulas):
    poisson = [SKIP, "clients.sampling=poisson", "clients.fraction=0.5", "clients.min_clients=2"]
    found = formulas(4).federation(*poisson, "rounds=8")
    sizes = [len(record.clients) for record in found.rounds()]
    assert min(sizes) < 2 <= max(sizes)
    failing = formulas(4).federation(*poisson, "rounds=8")
    failing.completed = sizes.index(1)
    failing.engine.train_clients = lambda *_: []
    with pytest.raises(TooFewClientsError, match="0 of 1 client "):
        next(failing.rounds())


def test_a_minimum_above_the_cohort_is_refused(formulas):
    with pytest.raises(
        RecipeError, match=r"clients\.min_clients: 4 exceeds the number of clients in a round, 2;"
    ):
        formulas(4).federation("clients.min_clients=4", "clients.fraction=0.5")


def test_validation_losses_are_those_that_the_plan_asks_for(formulas):
    case = formulas(1)
    row = case.fresh_row(0)
    apart = InTurn((Train(row), Train(row)))
    plans = {
        0: apart,
        2: dataclasses.replace(apart, joined=True),
        3: dataclasses.replace(apart, joined=True, compared=row),
    }
    for number, plan in plans.items():
        reply = dataclasses.replace(case.reply(0, plan), validation=(1.0, 1.0))
        fault = validate_reply(reply, plan, 1, 10)
        assert (fault is None) == (number == 2)
        assert number == 2 or f"is 2, expected {number}" in fault


def test_a_choice_and_a_mixture_must_be_among_the_sent_adapters(formulas):
    case = formulas(1)
    rows = torch.stack([case.fresh_row(0), case.fresh_row(1)])
    choose, mixture = Choose(rows), Mixture(rows, torch.full((2,), 0.5))
    for plan in (choose, mixture):
        assert validate_reply(case.reply(0, plan), plan, 1, 10) is None
    for choice in (-1, 2, True, None):
        assert "it chose adapter" in validate_reply(
            dataclasses.replace(case.reply(0, choose), choice=choice), choose, 1, 10
        )
    wrong = (
        None,
        torch.tensor([1.0]),
        torch.tensor([0.2, 0.2]),
        torch.tensor([2.0, -1.0]),
        torch.tensor([torch.nan, 0.5]),
    )
    for weights in wrong:
        assert "its weights are" in validate_reply(
            dataclasses.replace(case.reply(0, mixture), weights=weights), mixture, 1, 10
        )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_reply_that_passes_is_finite_and_of_the_requested_shape(data):
    """A reply is refused, or has the requested number of finite values."""
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    numbers = data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]))
    value = data.draw(st.floats(width=32))
    deltas = (
        torch.full(shape, value).to(numbers)
        if numbers.is_floating_point or value == value
        else torch.zeros(shape, dtype=numbers)
    )
    reply = dataclasses.replace(_good(), deltas=deltas)
    if validate_reply(reply, Train(torch.zeros(3)), 1, 10) is None:
        assert deltas.shape == (1, 3)
        assert deltas.dtype == torch.float32
        assert deltas.isfinite().all()


def _good():
    from fedmerge_peft.strategies import Reply

    return Reply(0, torch.zeros(1, 3), 10, 1.0, 0.0)


def test_no_client_is_skipped_by_default():
    assert Recipe.load("smoke").clients.failures == "raise"
