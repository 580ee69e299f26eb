"""FedEM on a known mixture of regressions, and on a tiny model."""

import pytest
import torch

from fedmerge_peft import AdapterLayout, Federation, Recipe, RecipeError, RunError, federate
from fedmerge_peft.recipe.strategies import FedEMRecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from fedmerge_peft.testing import reply_to
from fedmerge_peft.training.plan import Mixture, Trained
from fedmerge_peft.util.seeds import derive

SIZE = 20
LAYOUT = AdapterLayout.from_tensors([("a.lora_A.weight", (4, 5), "lora")])
COEFFICIENTS = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 1.5, 2.0]])
PI = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.0])


class Regression:
    """y = x θ_k + noise of unit variance; ℓ = ½ (y − x θ)² + ½ log 2π.

    A part π of the examples is from the first component.
    """

    size = 400

    def __init__(self, part, seed):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = 3 * torch.randn(self.size, 3, generator=generator)
        second = (torch.rand(self.size, generator=generator) >= part).long()
        self.part = float((second == 0).float().mean())
        self.outputs = (self.inputs * COEFFICIENTS[second]).sum(1) + torch.randn(
            self.size, generator=generator
        )

    def functions(self):
        def losses(row):
            return 0.5 * (self.outputs - self.inputs @ row[:3]).square() + 0.9189385

        def train(job, seed):
            row, weights = job.row.clone(), job.example_weights
            for _ in range(10):
                row[:3] -= (
                    0.05
                    * (weights * (self.inputs @ row[:3] - self.outputs))
                    @ self.inputs
                    / self.size
                )
            return Trained(row, float((weights * losses(row)).mean()), 10)

        return train, losses


def noise(number):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(number))


def make(adapters, fresh_row=noise, clients=9):
    return make_strategy(
        FedEMRecipe(name="fedem", adapters=adapters),
        StrategyContext(clients, LAYOUT, fresh_row, seed=1),
    )


def replies(strategy, clients):
    for index, client in enumerate(clients):
        seed = derive(0, index)
        yield reply_to(strategy.plan(index), index, client.size, *client.functions(), seed)


def test_fedem_recovers_a_mixture_of_two_regressions_and_each_clients_weights():
    clients = [Regression(float(part), seed) for seed, part in enumerate(PI)]
    strategy = make(2, noise, clients=5)
    for _ in range(40):
        strategy.update(list(replies(strategy, clients)))
    order = [0, 1] if (strategy.soup.rows[0, :3] - COEFFICIENTS[0]).norm() < 1 else [1, 0]
    torch.testing.assert_close(strategy.soup.rows[order, :3], COEFFICIENTS, rtol=0, atol=0.03)
    torch.testing.assert_close(
        strategy.weights[:, order[0]],
        torch.tensor([client.part for client in clients]),
        rtol=0,
        atol=0.02,
    )


def test_fedems_server_averages_each_component_by_examples_and_keeps_the_clients_weights():
    strategy = make(3)
    before = strategy.soup.rows
    deltas = [
        torch.randn(3, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    ]
    weights = [torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.8])]
    strategy.update(
        [
            Reply(c, d, n, 0.0, 0.0, weights=w)
            for c, d, n, w in zip((4, 2), deltas, (30, 10), weights, strict=True)
        ]
    )
    torch.testing.assert_close(strategy.soup.rows, before - (0.75 * deltas[0] + 0.25 * deltas[1]))
    torch.testing.assert_close(strategy.weights[[4, 2]], torch.stack(weights))
    torch.testing.assert_close(strategy.weights[0], torch.full((3,), 1 / 3))
    for mixture in (strategy.plan(2), strategy.served(2)):
        assert isinstance(mixture, Mixture)
        assert torch.equal(mixture.rows, strategy.soup.rows)
        assert torch.equal(mixture.weights, weights[1])


def test_fedem_refuses_components_that_would_stay_equal():
    with pytest.raises(
        RecipeError,
        match=(
            r"strategy: fedem's components would start and remain equal, because "
            r"no parameter .* LoRA and lora\.merge=factor"
        ),
    ):
        make(3, lambda _: torch.zeros(SIZE))
    make(1, lambda _: torch.zeros(SIZE))


def test_fedems_gap_is_the_mean_over_its_components(formulas):
    """Both components train to c_i = c ± a and are averaged to c: a gap of ‖a‖ each."""
    case = formulas(2)
    a = 0.1 * torch.ones(case.layout.size)
    case.centers = torch.stack([case.centers[0] + a, case.centers[0] - a])
    record = next(case.federation("strategy={name: fedem, adapters: 2}").rounds())
    assert record.gap == pytest.approx(float(a.norm()), rel=1e-4)


def test_training_a_mixture_lowers_its_loss(smoke, smoke_engine):
    federation = Federation(smoke("strategy=fedem", "rounds=4"), smoke_engine)
    before = federation.evaluate()
    records = list(federation.rounds())
    assert records[-1].train_loss < records[0].train_loss
    assert federation.evaluate().validation_loss != before.validation_loss


def test_a_mixture_has_no_single_adapter(smoke, smoke_engine, tmp_path):
    run = federate(smoke("strategy=fedem", "rounds=1"), tmp_path / "run", engine=smoke_engine)
    for ask in (
        lambda: run.adapter("Harbour Clinic"),
        lambda: run.save_adapter("Harbour Clinic", tmp_path / "adapter"),
        lambda: run.save_adapter("Harbour Clinic", tmp_path / "adapter", exact=True),
    ):
        with pytest.raises(
            RunError, match=r"single adapter. In Python, load each row of run\.soup"
        ):
            ask()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("where", ["strategy=fedem", "baselines=[fedavg, fedem]"])
def test_a_mixture_and_a_metric_of_generated_text_are_refused_with_the_recipe(tmp_path, where):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: words\ntask: {name: causal-lm, metrics: [perplexity, rougeL]}\n"
        "backbone: {model: tiny:gpt2}\n"
        "data: {path: unused, partition: {scheme: iid, clients: 2}}\n"
    )
    with pytest.raises(
        RecipeError,
        match=(
            r"recipe.yaml:2: task: the metric rougeL needs generated text.*fedem"
            r".*use perplexity or accuracy"
        ),
    ):
        Recipe.load(path, [where])
    Recipe.load(path, [where, "task.metrics=[perplexity, accuracy]"])
    Recipe.load(path)
