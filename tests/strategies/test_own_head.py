"""Decisions of FedMerge: the number of adapters, groups, and the clients' own heads."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from equality import assert_near
from fedmerge_peft import AdapterLayout
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.runs.checkpoint import Checkpoint
from fedmerge_peft.strategies import Reply, make_strategy
from fedmerge_peft.strategies.own_head import own_labels_gain
from fedmerge_peft.testing import FormulaClients, strategy_recipe
from fedmerge_peft.training.plan import InTurn, Train, Trained

CLIENTS = 6
ONE = torch.zeros(CLIENTS, dtype=torch.int64)
OWN_LABELS = torch.eye(CLIENTS, dtype=torch.int64) * 40 + 1


def drawn(distributions, examples, seed=0):
    """Label counts of clients, each drawn from its own distribution, ``(m, classes)``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(distributions, examples, replacement=True, generator=generator)
    return torch.stack([torch.bincount(row, minlength=distributions.shape[1]) for row in labels])


def make(label_counts=None, clients=None, **settings):
    clients = clients or FormulaClients(CLIENTS)
    context = replace(clients.strategy_context(), label_counts=label_counts)
    return make_strategy(strategy_recipe("fedmerge", **settings), context), clients


def play(strategy, clients, rounds):
    for _ in range(rounds):
        strategy.update([clients.reply(c, strategy.plan(c)) for c in range(CLIENTS)])


# ---- the need for own heads ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "examples"), [(2, 30), (7, 48), (150, 48)])
def test_clients_with_the_same_distribution_share_their_head(classes, examples, seed):
    generator = torch.Generator().manual_seed(seed)
    distribution = torch.rand(classes, generator=generator)
    counts = drawn(distribution.repeat(CLIENTS, 1), examples, seed)
    assert own_labels_gain(counts, ONE) == 0


@pytest.mark.parametrize("seed", range(5))
def test_clients_with_their_own_distributions_have_heads_of_their_own(seed):
    torch.manual_seed(seed)
    distributions = torch.distributions.Dirichlet(torch.full((20,), 0.1)).sample((CLIENTS,))
    assert own_labels_gain(drawn(distributions, 50, seed), ONE) > 100


def test_groups_explain_the_labels_of_their_clients():
    kinds = torch.tensor([0, 0, 0, 1, 1, 1])
    distributions = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])[kinds]
    counts = drawn(distributions, 40)
    assert own_labels_gain(counts, ONE) > 50
    assert own_labels_gain(counts, kinds) == 0
    assert own_labels_gain(counts, torch.arange(CLIENTS)) == 0


# ---- the strategy --------------------------------------------------------------------------------


def test_an_own_head_steps_along_the_second_update_and_the_soup_along_the_first():
    """θ_i,head = Θ_head + U_i with U_i ← U_i − δ'_i,head; Θ as in FedAvg from merged adapters."""
    strategy, clients = make(OWN_LABELS, warm_rounds=1, own_head=True, groups=1, server_momentum=0)
    head = clients.layout.columns("head")
    common, own = clients.fresh_row(0), torch.zeros(CLIENTS, len(head))
    for number in range(3):
        served = common.repeat(CLIENTS, 1)
        served[:, head] += own
        for client in range(CLIENTS):
            assert_near(strategy.adapter(client), served[client], 0)
        play(strategy, clients, 1)
        if number:
            own -= (served - clients.centers)[:, head]
        common = common - clients.shares @ (common.repeat(CLIENTS, 1) - clients.centers)
    served = common.repeat(CLIENTS, 1)
    served[:, head] += own
    merged = strategy.soup.merge(strategy.weights, torch.eye(CLIENTS))
    assert_near(merged, served, 0)
    assert_near(strategy.soup.merge(strategy.weights), common.repeat(CLIENTS, 1), 0)


@pytest.mark.parametrize(
    ("settings", "momentum"),
    [({}, 0.5), ({"server_momentum": 0.2}, 0.2), ({"groups": 2}, 0), ({"own_head": False}, 0)],
)
def test_one_adapter_with_own_heads_has_momentum(settings, momentum):
    strategy, clients = make(OWN_LABELS, warm_rounds=1, **{"groups": 1, **settings})
    play(strategy, clients, 2)
    (group,) = strategy.server.optimizer.param_groups
    assert group["momentum"] == momentum


def test_a_momentum_of_zero_is_another_setting_than_none():
    recipes = [strategy_recipe("fedmerge", server_momentum=value) for value in (None, 0.0)]
    assert recipes[0].effective_values() != recipes[1].effective_values()
    shared = [
        strategy_recipe("fedmerge", server_momentum=value, own_head=False) for value in (None, 0.0)
    ]
    assert shared[0].effective_values() == shared[1].effective_values()


@pytest.mark.parametrize(
    ("rule", "defaults", "same"),
    [
        ("normalized", {"weights_lr": 0.3, "weights_columns": "all"}, True),
        ("gradient", {"weights_lr": 1.0, "weights_columns": "all"}, True),
        ("normalized", {"weights_lr": 1.0}, False),
        ("paper", {"weights_lr": 0.01}, True),
        ("paper", {"weights_columns": "head"}, False),
    ],
)
def test_the_defaults_of_a_rule_are_no_other_setting(rule, defaults, same):
    given, unset = (strategy_recipe("fedmerge", rule=rule, **keys) for keys in (defaults, {}))
    assert (given.effective_values() == unset.effective_values()) == same


def test_a_client_alone_in_its_group_trains_once():
    clients = FormulaClients(CLIENTS)
    clients.centers = clients.centers[torch.tensor([0, 1, 1, 1, 1, 1])]
    strategy, _ = make(OWN_LABELS, clients=clients, warm_rounds=1, groups=2)
    play(strategy, clients, 3)
    assert isinstance(strategy.plan(0), Train)
    assert isinstance(strategy.plan(1), InTurn)
    assert not strategy.own_head.rows[0].any()
    assert strategy.own_head.rows[1:].any(dim=1).all()


def test_the_trained_model_of_a_client_with_an_own_head_has_both_updates():
    strategy, clients = make(OWN_LABELS, warm_rounds=1, groups=1)
    play(strategy, clients, 2)
    plan = strategy.plan(0)
    head = clients.layout.columns("head")
    outcomes = [Trained(job.row - number, 1.0, 1) for number, job in enumerate(plan.jobs, 1)]
    outcomes[1].row[:] = plan.jobs[1].row
    outcomes[1].row[head] -= 2
    expected = strategy.adapter(0) - 1
    expected[head] -= 2
    result = plan.result(outcomes, [], 0)
    assert_near(result.trained, expected, 1)
    assert torch.equal(plan.validated_rows(result.trained)[0], strategy.adapter(0))
    assert plan.jobs[1].phases[0].nonzero().flatten().tolist() == head.tolist()


def test_the_decision_follows_from_the_labels_and_is_reported():
    strategy, clients = make(OWN_LABELS, warm_rounds=2, groups=1)
    play(strategy, clients, 1)
    assert strategy.decisions() == []
    play(strategy, clients, 1)
    groups, heads = strategy.decisions()
    assert groups == "1 group of clients: as set in the recipe"
    assert heads.startswith("own heads: the clients' own label distributions explain the labels")
    play(strategy, clients, 1)
    assert strategy.decisions() == []


@pytest.mark.parametrize(
    ("counts", "settings"),
    [
        (None, {}),  # labels that the server must not or cannot know
        (OWN_LABELS, {"own_head": False}),
        (torch.full((CLIENTS, 3), 20), {}),
    ],
    ids=["unknown", "off", "alike"],
)
def test_heads_are_shared_without_a_reason(counts, settings):
    strategy, clients = make(counts, warm_rounds=1, groups=1, **settings)
    play(strategy, clients, 2)
    assert strategy.own_head is None
    assert strategy.soup.own is None


def test_clients_whose_labels_are_not_known_yet_do_not_hide_the_others():
    """A site that joins late has no counts when the server starts."""
    counts = OWN_LABELS.clone()
    counts[0] = 0
    strategy, clients = make(counts, warm_rounds=1, groups=1)
    play(strategy, clients, 1)
    assert strategy.own_head is not None


def test_heads_that_the_recipe_shares_are_not_explained_by_labels():
    strategy, clients = make(OWN_LABELS, warm_rounds=1, groups=1, own_head=False)
    play(strategy, clients, 1)
    assert strategy.decisions()[1] == "shared heads: as set in the recipe"


def test_an_own_head_needs_a_head_and_a_grouping():
    headless = FormulaClients(
        CLIENTS, AdapterLayout.from_tensors([("one.lora_A.weight", (2, 3), "lora")])
    )
    with pytest.raises(RecipeError, match="own_head: this adapter has no head"):
        make(clients=headless, own_head=True)
    make(clients=headless, own_head=False)
    with pytest.raises(ValidationError, match="own heads begin at the grouping of start: warm"):
        strategy_recipe("fedmerge", own_head=True, start="independent")


def test_a_client_has_no_own_head_before_its_first_reply():
    strategy, clients = make(OWN_LABELS, warm_rounds=1, groups=1, own_head=True)
    strategy.update([clients.reply(c, strategy.plan(c)) for c in range(CLIENTS - 1)])
    head = clients.layout.columns("head")
    assert_near(strategy.adapter(CLIENTS - 1)[head], strategy.soup.rows[0, head], 0)
    reply = clients.reply(CLIENTS - 1, strategy.plan(CLIENTS - 1))
    strategy.update([reply])
    assert_near(strategy.own_head.rows[CLIENTS - 1], -reply.deltas[1, head], 0)


def test_a_group_gets_an_adapter_and_clients_that_come_later_join_the_group_they_point_to():
    clients = FormulaClients(CLIENTS)
    clients.centers = clients.centers[torch.arange(CLIENTS) % 2]  # two kinds of clients
    strategy, _ = make(clients=clients, warm_rounds=2)
    for _ in range(2):
        assert strategy.weights.shape == (CLIENTS, 1)
        strategy.update([clients.reply(c, strategy.plan(c)) for c in range(4)])
    assert strategy.weights.shape == (CLIENTS, 2)
    assert strategy.decisions()[0].startswith("2 groups of clients")
    assert strategy.weights[4:].tolist() == [[0.5, 0.5]] * 2
    strategy.update([clients.reply(c, strategy.plan(c)) for c in (4, 5)])
    chosen = strategy.weights.argmax(dim=1).tolist()
    assert chosen == [chosen[0], chosen[1]] * 3
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("momentum", [0.5, None])
@pytest.mark.parametrize("groups", [1, None])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_restored_strategy_goes_on_as_if_it_had_never_stopped(rounds, groups, momentum, tmp_path):
    settings = {"warm_rounds": 2, "own_head": True, "server_momentum": momentum, "groups": groups}
    clients = FormulaClients(CLIENTS)
    clients.centers = clients.centers[torch.arange(CLIENTS) % 2]
    whole, _ = make(clients=clients, **settings)
    play(whole, clients, rounds)
    whole.soup.save(tmp_path / "soup.safetensors")
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in whole.state_dict().items()
    }
    again, _ = make(clients=clients, **settings)

    class Manifest:
        counters = {}

    saved = AdapterSoup.load(tmp_path / "soup.safetensors")
    Checkpoint(Manifest, tmp_path, saved, state).restore(again)
    for strategy in (whole, again):
        play(strategy, clients, 3)
    assert torch.equal(again.soup.rows, whole.soup.rows)
    assert torch.equal(again.weights, whole.weights)
    assert torch.equal(again.adapter(0), whole.adapter(0))


def test_without_groups_the_number_of_adapters_is_fixed():
    strategy, _ = make(adapters=3)
    with pytest.raises(ValueError, match="adapters is 2, expected 3"):
        strategy.resize(2)


def test_a_reply_from_nowhere_changes_no_other_own_head():
    strategy, clients = make(OWN_LABELS, warm_rounds=1, groups=1, own_head=True)
    play(strategy, clients, 1)
    before = strategy.own_head.rows.clone()
    strategy.update([Reply(0, torch.ones(2, clients.layout.size), 10, 1.0, 0.0)])
    assert torch.equal(strategy.own_head.rows[1:], before[1:])
    assert not torch.equal(strategy.own_head.rows[0], before[0])
