"""FeMAM: levels, their ranks, clusters and the models that clients drop, on formula clients."""

from dataclasses import replace

import pytest
import torch

from fedmerge_peft import AdapterLayout, RecipeError, federate
from strategies.factor_pairs import columns

GROUPS = torch.tensor([0, 1, 0, 1, 1, 0])
SIZES = [10, 20, 30, 40, 50, 60]


@pytest.fixture
def case(formulas):
    """Six clients in two groups, which differ in all columns."""
    case = formulas(6, sizes=SIZES)
    noise = torch.randn(case.centers.shape, generator=torch.Generator().manual_seed(1))
    case.centers = 3 * case.centers[GROUPS] + 0.2 * noise
    return case


def make(case, **settings):
    settings = {"global_rounds": 2, "level_rounds": 2, "clusters": 2, **settings}
    return case.strategy("femam", **settings)


def rounds(case, strategy, count, losses=None):
    for _ in range(count):
        replies = list(case.replies(strategy))
        if losses is not None:
            scores = [
                {"validation_loss": losses[strategy.rounds][reply.client]} for reply in replies
            ]
            replies = [replace(r, served=s) for r, s in zip(replies, scores, strict=True)]
        strategy.update(replies)


def only(mask):
    return mask.nonzero().flatten()


def test_each_level_trains_its_own_ranks_and_the_head(case):
    """The ranks are disjoint and cover the slot: the product is the sum of the levels' products."""
    strategy = make(case)
    factors = torch.zeros(case.layout.size, dtype=torch.bool)
    factors[columns(case.layout, "lora")] = True
    covered = torch.stack([mask & factors for mask in strategy.masks]).sum(0)
    assert torch.equal(covered, factors.long())
    assert all(bool(mask[columns(case.layout, "head")].all()) for mask in strategy.masks)
    for completed, level in enumerate([0, 0, 1, 1, 2, 2, 2]):
        assert torch.equal(strategy.plan(0).phases[0], strategy.masks[level])
        before = strategy.soup.rows.clone()
        assert strategy.rounds == completed
        rounds(case, strategy, 1)
        changed = strategy.soup.rows != before
        assert not changed[:, ~strategy.masks[level]].any()


def test_levels_are_the_means_of_all_of_a_cluster_and_of_one_client(case):
    strategy = make(case)
    first, second, third = strategy.masks
    rounds(case, strategy, 2)
    for client in range(6):
        torch.testing.assert_close(strategy.served(client)[first], case.mean()[first])
    torch.testing.assert_close(strategy.served(0)[~first], case.fresh_row(0)[~first])
    rounds(case, strategy, 2)
    for client in range(6):
        members = only(GROUPS[client] == GROUPS).tolist()
        torch.testing.assert_close(strategy.served(client)[second], case.mean(members)[second])
    rounds(case, strategy, 3)
    for client in range(6):
        served = strategy.served(client)
        members = only(GROUPS[client] == GROUPS).tolist()
        torch.testing.assert_close(served[third], case.centers[client][third])
        ranks = second & ~third
        torch.testing.assert_close(served[ranks], case.mean(members)[ranks])


def test_clients_drop_a_level_that_does_not_lower_their_validation_loss(case):
    strategy = make(case, levels=4)
    rounds(case, strategy, 2, losses=[[9.0] * 6, [8.0] * 6])
    common = strategy.served(0)
    worse = [False, True, False, True, False, False]
    losses = {2: [5.0] * 6, 3: [5.0 if w else 4.9 for w in worse]}
    rounds(case, strategy, 2, losses)
    assert strategy.decisions() == [
        "level 2 ends; 2 of 6 clients drop their model, because their validation loss did not "
        "decrease"
    ]
    for client in range(6):
        same = torch.equal(strategy.served(client), common)
        assert same == worse[client]
    kept = strategy.served(0)
    rounds(case, strategy, 1)  # the next level continues from there
    mask = strategy.masks[2]
    torch.testing.assert_close(strategy.served(1)[~mask], common[~mask])
    torch.testing.assert_close(strategy.served(0)[~mask], kept[~mask])
    assert strategy.decisions() == []


def test_without_validation_scores_all_levels_are_kept(case):
    strategy = make(case)
    rounds(case, strategy, 4)
    assert not any(torch.equal(strategy.served(c), case.mean()) for c in range(6))
    assert strategy.decisions() == [
        "level 2 ends; 0 of 6 clients drop their model, because their validation loss did not "
        "decrease"
    ]


def test_only_the_current_level_travels(case):
    strategy = make(case)
    sizes = [int(mask.sum()) for mask in strategy.masks]
    expected = [(0, 0), (0, 0), (0, 1), (1, 1), (1, None), (None, None)]
    for down, up in expected:
        numbers = tuple(0 if level is None else sizes[level] for level in (down, up))
        assert strategy.traffic(0) == numbers
        rounds(case, strategy, 1)


def test_a_client_that_missed_a_round_is_sent_everything(case):
    strategy = make(case)
    case.round(strategy, [0, 1])
    assert strategy.traffic(0) == (int(strategy.masks[0].sum()),) * 2
    assert strategy.traffic(2) == (case.layout.size, int(strategy.masks[0].sum()))
    for client in range(6):  # all have the global model
        first = strategy.masks[0]
        torch.testing.assert_close(strategy.served(client)[first], case.mean([0, 1])[first])


def test_a_run_resumes_within_a_level(case):
    whole, half = make(case), make(case)
    rounds(case, whole, 5)
    rounds(case, half, 3)
    resumed = make(case)
    resumed.soup = half.soup
    resumed.load_state_dict(half.state_dict())
    rounds(case, resumed, 2)
    assert torch.equal(resumed.soup.rows, whole.soup.rows)


def test_the_order_of_replies_does_not_matter(case):
    one, other = make(case), make(case)
    for _ in range(4):
        one.update(list(case.replies(one)))
        other.update(list(case.replies(other))[::-1])
    assert torch.equal(one.soup.rows, other.soup.rows)


def test_every_level_needs_a_rank(formulas):
    case = formulas(2)
    with pytest.raises(
        RecipeError, match=r"lora.r: femam splits the ranks into 5 parts, but one has rank 4"
    ):
        case.strategy("femam", levels=5)
    case = formulas(2, AdapterLayout.from_tensors([("a.lora_A.weight", (4, 3), "lora")]))
    with pytest.raises(RecipeError, match=r"lora: femam cannot split this adapter"):
        case.strategy("femam")


def test_three_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path):
    settings = "{name: femam, levels: 2, global_rounds: 1}"
    run = federate(smoke(f"strategy={settings}", "rounds=3"), tmp_path / "run", engine=smoke_engine)
    assert run.soup.rows.isfinite().all()
    assert [record["bytes_up"] > 0 for record in run.records] == [True, False, False]
    assert len(run.soup.rows.unique(dim=0)) == 6
    assert all(record["gap"] >= 0 for record in run.records)
