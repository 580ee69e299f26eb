"""Private heads: any averaging method shares the body and leaves each client its head."""

import pytest
import torch
from pydantic import ValidationError

from fedmerge_peft import Recipe, federate
from fedmerge_peft.adapters.soup import AdapterSoup, OwnParts
from fedmerge_peft.errors import RecipeError, RunError
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.recipe.strategies import STRATEGIES
from fedmerge_peft.serving.export import export_all, export_client, export_soup
from fedmerge_peft.serving.personalize import personalize
from fedmerge_peft.testing import strategy_recipe
from fedmerge_peft.training.plan import InTurn, Train

SETTINGS = {"fedmerge": {"warm_rounds": 1, "groups": 2, "adapters": 2}}
NAMES = [name for name, section in STRATEGIES.sections().items() if "head" in section.model_fields]


def private(case, name, **settings):
    own = SETTINGS.get(name, {})
    return case.strategy(name, head="private", **own, **settings)


def trained_head(case, name, client, number):
    """The head that a client has after this number of rounds, each with exact training."""
    head = case.layout.columns("head")
    row = case.fresh_row(0)
    for _ in range(number):
        row = case.train(client, Train(row, proximal=0.05 if name == "fedprox" else None)).row
    return row[head]


def test_every_method_that_averages_a_head_can_leave_it_private():
    without = {"local", "ditto", "fedper", "fedrep", "fedrod", "feddpa", "fedalt", "fedsa_lora"}
    without |= {"fedpac", "femam"}
    assert {*STRATEGIES.sections()} - {*NAMES} == {*without, "fedem"}


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fedper_is_fedavg_with_private_heads(formulas, momentum):
    case = formulas(3, sizes=[10, 20, 30])
    one = case.strategy("fedper", server_momentum=momentum)
    other = case.strategy("fedavg", head="private", server_momentum=momentum)
    for clients in ([0, 1], [1, 2], [0, 1, 2]):
        case.round(one, clients)
        case.round(other, clients)
        for client in range(3):
            assert torch.equal(one.served(client), other.served(client))


@pytest.mark.parametrize("name", NAMES)
def test_the_body_is_that_of_the_method_and_each_head_is_trained_by_its_client_alone(
    formulas, name
):
    case = formulas(4, sizes=[10, 20, 30, 40])
    strategy, head = private(case, name), case.layout.columns("head")
    body = torch.ones(case.layout.size, dtype=torch.bool)
    body[head] = False
    for number in range(3):
        plans = [strategy.plan(client) for client in range(4)]
        for client, plan in enumerate(plans):
            expected = trained_head(case, name, client, number)
            torch.testing.assert_close(plan.sent[:, head], expected.expand(len(plan.sent), -1))
        case.round(strategy, range(4))
    torch.testing.assert_close(
        torch.stack([strategy.served(client)[head] for client in range(4)]),
        torch.stack([trained_head(case, name, client, 3) for client in range(4)]),
    )
    merged = strategy.soup.merge(strategy.weights, torch.eye(4))
    for client in range(4):
        torch.testing.assert_close(merged[client], strategy.served(client))
    assert not strategy.soup.rows[:, head].any()
    if name in ("fedavg", "ffa_lora", "rolora"):  # elementwise, so the body is the same
        shared = case.strategy(name)
        for _ in range(3):
            case.round(shared, range(4))
        assert torch.equal(strategy.soup.rows[:, body], shared.soup.rows[:, body])


@pytest.mark.parametrize("name", NAMES)
def test_heads_do_not_travel(formulas, name):
    case = formulas(4)
    size = len(case.layout.columns("head"))
    own = SETTINGS.get(name, {})
    shared, kept = case.strategy(name, **own), private(case, name)
    adapters = 5 if name == "ifca" else 1
    assert tuple(
        full - part for full, part in zip(shared.traffic(0), kept.traffic(0), strict=True)
    ) == (adapters * size, size)


def test_a_proximal_anchor_and_trained_columns_get_the_clients_head(formulas):
    case = formulas(2)
    strategy = private(case, "ffa_lora")
    (mask,) = strategy.plan(0).phases
    assert mask[case.layout.columns("head")].all()
    assert not mask.all()


def test_a_strategy_with_other_plans_is_refused(formulas, monkeypatch):
    case = formulas(2)
    strategy = private(case, "fedavg")
    plan = strategy.inner.plan(0)
    monkeypatch.setattr(strategy.inner, "plan", lambda _: InTurn((plan,)))
    with pytest.raises(RecipeError, match="head: private needs clients that train one adapter"):
        strategy.plan(0)


def test_private_heads_rule_out_privacy_and_own_heads():
    with pytest.raises(RecipeError, match="head: private of the strategy fedavg, because"):
        Recipe.load("smoke", ["strategy={name: fedavg, head: private}", "privacy.mode=local"])
    with pytest.raises(ValidationError, match="own_head: needs a shared head"):
        strategy_recipe("fedmerge", head="private", own_head=True)
    with pytest.raises(ValidationError, match="head"):
        strategy_recipe("fedem", head="private")


def test_own_parts_add_up_and_private_ones_need_a_client(formulas):
    case = formulas(2)
    one = OwnParts(torch.tensor([1, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), private=True)
    other = OwnParts(torch.tensor([3, 5]), torch.tensor([[10.0, 20.0], [30.0, 40.0]]))
    both = one.plus(other)
    assert both.columns.tolist() == [1, 3, 5]
    assert both.residuals.tolist() == [[1.0, 12.0, 20.0], [3.0, 34.0, 40.0]]
    assert both.private
    soup = AdapterSoup(torch.zeros(1, case.layout.size), case.layout, own=both)
    assert soup.merge(torch.ones(1), torch.tensor([0.0, 1.0]))[both.columns].tolist() == [3, 34, 40]
    for clients in (None, torch.tensor([0.5, 0.0])):
        with pytest.raises(ValueError, match="only clients have whole adapters"):
            soup.merge(torch.ones(1), clients)


def test_a_run_with_private_heads_exports_clients_and_refuses_the_rest(
    smoke, smoke_engine, tmp_path
):
    recipe = smoke("rounds=2", "strategy={name: ifca, adapters: 2, head: private}")
    run = federate(recipe, tmp_path / "run", engine=smoke_engine)
    federation = Federation(recipe, smoke_engine)
    list(federation.rounds())
    layout = smoke_engine.backbone.layout
    for number, client in enumerate(run.client_names):
        assert torch.equal(layout.row(run.adapter(client)), federation.strategy.served(number))
    from safetensors.torch import load_file

    export_all(run, tmp_path / "all")
    name = run.client_names[1]
    export_client(run, name, tmp_path / "one")
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    (same,) = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "all").iterdir()
        if folder.name == name
    )
    assert all(torch.equal(one[key], same[key]) for key in one)
    half = run.merge({name: 1, run.client_names[0]: 1}).row
    heads = [federation.strategy.served(number)[layout.columns("head")] for number in (0, 1)]
    torch.testing.assert_close(half[layout.columns("head")], sum(heads) / 2)
    with pytest.raises(RunError, match="the soup has no whole adapters; give shares of"):
        run.merge({0: 1})
    with pytest.raises(RunError, match="export the clients' adapters with --all"):
        export_soup(run, tmp_path / "soup")
    with pytest.raises(RunError, match="a new client has none"):
        personalize(run, tmp_path / "unread.csv")
