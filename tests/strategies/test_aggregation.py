"""Other ways to aggregate LoRA: on clients whose answers are formulas, and on a tiny model."""

import pytest
import torch

from equality import assert_near, tolerance
from fedmerge_peft import (
    AdapterLayout,
    AdapterSoup,
    BackboneError,
    Federation,
    RecipeError,
    federate,
    merge_error,
)
from fedmerge_peft.adapters.lora_factors import (
    RANDOM_INIT_SUFFIXES,
    layer_factors,
    product_svd,
    rank_mask,
    suffix_mask,
)
from fedmerge_peft.strategies import Reply

pytestmark = pytest.mark.equality

LAYERS = ("one", "two")


def pair(layout, row, layer):
    state = layout.state_dict(row)
    return state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]


def mean_product(case, rows, layer, ranks=None):
    """Σ_i ρ_i B_i A_i over the first r_i ranks, densely."""
    total = 0.0
    for client, (share, row) in enumerate(zip(case.shares, rows, strict=True)):
        a, b = pair(case.layout, row, layer)
        rank = ranks[client] if ranks else len(a)
        total = total + share * b[:, :rank] @ a[:rank]
    return total


# ---- FedProx, and Adam on the server ------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.1, 3.0])
def test_fedproxs_clients_stop_between_their_minimum_and_what_they_were_sent(formulas, mu):
    """argmin ½ ‖θ − c_i‖² + μ/2 ‖θ − θ_sent‖² = (c_i + μ θ_sent) / (1 + μ), whose mean is the next θ."""
    case = formulas(3, sizes=[10, 20, 30])
    strategy, expected = case.strategy("fedprox", mu=mu), case.fresh_row(0)
    for _ in range(3):
        case.round(strategy)
        expected = (case.mean() + mu * expected) / (1 + mu)
        torch.testing.assert_close(strategy.served(1), expected)


def test_fedadam_steps_by_its_formula(formulas):
    """m ← β₁ m + (1 − β₁) δ,  v ← β₂ v + (1 − β₂) δ²,  θ ← θ − η m̂ / (√v̂ + τ), with β₂ = 0.99 and τ = 1e-3.

    m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ) are Adam's own, as both moments start at zero.
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


# ---- ranks ---------------------------------------------------------------------------------------


def test_ranks_are_rows_of_a_and_columns_of_b_in_embeddings_too(make_backbone):
    backbone = make_backbone("bert", {"r": 3, "target_modules": ["query", "word_embeddings"]})
    row = backbone.fresh_row(0) + 1.0
    whole, part = (
        row.clone(),
        torch.where(rank_mask(backbone.layout, lambda _: slice(1, 3)), row, 0.0),
    )
    assert {layer.embedding for layer in layer_factors(backbone.layout)} == {True, False}
    for layer in layer_factors(backbone.layout):
        (a, b), (a_part, b_part) = layer.split(whole), layer.split(part)
        assert a.shape[0] == b.shape[1] == 3
        torch.testing.assert_close(b_part @ a_part, b[:, 1:] @ a[1:])
        assert not a_part[0].any()
        assert not b_part[:, 0].any()


def test_products_of_two_matrices_are_told_from_other_updates_in_one_way():
    def layout(*shapes, role="lora"):
        return AdapterLayout.from_tensors([(f"a.{name}", shape, role) for name, shape in shapes])

    plain = [("lora_A.weight", (2, 3)), ("lora_B.weight", (3, 2)), ("lora_B.bias", (3,))]
    assert [layer.module for layer in layer_factors(layout(*plain))] == ["a"]
    others = {
        "is the factor of a convolution": layout(
            ("lora_A.weight", (2, 3, 3, 3)), ("lora_B.weight", (3, 2, 1, 1))
        ),
        "stacks several experts": layout(*plain, role="expert"),
        "DoRA's magnitudes": layout(*plain, ("lora_magnitude_vector", (3,))),
    }
    for reason, other in others.items():
        with pytest.raises(ValueError, match=reason):
            layer_factors(other)
        with pytest.raises(ValueError, match=rf"no exact merge: .*{reason}"):
            merge_error(AdapterSoup(torch.zeros(2, other.size), other), torch.tensor([0.5, 0.5]))
    for alone in (plain[0], plain[1], ("lora_embedding_A", (2, 5)), ("lora_embedding_B", (4, 2))):
        with pytest.raises(
            ValueError, match=rf"the other factor of a.{alone[0]} is frozen and shared"
        ):
            layer_factors(layout(alone))


def test_what_is_shared_with_a_frozen_a_is_what_starts_random(make_backbone):
    lora = {"r": 3, "target_modules": ["query", "word_embeddings"]}
    layout = make_backbone("bert", lora).layout
    random = {
        entry.key
        for entry in layout.entries
        if suffix_mask(layout, RANDOM_INIT_SUFFIXES)[entry.offset]
    }
    assert len({key.rpartition(".lora_")[2] for key in random}) == 2
    assert make_backbone("bert", {**lora, "merge": "shared_a"}).shared.keys() == random


def test_the_decomposition_through_small_factors_is_the_dense_one():
    generator = torch.Generator().manual_seed(0)
    for rank in (2, 5, 40):
        b, a = torch.randn(7, rank, generator=generator), torch.randn(rank, 6, generator=generator)
        u, s, vh = product_svd(b, a)
        torch.testing.assert_close(u * s @ vh, b.double() @ a.double())
        torch.testing.assert_close(s, torch.linalg.svdvals(b.double() @ a.double())[: len(s)])
        torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64))


# ---- FFA-LoRA and FedSA-LoRA ---------------------------------------------------------------------


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
                for share, c in zip(case.shares, case.centres, strict=True)
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


def test_fedsa_lora_averages_a_alone(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy, start = case.strategy("fedsa_lora"), case.fresh_row(0)
    case.round(strategy, [0, 1])
    for client, own in enumerate([case.centres[0], case.centres[1], start]):
        for layer in LAYERS:
            a, b = pair(case.layout, strategy.served(client), layer)
            torch.testing.assert_close(a, pair(case.layout, case.mean([0, 1]), layer)[0])
            torch.testing.assert_close(b, pair(case.layout, own, layer)[1])
        torch.testing.assert_close(strategy.served(client)[-6:], own[-6:])
    assert strategy.traffic(0) == (4 * 6 + 4 * 5, 4 * 6 + 4 * 5)


def test_fedsa_lora_needs_an_a_that_trains(smoke):
    with pytest.raises(
        RecipeError, match=r"strategy.name: fedsa_lora averages A, which does not train"
    ):
        Federation(smoke("strategy=fedsa_lora", "lora.merge=shared_a"))


# ---- FlexLoRA ------------------------------------------------------------------------------------


def test_flexlora_is_exact_where_the_mean_has_the_rank(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    direction = torch.randn(case.layout.size, generator=torch.Generator().manual_seed(1))
    case.centres = torch.stack([direction] * 3)
    for client in range(3):  # one A for all, so that the mean has rank 4
        for layer in LAYERS:
            pair(case.layout, case.centres[client], layer)[1].mul_(client - 0.5)
    strategy = case.strategy("flexlora")
    case.round(strategy)
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(0), layer)
        assert_near(b @ a, mean_product(case, case.centres, layer))


def test_flexlora_is_the_best_approximation_otherwise(formulas):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("flexlora")
    case.round(strategy)
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(0), layer)
        exact = mean_product(case, case.centres, layer)
        u, s, vh = torch.linalg.svd(exact)
        assert_near(b @ a, u[:, :4] * s[:4] @ vh[:4])
        assert torch.linalg.matrix_norm(exact - b @ a) == pytest.approx(
            float(s[4:].norm()), rel=tolerance(torch.float32)
        )
        assert_near(a @ a.T, torch.eye(4))
    torch.testing.assert_close(strategy.served(0)[-6:], case.mean()[-6:])


def test_flexlora_gives_each_client_the_first_directions_of_its_rank(formulas):
    case = formulas(5, sizes=[10, 20, 30, 40, 50])
    strategy = case.strategy("flexlora", ranks=[1, 4])
    ranks = [1, 4, 1, 4, 1]
    case.round(strategy)
    for layer in LAYERS:
        u, s, vh = torch.linalg.svd(mean_product(case, case.centres, layer, ranks))
        for client, rank in enumerate(ranks):
            a, b = pair(case.layout, strategy.served(client), layer)
            assert_near(b @ a, u[:, :rank] * s[:rank] @ vh[:rank])
            assert not a[rank:].any()
            assert not b[:, rank:].any()
    assert strategy.traffic(0) == (6 + 7 + 5 + 6 + 6,) * 2
    assert strategy.traffic(1) == (4 * (6 + 7 + 5 + 6) + 6,) * 2


def test_flexlora_leaves_no_direction_that_could_not_be_learned_again(formulas):
    """One client of rank 1 alone gives a mean of rank 1; the other directions keep an A, without which B would have no gradient."""
    case = formulas(3)
    strategy = case.strategy("flexlora", ranks=[1, 4])
    case.round(strategy, [0])
    for layer in LAYERS:
        a, b = pair(case.layout, strategy.served(1), layer)
        centre_a, centre_b = pair(case.layout, case.centres[0], layer)
        assert_near(b @ a, centre_b[:, :1] @ centre_a[:1])
        assert (a.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_ranks_are_at_most_the_slots(formulas, name):
    with pytest.raises(
        RecipeError,
        match=r"strategy.ranks: 8 exceeds the adapter's rank of 4; lower it, or raise lora.r",
    ):
        formulas(3).strategy(name, ranks=[2, 8])


# ---- FLoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [None, [1, 4]])
def test_flora_adds_the_mean_of_the_updates_to_the_backbone(formulas, ranks):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("flora", ranks=ranks)
    before = [pair(case.layout, strategy.served(1), layer)[0] for layer in LAYERS]
    case.round(strategy)
    for layer, old in zip(LAYERS, before, strict=True):
        expected = 0.5 * mean_product(case, case.centres, layer, [1, 4, 1] if ranks else None)
        assert_near(strategy.base[layer], expected)
        a, b = pair(case.layout, strategy.served(1), layer)
        assert not b.any()
        assert not torch.equal(a, old)
    torch.testing.assert_close(strategy.served(1)[-6:], case.mean()[-6:])
    case.round(strategy)  # the same answers again, on other fresh factors
    for layer in LAYERS:
        assert_near(
            strategy.base[layer],
            mean_product(case, case.centres, layer, [1, 4, 1] if ranks else None),
        )


def test_flora_sends_the_stacks_that_a_client_has_not_had_yet(formulas):
    case = formulas(3)
    strategy = case.strategy("flora", ranks=[1, 4])
    one, four, head = 24, 96, 6
    assert strategy.traffic(0) == (head, one + head)
    case.round(strategy, [0, 1])
    assert [strategy.traffic(client) for client in range(3)] == [
        (one + four + head, up + head) for up in (one, four, one)
    ]
    case.round(strategy, [2])
    assert [strategy.traffic(client)[0] for client in range(3)] == [one + four + one + head] * 2 + [
        one + head
    ]


def test_floras_backbone_computes_what_the_adapter_did(make_backbone):
    """W + ΔW with fresh factors gives the outputs of W with the factors behind ΔW; taking ΔW away restores every bit."""
    tokens = torch.tensor([[5, 6, 7, 8]])
    for kind, target in (("bert", "query"), ("gpt2", "c_attn")):
        backbone = make_backbone(
            kind, {"r": 2, "alpha": 6.0, "use_rslora": True, "target_modules": [target]}
        )
        strategy = flora_of(backbone)
        before = {
            name: value.clone()
            for name, value in backbone.model.state_dict().items()
            if "lora_" not in name
        }
        trained = strategy.served(0) + 0.1 * torch.randn(
            backbone.layout.size, generator=torch.Generator().manual_seed(0)
        )
        backbone.load_row(trained)
        expected = outputs(backbone, tokens)
        strategy.update([Reply(0, (strategy.served(0) - trained)[None], 10, 1.0, 0.0)])
        backbone.set_base(strategy.base)
        backbone.load_row(strategy.served(0))
        assert_near(outputs(backbone, tokens), expected)
        backbone.set_base({})
        after = backbone.model.state_dict()
        assert all(
            torch.equal(after[name], value)
            for name, value in before.items()
            if "modules_to_save" not in name
        )


def flora_of(backbone, clients=1):
    from fedmerge_peft.recipe.strategies import FLoraRecipe
    from fedmerge_peft.strategies import StrategyContext, make_strategy

    return make_strategy(
        FLoraRecipe(name="flora"),
        StrategyContext(clients, backbone.layout, backbone.fresh_row, scaling=backbone.scaling),
    )


def outputs(backbone, tokens):
    with torch.no_grad():
        return backbone.model(input_ids=tokens).logits


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_nothing_is_added_to_a_layer_that_is_tied_to_another(make_backbone):
    backbone = make_backbone("gpt2", {"r": 2, "target_modules": ["lm_head"]})
    name = next(iter(backbone.scaling))
    with pytest.raises(
        BackboneError, match=r"lora.target_modules: .*lm_head is tied to another layer"
    ):
        backbone.set_base({name: torch.zeros(1)})


def test_flora_refuses_embeddings(make_backbone):
    with pytest.raises(
        RecipeError,
        match=r"lora.target_modules: flora supports linear layers only, but .*word_embeddings is an embedding",
    ):
        flora_of(make_backbone("bert", {"target_modules": ["query", "word_embeddings"]}))


def test_a_soup_keeps_what_the_backbone_gained(tmp_path):
    layout = AdapterLayout.from_tensors([("a.lora_A.weight", (2, 3), "lora")])
    soup = AdapterSoup(
        torch.ones(1, 6), layout, {"s": torch.ones(2)}, {"a": torch.arange(6.0).view(2, 3)}
    )
    soup.save(tmp_path / "soup.safetensors")
    again = AdapterSoup.load(tmp_path / "soup.safetensors")
    assert torch.equal(again.base["a"], soup.base["a"])
    assert again.shared.keys() == {"s"}


# ---- on a tiny model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffa_lora", "fedsa_lora", "flexlora", "flora"])
def test_two_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path, name):
    run = federate(smoke(f"strategy={name}"), tmp_path / "run", engine=smoke_engine)
    head = len(smoke_engine.backbone.layout.columns("head"))
    a = b = 4 * 2 * 32  # two layers' query and value, at rank 2
    travels = {
        "ffa_lora": 2 * [(b + head, b + head)],
        "fedsa_lora": 2 * [(a, a)],
        "flexlora": 2 * [(a + b + head, a + b + head)],
        "flora": [(head, a + b + head), (6 * (a + b) + head, a + b + head)],
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
    """Of a client's s B_i A_i and what it gets next: the rank-r approximation of the mean for FlexLoRA, the mean itself for FLoRA."""
    case = formulas(3, sizes=[10, 20, 30])
    federation = case.federation(f"strategy={{name: {name}, ranks: {ranks}}}", "rounds=2")
    held, expected = [ranks[client % len(ranks)] for client in range(3)], []
    records = list(federation.rounds())
    for client, rank in enumerate(held):
        square = (case.centres[client] - case.mean())[-6:].square().sum()
        for layer in LAYERS:
            mean = mean_product(case, case.centres, layer, held)
            u, s, vh = torch.linalg.svd(mean)
            a, b = pair(case.layout, case.centres[client], layer)
            gets = mean if name == "flora" else u[:, :rank] * s[:rank] @ vh[:rank]
            square += (0.5 * (b[:, :rank] @ a[:rank] - gets)).square().sum()
        expected.append(float(square.sqrt()))
    assert [record.gap for record in records] == pytest.approx(
        [sum(expected) / 3] * 2, rel=tolerance(torch.float32)
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        "lora.alpha=5",
        "lora.use_rslora=true",
        "lora.alpha_pattern={query: 3}",
        "lora.rank_pattern={layer.0.attention.self.query: 3}",
    ],
)
def test_a_saved_adapter_of_flora_loads_in_plain_peft_and_gives_the_same_logits(
    smoke, tiny_models, tmp_path, lora, exact
):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    federation = Federation(
        smoke("strategy=flora", lora, "training.learning_rate=0.05", "rounds=3")
    )
    run = federate(federation.recipe, tmp_path / "run", engine=federation.engine)
    backbone = federation.engine.backbone
    run.save_adapter("Harbour Clinic", tmp_path / "adapter", exact=exact)
    plain = AutoModelForSequenceClassification.from_pretrained(
        tiny_models / "bert", num_labels=len(federation.engine.task.labels)
    )
    plain = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    soup = run.soup
    backbone.eval()
    backbone.load_row(soup.rows[0])
    backbone.set_base({})
    without = outputs(backbone, tokens)
    backbone.set_base(soup.base)
    served = outputs(backbone, tokens)
    assert (served - without).abs().max() > 1e-3
    with torch.no_grad():
        assert_near(plain(input_ids=tokens).logits, served)


def test_the_next_federation_on_an_engine_finds_the_backbone_as_it_was(smoke, smoke_engine):
    fresh = Federation(smoke("strategy=fedavg"), smoke_engine).evaluate()
    list(Federation(smoke("strategy=flora", "training.learning_rate=1e-3"), smoke_engine).rounds())
    assert Federation(smoke("strategy=fedavg"), smoke_engine).evaluate() == fresh
