"""Fed-RoD: FedAvg with a balanced loss, and personal heads added to its head."""

import pytest
import torch

from equality import assert_near
from fedmerge_peft import AdapterLayout, federate
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.strategies import Reply

LAYOUT = AdapterLayout.from_tensors(
    [
        ("one.lora_A.weight", (2, 3), "lora"),
        ("dense.weight", (4, 4), "head"),
        ("dense.bias", (4,), "head"),
        ("out.weight", (3, 4), "head"),
        ("out.bias", (3,), "head"),
    ]
)
LAST = torch.arange(LAYOUT.size - 15, LAYOUT.size)
"""Weight and bias of the head's last layer."""


def test_the_personal_head_is_added_to_the_averaged_one(formulas):
    """G trains to Σ ρ_i c_i. G + P_i trains to c_i from G as sent, so P_i = c_i − G(sent)."""
    case = formulas(3, LAYOUT, sizes=[10, 20, 30])
    fedrod, fedavg = case.strategy("fedrod"), case.strategy("fedavg")
    sent = fedavg.adapter(0)
    for _ in range(2):
        sent = fedavg.adapter(0)
        case.round(fedrod)
        case.round(fedavg)
    for client in range(3):
        expected = fedavg.adapter(client)
        expected[LAST] += case.centers[client][LAST] - sent[LAST]
        assert_near(fedrod.served(client), expected, 0)
    assert torch.equal(fedrod.soup.rows, fedavg.soup.rows)
    assert_near(
        fedrod.soup.merge(fedrod.weights, torch.eye(3)),
        torch.stack([fedrod.served(client) for client in range(3)]),
        0,
    )


def test_the_generic_head_has_a_balanced_loss_and_the_personal_one_a_plain_loss(formulas):
    case = formulas(2, LAYOUT)
    strategy = case.strategy("fedrod")
    case.round(strategy)
    generic, personal = strategy.plan(1).jobs
    assert (generic.logits, personal.logits) == ("adjusted", "plain")
    assert generic.phases == (None,)
    assert personal.phases[0].nonzero().flatten().tolist() == LAST.tolist()
    assert torch.equal(generic.row, strategy.soup.rows[0])
    assert torch.equal(personal.row, strategy.served(1))
    assert strategy.traffic(1) == (LAYOUT.size, LAYOUT.size)


def test_a_client_without_a_round_is_served_the_generic_head(formulas):
    case = formulas(3, LAYOUT)
    strategy = case.strategy("fedrod")
    case.round(strategy, [0, 1])
    assert torch.equal(strategy.served(2), strategy.soup.rows[0])
    step = torch.stack([torch.ones(LAYOUT.size), 2 * torch.ones(LAYOUT.size)])
    strategy.update([Reply(2, step, 10, 1.0, 0.0)])
    difference = strategy.served(2) - strategy.soup.rows[0]
    assert_near(difference[LAST], torch.full((len(LAST),), -2.0))
    assert not difference[: -len(LAST)].any()


def test_it_needs_a_head(formulas):
    layout = AdapterLayout.from_tensors([("one.lora_A.weight", (2, 3), "lora")])
    with pytest.raises(RecipeError, match="fedrod adds personal heads to a head"):
        formulas(2, layout).strategy("fedrod")


def test_its_adapters_are_plain_on_a_tiny_model(smoke, smoke_engine, tmp_path):
    """The logits of a client's adapter are those of both heads."""
    run = federate(smoke("strategy=fedrod"), tmp_path / "run", engine=smoke_engine)
    layout, own = smoke_engine.backbone.layout, run.soup.own
    assert own.columns.tolist() == [
        *layout.columns("head").tolist()
    ]  # the tiny model's head is one layer
    rows = run.soup.merge(run.state()[1], torch.eye(6))
    batch = smoke_engine.runtime.collate(smoke_engine.clients[0].test)
    _, inputs = smoke_engine.runtime.to_device(batch)
    backbone = smoke_engine.backbone
    backbone.eval()

    def logits(row):
        backbone.load_row(row)
        with torch.no_grad():
            return backbone.model(**inputs).logits

    generic = logits(run.soup.rows[0])
    personal = run.soup.rows[0].clone()
    personal[own.columns] = own.residuals[0]
    torch.testing.assert_close(logits(rows[0]), generic + logits(personal))
    assert own.residuals.abs().amax(dim=1).min() > 0
