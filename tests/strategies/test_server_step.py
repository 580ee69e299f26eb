"""The server step equals the method's equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equality import assert_near
from fedmerge_peft import fedmerge_step

pytestmark = pytest.mark.equality

RULES = ("normalized", "gradient", "paper")


def federation(m=7, d=3, p=40, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    soup = torch.randn(d, p, generator=generator, dtype=dtype)
    logits = torch.randn(m, d, generator=generator, dtype=dtype)
    deltas = 0.1 * torch.randn(m, p, generator=generator, dtype=dtype)
    sizes = torch.randint(1, 50, (m,), generator=generator)
    return soup, logits, deltas, sizes


def slow_paper_step(soup, logits, deltas, sizes, weights_lr, soup_lr, columns):
    """The authors' round in plain Python numbers, with the weights' step repeated k times."""
    m, d, p = len(deltas), len(soup), soup.shape[1]
    theta, w, delta = soup.tolist(), logits.tolist(), deltas.tolist()
    rho = [float(n) / float(sum(sizes)) for n in sizes]

    def softmax(row):
        powers = [math.exp(x) for x in row]
        return [x / sum(powers) for x in powers]

    pi = [softmax(row) for row in w]
    gradient = [[0.0] * d for _ in range(m)]
    for i in range(m):
        merged = [sum(pi[i][j] * theta[j][c] for j in range(d)) for c in range(p)]
        for j in range(d):
            gradient[i][j] = pi[i][j] * sum(
                (theta[j][c] - merged[c]) * delta[i][c] for c in columns
            )
    total = sum(abs(g) for row in gradient for g in row)
    step = [[0.01 * rho[i] * gradient[i][j] / total for j in range(d)] for i in range(m)]
    moved = [[0.0] * d for _ in range(m)]
    for _ in range(10_001):
        moved = [[moved[i][j] + step[i][j] for j in range(d)] for i in range(m)]
        if max(abs(x) for row in moved for x in row) > weights_lr:
            break
    w = [[w[i][j] - moved[i][j] for j in range(d)] for i in range(m)]
    pi = [softmax(row) for row in w]
    for j in range(d):
        column = sum(pi[i][j] * rho[i] for i in range(m))
        for c in range(p):
            theta[j][c] -= soup_lr * sum(pi[i][j] * rho[i] / column * delta[i][c] for i in range(m))
    return torch.tensor(theta, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)


@pytest.mark.parametrize(
    "columns", [None, list(range(30, 40))], ids=["all columns", "the head alone"]
)
@pytest.mark.parametrize(
    ("weights_lr", "soup_lr"),
    [(0.01, 1.0), (0.003, 0.5), (100.0, 1.0)],
    ids=["as published", "small", "never reached"],
)
def test_paper_rule_equals_a_slow_recomputation(columns, weights_lr, soup_lr):
    soup, logits, deltas, sizes = federation()
    found = fedmerge_step(
        soup,
        logits,
        deltas,
        sizes,
        rule="paper",
        weights_lr=weights_lr,
        soup_lr=soup_lr,
        columns=columns,
    )
    expected = slow_paper_step(
        soup, logits, deltas, sizes, weights_lr, soup_lr, columns or range(40)
    )
    assert_near(found[0], expected[0])
    assert_near(found[1], expected[1])


def test_paper_rule_moves_no_logit_much_further_than_its_step_size():
    soup, logits, deltas, sizes = federation()
    moved = (fedmerge_step(soup, logits, deltas, sizes, rule="paper")[1] - logits).abs().max()
    assert 0.01 < moved < 0.02


def test_gradient_rule_is_the_gradient_of_the_merged_objective():
    """With ℓ_i(θ) = ½‖θ − t_i‖², one unit step gives δ_i = θ_i − t_i, the exact gradient."""
    soup, logits, targets, sizes = federation(seed=3)
    soup.requires_grad_()
    logits.requires_grad_()
    shares = sizes / sizes.sum()
    merged = torch.softmax(logits, dim=1) @ soup
    objective = (shares * 0.5 * (merged - targets).square().sum(dim=1)).sum()
    by_autograd = torch.autograd.grad(objective, (soup, logits))
    new_soup, new_logits = fedmerge_step(
        soup.detach(),
        logits.detach(),
        (merged - targets).detach(),
        sizes,
        rule="gradient",
        weights_lr=0.3,
        soup_lr=0.7,
    )
    torch.testing.assert_close(new_soup, soup.detach() - 0.7 * by_autograd[0])
    torch.testing.assert_close(new_logits, logits.detach() - 0.3 * by_autograd[1])


def test_normalized_rule_moves_every_client_by_the_step_size():
    soup, logits, deltas, sizes = federation()
    moved = (
        (fedmerge_step(soup, logits, deltas, sizes, weights_lr=0.7)[1] - logits).abs().amax(dim=1)
    )
    torch.testing.assert_close(moved, torch.full_like(moved, 0.7))


def test_normalized_rule_moves_weight_towards_the_adapter_that_the_client_moved_to():
    soup = torch.eye(2, dtype=torch.float64)
    trained_towards_second = torch.tensor([[0.2, -0.2]], dtype=torch.float64)  # sent minus trained
    _, logits = fedmerge_step(
        soup, torch.zeros(1, 2, dtype=torch.float64), trained_towards_second, [5]
    )
    assert logits[0, 1] > logits[0, 0]


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_scale_of_a_reply_does_not_change_how_far_normalized_weights_move(scale, seed):
    soup, logits, deltas, sizes = federation(seed=seed)
    _, once = fedmerge_step(soup, logits, deltas, sizes)
    _, scaled = fedmerge_step(soup, logits, deltas * scale, sizes)
    torch.testing.assert_close(once, scaled)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 6), d=st.integers(1, 5), p=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_finite_inputs_give_finite_outputs(rule, m, d, p, seed):
    soup, logits, deltas, sizes = federation(m, d, p, seed, torch.float32)
    new_soup, new_logits = fedmerge_step(soup, 30 * logits, deltas, sizes, rule=rule)
    assert new_soup.isfinite().all()
    assert new_logits.isfinite().all()
    assert (new_soup.dtype, new_logits.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(torch.softmax(new_logits, 1).sum(1), torch.ones(m))


@pytest.mark.parametrize("rule", RULES)
def test_one_adapter_equals_fedavg(rule):
    soup, _, deltas, sizes = federation(d=1)
    logits = torch.zeros(len(deltas), 1, dtype=torch.float64)
    new_soup, new_logits = fedmerge_step(soup, logits, deltas, sizes, rule=rule)
    fedavg = soup - (sizes / sizes.sum()).to(deltas) @ deltas
    torch.testing.assert_close(new_soup, fedavg)
    assert torch.equal(new_logits, logits)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [2, 3, 5, 8])
def test_identical_starts_never_specialise(rule, dtype, d):
    soup, _, deltas, sizes = federation(m=9, d=1, p=3001, dtype=dtype)
    soup, logits = soup.repeat(d, 1), torch.zeros(9, d, dtype=dtype)
    for turn in range(5):
        soup, logits = fedmerge_step(soup, logits, deltas.roll(turn, 0), sizes, rule=rule)
    torch.testing.assert_close(soup, soup[:1].expand_as(soup))
    torch.testing.assert_close(torch.softmax(logits, 1), torch.full_like(logits, 1 / d))


@pytest.mark.parametrize("rule", ["normalized", "paper"])
def test_identical_starts_equal_fedavg(rule):
    start, _, deltas, sizes = federation(d=1)
    soup, _ = fedmerge_step(
        start.repeat(4, 1),
        torch.zeros(len(deltas), 4, dtype=torch.float64),
        deltas,
        sizes,
        rule=rule,
    )
    fedavg = start - (sizes / sizes.sum()).to(deltas) @ deltas
    torch.testing.assert_close(soup, fedavg.expand_as(soup))


@pytest.mark.parametrize("rule", RULES)
def test_permuting_adapters_permutes_the_result(rule):
    soup, logits, deltas, sizes = federation()
    order = torch.tensor([2, 0, 1])
    plain = fedmerge_step(soup, logits, deltas, sizes, rule=rule)
    permuted = fedmerge_step(soup[order], logits[:, order], deltas, sizes, rule=rule)
    torch.testing.assert_close(permuted[0], plain[0][order])
    torch.testing.assert_close(permuted[1], plain[1][:, order])


@pytest.mark.parametrize("rule", RULES)
def test_permuting_clients_permutes_the_weights_and_leaves_the_soup(rule):
    soup, logits, deltas, sizes = federation()
    order = torch.randperm(len(deltas), generator=torch.Generator().manual_seed(1))
    plain = fedmerge_step(soup, logits, deltas, sizes, rule=rule)
    permuted = fedmerge_step(soup, logits[order], deltas[order], sizes[order], rule=rule)
    torch.testing.assert_close(permuted[0], plain[0])
    torch.testing.assert_close(permuted[1], plain[1][order])


def test_columns_may_be_an_index_or_a_mask():
    soup, logits, deltas, sizes = federation()
    mask = torch.zeros(40, dtype=torch.bool)
    mask[5:9] = True
    by_index = fedmerge_step(soup, logits, deltas, sizes, columns=torch.arange(5, 9))
    by_mask = fedmerge_step(soup, logits, deltas, sizes, columns=mask)
    by_slice = fedmerge_step(soup, logits, deltas, sizes, columns=slice(5, 9))
    everything = fedmerge_step(soup, logits, deltas, sizes)
    assert torch.equal(by_index[1], by_mask[1])
    assert torch.equal(by_index[1], by_slice[1])
    assert not torch.equal(by_index[1], everything[1])


def test_arguments_are_not_modified():
    arguments = federation()
    before = [tensor.clone() for tensor in arguments]
    fedmerge_step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, w, x, n: (s, w[:, :2], x, n), r"expected soup \(d, P\)"),
        (lambda s, w, x, n: (s, w, x[:, :-1], n), r"expected soup \(d, P\)"),
        (lambda s, w, x, n: (s, w, x, n[:-1]), r"expected soup \(d, P\)"),
        (lambda s, w, x, n: (s, w[:0], x[:0], n[:0]), r"sizes \(m,\), m > 0"),
        (lambda s, w, x, n: (s, w, x, n * 0), "sizes must be positive"),
        (
            lambda s, w, x, n: (s, w, x.index_fill(0, torch.tensor([2, 5]), math.nan), n),
            r"deltas must be finite.* \[2, 5\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fedmerge_step(*change(*federation()))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="choose one of normalized, gradient, paper"):
        fedmerge_step(*federation(), rule="adam")
