"""FLoRA adds the mean of the updates to the backbone, FedEx-LoRA the error of averaged factors."""

import pytest
import torch

from equality import assert_near
from fedmerge_peft import (
    AdapterLayout,
    AdapterSoup,
    BackboneError,
    Federation,
    RecipeError,
    federate,
)
from fedmerge_peft.strategies import Reply
from strategies.factor_pairs import LAYERS, mean_product, outputs, pair

pytestmark = pytest.mark.equality


@pytest.mark.parametrize("ranks", [None, [1, 4]])
def test_flora_adds_the_mean_of_the_updates_to_the_backbone(formulas, ranks):
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("flora", ranks=ranks)
    before = [pair(case.layout, strategy.served(1), layer)[0] for layer in LAYERS]
    case.round(strategy)
    for layer, old in zip(LAYERS, before, strict=True):
        expected = 0.5 * mean_product(case, case.centers, layer, [1, 4, 1] if ranks else None)
        assert_near(strategy.base[layer], expected)
        a, b = pair(case.layout, strategy.served(1), layer)
        assert not b.any()
        assert not torch.equal(a, old)
    torch.testing.assert_close(strategy.served(1)[-6:], case.mean()[-6:])
    case.round(strategy)  # the same answers again, on other fresh factors
    for layer in LAYERS:
        assert_near(
            strategy.base[layer],
            mean_product(case, case.centers, layer, [1, 4, 1] if ranks else None),
        )


def test_flora_sends_the_stacks_that_a_client_has_not_received(formulas):
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


def test_fedex_lora_serves_the_exact_mean_of_the_clients_models(formulas):
    """ΔW + s B A = s Σ ρ_i B_i A_i after one round, and after each later one."""
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("fedex_lora")
    for _ in range(2):  # clients start from other factors and backbones, and go to c_i again
        base = {layer: strategy.base[layer].clone() for layer in LAYERS}
        case.round(strategy)
        torch.testing.assert_close(strategy.served(1), case.mean())
        for layer in LAYERS:
            a, b = pair(case.layout, strategy.served(1), layer)
            expected = base[layer] + 0.5 * mean_product(case, case.centers, layer)
            assert_near(strategy.base[layer] + 0.5 * b @ a, expected)
            assert torch.linalg.matrix_rank(strategy.base[layer]) > len(a)


def test_fedex_loras_backbone_needs_no_more_ranks_than_it_sends(formulas):
    """Σ ρ_i (B_i − B) (A_i − A) of two clients has rank r, and of one client it is zero."""
    case = formulas(3)
    strategy = case.strategy("fedex_lora")
    case.round(strategy, [1])
    assert_near(strategy.base["one"], torch.zeros(7, 6))
    torch.testing.assert_close(strategy.served(0), case.centers[1])
    case.round(strategy, [0, 2])
    assert torch.linalg.matrix_rank(strategy.base["one"], atol=1e-4) == 4


def test_fedex_lora_sends_the_adapter_and_the_updates_that_a_client_has_not_received(formulas):
    case = formulas(3)
    strategy = case.strategy("fedex_lora")
    factors, size = 96, 96 + 6
    assert strategy.traffic(0) == (size, size)
    case.round(strategy)
    assert [strategy.traffic(client) for client in range(3)] == 3 * [(2 * factors + size, size)]
    case.round(strategy, [0, 1])
    assert [strategy.traffic(client)[0] for client in range(3)] == [
        factors + size,
        factors + size,
        3 * factors + size,
    ]
    case.round(strategy, [2])
    assert strategy.traffic(2) == (size, size)


def test_floras_backbone_replaces_the_adapter(make_backbone):
    """W + ΔW with fresh factors gives the outputs of W with the factors of ΔW.

    Removing ΔW restores every bit.
    """
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


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_layers_are_refused(make_backbone):
    backbone = make_backbone("gpt2", {"r": 2, "target_modules": ["lm_head"]})
    name = next(iter(backbone.scaling))
    with pytest.raises(
        BackboneError, match=r"lora.target_modules: .*lm_head is tied to another layer"
    ):
        backbone.set_base({name: torch.zeros(1)})


def test_flora_refuses_embeddings(make_backbone):
    with pytest.raises(
        RecipeError,
        match=(
            r"lora.target_modules: flora supports linear layers only, "
            r"but .*word_embeddings is an embedding"
        ),
    ):
        flora_of(make_backbone("bert", {"target_modules": ["query", "word_embeddings"]}))


def test_a_soup_keeps_the_backbones_added_updates(tmp_path):
    layout = AdapterLayout.from_tensors([("a.lora_A.weight", (2, 3), "lora")])
    soup = AdapterSoup(
        torch.ones(1, 6), layout, {"s": torch.ones(2)}, {"a": torch.arange(6.0).view(2, 3)}
    )
    soup.save(tmp_path / "soup.safetensors")
    again = AdapterSoup.load(tmp_path / "soup.safetensors")
    assert torch.equal(again.base["a"], soup.base["a"])
    assert again.shared.keys() == {"s"}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("flora", "lora.alpha=5"),
        ("flora", "lora.use_rslora=true"),
        ("flora", "lora.alpha_pattern={query: 3}"),
        ("flora", "lora.rank_pattern={layer.0.attention.self.query: 3}"),
        ("fedex_lora", "lora.alpha=5"),
    ],
)
def test_a_saved_adapter_loads_in_plain_peft_and_gives_the_same_logits(
    smoke, tiny_models, tmp_path, name, lora, exact
):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    federation = Federation(
        smoke(f"strategy={name}", lora, "training.learning_rate=0.05", "rounds=3")
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


def test_the_next_federation_on_an_engine_starts_from_the_original_backbone(smoke, smoke_engine):
    fresh = Federation(smoke("strategy=fedavg"), smoke_engine).evaluate()
    list(Federation(smoke("strategy=flora", "training.learning_rate=1e-3"), smoke_engine).rounds())
    assert Federation(smoke("strategy=fedavg"), smoke_engine).evaluate() == fresh
