"""Runs of each task are exported, served and reported."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict

from equality import assert_near
from fedmerge_peft import Recipe, federate
from fedmerge_peft.data import federate_data
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import RunError
from fedmerge_peft.report.page import write_report
from fedmerge_peft.serving.export import export_client
from fedmerge_peft.sites.server.enrollment import agree_and_load
from fedmerge_peft.sites.server.roster import Roster
from fedmerge_peft.sites.site_data import site_summary, with_label_ids
from tasks.made_examples import KINDS, MADE, made, pictures

TASKS = sorted(MADE)
TARGETS = {"bert": ["query", "value"], "vit": ["q_proj", "v_proj"]}

INPUTS = {
    "token-classification": [["Ada", "Moor", "called"], ["the", "badge", "of", "Bo"]],
    "text-regression": [("the parcel", "parcel again"), ("a badge", "no")],
    "multi-label-classification": ["the parcel is late", "a badge"],
    "image-regression": pictures(2, seed=1),
    "multiple-choice": [],
}
"""Inputs of predictions."""


def piped(task, pipeline):
    """Return the answers of transformers' pipeline to the inputs, in the form of this package."""
    if task == "image-regression":
        return [answer for (answer,) in pipeline(INPUTS[task])]
    if task == "text-regression":
        return [pipeline({"text": a, "text_pair": b}) for a, b in INPUTS[task]]
    if task == "multi-label-classification":
        every = pipeline(INPUTS[task], top_k=None)
        above = [
            {each["label"]: each["score"] for each in answer if each["score"] >= 0.5}
            for answer in every
        ]
        ordered = [dict(sorted(each.items())) for each in above]
        return [{"labels": [*each], "scores": [*each.values()]} for each in ordered]
    answers = []
    for words in INPUTS[task]:
        found = pipeline(" ".join(words), ignore_labels=[])
        starts = [len(" ".join(words[:place])) + bool(place) for place in range(len(words))]
        firsts = [next(each for each in found if each["end"] > start) for start in starts]
        answers.append(
            {
                "tags": [each["entity"] for each in firsts],
                "scores": [each["score"] for each in firsts],
            }
        )
    return answers


@pytest.fixture(scope="module", params=TASKS)
def finished(request, tiny_models, tmp_path_factory):
    """A run of a round with two clients, and the engine that trained it."""
    folder = tmp_path_factory.mktemp(request.param)
    table, section = made(request.param, 24)
    kind = KINDS[request.param]
    table = table.add_column("by", [f"client {row % 2}" for row in range(24)])
    DatasetDict({"train": table}).save_to_disk(folder / "data")
    recipe = {
        "name": "mine",
        "task": section,
        "rounds": 1,
        "backbone": {"model": str(tiny_models / kind)},
        "lora": {"r": 2, "target_modules": TARGETS[kind]},
        "data": {
            "path": str(folder / "data"),
            "test_fraction": 0.25,
            "partition": {"scheme": "natural", "by": "by"},
        },
        "strategy": {"name": "fedmerge", "adapters": 2, "start": "independent"},
        "training": {"learning_rate": 0.01, "epochs": 1, "device": "cpu"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    recipe = Recipe.load(folder / "mine.yaml")
    engine = LocalEngine.from_recipe(recipe)
    return federate(recipe, folder / "run", engine=engine), engine


def served_logits(run, engine, inputs):
    soup, weights = run.state()
    engine.backbone.load_row(soup.merge(weights[0]))
    engine.backbone.eval()
    with torch.no_grad():
        return engine.backbone.model(**inputs).logits


def test_an_export_loads_in_plain_peft_with_the_same_logits(finished, tmp_path):
    """The code on the model card is executed as it is written."""
    run, engine = finished
    batch = engine.runtime.collate(np.arange(4))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    card = (export_client(run, "client 0", tmp_path / "out") / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    scope = {}
    exec(code, scope)
    with torch.no_grad():
        found = scope["model"].eval()(**inputs).logits
    assert_near(found, served_logits(run, engine, inputs))


def test_a_report_has_the_tasks_metric(finished, tmp_path):
    run, engine = finished
    page = write_report([run], tmp_path / "report.html").read_text()
    assert engine.task.metrics[0].replace("_", " ") in page
    assert engine.recipe.task.name in page
    assert "guessing" not in page  # among labels of which one is right


def test_predictions_are_those_of_transformers_pipeline(finished):
    run, engine = finished
    name = engine.recipe.task.name
    if not engine.task.pipeline:
        with pytest.raises(RunError, match="has no pipeline for"):
            run.client("client 0").pipeline(device="cpu")
        return
    found = run.predict({"client 0": INPUTS[name]}, device="cpu")["client 0"]
    expected = piped(name, run.client("client 0").pipeline(device="cpu"))
    for mine, theirs in zip(found, expected, strict=True):
        for key in mine.keys() - {"score", "scores"}:
            assert mine[key] == theirs[key]
        for key in mine.keys() & {"score", "scores"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3)


@pytest.mark.parametrize("other", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_probabilities_do_not_depend_on_the_problem_type_of_the_checkpoint(
    kind, other, tiny_models, tmp_path
):
    folder = shutil.copytree(tiny_models / kind, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": other}))
    inputs = pictures(12) if kind == "vit" else [f"the parcel {n}" for n in range(12)]
    medium, task = (
        ("image", "image-classification") if kind == "vit" else ("text", "sequence-classification")
    )
    table = Dataset.from_dict({medium: inputs, "label": ["a", "b", "c"] * 4, "by": ["x"] * 12})
    recipe = Recipe(
        name="mine",
        rounds=1,
        task={"name": task},
        backbone={"model": str(folder)},
        lora={"r": 2, "target_modules": TARGETS[kind]},
        data={"path": "memory", "partition": {"scheme": "natural", "by": "by"}},
        training={"learning_rate": 0.01, "epochs": 1, "device": "cpu"},
    )
    run = federate(recipe, tmp_path / "run", data=table)
    (found,) = run.predict({"x": inputs[:1]}, device="cpu")["x"]
    best = run.client("x").pipeline(device="cpu")(inputs[0], top_k=None)[0]
    assert (best["label"], best["score"]) == (found["label"], pytest.approx(found["score"], 1e-3))
    card = (run.save_adapter("x", tmp_path / "out") / "README.md").read_text()
    scope = {}
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    assert scope["model"].config.problem_type == "single_label_classification"


def test_a_server_without_data_agrees_with_its_sites(finished):
    """The server builds the adapter of the sites from a summary of their data."""
    _, engine = finished
    recipe = engine.recipe
    data = federate_data(recipe.data, recipe.task.label_column, recipe.seed)
    summary, roster = site_summary(data, recipe), Roster()
    assert not roster.agree_on_format({"site-1": summary}, recipe)
    absent = {}
    task, backbone = agree_and_load(recipe, roster, {"site-1": summary}, absent)
    assert not absent
    assert task.labels == engine.task.labels
    assert backbone.layout == engine.backbone.layout
    table = with_label_ids(data, recipe, roster.labels or ()).table
    rows = zip(
        engine.task.encode(table).columns["labels"],
        engine.runtime.examples.columns["labels"],
        strict=True,
    )
    assert all(torch.equal(own, expected) for own, expected in rows)
