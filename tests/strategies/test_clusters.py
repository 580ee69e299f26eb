"""Clusterings and mixtures: on clients whose clusters are known, and on a tiny model."""

import random
from dataclasses import dataclass

import pytest
import torch

from fedmerge_peft import AdapterLayout, Federation, Recipe, RecipeError, RunError, federate, load_run
from fedmerge_peft.recipe.strategies import FLHC, IFCA, FedEM, FeSEM
from fedmerge_peft.seeds import derive
from fedmerge_peft.strategies import Reply, Start, make_strategy
from fedmerge_peft.strategies.flhc import hierarchy
from fedmerge_peft.training.plan import Choose, Mixture
from fedmerge_peft.training.reference import Trained
from fedmerge_peft.training.work import Hands, carry_out

SIZE = 20
LAYOUT = AdapterLayout.of([("a.lora_A.weight", (4, 5), "lora")])
CENTRES = 10 * torch.randn(3, SIZE, generator=torch.Generator().manual_seed(42))
TRUTH = torch.arange(9) % 3
SIZES = torch.tensor([10, 40, 20, 30, 10, 20, 50, 30, 10])
TARGETS = CENTRES[TRUTH] + 0.5 * torch.randn(9, SIZE, generator=torch.Generator().manual_seed(43))
RECIPES = {
    "ifca": IFCA(name="ifca", adapters=3),
    "fesem": FeSEM(name="fesem", adapters=3),
    "flhc": FLHC(name="flhc", adapters=3, warm_rounds=2),
    "fedem": FedEM(name="fedem", adapters=3),
}


def noise(number):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(number))


def near(number):
    """Starts that lean a little towards the centres: what IFCA's guarantee asks for."""
    return 0.2 * CENTRES[number % 3] + 0.1 * noise(number)


def make(recipe, fresh_row=near, clients=9):
    return make_strategy(recipe if not isinstance(recipe, str) else RECIPES[recipe], Start(clients, LAYOUT, fresh_row, seed=1))


@dataclass(frozen=True)
class Quadratic:
    """ℓ(θ) = ½‖θ − target‖²; a round of training goes half of the way."""

    target: torch.Tensor
    size: int = 10

    def hands(self):
        def losses(row):
            return (0.5 * (row - self.target).square().sum() / self.size).repeat(self.size)

        def train(job, seed):
            weight = 1.0 if job.example_weights is None else float(job.example_weights.mean())
            return Trained(job.row - 0.5 * weight * (job.row - self.target), float(losses(job.row).mean()), 1)

        return Hands(train, losses)


QUADRATICS = [Quadratic(target, int(size)) for target, size in zip(TARGETS, SIZES, strict=True)]


def replies(strategy, clients, who):
    for index in who:
        work = carry_out(strategy.plan(index), clients[index].hands(), derive(0, index))
        yield Reply(index, work.deltas, clients[index].size, work.loss, 0.0, choice=work.choice, weights=work.weights)


def federated(strategy, clients, rounds, cohort=None, seed=0):
    """Rounds with replies in any order; what was sent must outlive the update."""
    order = random.Random(seed)
    for _ in range(rounds):
        who = order.sample(range(len(clients)), cohort or len(clients))
        plans = [strategy.plan(index) for index in who]
        before = [plan.sent.clone() for plan in plans]
        strategy.update(replies(strategy, clients, who))
        assert all(torch.equal(plan.sent, sent) for plan, sent in zip(plans, before, strict=True))
    return strategy


def mean_of_targets(group, by_size):
    weights = (group == TRUTH) * (SIZES if by_size else torch.ones(9))
    return weights.float() @ TARGETS / weights.sum()


# ---- clusters that are known ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "by_size"), [("ifca", True), ("fesem", False), ("flhc", True)])
@pytest.mark.parametrize("cohort", [None, 6], ids=["all clients", "two in three"])
def test_clusters_and_centres_are_found(name, by_size, cohort):
    strategy = federated(make(name), QUADRATICS, 30, cohort)
    torch.testing.assert_close(strategy.weights.sum(1), torch.ones(9))
    assert strategy.weights.max(1).values.min() == 1
    groups = strategy.weights.argmax(1)
    assert all((groups[i] == groups[k]) == (TRUTH[i] == TRUTH[k]) for i in range(9) for k in range(9))
    for client in range(9):
        expected = mean_of_targets(TRUTH[client], by_size) if cohort is None else CENTRES[TRUTH[client]]
        torch.testing.assert_close(strategy.served(client), expected, rtol=1e-4, atol=1e-3 if cohort is None else 2.0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_order_of_replies_does_not_matter(name):
    forwards, backwards = make(name), make(name)
    for _ in range(3):
        answers = list(replies(forwards, QUADRATICS, range(9)))
        forwards.update(answers)
        backwards.update(reversed(answers))
        assert torch.equal(forwards.soup.rows, backwards.soup.rows)
        assert torch.equal(forwards.weights, backwards.weights)


@pytest.mark.parametrize("name", RECIPES)
def test_one_adapter_is_fedavg_or_its_plain_mean(name):
    strategy = federated(make(RECIPES[name].model_copy(update={"adapters": 1})), QUADRATICS, 20)
    weights = (torch.ones(9) if name == "fesem" else SIZES).float()
    torch.testing.assert_close(strategy.soup.rows[0], weights @ TARGETS / weights.sum(), rtol=1e-4, atol=1e-3)
    assert torch.equal(strategy.weights, torch.ones(9, 1))
    assert strategy.warnings() == []


@pytest.mark.parametrize("name", RECIPES)
def test_fewer_clients_than_adapters(name):
    strategy = federated(make(RECIPES[name].model_copy(update={"adapters": 5}), clients=2), QUADRATICS[:2], 10)
    assert strategy.soup.rows.isfinite().all()
    torch.testing.assert_close(strategy.weights.sum(1), torch.ones(2))


def test_traffic():
    expected = {"ifca": (3 * SIZE, SIZE), "fesem": (SIZE, SIZE), "flhc": (SIZE, SIZE), "fedem": (3 * SIZE, 3 * SIZE)}
    assert {name: make(name).traffic(0) for name in RECIPES} == expected


# ---- IFCA ----------------------------------------------------------------------------------------


def test_ifca_offers_all_adapters_and_leaves_a_cluster_that_nobody_chose():
    strategy = make("ifca")
    before = strategy.soup.rows
    assert isinstance(strategy.plan(0), Choose)
    torch.testing.assert_close(strategy.served(0), before.mean(0))  # it has not chosen yet
    strategy.update(replies(strategy, QUADRATICS, [0, 3, 1]))
    assert torch.equal(strategy.soup.rows[2], before[2])
    trained = [before[0] - 0.5 * (before[0] - TARGETS[client]) for client in (0, 3)]
    torch.testing.assert_close(strategy.soup.rows[0], 0.25 * trained[0] + 0.75 * trained[1])
    assert strategy.weights.argmax(1)[[0, 3, 1]].tolist() == [0, 0, 1]
    torch.testing.assert_close(strategy.weights[2], torch.full((3,), 1 / 3))


def test_ifca_may_leave_adapters_over_and_says_so():
    """An adapter that starts ahead for all clients keeps them: the known weakness."""
    strategy = federated(make("ifca", lambda number: CENTRES.mean(0) if number == 0 else 100 + noise(number)), QUADRATICS, 5)
    assert strategy.weights.argmax(1).tolist() == [0] * 9
    assert strategy.warnings() == ["adapters 1, 2 of 3 stand unused (less than a quarter of an even share of the clients' weight)"]


# ---- FeSEM ---------------------------------------------------------------------------------------


def test_fesem_moves_a_client_to_the_centre_that_its_adapter_comes_nearest_to():
    strategy = federated(make("fesem"), QUADRATICS, 10)
    start, target = strategy.weights[0].argmax(), strategy.weights[1].argmax()
    centre = strategy.soup.rows[target].clone()
    trained = centre + 0.1
    strategy.update([Reply(0, (strategy.served(0) - trained)[None], 10, 0.0, 0.0)])
    assert strategy.weights[0].argmax() == target != start
    torch.testing.assert_close(strategy.soup.rows[target], trained)  # the mean of this round's replies


def test_fesem_keeps_a_centre_that_no_reply_is_nearest_to():
    strategy = federated(make("fesem"), QUADRATICS, 3)
    before = strategy.soup.rows
    strategy.update(replies(strategy, QUADRATICS, [0, 3]))
    changed = (strategy.soup.rows != before).any(1)
    assert changed.sum() == 1
    assert changed[strategy.weights[0].argmax()]


def test_fesem_tells_rows_apart_that_are_long_and_close():
    """Squared, these rows are 1e8 times what tells them apart: in single precision, inner products would see nothing."""
    far = 1e4 * torch.ones(SIZE)
    strategy = make(FeSEM(name="fesem", adapters=2), lambda _: far, clients=30)
    close = [Quadratic(far + (1.0 if client % 2 else -1.0)) for client in range(30)]
    for _ in range(3):
        strategy.update(replies(strategy, close, range(30)))
    groups = strategy.weights.argmax(1)
    assert groups[0] != groups[1]
    assert torch.equal(groups, groups[:2].repeat(15))


# ---- FL+HC ---------------------------------------------------------------------------------------


def test_flhc_is_fedavg_before_the_clustering_and_each_clusters_own_from_that_round_on():
    strategy = make("flhc", noise)
    assert strategy.warnings() == ["clients are clustered after round 2, and this was round 0: so far this is FedAvg"]
    federated(strategy, QUADRATICS, 1)
    shares = SIZES / SIZES.sum()
    fedavg = 0.5 * noise(0) + 0.5 * shares @ TARGETS
    torch.testing.assert_close(strategy.soup.rows, fedavg.expand(3, -1))
    torch.testing.assert_close(strategy.weights, torch.full((9, 3), 1 / 3))
    federated(strategy, QUADRATICS, 1)
    for client in range(9):
        torch.testing.assert_close(strategy.served(client), 0.5 * fedavg + 0.5 * mean_of_targets(TRUTH[client], True))
    assert strategy.warnings() == []


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_flhc_clusters_by_any_metric_and_linkage(metric, linkage):
    strategy = federated(make(FLHC(name="flhc", adapters=3, metric=metric, linkage=linkage)), QUADRATICS, 2)
    groups = strategy.weights.argmax(1)
    assert all((groups[i] == groups[k]) == (TRUTH[i] == TRUTH[k]) for i in range(9) for k in range(9))


def test_flhc_places_a_client_that_comes_late_by_where_its_training_leads():
    strategy = make("flhc")
    everyone_but_two = [0, 1, 2, 3, 4, 5, 6]
    for _ in range(3):
        strategy.update(replies(strategy, QUADRATICS, everyone_but_two))
    before = strategy.soup.rows
    torch.testing.assert_close(strategy.plan(7).row, before.mean(0))
    strategy.update(replies(strategy, QUADRATICS, [7, 8]))
    assert torch.equal(strategy.soup.rows, before)  # their replies do not count yet
    assert strategy.weights.argmax(1)[[7, 8]].tolist() == strategy.weights.argmax(1)[[1, 2]].tolist()
    assert strategy.weights[[7, 8]].max(1).values.tolist() == [1, 1]


def test_an_update_of_zero_is_far_from_all_by_cosine():
    deltas = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    assert len({*hierarchy(deltas, 3, "cosine", "average").tolist()}) == 3
    assert hierarchy(deltas, 3, "cosine", "average")[0] == hierarchy(deltas, 3, "cosine", "average")[1]


# ---- FedEM ---------------------------------------------------------------------------------------

COEFFICIENTS = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 1.5, 2.0]])
PI = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.0])


class Regression:
    """y = x θ_k + noise of unit variance, where k is the first component for a part π of the examples; ℓ = ½ (y − x θ)² + ½ log 2π."""

    size = 400

    def __init__(self, part, seed):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = 3 * torch.randn(self.size, 3, generator=generator)
        second = (torch.rand(self.size, generator=generator) >= part).long()
        self.outputs = (self.inputs * COEFFICIENTS[second]).sum(1) + torch.randn(self.size, generator=generator)

    def hands(self):
        def losses(row):
            return 0.5 * (self.outputs - self.inputs @ row[:3]).square() + 0.9189385

        def train(job, seed):
            row, weights = job.row.clone(), job.example_weights
            for _ in range(10):
                row[:3] -= 0.05 * (weights * (self.inputs @ row[:3] - self.outputs)) @ self.inputs / self.size
            return Trained(row, float((weights * losses(row)).mean()), 10)

        return Hands(train, losses)


def test_fedem_recovers_a_mixture_of_two_regressions_and_each_clients_part_of_it():
    clients = [Regression(float(part), seed) for seed, part in enumerate(PI)]
    strategy = federated(make(FedEM(name="fedem", adapters=2), noise, clients=5), clients, 40)
    order = [0, 1] if (strategy.soup.rows[0, :3] - COEFFICIENTS[0]).norm() < 1 else [1, 0]
    torch.testing.assert_close(strategy.soup.rows[order, :3], COEFFICIENTS, rtol=0, atol=0.1)
    torch.testing.assert_close(strategy.weights[:, order[0]], PI, rtol=0, atol=0.07)


def test_fedems_server_averages_each_component_by_examples_and_keeps_the_clients_weights():
    strategy = make("fedem")
    before = strategy.soup.rows
    deltas = [torch.randn(3, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    weights = [torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.8])]
    strategy.update([Reply(c, d, n, 0.0, 0.0, weights=w) for c, d, n, w in zip((4, 2), deltas, (30, 10), weights, strict=True)])
    torch.testing.assert_close(strategy.soup.rows, before - (0.75 * deltas[0] + 0.25 * deltas[1]))
    torch.testing.assert_close(strategy.weights[[4, 2]], torch.stack(weights))
    torch.testing.assert_close(strategy.weights[0], torch.full((3,), 1 / 3))
    for mixture in (strategy.plan(2), strategy.served(2)):
        assert isinstance(mixture, Mixture)
        assert torch.equal(mixture.rows, strategy.soup.rows)
        assert torch.equal(mixture.weights, weights[1])


def test_fedem_refuses_components_that_would_stay_equal():
    with pytest.raises(RecipeError, match=r"strategy: fedem's components would start equal .* use lora\.merge=factor"):
        make("fedem", lambda _: torch.zeros(SIZE))
    make(FedEM(name="fedem", adapters=1), lambda _: torch.zeros(SIZE))


# ---- on a tiny model -----------------------------------------------------------------------------

BYTES = {"ifca": (3, 1), "fesem": (1, 1), "flhc": (1, 1), "fedem": (3, 3)}


@pytest.mark.parametrize("name", RECIPES)
def test_two_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path, name):
    warm = ["strategy.warm_rounds=1"] if name == "flhc" else []
    run = federate(smoke(f"strategy={name}", "strategy.adapters=3", *warm), tmp_path / name, engine=smoke_engine)
    one = 6 * 4 * smoke_engine.backbone.layout.size
    for record in run.records:
        assert (record["bytes_down"], record["bytes_up"]) == (BYTES[name][0] * one, BYTES[name][1] * one)
        assert 0 <= record["served"]["mean"] <= 1
        assert 0 <= record["gap"] < 100
    soup, weights = load_run(run.path).soup, load_run(run.path).weights
    assert soup.rows.isfinite().all()
    assert weights.shape == (6, 3)
    assert weights.sum(axis=1).to_list() == pytest.approx([1.0] * 6)
    assert run.summary["final"]["served"]["validation_loss"] > 0
    if name != "fedem":
        row = soup.merge(torch.tensor(weights.loc["Harbour Clinic"].to_numpy()))
        saved = run.adapter("Harbour Clinic")
        assert all(torch.equal(saved[key], value) for key, value in soup.state_dict(row).items())


def test_training_a_mixture_lowers_its_loss(smoke, smoke_engine):
    federation = Federation(smoke("strategy=fedem", "rounds=4"), smoke_engine)
    before = federation.measure()
    records = list(federation.rounds())
    assert records[-1].train_loss < records[0].train_loss
    assert federation.measure().validation_loss != before.validation_loss


def test_a_mixture_has_no_single_adapter(smoke, smoke_engine, tmp_path):
    run = federate(smoke("strategy=fedem", "rounds=1"), tmp_path / "run", engine=smoke_engine)
    for ask in (
        lambda: run.adapter("Harbour Clinic"),
        lambda: run.save_adapter("Harbour Clinic", tmp_path / "adapter"),
        lambda: run.save_adapter("Harbour Clinic", tmp_path / "adapter", exact=True),
    ):
        with pytest.raises(RunError, match=r"no single adapter. Load each row of run\.soup\.rows"):
            ask()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("where", ["strategy=fedem", "baselines=[fedavg, fedem]"])
def test_a_mixture_and_a_metric_of_generated_text_are_refused_with_the_recipe(tmp_path, where):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: words\ntask: {name: causal-lm, metrics: [perplexity, rougeL]}\nbackbone: {model: tiny:gpt2}\n"
        "data: {path: unused, partition: {scheme: iid, clients: 2}}\n"
    )
    with pytest.raises(
        RecipeError, match=r"recipe.yaml:2: task: the metric rougeL needs generated text.*fedem.*use perplexity or accuracy"
    ):
        Recipe.load(path, [where])
    Recipe.load(path, [where, "task.metrics=[perplexity, accuracy]"])
    Recipe.load(path)
