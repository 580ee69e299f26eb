"""Methods with private parameters of each client, on formula clients and a tiny model."""

import pytest
import torch

from fedmerge_peft import AdapterLayout, Federation, Recipe, RecipeError, federate
from fedmerge_peft.adapters.lora_factors import layer_factors
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from strategies.factor_pairs import columns, halves

# ---- FedAvg and finetuning -----------------------------------------------------------------------


def test_finetuned_fedavg_serves_the_clients_last_trained_adapter(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("fedavg_ft")
    case.round(strategy, [0, 2])
    shared = case.mean([0, 2])
    torch.testing.assert_close(strategy.plan(0).row, shared)
    torch.testing.assert_close(strategy.served(0), case.centers[0])
    torch.testing.assert_close(strategy.served(1), shared)  # it never took part
    case.round(strategy, [1])
    torch.testing.assert_close(strategy.served(1), case.centers[1])
    torch.testing.assert_close(strategy.served(0), case.centers[0])
    torch.testing.assert_close(strategy.weights.sum(1), torch.ones(3))


def test_finetuning_after_fedavg_starts_from_the_newest_global_adapter(formulas):
    """Two passes of a step halfway to c_i give (θ + 3 c_i) / 4, with θ of the last aggregation."""
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("fedavg_ft", fedavg_rounds=2, passes=2)
    for _ in range(2):
        assert strategy.plan(0).phases == (None,)
        case.round(strategy)
    shared = case.mean()
    for client in range(3):
        torch.testing.assert_close(strategy.served(client), shared)
        assert strategy.plan(client).phases == (None, None)
        assert torch.equal(strategy.plan(client).row, strategy.served(client))
    replies = [
        Reply(client, (0.75 * (shared - case.centers[client]))[None], 10, 1.0, 0.0)
        for client in (0, 2)
    ]
    strategy.update(replies)
    for client in (0, 2):
        expected = (shared + 3 * case.centers[client]) / 4
        torch.testing.assert_close(strategy.served(client), expected)
        assert torch.equal(strategy.plan(client).row, strategy.served(client))  # and goes on there
    torch.testing.assert_close(strategy.served(1), shared)
    case.round(strategy, [2])
    torch.testing.assert_close(strategy.served(2), case.centers[2])
    torch.testing.assert_close(strategy.served(1), shared)


def test_finetuning_sends_the_global_adapter_once_and_returns_nothing(formulas):
    case = formulas(3)
    federation = case.federation("strategy={name: fedavg_ft, fedavg_rounds: 2}", "rounds=4")
    records, one = list(federation.rounds()), 3 * 4 * case.layout.size
    assert [(record.bytes_down, record.bytes_up) for record in records] == [
        (one, one),
        (one, one),
        (one, 0),
        (0, 0),
    ]
    assert [record.gap for record in records[2:]] == [0, 0]
    assert [record.update_norm is None for record in records] == [False, False, True, True]
    assert [bool(record.warnings) for record in records] == [True, False, False, False]
    assert records[0].warnings == [
        "until clients finetune after round 2, fedavg_ft equals FedAvg; completed rounds: 1"
    ]


def test_rounds_before_the_finetuning_are_fedavgs(formulas):
    case = formulas(4)
    finetuned = case.strategy("fedavg_ft", fedavg_rounds=3, server_momentum=0.5)
    fedavg = case.strategy("fedavg", server_momentum=0.5)
    for clients in ([0, 1], [1, 3], [2]):
        case.round(finetuned, clients)
        case.round(fedavg, clients)
        assert torch.equal(finetuned.served(1), fedavg.served(1))


def test_passes_without_rounds_of_finetuning_are_refused():
    with pytest.raises(RecipeError, match=r"strategy.passes: .* set fedavg_rounds"):
        Recipe.load("smoke", ["strategy={name: fedavg_ft, passes: 3}"])


# ---- Ditto ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularization", [0.1, 1.0, 9.0])
def test_dittos_private_adapter_lies_between_its_clients_minimum_and_the_global_one(
    formulas, regularization
):
    """v_i = (c_i + λ w) / (1 + λ), with the w that was sent."""
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("ditto", regularization=regularization)
    for _ in range(2):
        case.round(strategy)
    torch.testing.assert_close(strategy.plan(0).jobs[0].row, case.mean())
    for client in range(3):
        expected = (case.centers[client] + regularization * case.mean()) / (1 + regularization)
        torch.testing.assert_close(strategy.served(client), expected)


def test_dittos_global_adapter_is_fedavgs(formulas):
    case = formulas(4)
    ditto, fedavg = case.strategy("ditto"), case.strategy("fedavg")
    for clients in ([0, 1], [1, 3], [2]):
        case.round(ditto, clients)
        case.round(fedavg, clients)
        torch.testing.assert_close(ditto.plan(0).jobs[0].row, fedavg.served(0))


def test_dittos_private_adapter_starts_from_the_global_one_in_its_clients_first_round(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("ditto")
    for clients in ([0], [0, 2]):
        case.round(strategy, clients)
        torch.testing.assert_close(strategy.served(1), case.mean(clients))
        shared, own = strategy.plan(1).jobs
        assert torch.equal(own.row, shared.row)
        assert torch.equal(own.row, strategy.served(1))
    served, step = strategy.served(0), 0.1 * torch.ones(case.layout.size)
    strategy.update([Reply(1, torch.stack([step, 3 * step]), 20, 1.0, 0.0)])
    torch.testing.assert_close(strategy.served(1), case.mean([0, 2]) - 3 * step)
    torch.testing.assert_close(strategy.plan(1).jobs[0].row, case.mean([0, 2]) - step)
    assert torch.equal(strategy.served(0), served)


def test_dittos_gap_is_the_global_adapters(formulas):
    """w trains to c ± a and becomes c: a gap of ‖a‖, independent of the private adapters."""
    case = formulas(2)
    a = 0.1 * torch.ones(case.layout.size)
    case.centers = torch.stack([case.centers[0] + a, case.centers[0] - a])
    for record in case.federation("strategy={name: ditto, regularization: 3}").rounds():
        assert record.gap == pytest.approx(float(a.norm()), rel=1e-4)


# ---- FedPer and FedRep ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_private_heads_never_mix_and_the_body_is_the_mean(formulas, name):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy(name)
    head, start = columns(case.layout, "head"), case.fresh_row(0)
    body = columns(case.layout, "lora")
    case.round(strategy, [0, 1])
    for client in range(3):
        torch.testing.assert_close(strategy.served(client)[body], case.mean([0, 1])[body])
    for client, expected in enumerate([case.centers[0], case.centers[1], start]):
        torch.testing.assert_close(strategy.served(client)[head], expected[head])
    assert strategy.traffic(0) == (len(body), len(body))


def test_fedpers_clients_train_head_and_body_together_from_their_own_last_head(formulas):
    """The next body is Σ ρ_i φ_i in the second round too, and each head stays where it was."""
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("fedper")
    case.round(strategy)
    plan = strategy.plan(2)
    assert plan.phases == (None,)
    assert torch.equal(plan.row, strategy.served(2))
    body, head = columns(case.layout, "lora"), columns(case.layout, "head")
    torch.testing.assert_close(plan.row[head], case.centers[2][head])
    strategy.update([Reply(2, torch.ones(1, case.layout.size), 30, 1.0, 0.0)])
    torch.testing.assert_close(strategy.served(0)[body], case.mean()[body] - 1)
    torch.testing.assert_close(strategy.served(0)[head], case.centers[0][head])
    torch.testing.assert_close(strategy.served(2)[head], case.centers[2][head] - 1)


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_the_gap_of_a_private_head_is_that_of_the_body(formulas, name):
    case = formulas(2)
    body = columns(case.layout, "lora")
    expected = float((case.centers[0] - case.mean())[body].norm())
    for record in case.federation(f"strategy={name}").rounds():
        assert record.gap == pytest.approx(expected, rel=1e-4)


def test_fedrep_trains_the_head_first_and_then_the_body(formulas):
    case = formulas(2)
    first, then = case.strategy("fedrep").plan(0).phases
    assert torch.equal(first.nonzero().flatten(), columns(case.layout, "head"))
    assert torch.equal(then, ~first)


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_a_private_head_needs_a_head(formulas, name):
    case = formulas(
        2,
        AdapterLayout.from_tensors(
            [("a.lora_A.weight", (2, 3), "lora"), ("a.lora_B.weight", (3, 2), "lora")]
        ),
    )
    with pytest.raises(
        RecipeError,
        match=rf"strategy: {name} keeps the head private, but this adapter has none",
    ):
        case.strategy(name)


# ---- FedDPA --------------------------------------------------------------------------------------


def test_feddpas_halves_are_the_mean_and_the_clients_own(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("feddpa")
    shared, private = halves(case.layout)
    head = columns(case.layout, "head")
    case.round(strategy, [0, 2])
    mean = case.mean([0, 2])
    for client in (0, 2):
        served = strategy.served(client)
        torch.testing.assert_close(served[shared], mean[shared])
        torch.testing.assert_close(served[private], case.centers[client][private])
        torch.testing.assert_close(served[head], case.centers[client][head])


def test_a_newcomer_to_feddpa_is_served_the_global_half_and_head(formulas):
    case = formulas(3)
    strategy = case.strategy("feddpa")
    shared, private = halves(case.layout)
    head = columns(case.layout, "head")
    case.round(strategy, [0, 2])
    served = strategy.served(1)
    torch.testing.assert_close(served[shared], case.mean([0, 2])[shared])
    torch.testing.assert_close(served[head], case.mean([0, 2])[head])
    assert torch.equal(served[private], case.fresh_row(0)[private])
    strategy.update(list(case.replies(strategy, [1])))
    torch.testing.assert_close(strategy.served(1)[head], case.centers[1][head])
    torch.testing.assert_close(strategy.served(0)[head], case.centers[0][head])


def test_feddpas_jobs_train_the_global_half_alone_and_then_the_private_one(
    formulas,
):
    case = formulas(3)
    strategy = case.strategy("feddpa")
    shared, _ = halves(case.layout)
    for _ in range(2):
        case.round(strategy)
    first, second = strategy.plan(1).jobs
    sent = case.layout.state_dict(first.row)
    assert not sent["one.lora_B.weight"][:, 2:].any()
    assert sent["one.lora_B.weight"][:, :2].any()
    torch.testing.assert_close(second.row[shared], first.row[shared])
    assert not (second.phases[0] & shared).any()
    state = case.layout.state_dict(second.row)
    a, b = state["one.lora_A.weight"], state["one.lora_B.weight"]
    torch.testing.assert_close(b @ a, b[:, :2] @ a[:2] + b[:, 2:] @ a[2:])


@pytest.mark.parametrize("name", ["feddpa", "fedalt"])
def test_private_halves_of_embeddings_start_at_zero_and_can_be_trained(make_backbone, name):
    """B_i A_i = 0 with one factor that is not zero: with both at zero, neither has a gradient."""
    backbone = make_backbone("bert", {"r": 4, "target_modules": ["query", "word_embeddings"]})
    strategy = make_strategy(
        Recipe.load("smoke", [f"strategy={name}"]).strategy,
        StrategyContext(2, backbone.layout, backbone.fresh_row),
    )
    for layer in layer_factors(backbone.layout):
        a, b = layer.split(strategy.adapter(1))
        assert not (b[:, 2:] @ a[2:]).any(), layer.module
        assert a[2:].any() or b[:, 2:].any(), layer.module


@pytest.mark.parametrize("name", ["feddpa", "fedalt"])
def test_methods_that_halve_the_ranks_need_an_even_rank(formulas, name):
    case = formulas(
        2,
        AdapterLayout.from_tensors(
            [("a.lora_A.weight", (3, 3), "lora"), ("a.lora_B.weight", (3, 3), "lora")]
        ),
    )
    with pytest.raises(
        RecipeError,
        match=rf"lora.r: {name} splits the ranks in half, but a has rank 3; use an even rank",
    ):
        case.strategy(name)


@pytest.mark.parametrize("lora", ["lora.merge=shared_a", "lora.use_dora=true"])
@pytest.mark.parametrize("name", ["feddpa", "fedalt", "flexlora", "flora", "fedex_lora"])
def test_methods_that_split_factors_refuse_adapters_that_are_more_than_products(smoke, name, lora):
    with pytest.raises(
        RecipeError,
        match=rf"lora: {name} cannot .* this adapter: .*\({lora.split('=')[0]}",
    ):
        Federation(smoke(f"strategy={name}", lora))


# ---- all of them ---------------------------------------------------------------------------------

PERSONAL = ("fedavg_ft", "ditto", "fedper", "fedrep", "feddpa", "fedsa_lora", "fedpac")


@pytest.mark.parametrize("name", PERSONAL)
def test_sent_rows_do_not_change_with_the_update(formulas, name):
    case = formulas(3)
    strategy = case.strategy(name)
    plans = [strategy.plan(client) for client in range(3)]
    before = [plan.sent.clone() for plan in plans]
    served = [strategy.served(client) for client in range(3)]
    kept = [each.clone() for each in served]
    case.round(strategy)
    assert all(torch.equal(plan.sent, sent) for plan, sent in zip(plans, before, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(served, kept, strict=True))


@pytest.mark.parametrize("name", PERSONAL)
def test_the_order_of_replies_does_not_matter(formulas, name):
    case = formulas(4, sizes=[10, 20, 30, 40])
    one, other = case.strategy(name, server_momentum=0.5), case.strategy(name, server_momentum=0.5)
    for _ in range(2):
        one.update(list(case.replies(one)))
        other.update(list(case.replies(other))[::-1])
    assert torch.equal(one.soup.rows, other.soup.rows)
    torch.testing.assert_close(
        one.soup.merge(one.weights, torch.eye(4)),
        torch.stack([one.served(client) for client in range(4)]),
    )


@pytest.mark.parametrize("name", ["fedavg_ft", "ditto", "fedper", "fedrep", "feddpa", "fedalt"])
def test_two_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path, name):
    run = federate(smoke(f"strategy={name}"), tmp_path / "run", engine=smoke_engine)
    head = len(smoke_engine.backbone.layout.columns("head"))
    factors = 4 * 2 * (32 + 32)  # two layers' query and value, at rank 2
    travels = {
        "fedavg_ft": factors + head,
        "ditto": factors + head,
        "fedper": factors,
        "fedrep": factors,
        "feddpa": factors // 2 + head,
        "fedalt": factors // 2,
    }[name]
    assert [(record["bytes_down"], record["bytes_up"]) for record in run.records] == 2 * [
        (6 * 4 * travels, 6 * 4 * travels)
    ]
    assert run.soup.rows.isfinite().all()
    assert run.summary["final"]["served"]["mean"] >= 0
    assert all(
        record["train_loss"] > 0 and record["gap"] >= 0 and record["warnings"] == []
        for record in run.records
    )
    assert (
        run.adapter("Harbour Clinic").keys()
        == smoke_engine.backbone.layout.state_dict(run.soup.rows[0]).keys()
    )


def test_fedreps_head_stays_as_the_client_trained_it_on_a_tiny_model(smoke, smoke_engine):
    """Each client has a head of its own after a round, and all have one body."""
    federation = Federation(smoke("strategy=fedrep"), smoke_engine)
    next(federation.rounds())
    rows = torch.stack([federation.strategy.served(client) for client in range(6)])
    head = smoke_engine.backbone.layout.columns("head")
    body = torch.ones(rows.shape[1], dtype=torch.bool)
    body[head] = False
    assert torch.equal(rows[:, body], rows[:1, body].expand(6, -1))
    assert all(
        not torch.equal(rows[one, head], rows[two, head]) for one in range(6) for two in range(one)
    )
