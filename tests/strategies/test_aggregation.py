"""FedProx, FedAdam and other ways to aggregate LoRA, on formula clients and a tiny model."""

import pytest
import torch

from equality import assert_near, tolerance
from fedmerge_peft import Federation, RecipeError, federate
from fedmerge_peft.adapters.lora_factors import layer_factors
from fedmerge_peft.strategies import Reply
from strategies.factor_pairs import LAYERS, mean_product, pair

pytestmark = pytest.mark.equality


# ---- FedProx, and Adam on the server ------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.1, 3.0])
def test_fedproxs_clients_stop_between_their_minimum_and_the_sent_adapter(formulas, mu):
    """The next θ is the mean of argmin ½ ‖θ − c_i‖² + μ/2 ‖θ − θ_sent‖².

    The minimum is (c_i + μ θ_sent) / (1 + μ).
    """
    case = formulas(3, sizes=[10, 20, 30])
    strategy, expected = case.strategy("fedprox", mu=mu), case.fresh_row(0)
    for _ in range(3):
        case.round(strategy)
        expected = (case.mean() + mu * expected) / (1 + mu)
        torch.testing.assert_close(strategy.served(1), expected)


def test_fedadam_steps_by_its_formula(formulas):
    """θ ← θ − η m̂ / (√v̂ + τ), with β₂ = 0.99 and τ = 1e-3.

    m ← β₁ m + (1 − β₁) δ and v ← β₂ v + (1 − β₂) δ² start at zero, so that Adam corrects them:
    m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ).
    """
    case = formulas(2, sizes=[10, 30])
    strategy = case.strategy("fedavg", server_optimizer="adam", server_lr=0.02, server_momentum=0.8)
    expected, m, v = case.fresh_row(0).double(), 0.0, 0.0
    for turn in (1, 2, 3):
        deltas = 10.0**-turn * torch.randn(
            2, case.layout.size, generator=torch.Generator().manual_seed(turn)
        )
        strategy.update(
            [Reply(client, deltas[client][None], case.sizes[client], 1.0, 0.0) for client in (0, 1)]
        )
        mean = (0.25 * deltas[0] + 0.75 * deltas[1]).double()
        m, v = 0.8 * m + 0.2 * mean, 0.99 * v + 0.01 * mean**2
        expected = expected - 0.02 * (m / (1 - 0.8**turn)) / ((v / (1 - 0.99**turn)).sqrt() + 1e-3)
        assert_near(strategy.served(0), expected)


# ---- FFA-LoRA, RoLoRA and FedSA-LoRA -------------------------------------------------------------


def test_ffa_loras_mean_of_b_is_the_mean_of_the_updates(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy, start = case.strategy("ffa_lora"), case.fresh_row(0)
    case.round(strategy)
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(1), layer)
        assert torch.equal(a, pair(case.layout, start, layer)[0])
        torch.testing.assert_close(
            b @ a,
            sum(
                share * pair(case.layout, c, layer)[1] @ a
                for share, c in zip(case.shares, case.centers, strict=True)
            ),
        )
    size = 7 * 4 + 6 * 4 + 6
    assert strategy.traffic(0) == (size, size)


@pytest.mark.parametrize(
    "settings", ["", ", server_optimizer: adam, server_lr: 0.01, server_momentum: 0.9"]
)
def test_ffa_loras_a_stays_bit_identical_through_training(smoke, settings):
    federation = Federation(
        smoke(f"strategy={{name: ffa_lora{settings}}}", "training.weight_decay=0.1")
    )
    start = federation.strategy.served(0)
    list(federation.rounds())
    layout, now = federation.engine.backbone.layout, federation.strategy.served(0)
    for layer in layer_factors(layout):
        assert torch.equal(layer.split(now)[0], layer.split(start)[0])
        assert not torch.equal(layer.split(now)[1], layer.split(start)[1])


def test_rolora_averages_b_and_then_a(formulas):
    """The frozen factor is the same for all, so the mean of B_i A_i is the product of the means."""
    case = formulas(3, sizes=[10, 20, 30])
    strategy, start, mean = case.strategy("rolora"), case.fresh_row(0), case.mean()
    case.round(strategy)
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(1), layer)
        assert torch.equal(a, pair(case.layout, start, layer)[0])
        torch.testing.assert_close(b, pair(case.layout, mean, layer)[1])
        torch.testing.assert_close(
            b @ a,
            sum(
                share * pair(case.layout, c, layer)[1] @ a
                for share, c in zip(case.shares, case.centers, strict=True)
            ),
        )
    torch.testing.assert_close(strategy.served(1)[-6:], mean[-6:])
    before = strategy.served(1)
    replies = [Reply(0, torch.ones(1, case.layout.size), 10, 1.0, 0.0)]
    strategy.update(replies)
    for layer in LAYERS:
        (a, b), (old_a, old_b) = (
            pair(case.layout, row, layer) for row in (strategy.served(0), before)
        )
        assert torch.equal(b, old_b)
        torch.testing.assert_close(a, old_a - 1)
    torch.testing.assert_close(strategy.served(0)[-6:], before[-6:] - 1)
    case.round(strategy)  # B again
    torch.testing.assert_close(
        pair(case.layout, strategy.served(0), "one")[1], pair(case.layout, mean, "one")[1]
    )


def test_roloras_plan_freezes_what_the_round_does_not_average(formulas):
    case = formulas(2)
    strategy = case.strategy("rolora")
    for frozen in ("lora_A", "lora_B", "lora_A"):
        (mask,) = strategy.plan(0).phases
        for entry in case.layout.entries:
            assert bool(mask[entry.columns].any()) != (frozen in entry.key)
        case.round(strategy)


def test_rolora_sends_what_changed_since_the_client_took_part(formulas):
    case = formulas(3)
    strategy = case.strategy("rolora")
    a, b, head = 4 * 6 + 4 * 5, 7 * 4 + 6 * 4, 6
    whole = a + b + head
    assert [strategy.traffic(client) for client in range(3)] == 3 * [(whole, b + head)]
    case.round(strategy, [0, 1])
    assert [strategy.traffic(client) for client in range(3)] == [
        (b + head, a + head),
        (b + head, a + head),
        (whole, a + head),
    ]
    case.round(strategy, [1, 2])
    assert [strategy.traffic(client) for client in range(3)] == [
        (whole, b + head),
        (a + head, b + head),
        (a + head, b + head),
    ]


@pytest.mark.parametrize(
    "settings", [{"server_momentum": 0.5}, {"server_optimizer": "adam", "server_lr": 0.01}]
)
def test_moments_of_a_factor_wait_while_the_other_one_trains(formulas, settings):
    """Each factor moves as in a FedAvg that has its rounds only."""
    case, ones = formulas(1), torch.ones(1, 96 + 6)
    rolora, fedavg = case.strategy("rolora", **settings), case.strategy("fedavg", **settings)
    for _ in range(4):
        rolora.update([Reply(0, ones, 10, 1.0, 0.0)])
    for _ in range(2):
        fedavg.update([Reply(0, ones, 10, 1.0, 0.0)])
    factors = slice(-6)
    torch.testing.assert_close(rolora.served(0)[factors], fedavg.served(0)[factors])
    for _ in range(2):
        fedavg.update([Reply(0, ones, 10, 1.0, 0.0)])
    torch.testing.assert_close(rolora.served(0)[-6:], fedavg.served(0)[-6:])


def test_fedsa_lora_averages_a_alone(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy, start = case.strategy("fedsa_lora"), case.fresh_row(0)
    case.round(strategy, [0, 1])
    for client, own in enumerate([case.centers[0], case.centers[1], start]):
        for layer in LAYERS:
            a, b = pair(case.layout, strategy.served(client), layer)
            torch.testing.assert_close(a, pair(case.layout, case.mean([0, 1]), layer)[0])
            torch.testing.assert_close(b, pair(case.layout, own, layer)[1])
        torch.testing.assert_close(strategy.served(client)[-6:], own[-6:])
    assert strategy.traffic(0) == (4 * 6 + 4 * 5, 4 * 6 + 4 * 5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fedsa_lora", "averages A, which is not trained"),
        ("rolora", "trains A and B in turn, but A is not trained"),
    ],
)
def test_methods_that_average_a_need_one_that_trains(smoke, name, reason):
    with pytest.raises(RecipeError, match=rf"lora: {name} {reason}"):
        Federation(smoke(f"strategy={name}", "lora.merge=shared_a"))


# ---- FlexLoRA ------------------------------------------------------------------------------------


def test_flexlora_is_exact_if_the_mean_has_the_rank(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    direction = torch.randn(case.layout.size, generator=torch.Generator().manual_seed(1))
    case.centers = torch.stack([direction] * 3)
    for client in range(3):  # one A for all, so that the mean has rank 4
        for layer in LAYERS:
            pair(case.layout, case.centers[client], layer)[1].mul_(client - 0.5)
    strategy = case.strategy("flexlora")
    case.round(strategy)
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(0), layer)
        assert_near(b @ a, mean_product(case, case.centers, layer))


def test_flexlora_is_the_best_approximation_otherwise(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("flexlora")
    case.round(strategy)
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(0), layer)
        exact = mean_product(case, case.centers, layer)
        u, s, vh = torch.linalg.svd(exact)
        assert_near(b @ a, u[:, :4] * s[:4] @ vh[:4])
        assert torch.linalg.matrix_norm(exact - b @ a) == pytest.approx(
            float(s[4:].norm()), rel=tolerance(torch.float32)
        )
        assert_near(a @ a.T, torch.eye(4))
    torch.testing.assert_close(strategy.served(0)[-6:], case.mean()[-6:])


def test_flexlora_serves_each_client_the_first_directions_of_its_rank(formulas):
    case = formulas(5, sizes=[10, 20, 30, 40, 50])
    strategy = case.strategy("flexlora", ranks=[1, 4])
    ranks = [1, 4, 1, 4, 1]
    case.round(strategy)
    for layer in LAYERS:
        u, s, vh = torch.linalg.svd(mean_product(case, case.centers, layer, ranks))
        for client, rank in enumerate(ranks):
            a, b = pair(case.layout, strategy.served(client), layer)
            assert_near(b @ a, u[:, :rank] * s[:rank] @ vh[:rank])
            assert not a[rank:].any()
            assert not b[:, rank:].any()
    assert strategy.traffic(0) == (6 + 7 + 5 + 6 + 6,) * 2
    assert strategy.traffic(1) == (4 * (6 + 7 + 5 + 6) + 6,) * 2


def test_flexlora_keeps_every_direction_trainable(formulas):
    """The mean of one client of rank 1 has rank 1.

    The other directions keep a nonzero A, without which B would have no gradient.
    """
    case = formulas(3)
    strategy = case.strategy("flexlora", ranks=[1, 4])
    case.round(strategy, [0])
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(1), layer)
        center_a, center_b = pair(case.layout, case.centers[0], layer)
        assert_near(b @ a, center_b[:, :1] @ center_a[:1])
        assert (a.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_ranks_above_the_slots_are_refused(formulas, name):
    with pytest.raises(
        RecipeError,
        match=r"strategy.ranks: 8 exceeds the adapter's rank of 4; lower it, or raise lora.r",
    ):
        formulas(3).strategy(name, ranks=[2, 8])


# ---- on a tiny model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ffa_lora", "fedsa_lora", "rolora", "flexlora", "flora", "fedex_lora"]
)
def test_two_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path, name):
    run = federate(smoke(f"strategy={name}"), tmp_path / "run", engine=smoke_engine)
    head = len(smoke_engine.backbone.layout.columns("head"))
    a = b = 4 * 2 * 32  # two layers' query and value, at rank 2
    travels = {
        "ffa_lora": 2 * [(b + head, b + head)],
        "fedsa_lora": 2 * [(a, a)],
        "rolora": [(a + b + head, b + head), (b + head, a + head)],
        "flexlora": 2 * [(a + b + head, a + b + head)],
        "flora": [(head, a + b + head), (6 * (a + b) + head, a + b + head)],
        "fedex_lora": [(a + b + head, a + b + head), (6 * (a + b) + head, a + b + head)],
    }[name]
    assert [(record["bytes_down"], record["bytes_up"]) for record in run.records] == [
        (24 * down, 24 * up) for down, up in travels
    ]
    assert run.soup.rows.isfinite().all()
    assert run.summary["final"]["served"]["mean"] >= 0
    assert all(record["train_loss"] > 0 and record["warnings"] == [] for record in run.records)


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_clients_of_different_ranks_on_a_tiny_model(smoke, smoke_engine, name):
    federation = Federation(smoke(f"strategy={{name: {name}, ranks: [1, 2]}}"), smoke_engine)
    first, _ = federation.rounds()
    head, each = len(smoke_engine.backbone.layout.columns("head")), 4 * 64
    assert first.bytes_up == 4 * (6 * head + 3 * each + 3 * 2 * each)
    assert federation.strategy.soup.rows.isfinite().all()
    for layer in layer_factors(smoke_engine.backbone.layout):
        assert not layer.split(federation.strategy.served(0))[0][1:].any()


@pytest.mark.parametrize("ranks", [[4], [1, 4]])
@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_the_gap_is_between_updates(formulas, name, ranks):
    """The gap is the distance between a client's s B_i A_i and its next update.

    FlexLoRA serves the rank-r approximation of the mean, FLoRA the mean itself.
    """
    case = formulas(3, sizes=[10, 20, 30])
    federation = case.federation(f"strategy={{name: {name}, ranks: {ranks}}}", "rounds=2")
    held, expected = [ranks[client % len(ranks)] for client in range(3)], []
    records = list(federation.rounds())
    for client, rank in enumerate(held):
        square = (case.centers[client] - case.mean())[-6:].square().sum()
        for layer in LAYERS:
            mean = mean_product(case, case.centers, layer, held)
            u, s, vh = torch.linalg.svd(mean)
            a, b = pair(case.layout, case.centers[client], layer)
            gets = mean if name == "flora" else u[:, :rank] * s[:rank] @ vh[:rank]
            square += (0.5 * (b[:, :rank] @ a[:rank] - gets)).square().sum()
        expected.append(float(square.sqrt()))
    assert [record.gap for record in records] == pytest.approx(
        [sum(expected) / 3] * 2, rel=tolerance(torch.float32)
    )


def test_fedex_loras_gap_is_between_updates(formulas):
    """Its next update is s Σ ρ_i B_i A_i, of which the backbone holds a part."""
    case = formulas(3, sizes=[10, 20, 30])
    expected = 0.0
    for client in range(3):
        square = (case.centers[client] - case.mean())[-6:].square().sum()
        for layer in LAYERS:
            a, b = pair(case.layout, case.centers[client], layer)
            square += (0.5 * (b @ a - mean_product(case, case.centers, layer))).square().sum()
        expected += float(square.sqrt()) / 3
    for record in case.federation("strategy=fedex_lora", "rounds=2").rounds():
        assert record.gap == pytest.approx(expected, rel=tolerance(torch.float32))
