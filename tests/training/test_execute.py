"""Execution of plans with closed-form losses, without a model."""

import pytest
import torch

from fedmerge_peft.training.execute import run_plan, run_plans
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Train, Trained
from fedmerge_peft.util.seeds import derive

POINTS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [5.0, 5.0]])


class Client:
    """ℓ(θ; x) = ½‖θ − x‖² for each point x; training ends at the weighted mean of the points."""

    def __init__(self, points=POINTS):
        self.points = points
        self.jobs = []

    def run(self, plan, seed):
        return run_plan(plan, seed, self.train, self.losses)

    def losses(self, row):
        return 0.5 * (self.points - row).square().sum(1)

    def train(self, job, seed):
        self.jobs.append((job, seed))
        weights = (
            torch.ones(len(self.points)) if job.example_weights is None else job.example_weights
        )
        row = (weights[:, None] * self.points).sum(0) / weights.sum()
        return Trained(row, float((weights * self.losses(row)).mean()), 1)


def test_training_one_adapter_gives_its_delta():
    client, sent = Client(), torch.tensor([1.0, 1.0])
    result = client.run(Train(sent), 5)
    torch.testing.assert_close(result.deltas, (sent - POINTS.mean(0))[None])
    torch.testing.assert_close(result.trained, POINTS.mean(0))
    assert client.jobs[0][1] == 5
    assert result.loss == pytest.approx(float(client.losses(POINTS.mean(0)).mean()))


def test_sequential_jobs_give_a_delta_each_and_the_loss_of_the_first():
    client, rows = Client(), torch.tensor([[1.0, 1.0], [4.0, 0.0]])
    jobs = (Train(rows[0]), Train(rows[1], example_weights=torch.tensor([0.0, 0.0, 0.0, 1.0])))
    result = client.run(InTurn(jobs), 5)
    torch.testing.assert_close(result.deltas, rows - torch.stack([POINTS.mean(0), POINTS[3]]))
    torch.testing.assert_close(result.trained, POINTS[3])
    assert result.loss == pytest.approx(float(client.losses(POINTS.mean(0)).mean()))
    assert [job for job, _ in client.jobs] == list(jobs)


def test_choosing_takes_the_adapter_with_the_lowest_loss_and_trains_it_alone():
    client, rows = Client(), torch.tensor([[9.0, 9.0], [2.0, 2.1], [-4.0, 0.0]])
    result = client.run(Choose(rows), 5)
    assert result.choice == 1
    torch.testing.assert_close(result.deltas, (rows[1] - POINTS.mean(0))[None])
    ((job, seed),) = client.jobs
    assert torch.equal(job.row, rows[1])
    assert seed == 5


def test_equal_losses_are_broken_at_random():
    rows = torch.zeros(3, 2)
    choices = [Client().run(Choose(rows), seed).choice for seed in range(60)]
    assert {choices.count(choice) > 8 for choice in range(3)} == {True}
    assert choices == [Client().run(Choose(rows), seed).choice for seed in range(60)]


def test_an_adapter_with_a_nan_loss_is_not_chosen():
    assert Client().run(Choose(torch.tensor([[torch.nan, 0.0], [50.0, 50.0]])), 5).choice == 1


def test_a_mixtures_posterior_is_bayes_rule():
    """p(k | x) = π_k exp(−½‖θ_k − x‖²) / Σ_j …, in plain numbers.

    π_k becomes its mean, and θ_k the mean of the points weighted by it.
    """
    client, rows, weights = (
        Client(),
        torch.tensor([[0.0, 1.0], [3.0, 3.0]]),
        torch.tensor([0.3, 0.7]),
    )
    result = client.run(Mixture(rows, weights), 5)
    joint = [
        [float(weights[k] * torch.exp(-0.5 * (rows[k] - point).square().sum())) for point in POINTS]
        for k in range(2)
    ]
    posterior = torch.tensor(
        [[joint[k][i] / (joint[0][i] + joint[1][i]) for i in range(4)] for k in range(2)]
    )
    torch.testing.assert_close(result.weights, posterior.mean(1))
    trained = posterior @ POINTS / posterior.sum(1, keepdim=True)
    torch.testing.assert_close(result.deltas, rows - trained)
    torch.testing.assert_close(result.trained.rows, trained)
    torch.testing.assert_close(result.trained.weights, posterior.mean(1))
    for (job, _), each, row in zip(client.jobs, posterior, rows, strict=True):
        torch.testing.assert_close(job.example_weights, each)
        assert torch.equal(job.row, row)
    expected = sum(float((posterior[k] * client.losses(trained[k])).mean()) for k in range(2))
    assert result.loss == pytest.approx(expected)


def test_losses_of_thousands_of_nats_and_weights_of_zero_leave_a_posterior_that_is_finite():
    far = torch.tensor([[100.0, 0.0], [101.0, 0.0], [0.0, 0.0]])
    result = Client(POINTS - 50).run(Mixture(far, torch.tensor([0.5, 0.5, 0.0])), 5)
    torch.testing.assert_close(result.weights, torch.tensor([1.0, 0.0, 0.0]))


def test_a_mixture_of_equals_has_the_loss_of_one_of_them():
    row = torch.tensor([1.0, 1.0])
    alone = Client().run(Train(row), 5)
    mixed = Client().run(Mixture(row.repeat(3, 1), torch.full((3,), 1 / 3)), 5)
    assert mixed.loss == pytest.approx(alone.loss)
    torch.testing.assert_close(mixed.weights, torch.full((3,), 1 / 3))


@pytest.mark.parametrize(
    "plan",
    [InTurn((Train(POINTS[0]), Train(POINTS[1]))), Mixture(POINTS[:2], torch.tensor([0.5, 0.5]))],
    ids=str,
)
def test_every_job_of_a_plan_has_a_seed_derived_from_the_plans(plan):
    def seeds(seed):
        client = Client()
        client.run(plan, seed)
        return [each for _, each in client.jobs]

    assert seeds(5) == seeds(5)
    assert len({*seeds(5), *seeds(6)}) == 4


def test_the_first_of_sequential_jobs_draws_as_if_alone():
    client = Client()
    client.run(InTurn((Train(POINTS[0]), Train(POINTS[1]))), 5)
    assert [seed for _, seed in client.jobs] == [5, derive(5, "job", 1)]


def test_jobs_of_several_clients_at_one_step_are_one_call():
    """Each plan has the jobs and seeds that it has alone, with any other plans beside it."""
    rows, weights = torch.tensor([[9.0, 9.0], [2.0, 2.1]]), torch.tensor([0.3, 0.7])
    plans = [
        Train(rows[0]),
        Choose(rows),
        InTurn((Train(rows[0]), Train(rows[1]))),
        Mixture(rows, weights),
        Choose(rows),
    ]
    clients, calls = [Client(POINTS + number) for number in range(len(plans))], []

    def train(fits):
        calls.append([number for number, _ in fits])
        return [clients[number].train(fit.job, fit.seed) for number, fit in fits]

    numbered = [(plan, seed) for seed, plan in enumerate(plans)]
    together = run_plans(numbered, train, lambda number, row: clients[number].losses(row))
    assert calls == [[0, 1, 2, 2, 3, 3, 4]]
    for seed, (plan, result) in enumerate(zip(plans, together, strict=True)):
        alone = Client(POINTS + seed).run(plan, seed)
        assert torch.equal(result.deltas, alone.deltas)
        assert (result.loss, result.choice) == (alone.loss, alone.choice)
