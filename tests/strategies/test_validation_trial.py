"""FedMerge's trials of its groups: merged adapters against others, on validation examples."""

from dataclasses import replace

import pytest
import torch

from equality import assert_near
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.strategies import Reply, make_strategy
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.validation_trial import FIRST, LAST, CommonTrial, OwnTrial
from fedmerge_peft.testing import FormulaClients, strategy_recipe

CLIENTS, WARM = 6, 2
END = WARM + FIRST
"""First round in which the trial may end."""


def grouped_clients():
    """Return clients in two groups of three, with small differences inside."""
    clients = FormulaClients(CLIENTS)
    clients.centers = clients.centers[[0, 0, 0, 1, 1, 1]] + 0.1 * clients.centers
    return clients


def reply(client, before, after):
    return Reply(client, torch.zeros(1, 2), 1, 0.0, 0.0, validation=(before, after))


def compared(own, merged):
    trial = OwnTrial(len(own))
    trial.store([reply(client, 9.0, loss) for client, loss in enumerate(own)])
    return trial.compare([reply(client, loss, 9.0) for client, loss in enumerate(merged)])


def play(strategy, clients, rounds, own=1.0, merged=1.0, common=9.0):
    """Run rounds in which each client reports these losses when it is asked for them."""
    for _ in range(rounds):
        losses = (merged, own) if strategy.validates() else None
        if losses and strategy.plan(0).compared is not None:
            losses = (*losses, common)
        strategy.update([replace(one, validation=losses) for one in clients.replies(strategy)])


def test_a_comparison_has_the_means_and_the_error_of_their_difference():
    found = compared([1.0, 2.0, 3.0, 2.0], [2.5, 1.5, 3.5, 2.5])
    assert (found.own, found.merged) == (2.0, 2.5)
    assert found.error == pytest.approx((2 / 3) ** 0.5 / 2)  # of 1.5, −.5, .5, .5
    assert not found.own_is_better  # .5 is less than two errors
    assert compared([1.0, 2.0, 3.0, 2.0], [1.5, 2.5, 3.5, 2.5]).own_is_better


@pytest.mark.parametrize(
    ("merged", "better"), [(1.0, False), (1.005, False), (1.02, True), (0.5, False)]
)
def test_differences_below_one_percent_are_chance(merged, better):
    assert compared([1.0] * 4, [merged] * 4).own_is_better is better


def test_a_loss_of_zero_is_a_loss():
    trial = OwnTrial(2)
    trial.store([reply(0, 1.0, 0.0), reply(1, 1.0, 0.0)])
    found = trial.compare([reply(0, 0.0, 0.0), reply(1, 0.0, 0.0)])
    assert (found.harm, found.own_is_better) == (0.0, False)
    assert not trial.persists(found)


def test_a_liar_cannot_end_groups():
    """Its loss raises the mean, and the error of the mean as much."""
    honest = [1.0] * 11
    assert not compared([*honest, 0.0], [*honest, 1e30]).own_is_better


def test_no_comparison_without_half_of_the_clients():
    trial = OwnTrial(5)
    trial.store([reply(client, 1.0, 1.0) for client in range(3)])
    asked = [reply(client, 2.0, 1.0) for client in range(5)]
    assert trial.compare(asked[:2]) is None
    assert trial.compare([replace(one, validation=None) for one in asked]) is None
    assert trial.compare([replace(one, validation=(float("inf"), 1.0)) for one in asked]) is None
    assert trial.compare(asked).merged == 2.0  # of the three that have both


@pytest.mark.parametrize(("reporting", "last"), [(True, END), (False, WARM + LAST)])
def test_clients_report_validation_losses_until_the_trial_ends(reporting, last):
    clients = grouped_clients()
    strategy = clients.strategy("fedmerge", warm_rounds=WARM)
    asked = []
    for _ in range(WARM + LAST + 2):
        asked.append(strategy.validates())
        if reporting:
            play(strategy, clients, 1)
        else:
            clients.round(strategy)
    assert [number for number, one in enumerate(asked, 1) if one] == list(range(WARM + 1, last + 1))


def test_losses_are_reported_until_both_trials_have_ended():
    clients = grouped_clients()
    strategy = clients.strategy("fedmerge", warm_rounds=WARM)
    play(strategy, clients, WARM)
    while strategy.trials.own is not None:
        play(strategy, clients, 1)
    strategy.trials.common = CommonTrial()  # as if it had not decided yet
    assert strategy.plan(0).compared is not None
    assert strategy.validates()
    play(strategy, clients, 1)
    assert any("groups kept" in decision for decision in strategy.decisions())
    assert not strategy.validates()
    assert strategy.plan(0).compared is None


def test_groups_whose_harm_shrinks_are_tried_on():
    clients = grouped_clients()
    strategy = clients.strategy("fedmerge", warm_rounds=WARM)
    play(strategy, clients, WARM)
    for merged in (1.0, 1.5, 1.3, 1.15, 1.08):
        play(strategy, clients, 1, merged=merged)
        assert strategy.validates()
        assert all("groups kept" in decision for decision in strategy.decisions())
    play(strategy, clients, 1, merged=1.0)
    assert "merging kept" in strategy.decisions()[0]


def test_groups_whose_harm_lasts_end_after_it_had_shrunk():
    clients = grouped_clients()
    strategy = clients.strategy("fedmerge", warm_rounds=WARM)
    play(strategy, clients, WARM)
    for merged in (1.0, 1.5, 1.3, 1.1):
        play(strategy, clients, 1, merged=merged)
    play(strategy, clients, 1, merged=1.09)
    assert "an adapter for each client" in strategy.decisions()[0]


def test_other_settings_have_no_trial():
    clients = grouped_clients()
    for settings in (
        {"groups": 2},
        {"adapters": 3},
        {"start": "independent"},
        {"own_head": True},
    ):
        strategy = clients.strategy("fedmerge", warm_rounds=1, **settings)
        clients.round(strategy)
        assert not strategy.validates()


def test_a_robust_federation_ignores_reported_losses():
    clients = grouped_clients()
    context = replace(
        clients.strategy_context(), aggregator=Aggregator(RobustnessRecipe(norm_multiple=2.0))
    )
    strategy = make_strategy(strategy_recipe("fedmerge", warm_rounds=1), context)
    clients.round(strategy)
    assert not strategy.validates()


@pytest.mark.parametrize("merged", [1.0, 0.8])
def test_groups_stay_if_merging_does_not_harm(merged):
    clients = grouped_clients()
    tried, other = (clients.strategy("fedmerge", warm_rounds=WARM) for _ in range(2))
    play(tried, clients, END, merged=merged)
    for _ in range(END):
        clients.round(other)  # reports no losses
    assert torch.equal(tried.soup.rows, other.soup.rows)
    assert torch.equal(tried.weights, other.weights)
    assert tried.decisions() == [
        f"merging kept: validation loss 1 after own training, {merged:g} after merging"
    ]
    assert other.decisions() == []


def test_each_client_gets_an_adapter_if_merging_harms():
    """Its row starts from what it was sent: Θ_i = θ_i, then the soup step with the new weights."""
    clients = grouped_clients()
    strategy = clients.strategy("fedmerge", warm_rounds=WARM, warm_weight=0.9, weights_lr=0.0)
    play(strategy, clients, END - 1, merged=2.0)
    sent = torch.stack([strategy.adapter(client) for client in range(CLIENTS)])
    play(strategy, clients, 1, merged=2.0)
    assert strategy.decisions() == [
        "an adapter for each client: validation loss 1 after own training, 2 after merging"
    ]
    weights = torch.full((CLIENTS, CLIENTS), 0.1 / (CLIENTS - 1)).fill_diagonal_(0.9)
    assert_near(strategy.weights, weights)
    shares = weights / weights.sum(dim=0)  # q of clients with equal sizes; columns sum to 1
    assert_near(strategy.soup.rows, sent - shares.T @ (sent - clients.centers))
    assert strategy.own_head is None
    assert not strategy.validates()


@pytest.mark.parametrize(
    ("losses", "stops"),
    [({"merged": 2.0}, (END - 1, END, END + 1)), ({"common": 1.0}, range(WARM - 1, WARM + 4))],
    ids=["merging", "groups"],
)
def test_a_federation_resumes_during_and_after_its_trials(losses, stops):
    clients = grouped_clients()
    whole = clients.strategy("fedmerge", warm_rounds=WARM)
    play(whole, clients, END + 2, **losses)
    for stop in stops:
        first, second = (clients.strategy("fedmerge", warm_rounds=WARM) for _ in range(2))
        play(first, clients, stop, **losses)
        second.resize(len(first.soup))
        second.soup = first.soup
        second.load_state_dict(first.state_dict())
        play(second, clients, END + 2 - stop, **losses)
        assert torch.equal(second.soup.rows, whole.soup.rows)
        assert torch.equal(second.weights, whole.weights)


# ---- groups against one adapter ------------------------------------------------------------------


def with_common(*losses):
    return [
        replace(reply(client, grouped, 9.0), validation=(grouped, 9.0, common))
        for client, (grouped, common) in enumerate(losses)
    ]


@pytest.mark.parametrize(("common", "keep"), [(1.03, True), (1.0201, True), (1.019, None)])
def test_groups_are_kept_for_a_gain_of_two_percent(common, keep):
    assert CommonTrial().decide(with_common((1.0, common), (2.0, 2 * common)))[0] is keep


def test_groups_without_a_gain_end_in_the_second_round():
    trial = CommonTrial()
    assert trial.decide(with_common((1.0, 1.01), (2.0, 2.0)))[0] is None
    keep, losses = trial.decide(with_common((1.0, 0.9), (2.0, 2.0)))
    assert keep is False
    assert losses == "1.5 by group, 1.45 with one adapter"


def test_a_small_but_certain_gain_ends_no_groups():
    trial = CommonTrial()
    certain = with_common((1.0, 1.009), (2.0, 2.011), (3.0, 3.010), (4.0, 4.012))
    assert [trial.decide(certain)[0] for _ in range(4)] == [None] * 4
    uncertain = with_common((1.0, 1.03), (2.0, 1.99), (3.0, 3.02), (4.0, 4.01))
    assert [trial.decide(uncertain)[0] for _ in range(2)] == [None, False]


def test_losses_that_are_missing_or_infinite_do_not_count():
    trial = CommonTrial()
    for replies in (
        with_common((1.0, 1.0)),
        with_common((1.0, 1.0), (1.0, float("inf"))),
        [reply(client, 1.0, 1.0) for client in range(3)],
        [replace(one, validation=None) for one in with_common((1.0, 1.0), (1.0, 1.0))],
    ):
        assert trial.decide(replies) == (None, "")
    assert trial.rounds == 0


def test_clients_are_sent_the_mean_of_all_adapters_until_the_trial_ends():
    clients = grouped_clients()
    strategy = clients.strategy("fedmerge", warm_rounds=WARM)
    size = clients.layout.size
    play(strategy, clients, WARM - 1)
    assert strategy.plan(0).compared is None
    play(strategy, clients, 1)
    merged = torch.stack([strategy.adapter(client) for client in range(CLIENTS)])
    for client in range(CLIENTS):
        plan = strategy.plan(client)
        assert_near(plan.compared, merged.mean(dim=0))
        assert torch.equal(plan.sent, torch.stack([merged[client], plan.compared]))
        assert (plan.returned_rows, strategy.traffic(client)) == (1, (2 * size, size))
    play(strategy, clients, 1, common=1.5)
    assert strategy.decisions() == ["groups kept: validation loss 1 by group, 1.5 with one adapter"]
    assert strategy.plan(0).compared is None
    assert strategy.traffic(0) == (size, size)


def test_clients_share_one_adapter_if_groups_gain_nothing():
    """The soup becomes the mean of what the clients were sent, and makes FedAvg's step."""
    clients = grouped_clients()
    strategy = clients.strategy("fedmerge", warm_rounds=WARM)
    play(strategy, clients, WARM + 1, common=1.0)
    assert (len(strategy.soup), strategy.decisions()) == (2, [])
    sent = torch.stack([strategy.adapter(client) for client in range(CLIENTS)])
    play(strategy, clients, 1, common=0.99)
    assert strategy.decisions() == [
        "one adapter for all clients: validation loss 1 by group, 0.99 with one adapter"
    ]
    assert torch.equal(strategy.weights, torch.ones(CLIENTS, 1))
    updates = sent - clients.centers
    assert_near(strategy.soup.rows[0], sent.mean(dim=0) - updates.mean(dim=0))
    play(strategy, clients, 3, merged=0.5)
    assert len(strategy.soup) == 1
    assert not strategy.validates()


def test_clients_without_validation_examples_compare_nothing():
    clients = grouped_clients()
    context = replace(clients.strategy_context(), validation=False)
    strategy = make_strategy(strategy_recipe("fedmerge", warm_rounds=WARM), context)
    play(strategy, clients, WARM + 1)
    assert not strategy.validates()
    assert strategy.plan(0).compared is None
