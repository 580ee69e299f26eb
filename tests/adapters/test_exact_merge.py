"""The average of the parameters and the average of the updates, on real PEFT models."""

import pytest
import torch

from equality import tolerance
from fedmerge_peft import AdapterSoup, concat, merge_error
from fedmerge_peft.adapters.soup import OwnParts

pytestmark = pytest.mark.equality


def soup_of(backbone, adapters=3):
    """Adapters whose B is not zero, as after training."""
    rows = torch.stack([backbone.fresh_row(number) for number in range(adapters)])
    return AdapterSoup(
        rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)),
        backbone.layout,
        backbone.shared,
    )


def test_concatenation_gives_the_average_of_the_updates(make_backbone):
    """Merging equals adding Σ_j π_j scaling B_j A_j to the weight of every layer."""
    backbone = make_backbone("bert", {"r": 4, "target_modules": ["query", "value", "dense"]})
    soup, weights = soup_of(backbone), torch.tensor([0.2, 0.5, 0.3])
    state, config = concat(soup, weights, backbone.config.to_dict())
    assert (config["r"], config["lora_alpha"]) == (12, 48.0)
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        b_key = key.replace("lora_A", "lora_B")
        each = [soup.state_dict(row) for row in soup.rows]
        expected = sum(
            weight * one[b_key] @ one[key] for weight, one in zip(weights, each, strict=True)
        )
        torch.testing.assert_close(state[b_key] @ state[key], expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_without_weight_are_not_concatenated(make_backbone, use_rslora):
    backbone = make_backbone(
        "bert", {"r": 4, "use_rslora": use_rslora, "target_modules": ["query"]}
    )
    soup, config = soup_of(backbone), backbone.config.to_dict()
    state, found = concat(soup, torch.tensor([0.25, 0.0, 0.75]), config)
    expected, less = concat(
        AdapterSoup(soup.rows[[0, 2]], soup.layout, soup.shared), torch.tensor([0.25, 0.75]), config
    )
    assert found == less
    assert found["r"] == 8
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_concatenation_keeps_the_scaling(make_backbone, use_rslora):
    backbone = make_backbone(
        "bert", {"r": 4, "alpha": 6.0, "use_rslora": use_rslora, "target_modules": ["query"]}
    )
    _, config = concat(soup_of(backbone), torch.tensor([0.2, 0.5, 0.3]), backbone.config.to_dict())
    power = 0.5 if use_rslora else 1.0
    assert config["lora_alpha"] / config["r"] ** power == pytest.approx(6.0 / 4**power)


def test_parameter_averages_are_off_by_the_cross_terms(make_backbone):
    soup = soup_of(make_backbone("bert", {"target_modules": ["query"]}))
    weights = torch.tensor([0.2, 0.5, 0.3])
    a_key, b_key = (
        next(key for key in soup.state_dict(soup.rows[0]) if factor in key)
        for factor in ("lora_A", "lora_B")
    )
    only = {key for key in soup.state_dict(soup.rows[0]) if "lora_" in key}
    assert merge_error(soup, weights) > 0.1
    off = exact = 0.0
    for a_key in sorted(key for key in only if "lora_A" in key):
        b_key = a_key.replace("lora_A", "lora_B")
        each = [soup.state_dict(row) for row in soup.rows]
        update = sum(w * s[b_key] @ s[a_key] for w, s in zip(weights, each, strict=True))
        average = sum(w * s[b_key] for w, s in zip(weights, each, strict=True)) @ sum(
            w * s[a_key] for w, s in zip(weights, each, strict=True)
        )
        off += (average - update).square().sum()
        exact += update.square().sum()
    assert merge_error(soup, weights) == pytest.approx(
        float((off / exact).sqrt()), rel=tolerance(torch.float32)
    )


def test_a_shared_a_makes_the_parameter_average_exact(make_backbone):
    soup = soup_of(
        make_backbone("bert", {"target_modules": ["query", "value"], "merge": "shared_a"})
    )
    assert merge_error(soup, torch.tensor([0.2, 0.5, 0.3])) < 1e-6


def test_one_hot_weights_make_the_parameter_average_exact(make_backbone):
    soup = soup_of(make_backbone("bert", {"target_modules": ["query"]}))
    assert merge_error(soup, torch.tensor([0.0, 1.0, 0.0])) < 1e-6


def test_adapters_without_updates_have_no_error(make_backbone):
    backbone = make_backbone("bert", {"target_modules": ["query"]})
    soup = AdapterSoup(torch.stack([backbone.fresh_row(0), backbone.fresh_row(1)]), backbone.layout)
    assert merge_error(soup, torch.tensor([0.5, 0.5])) == 0.0


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.2, 0.5, 0.3]])
def test_clients_with_one_a_and_b_of_their_own_are_merged_exactly(make_backbone, weights):
    backbone = make_backbone("bert", {"r": 4, "target_modules": ["query"]})
    layout, clients = backbone.layout, torch.tensor(weights)
    of_b = torch.cat(
        [
            torch.arange(entry.columns.start, entry.columns.stop)
            for entry in layout.entries
            if entry.key.endswith("lora_B.weight")
        ]
    )
    rows = soup_of(backbone).rows[:1].clone()
    rows[:, of_b] = 0
    own = torch.randn(3, len(of_b), generator=torch.Generator().manual_seed(1))
    soup = AdapterSoup(rows, layout, backbone.shared, own=OwnParts(of_b, own, private=True))
    state, config = concat(soup, torch.ones(1), backbone.config.to_dict(), clients)
    assert config["r"] == 4
    each = [soup.state_dict(soup.merge(torch.ones(1), one)) for one in torch.eye(3)]
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        b_key = key.replace("lora_A", "lora_B")
        expected = sum(w * one[b_key] @ one[key] for w, one in zip(weights, each, strict=True))
        torch.testing.assert_close(state[b_key] @ state[key], expected)
        assert expected.abs().max() > 0
    several = AdapterSoup(rows.repeat(2, 1), layout, backbone.shared, own=soup.own)
    with pytest.raises(
        ValueError, match=r"no exact merge: clients have own parts .*; use exact=False"
    ):
        concat(several, torch.tensor([0.5, 0.5]), backbone.config.to_dict(), clients)


def test_dora_has_no_exact_merge(make_backbone):
    soup = soup_of(make_backbone("bert", {"target_modules": ["query"], "use_dora": True}))
    with pytest.raises(ValueError, match="DoRA"):
        merge_error(soup, torch.tensor([0.2, 0.5, 0.3]))
