"""Weights of the backbone or examples that change between a run and its use are noticed."""

import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge_peft import Recipe, RecipeError, ResumeError, RunError, federate, resume
from fedmerge_peft.models.pretrained import load_model
from fedmerge_peft.models.weights_digest import weights_digest
from fedmerge_peft.recipe.backbone import BackboneRecipe

TICKETS = pd.DataFrame(
    {
        "text": [f"ticket {n}" for n in range(24)],
        "label": ["a", "b"] * 12,
        "site": ["North"] * 12 + ["South"] * 12,
    }
)


class Task:
    """A classifier of two labels."""

    auto_model = "AutoModelForSequenceClassification"
    heads = ("classifier",)
    unused = ()
    config_options = {}
    labels = ("no", "yes")
    pad_token_id = None


@pytest.fixture
def folder(tiny_models, tmp_path):
    """A folder with a tiny model."""
    shutil.copytree(tiny_models / "bert", tmp_path / "model")
    return tmp_path / "model"


def change(folder):
    """Train a model a little."""
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor += 1e-3 * torch.randn_like(tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def digest(folder, seed=0, **backbone):
    torch.manual_seed(seed)
    recipe = BackboneRecipe(model=str(folder), **backbone)
    return weights_digest(*load_model(recipe, Task(), str(folder), torch.device("cpu")))


def test_the_digest_depends_on_the_pretrained_weights_alone(folder):
    before = digest(folder)
    assert digest(folder, seed=1) == before  # with another head
    assert digest(folder, dtype="bfloat16") != before
    change(folder)
    assert digest(folder) != before


def test_running_statistics_count():
    model = torch.nn.BatchNorm1d(3)
    before = weights_digest(model, ())
    model.running_mean += 1
    assert weights_digest(model, ()) != before


def tickets(path, model):
    """A recipe of two sites."""
    return Recipe(
        name="tickets",
        rounds=1,
        task={"name": "sequence-classification"},
        backbone={"model": str(model)},
        data={"path": str(path), "partition": {"scheme": "natural", "by": "site"}},
        baselines=["local"],
        training={"device": "cpu", "learning_rate": 1e-3},
    )


def test_a_run_refuses_other_weights(folder, tmp_path):
    recipe = tickets("memory", folder)
    run = federate(recipe, tmp_path / "run", data=TICKETS)
    change(folder)
    with pytest.raises(ResumeError, match=r"data or the model have changed .* backbone\.json"):
        resume(run.path, ["rounds=2"], data=TICKETS)
    changed = f"the weights of {folder} have changed since the run"
    with pytest.raises(RunError, match=changed):
        run.predict({"North": ["ticket"]})
    with pytest.raises(RunError, match=changed):
        run.client("North").model("cpu")
    reused = recipe.replace([f"baselines_from={run.path}"])
    with pytest.raises(RecipeError, match=r"backbone\.json differs from this run's"):
        federate(reused, tmp_path / "other", data=TICKETS)


@pytest.mark.parametrize(
    ("column", "changed"),
    [("label", ["b", "a"] * 12), ("text", [f"a bill {n}" for n in range(24)])],
)
def test_other_examples_of_the_same_clients_are_refused(column, changed, tmp_path):
    TICKETS.to_csv(tmp_path / "rows.csv", index=False)
    run = federate(tickets(tmp_path / "rows.csv", "tiny:bert"), tmp_path / "run")
    TICKETS.assign(**{column: changed}).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ResumeError, match=r"data or the model have changed .* examples\.json"):
        resume(run.path, ["rounds=2"])
    TICKETS.to_csv(tmp_path / "rows.csv", index=False)
    assert resume(run.path, ["rounds=2"]).rounds_on_disk == 2
