"""Predictions for many clients in one pass equal those for each client alone."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from equality import tolerance
from fedmerge_peft import DataError, Predictor, RunError, federate, load_run
from fedmerge_peft.serving.predictor import stacking_obstacle

from .conftest import TASKS

TEXTS = {
    "client 0": [
        "my order is late",
        "the page shows an error and I cannot go on",
        "a refund please",
    ],
    "client 2": ["it works again"],
    "client 1": [f"ticket {number} " + "again " * number for number in range(5)],
}


def inputs(task):
    if task == "image-classification":
        colors = {
            client: [(40 * number, 10 * len(text), 90) for number, text in enumerate(texts)]
            for client, texts in TEXTS.items()
        }
        return {
            client: [Image.new("RGB", (32, 32), color) for color in each]
            for client, each in colors.items()
        }
    return TEXTS


@pytest.fixture(scope="module")
def predictor(finished):
    made = {}

    def of(task):
        return made.setdefault(task, Predictor(finished(task).run, device="cpu"))

    return of


@pytest.fixture
def passes(monkeypatch):
    """The number of adapters of each pass."""
    counted = []
    whole = Predictor._applied
    monkeypatch.setattr(
        Predictor, "_applied", lambda self, rows: (counted.append(len(rows)), whole(self, rows))[1]
    )
    return counted


@pytest.mark.equality
@pytest.mark.parametrize("task", TASKS)
def test_one_pass_equals_one_client_at_a_time(task, predictor, passes):
    predict, given = predictor(task), inputs(task)
    alone = {
        client: [predict({client: [each]})[client][0] for each in given[client]] for client in given
    }
    assert set(passes) == {1}
    assert predict.sequential_reason is None
    passes.clear()
    together = predict(given)
    assert max(passes) == 3
    assert len(passes) < sum(map(len, given.values()))
    assert list(together) == list(given)
    if task == "causal-lm":
        assert together == alone
        return
    for client in given:
        assert [each["label"] for each in together[client]] == [
            each["label"] for each in alone[client]
        ]
        assert [each["score"] for each in together[client]] == pytest.approx(
            [each["score"] for each in alone[client]], rel=tolerance(torch.float32)
        )


@pytest.mark.equality
@pytest.mark.parametrize("task", ["sequence-classification", "image-classification"])
def test_one_pass_equals_each_clients_pipeline(task, finished, predictor):
    given = inputs(task)
    for client, predictions in predictor(task)(given).items():
        expected = finished(task).run.client(client).pipeline("cpu")(given[client])
        best = [
            max(each, key=lambda label: label["score"]) if isinstance(each, list) else each
            for each in expected
        ]
        assert [each["label"] for each in predictions] == [each["label"] for each in best]
        assert [each["score"] for each in predictions] == pytest.approx(
            [each["score"] for each in best], rel=tolerance(torch.float32)
        )


@pytest.mark.equality
def test_a_decoder_completes_as_its_pipeline(finished, predictor):
    run = finished("causal-lm").run
    for client, predictions in predictor("causal-lm")(TEXTS).items():
        pipeline = run.client(client).pipeline("cpu", do_sample=False)
        found = [
            pipeline(text, return_full_text=False)[0]["generated_text"].strip()
            for text in TEXTS[client]
        ]
        assert predictions == found


@pytest.mark.equality
def test_a_decoder_answers_chats_as_its_pipeline(finished, predictor):
    run = finished("causal-lm").run
    chats = [
        [{"role": "user", "content": text}, *more]
        for text, more in [
            ("Hello", []),
            (
                "My order",
                [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "So"}],
            ),
        ]
    ]
    answers = predictor("causal-lm")({client: [*chats, "Hello"] for client in TEXTS})
    assert len({tuple(each) for each in answers.values()}) > 1
    for client, own in answers.items():
        pipeline = run.client(client).pipeline("cpu", do_sample=False)
        assert own == [
            pipeline(each, return_full_text=False)[0]["generated_text"].strip()
            for each in (*chats, "Hello")
        ]


@pytest.mark.equality
def test_chats_of_several_clients_are_answered_in_one_pass(predictor, passes):
    predict = predictor("causal-lm")
    given = {
        client: [
            [
                {"role": "system", "content": "Be brief. " * number},
                {"role": "user", "content": text},
            ][number % 2 :]  # some without a system prompt
            for number, text in enumerate(texts)
        ]
        for client, texts in TEXTS.items()
    }
    assert [len(chats) for chats in given.values()] == [3, 1, 5]
    alone = {
        client: [predict({client: [each]})[client][0] for each in given[client]] for client in given
    }
    assert set(passes) == {1}
    assert predict.sequential_reason is None  # after a trial, whose passes do not count
    passes.clear()
    assert predict(given, batch_size=6) == alone
    assert passes == [3, 3]  # two chats of each of three clients, of which some have one left
    passes.clear()
    assert predict(given, batch_size=4) == alone
    assert passes == [3, 3, 3]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"role": "user", "content": "Hello"}, "an input must be a text or a list of messages"),
        ([{"role": "user"}], r"input 1 \(.*\): a message in 'messages' needs a role and a content"),
        ([{"role": "assistant", "content": "a"}], r"input 1 \(.*\): the last message is the assis"),
        ([], r"input 1 \(from 0, of all inputs\): 'messages' must be a list of at least one"),
    ],
)
def test_chats_that_cannot_be_answered_are_refused(predictor, chat, message):
    client = next(iter(TEXTS))
    with pytest.raises(DataError, match=message):
        predictor("causal-lm")({client: ["Hello", chat]})


def test_inputs_that_cannot_be_read_are_named_as_inputs(predictor, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    given = {"client 0": [Image.new("RGB", (32, 32))], "client 1": [str(tmp_path / "text.png")]}
    message = r"^input 1 \(from 0, of all inputs\): the image in column 'image' cannot be decoded"
    with pytest.raises(DataError, match=message):
        predictor("image-classification")(given)


def test_predictions_of_clients_differ(predictor):
    """The fixture's clients have different adapters, so that mixing them up is detected."""
    predict = predictor("sequence-classification")
    text = ["the page shows an error"]
    scores = [each[0]["score"] for each in predict(dict.fromkeys(TEXTS, text)).values()]
    assert len({round(score, 6) for score in scores}) == 3


def test_models_that_refuse_stacking_predict_one_client_at_a_time(
    finished, passes, monkeypatch, caplog
):
    predict = Predictor(finished("sequence-classification").run, device="cpu")
    monkeypatch.setattr(
        "fedmerge_peft.serving.predictor.stacking_obstacle", lambda _: "it routes tokens"
    )
    with caplog.at_level(logging.INFO, "fedmerge_peft"):
        together = predict(TEXTS)
    assert set(passes) == {1}
    assert "predicting for one client at a time: it routes tokens" in caplog.text
    assert [len(each) for each in together.values()] == [3, 1, 5]


def test_a_model_that_mixes_a_batch_is_detected(finished, monkeypatch):
    predict = Predictor(finished("sequence-classification").run, device="cpu")
    assert stacking_obstacle(predict._backbone) is None

    def mixing(module, args, output):
        return output + 0.3 * output.flip(0)

    layer = next(
        module
        for name, module in predict._backbone.model.named_modules()
        if name.endswith("classifier")
    )
    layer.register_forward_hook(mixing)
    assert "mix the examples" in predict.sequential_reason


def test_dora_predicts_one_at_a_time(smoke, tmp_path):
    run = federate(smoke("lora.use_dora=true", "rounds=1"), tmp_path / "run")
    predict = Predictor(run, device="cpu")
    names = run.client_names[:2]
    found = predict({name: ["the badge reader is offline"] for name in names})
    assert "DoRA" in predict.sequential_reason
    assert found[names[1]][0]["score"] == pytest.approx(
        run.client(names[1]).pipeline("cpu")("the badge reader is offline")[0]["score"]
    )


@pytest.mark.equality
def test_flora_predicts_with_the_backbones_added_updates(smoke, smoke_engine, tmp_path):
    run = federate(smoke("strategy=flora", "rounds=2"), tmp_path / "run", engine=smoke_engine)
    run.save_adapter(run.client_names[0], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ranks = set(config["rank_pattern"].values())
    assert max(ranks) > config["r"]
    assert f"rank {max(ranks)}" in (tmp_path / "adapter" / "README.md").read_text()
    name = run.client_names[0]
    found = run.predict({name: ["the badge reader is offline"]}, device="cpu")
    assert found[name][0]["score"] == pytest.approx(
        run.client(name).pipeline("cpu")("the badge reader is offline")[0]["score"],
        rel=tolerance(torch.float32),
    )


def test_paths_of_images_are_read(predictor, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    predict = predictor("image-classification")
    assert predict({"client 1": [tmp_path / "red.png"]}) == predict(
        {"client 1": [Image.new("RGB", (40, 40), "red")]}
    )


def test_no_inputs_give_no_predictions(finished):
    run = finished("sequence-classification").run
    assert run.predict({}, device="cpu") == {}
    assert run.predict({"client 1": [], "client 0": ["a"]}, device="cpu")["client 1"] == []


@pytest.mark.equality
def test_many_inputs_are_split_into_passes(predictor, passes):
    predict = predictor("sequence-classification")
    given = {client: [f"ticket {number}" for number in range(7)] for client in TEXTS}
    whole = predict(given)
    passes.clear()
    cut = predict(given, batch_size=4)
    assert len(passes) >= 6
    for client in given:
        assert [each["score"] for each in cut[client]] == pytest.approx(
            [each["score"] for each in whole[client]], rel=tolerance(torch.float32)
        )


@pytest.mark.parametrize(
    ("task", "given", "error", "message"),
    [
        (
            "sequence-classification",
            {"nobody": ["a"]},
            RunError,
            "no client 'nobody'; it has client 0",
        ),
        (
            "sequence-classification",
            {"client 0": [3]},
            DataError,
            "an input must be a text, found 3",
        ),
        (
            "sequence-classification",
            {"client 0": [("a", "b")]},
            DataError,
            "an input must be a text, found",
        ),
        ("sequence-classification", {"client 0": [""]}, None, ""),
        (
            "sequence-classification",
            {"client 0": ["half of a \ud83d"]},
            DataError,
            "an input cannot be read: .*surrogates not allowed",
        ),
        ("causal-lm", {"client 0": ["half of a \ud83d"]}, DataError, "surrogate|half of a"),
        (
            "image-classification",
            {"client 0": [0]},
            DataError,
            "an input must be a PIL image, or the path of a file, found 0",
        ),
        (
            "causal-lm",
            {"client 0": [0]},
            DataError,
            "an input must be a text or a list of messages, found 0",
        ),
    ],
)
def test_invalid_inputs_are_refused(task, given, error, message, predictor):
    if error is None:
        assert predictor(task)(given)["client 0"]
        return
    with pytest.raises(error, match=message):
        predictor(task)(given)


@pytest.mark.parametrize(
    "one",
    [
        "one text",
        b"one text",
        {"text": "one"},
        {"one", "two"},
        pd.DataFrame({"text": ["one"]}),
        np.array("one"),
        Image.new("RGB", (8, 8)),
        None,
        3,
    ],
    ids=lambda one: type(one).__name__,
)
def test_one_input_is_no_list_of_inputs(one, predictor):
    with pytest.raises(DataError, match=r"client 0: found .*, expected a list of inputs"):
        predictor("sequence-classification")({"client 0": one})


@pytest.mark.parametrize("inputs", ["client 0", ["a"], None, [("client 0", ["a"])]])
def test_inputs_are_by_client(inputs, predictor):
    with pytest.raises(DataError, match=r"inputs: found .*, expected lists by client"):
        predictor("sequence-classification")(inputs)


def test_inputs_may_be_any_sequence(predictor):
    predict, texts = predictor("sequence-classification"), TEXTS["client 1"]
    expected = predict({"client 0": texts})
    for several in (tuple(texts), iter(texts), (t for t in texts), np.array(texts)):
        assert predict({"client 0": several}) == expected
    assert predict({"client 0": pd.Series(texts)}) == expected


def test_fedem_has_no_single_adapter(smoke, smoke_engine, tmp_path):
    run = federate(smoke("strategy=fedem", "rounds=1"), tmp_path / "run", engine=smoke_engine)
    with pytest.raises(RunError, match="no single adapter to predict with"):
        load_run(run.path).predict({run.client_names[0]: ["a"]})


def test_the_model_is_restored(predictor):
    predict = predictor("sequence-classification")
    predict(TEXTS)
    assert torch.is_grad_enabled()
    assert not [
        module
        for module in predict._backbone.model.modules()
        if "forward" in vars(module) and "AdapterStack" in repr(module.forward)
    ]
