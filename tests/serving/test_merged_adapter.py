"""A run's adapters as PEFT models, as pipelines and as mixtures."""

import pytest
import torch
from transformers import TextClassificationPipeline, TextGenerationPipeline

from equality import assert_near
from fedmerge_peft import RunError

from .conftest import TASKS

CLIENT = "client 1"


@pytest.mark.equality
@pytest.mark.parametrize("task", TASKS)
def test_a_clients_model_equals_its_served_one(task, finished):
    made = finished(task)
    model = made.run.client(CLIENT).model("cpu")
    assert not model.training
    assert_near(model(**made.inputs).logits.detach(), made.logits(CLIENT))


def test_a_pipeline_names_the_labels(finished):
    pipeline = finished("sequence-classification").run.client(CLIENT).pipeline("cpu")
    assert isinstance(pipeline, TextClassificationPipeline)
    found = pipeline(["my order is late", "word " * 500], top_k=None)
    assert [{each["label"] for each in scores} for scores in found] == [{"amber", "blue"}] * 2


def test_a_pipeline_of_a_decoder_generates(finished):
    pipeline = finished("causal-lm").run.client(CLIENT).pipeline("cpu", max_new_tokens=3)
    assert isinstance(pipeline, TextGenerationPipeline)
    assert pipeline("my order")[0]["generated_text"].startswith("my order")


def test_a_pipeline_of_images_names_the_labels(finished):
    from PIL import Image

    pipeline = finished("image-classification").run.client(CLIENT).pipeline("cpu")
    assert {each["label"] for each in pipeline(Image.new("RGB", (40, 40)))} == {"cat", "dog"}


def test_a_client_has_its_weights_and_scores(finished):
    run = finished("sequence-classification").run
    client = run.client(CLIENT)
    assert client.weights.tolist() == pytest.approx(list(run.weights.loc[CLIENT]))
    assert client.scores["test_accuracy"] == run.clients.loc[CLIENT, "test_accuracy"]
    assert client.round == 2
    assert "after round 2" in repr(client)


def test_a_mixture_of_one_adapter_is_that_adapter(finished):
    run = finished("causal-lm").run
    assert torch.equal(run.merge({2: 5}).row, run.soup.rows[2])


def test_weights_of_a_mixture_are_normalized(finished):
    run = finished("causal-lm").run
    assert run.merge({0: 3, 2: 1}).weights.tolist() == [0.75, 0, 0.25]


def test_clients_can_be_mixed_by_name(finished):
    run = finished("causal-lm").run
    mixed = run.merge({"client 0": 1, "client 2": 1, 1: 2})
    expected = (run.client("client 0").weights + run.client("client 2").weights) / 4 + torch.tensor(
        [0, 0.5, 0]
    )
    torch.testing.assert_close(mixed.weights, expected)
    assert mixed.name == "0.25 client 0 + 0.25 client 2 + 0.5 1"
    assert mixed.scores == {}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "is not a valid mixture"),
        ({0: 0}, "is not a valid mixture"),
        ({0: -1, 1: 2}, "is not a valid mixture"),
        ({0: float("inf")}, "is not a valid mixture"),
        ({3: 1}, "has no adapter 3; it has 0 to 2"),
        ({"nobody": 1}, "has no client 'nobody'"),
    ],
)
def test_invalid_mixtures_are_refused(shares, message, finished):
    with pytest.raises(RunError, match=message):
        finished("causal-lm").run.merge(shares)


def test_a_mixture_can_be_removed(finished, tmp_path):
    folder = finished("causal-lm").run.merge({0: 1, 1: 1}).save(tmp_path / "half")
    assert (folder / "adapter_model.safetensors").is_file()
