"""Runs on models that Python passes, instead of folders or hub ids."""

import re
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tokenizers import normalizers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from federation.made_modules import ImageNet, NextToken, TextNet
from federation.small_recipe import recipe
from fedmerge_peft import (
    BackboneError,
    Recipe,
    ResumeError,
    RunError,
    export_client,
    federate,
    load_run,
    personalize,
    resume,
    sweep,
)
from fedmerge_peft.models.in_memory import save_stock
from fedmerge_peft.report.page import write_report
from fedmerge_peft.tasks.in_memory import take_model

LABELS = ["access", "billing"]


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models / "bert")


@pytest.fixture
def bert(tiny_models):
    return AutoModelForSequenceClassification.from_pretrained(tiny_models / "bert", num_labels=6)


def frame():
    texts = [("The badge reader is offline.", "access"), ("I was charged twice.", "billing")] * 16
    table = pd.DataFrame(texts, columns=["text", "queue"])
    table["desk"] = ["North", "South", "South", "North"] * 8
    return table


def text_recipe(**changes):
    return Recipe(
        **{
            "name": "net",
            "rounds": 2,
            "task": {"name": "sequence-classification", "label": "queue"},
            "backbone": {"model": "memory"},
            "data": {"path": "memory", "partition": {"scheme": "natural", "by": "desk"}},
            "strategy": {"name": "fedmerge", "adapters": 2},
            "training": {"learning_rate": 0.01, "device": "cpu"},
            **changes,
        }
    )


def state_of(model):
    config = getattr(model, "config", None)
    settings = deepcopy(vars(config)) if config is not None else None
    return {name: value.clone() for name, value in model.state_dict().items()}, settings


def assert_unchanged(model, state):
    tensors, settings = state
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())
    if settings is not None:
        assert vars(model.config) == settings


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "run"
    return federate(text_recipe(), path, data=frame(), model=TextNet(), tokenizer=tokenizer)


# ---- models of transformers ----------------------------------------------------------------------


@pytest.mark.equality
def test_a_run_equals_one_on_the_same_model_from_its_folder(bert, tokenizer, tiny_models, tmp_path):
    folder = tmp_path / "model"
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = state_of(bert)
    passed = federate(recipe("rounds=1"), tmp_path / "passed", model=bert, tokenizer=tokenizer)
    assert_unchanged(bert, state)
    loaded = federate(recipe("rounds=1", f"backbone.model={folder}"), tmp_path / "loaded")
    assert re.fullmatch(r"memory:\w{16}", passed.recipe.backbone.model)
    assert torch.equal(passed.soup.rows, loaded.soup.rows)
    assert passed.summary["final"] == loaded.summary["final"]
    client = passed.client_names[0]
    texts = {client: ["The badge reader is offline."]}
    assert passed.predict(texts) == loaded.predict(texts)
    (ours,) = passed.client(client).pipeline()(texts[client])
    (theirs,) = loaded.client(client).pipeline()(texts[client])
    assert ours == theirs


def test_a_model_with_modules_of_its_own_keeps_them(bert, tokenizer, tmp_path):
    """Saved and loaded with transformers, it would lose them."""
    bert.classifier = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6))
    run = federate(recipe("rounds=1"), tmp_path / "run", model=bert, tokenizer=tokenizer)
    adapter = run.adapter(run.client_names[0])
    assert any("classifier.2.weight" in name for name in adapter)


# ---- other modules -------------------------------------------------------------------------------


def test_a_module_gets_from_a_frame_to_a_report(run, tmp_path):
    assert run.clients["test_accuracy"].notna().all()
    assert run.records[-1]["train_loss"] < run.records[0]["train_loss"]
    assert "North" in write_report([run], tmp_path / "report.html").read_text()


def test_a_run_does_not_change_the_module(tokenizer, tmp_path):
    net = TextNet()
    state = state_of(net)
    federate(text_recipe(rounds=1), tmp_path / "run", data=frame(), model=net, tokenizer=tokenizer)
    assert_unchanged(net, state)
    assert not hasattr(net, "config")
    assert isinstance(net(torch.tensor([[1]]), torch.tensor([[1]])), torch.Tensor)


def test_the_adapter_of_a_module_loads_into_the_module(run, tokenizer, tmp_path):
    inputs = {name: torch.tensor([[5, 6, 7]]) for name in ("input_ids",)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    folder = export_client(run, "North", tmp_path / "north")
    assert "base = ...  # the model that the run was given" in (folder / "README.md").read_text()
    own = PeftModel.from_pretrained(TextNet(), folder).eval()
    assert torch.equal(own(**inputs), run.client("North").model()(**inputs).logits)
    assert not torch.allclose(own(**inputs), TextNet()(**inputs))


def test_clients_predict_with_a_module(run):
    (answer,) = run.predict({"North": ["I was charged twice."]})["North"]
    assert answer["label"] in LABELS
    with pytest.raises(
        RunError, match=r"pipeline: transformers has no pipeline for TextNet.*run\.predict"
    ):
        run.client("North").pipeline()


def test_the_output_layer_is_the_head_and_all_others_get_lora(run):
    config = run.adapter_config
    assert config["modules_to_save"] == ["base_model.model.out"]  # and not each lora_dropout
    assert set(config["target_modules"]) == {"layers.0.dense", "layers.1.dense"}


class Negated(TextNet):
    def forward(self, input_ids, attention_mask):
        return -super().forward(input_ids, attention_mask)


def rows_of(tmp_path, name, model, tokenizer):
    run = federate(
        text_recipe(rounds=1), tmp_path / name, data=frame(), model=model, tokenizer=tokenizer
    )
    return run, run.soup.rows


def test_the_code_of_a_module_is_part_of_its_fingerprint(tokenizer, tmp_path):
    first, rows = rows_of(tmp_path, "first", TextNet(), tokenizer)
    Negated.__name__ = "TextNet"  # as in a notebook whose cell has run again
    second, others = rows_of(tmp_path, "second", Negated(), tokenizer)
    assert first.recipe.backbone.model != second.recipe.backbone.model
    assert not torch.equal(rows, others)


@pytest.mark.parametrize("change", ["normalizer", "model_max_length"])
def test_the_settings_of_a_tokenizer_are_part_of_the_fingerprint(change, tokenizer, tmp_path):
    other = deepcopy(tokenizer)
    if change == "normalizer":
        other.backend_tokenizer.normalizer = normalizers.Replace("a", "e")
    else:
        other.model_max_length = 4
    first, rows = rows_of(tmp_path, "first", TextNet(), tokenizer)
    second, others = rows_of(tmp_path, "second", TextNet(), other)
    assert first.recipe.backbone.model != second.recipe.backbone.model
    assert not torch.equal(rows, others)


def test_objects_replace_earlier_ones_with_the_same_fingerprint():
    values = [1.0, 2.0]
    functions = [lambda image, value=value: value for value in values]
    net = TextNet()
    first, second = (take_model(net, processor=function) for function in functions)
    assert first is second
    assert second.processor is functions[1]


@pytest.mark.parametrize("change", ["none", "hook", "setting", "forward"])
def test_a_model_of_transformers_that_computes_something_else_is_copied(change, bert, tmp_path):
    layer = bert.bert.encoder.layer[0]
    if change == "hook":
        layer.intermediate.register_forward_hook(lambda module, inputs, output: output * 0)
    elif change == "setting":
        layer.output.LayerNorm.eps = 1.0
    elif change == "forward":
        layer.intermediate.forward = torch.nn.functional.relu
    save_stock(bert, tmp_path / "model")
    assert (tmp_path / "model").exists() == (change == "none")


def test_hooks_of_a_model_run_in_training(tiny_models, tokenizer, tmp_path):
    calls = []
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models / "bert", num_labels=2)
    model.bert.pooler.register_forward_hook(lambda *_: calls.append("hook"))
    federate(
        text_recipe(rounds=1), tmp_path / "run", data=frame(), model=model, tokenizer=tokenizer
    )
    assert calls


def test_a_function_prepares_the_images_of_a_module(tmp_path):
    images = [Image.new("RGB", (2, 2), color) for color in ("black", "white")] * 16
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        rows.append((str(folder / f"{number}.png"), ["dark", "light"][number % 2]))
    table = pd.DataFrame(rows, columns=["image", "label"]).assign(desk=["N", "S", "S", "N"] * 8)

    def pixels(image):
        return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255

    task = {"name": "image-classification", "image": "image", "label": "label"}
    run = federate(
        text_recipe(task=task), tmp_path / "run", data=table, model=ImageNet(), processor=pixels
    )
    assert run.clients["test_accuracy"].notna().all()
    assert run.predict({"N": images[:1]})["N"][0]["label"] in ("dark", "light")


def test_a_module_predicts_next_tokens(tokenizer, tmp_path):
    net, table = NextToken(), frame().rename(columns={"queue": "topic"})
    lm = {"name": "causal-lm", "text": "text"}
    run = federate(
        text_recipe(task=lm), tmp_path / "run", data=table, model=net, tokenizer=tokenizer
    )
    assert run.clients["test_perplexity"].notna().all()
    with pytest.raises(BackboneError, match=r"does not generate text"):
        run.predict({"North": ["The badge"]})


# ---- the same model again ------------------------------------------------------------------------


@pytest.mark.equality
def test_a_resumed_run_takes_the_same_model(run, tokenizer, tmp_path):
    path, given = tmp_path / "run", {"data": frame(), "tokenizer": tokenizer}
    federate(text_recipe(rounds=1), path, model=TextNet(), **given)
    with pytest.raises(ResumeError, match=r"cannot be used with another model: it had memory:\w+"):
        resume(path, ["rounds=2"], model=TextNet(seed=1), **given)
    extended = resume(path, ["rounds=2"], model=TextNet(), **given)
    assert len(extended.records) == 2
    assert extended.predict({"North": ["a"]}).keys() == {"North"}


def test_a_run_without_its_model_says_what_to_pass(tokenizer, tmp_path):
    net = TextNet(seed=3)
    path = tmp_path / "run"
    federate(text_recipe(rounds=1), path, data=frame(), model=net, tokenizer=tokenizer)
    with pytest.raises(ResumeError, match=r"needs its model.*model=\.\.\., and tokenizer="):
        resume(path, ["rounds=2"], data=frame())
    with pytest.raises(BackboneError, match=r"load_run\(path, model=\.\.\., tokenizer=\.\.\.\)"):
        load_run(path).predict({"North": ["a"]})
    with pytest.raises(ResumeError, match="cannot be used with another model"):
        load_run(path, model=TextNet(seed=4), tokenizer=tokenizer)
    assert load_run(path).clients is not None
    again = load_run(path, model=net, tokenizer=tokenizer)
    assert again.predict({"North": ["a"]}).keys() == {"North"}
    new = personalize(path, frame(), model=net, tokenizer=tokenizer, local=False)
    assert len(new.weights) == 2


def test_a_model_that_has_changed_is_refused(tokenizer, tmp_path):
    net = TextNet(seed=5)
    run = federate(
        text_recipe(rounds=1), tmp_path / "run", data=frame(), model=net, tokenizer=tokenizer
    )
    with torch.no_grad():
        net.out.bias += 1
    with pytest.raises(BackboneError, match=r"TextNet, or its .* has changed since it was"):
        run.predict({"North": ["a"]})


def test_a_run_of_a_hub_model_refuses_one(bert, tokenizer, tmp_path):
    federate(recipe("rounds=1"), tmp_path / "run")
    with pytest.raises(ResumeError, match=r"loads its model from backbone\.model: tiny:bert"):
        resume(tmp_path / "run", ["rounds=2"], model=bert, tokenizer=tokenizer)


def test_a_sweep_takes_a_model(tokenizer, tmp_path):
    recipes = {str(seed): text_recipe(rounds=1, seed=seed) for seed in (0, 1)}
    runs = sweep(recipes, tmp_path, data=frame(), model=TextNet(), tokenizer=tokenizer)
    assert {run.recipe.backbone.model for run in runs.values()} == {runs["0"].recipe.backbone.model}


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({"model": "bert-base-uncased", "tokenizer": 1}, r"found text 'bert.*backbone\.model"),
        ({"model": TextNet()}, r"pass its tokenizer=\.\.\. \(texts\) or its processor"),
        ({"model": TextNet(), "tokenizer": 1, "processor": 1}, "and not both"),
        ({"tokenizer": 1}, "pass the model, too"),
        ({"model": TextNet(), "tokenizer": 1}, "tokenizer: found int, expected a tokenizer"),
    ],
)
def test_what_is_no_model_with_its_processor_is_refused(passed, message, tmp_path):
    with pytest.raises(BackboneError, match=message):
        federate(text_recipe(), tmp_path / "run", data=frame(), **passed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("net", "changes", "message"),
    [
        (TextNet(labels=3), {}, r"logits of shape \(1, 3\).*the data have 2 labels"),
        (nn.Linear(1, 2), {}, "Linear has no linear layers besides its head"),
        (ImageNet(), {}, "does not run on the inputs of this task"),
        (TextNet(), {"backbone": {"model": "memory", "attention": "eager"}}, "backbone.attention"),
        (
            TextNet(),
            {"backbone": {"model": "memory", "gradient_checkpointing": True}},
            "backbone.gradient_checkpointing: needs a model of transformers without changed",
        ),
    ],
)
def test_a_module_that_does_not_fit_is_refused(net, changes, message, tokenizer, tmp_path):
    with pytest.raises(BackboneError, match=message):
        federate(
            text_recipe(**changes), tmp_path / "run", data=frame(), model=net, tokenizer=tokenizer
        )


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
def test_a_model_with_an_adapter_is_refused(wrap, tokenizer, tmp_path):
    adapted = wrap(get_peft_model(TextNet(), LoraConfig(target_modules=["out"])))
    with pytest.raises(BackboneError, match="it holds a PEFT adapter"):
        federate(text_recipe(), tmp_path / "run", model=adapted, tokenizer=tokenizer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(BackboneError, match="pass the module that was compiled"):
        federate(
            text_recipe(), tmp_path / "run", model=torch.compile(TextNet()), tokenizer=tokenizer
        )


def test_a_recipe_without_its_model_says_so(tmp_path):
    with pytest.raises(BackboneError, match=r"federate\(recipe, model=\.\.\., tokenizer=\.\.\.\)"):
        federate(text_recipe(), tmp_path / "run", data=frame())
