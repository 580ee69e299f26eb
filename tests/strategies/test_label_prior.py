"""Label priors: their estimate, and their place in the bias of the served adapters."""

import json
import math

import pytest
import torch

from equality import assert_near
from fedmerge_peft import AdapterLayout, Recipe, federate
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.recipe.strategies import STRATEGIES
from fedmerge_peft.strategies.label_counts import LabelPriors, fit_concentration
from fedmerge_peft.strategies.label_prior import bias_columns
from fedmerge_peft.training.plan import Mixture

SKEWED = torch.tensor([[30, 0, 0], [0, 30, 0], [0, 0, 30], [15, 15, 0]])
ALIKE = torch.tensor([[10, 20, 30], [11, 19, 30], [10, 21, 29]])


# ---- the estimate --------------------------------------------------------------------------------


def test_the_prior_is_the_mean_of_a_dirichlet_posterior():
    priors = LabelPriors(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), 4.0)
    counts = torch.tensor([[6, 0, 0], [0, 0, 0]])
    expected = torch.tensor([[8 / 10, 1 / 10, 1 / 10], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(priors.shifts(counts, balanced=True).exp(), expected)
    torch.testing.assert_close(
        priors.shifts(counts, balanced=False).exp(), expected / torch.tensor([0.5, 0.25, 0.25])
    )


def test_clients_with_one_distribution_need_no_shift():
    priors = LabelPriors.fit(ALIKE)
    assert math.isinf(priors.concentration)
    assert priors.shifts(ALIKE, balanced=False).tolist() == [[0.0] * 3] * 3
    torch.testing.assert_close(
        priors.shifts(ALIKE, balanced=True), priors.mean.log().float().expand(3, -1)
    )


def test_skewed_clients_get_their_own_labels():
    priors = LabelPriors.fit(SKEWED)
    assert priors.concentration < 10
    frequencies = priors.shifts(SKEWED, balanced=True).exp()
    torch.testing.assert_close(frequencies.sum(dim=1), torch.ones(4))
    assert frequencies[:3].diagonal().min() > 0.8
    assert bool((frequencies > 0).all())  # labels without examples stay possible


def test_a_client_without_known_labels_has_no_shift_and_one_client_alone_has_none():
    counts = torch.cat([SKEWED, torch.zeros(1, 3, dtype=torch.int64)])
    shifts = LabelPriors.fit(counts).shifts(counts, balanced=False)
    torch.testing.assert_close(shifts[-1], torch.zeros(3))
    alone = SKEWED[3:]
    assert LabelPriors.fit(alone).shifts(alone, balanced=False).abs().max() == 0


def test_the_concentration_of_drawn_clients_is_found():
    """Counts of 400 clients, from distributions Dirichlet(2 · p̄) around the uniform one."""
    torch.manual_seed(0)
    distributions = torch.distributions.Dirichlet(torch.full((10,), 0.2)).sample((400,))
    counts = torch.distributions.Multinomial(40, distributions).sample()
    found, gain = fit_concentration(counts.double(), counts.sum(dim=0).double() - counts)
    assert 1 < found < 4
    assert gain > 1000


# ---- served adapters -----------------------------------------------------------------------------


def logits_of(engine, row, rows):
    """Logits of examples with an adapter."""
    _, inputs = engine.runtime.to_device(engine.runtime.collate(rows))
    engine.backbone.load_row(row)
    engine.backbone.eval()
    with torch.no_grad():
        return engine.backbone.model(**inputs).logits


def with_skewed_labels(engine, recipe):
    """The engine for a recipe, with label counts that differ between its clients."""
    counts = [[30, 1, 0], [1, 30, 0], [0, 1, 30], [15, 15, 0], [30, 0, 2], [0, 31, 1]]
    labels = len(engine.task.labels)
    table = [(row + [0] * labels)[:labels] for row in counts]
    engine = engine.with_recipe(recipe)
    engine.label_counts = lambda: table
    return engine, torch.tensor(table)


@pytest.mark.parametrize("name", [entry.name for entry in STRATEGIES])
@pytest.mark.parametrize("logits", ["plain", "adjusted"])
def test_every_method_serves_the_prior_and_trains_without_it(smoke, smoke_engine, name, logits):
    settings = ("serving.label_prior=true", f"training.logits={logits}")
    levels = ["strategy.levels=2"] if name == "femam" else []  # as many as ranks
    recipe = smoke(f"strategy={name}", *levels, *settings)
    engine, counts = with_skewed_labels(smoke_engine, recipe)
    federation = Federation(recipe, engine)
    strategy, inner = federation.strategy, federation.strategy.inner
    shifts = LabelPriors.fit(counts).shifts(counts, balanced=logits == "adjusted")
    assert shifts.abs().max() > 1
    for client in range(6):
        before, served = inner.served(client), strategy.served(client)
        assert torch.equal(strategy.plan(client).sent, inner.plan(client).sent)
        if isinstance(served, Mixture):
            before, served = before.rows[0], served.rows[0]
        else:
            merged = strategy.soup.merge(strategy.weights[client], torch.eye(6)[client])
            assert_near(merged, served, 0)
        test = engine.clients[client].test
        torch.testing.assert_close(
            logits_of(engine, served, test), logits_of(engine, before, test) + shifts[client]
        )


def test_priors_and_own_heads_add_up(smoke, smoke_engine, tmp_path):
    """A run's exports load what its clients were scored with."""
    strategy = {"name": "fedmerge", "warm_rounds": 1, "own_head": True}
    recipe = smoke(f"strategy={json.dumps(strategy)}", "serving.label_prior=true", "rounds=2")
    run = federate(recipe, tmp_path / "run", engine=smoke_engine)
    federation = Federation(recipe, smoke_engine)
    list(federation.rounds())
    layout = smoke_engine.backbone.layout
    for number, client in enumerate(run.client_names):
        row = layout.row(run.adapter(client))
        torch.testing.assert_close(row, federation.strategy.served(number))
    assert all(record["finetuned"] is None for record in run.records)


def test_the_bias_is_that_of_the_heads_last_layer():
    def layout(*entries):
        return AdapterLayout.from_tensors([(key, shape, "head") for key, shape in entries])

    dense = [("dense.weight", (3, 3)), ("dense.bias", (3,))]
    out = [("out.weight", (3, 3)), ("out.bias", (3,))]
    assert bias_columns(layout(*dense, *out), 3).tolist() == [21, 22, 23]
    with pytest.raises(RecipeError, match="has no bias to add the prior to; remove the key"):
        bias_columns(layout(*dense, out[0]), 3)
    with pytest.raises(RecipeError, match=r"ends in out.weight with 3 rows, but there are 5"):
        bias_columns(layout(*dense, *out), 5)
    with pytest.raises(RecipeError, match="this adapter has no output layer to add the prior to"):
        bias_columns(AdapterLayout.from_tensors([("a.lora_A.weight", (1, 2), "lora")]), 3)


def test_no_prior_without_labels_or_with_privacy():
    prior = "serving.label_prior=true"
    with pytest.raises(RecipeError, match="label_prior needs examples with one label each"):
        Recipe.load("smoke", ["task={name: causal-lm}", prior])
    with pytest.raises(RecipeError, match=r"privacy\.mode: local does not protect"):
        Recipe.load("smoke", ["strategy=fedavg", "privacy.mode=local", prior])
    with pytest.raises(RecipeError, match="logits: restricted needs examples with one label each"):
        Recipe.load("smoke", ["task={name: causal-lm}", "training.logits=restricted"])
    for name in ("fedpac", "fedrod"):
        with pytest.raises(RecipeError, match=f"{name} needs examples with one label each"):
            Recipe.load("smoke", ["task={name: causal-lm}", f"strategy={name}"])
