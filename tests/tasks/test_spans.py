"""Entities as spans of characters: words, tags, faults, predictions, and the same training."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, List, Value

from fedmerge_peft import Recipe, federate
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.spans import Span, SpanTags, tag_words
from fedmerge_peft.tasks.tagged_words import joined_bounds
from tasks.made_examples import tagged

NAME = "token-classification"
TEXT = "Dr. Ada Moor (Leeds-based) called."
SPANS = [Span(4, 12, "PER"), Span(14, 19, "LOC")]


def as_spans(table):
    """The same sentences as texts with spans instead of words with tags."""
    texts, spans = [], []
    for row in table:
        bounds = joined_bounds(row["tokens"])
        found = []
        for (start, end), tag in zip(bounds.tolist(), row["ner_tags"], strict=True):
            if tag.startswith("B-"):
                found.append({"start": start, "end": end, "label": tag[2:]})
            elif tag.startswith("I-"):
                found[-1]["end"] = end
        texts.append(" ".join(row["tokens"]))
        spans.append(found)
    return Dataset.from_dict({"text": texts, "spans": spans})


def test_words_are_divided_at_borders_and_tagged():
    bounds, tags = tag_words(TEXT, SPANS)
    words = [TEXT[start:end] for start, end in bounds]
    assert words == ["Dr", ".", "Ada", "Moor", "(", "Leeds", "-", "based", ")", "called", "."]
    entities = {"Ada": "B-PER", "Moor": "I-PER", "Leeds": "B-LOC"}
    assert tags == [entities.get(word, "O") for word in words]
    bounds, tags = tag_words("Leedsbased", [Span(0, 5, "LOC")])
    assert bounds.tolist() == [[0, 5], [5, 10]]
    assert tags == ["B-LOC", "O"]


def test_spans_and_tagged_words_are_the_same_examples(task_of):
    words = tagged(8)
    texts = as_spans(words)
    of_words = task_of("bert", words, name=NAME)
    of_spans = task_of("bert", texts, name=NAME, spans="spans")
    assert set(of_spans.labels) == {*of_words.labels, "I-LOC"}  # no place has two words
    first, second = of_words.encode(words), of_spans.encode(texts)
    for row in range(8):
        for column in ("input_ids", "places", "bounds"):
            assert torch.equal(first.columns[column][row], second.columns[column][row])
        tags = [
            [task.labels[tag] if tag >= 0 else None for tag in examples.columns["labels"][row]]
            for task, examples in ((of_words, first), (of_spans, second))
        ]
        assert tags[0] == tags[1]


def test_records_of_lists_and_ids_of_labels_are_read(task_of):
    kind = List({"start": Value("int64"), "end": Value("int64"), "label": ClassLabel(names=["X"])})
    listed = Dataset.from_dict({"text": ["a b"], "spans": [[{"start": 2, "end": 3, "label": 0}]]})
    records = Dataset.from_dict(
        {"text": ["a b"], "spans": [{"start": [2], "end": [3], "label": ["X"]}]}
    )
    for table in (listed.cast_column("spans", kind), records):
        task = task_of("bert", table, name=NAME, spans="spans")
        assert task.labels == ["O", "B-X", "I-X"]
        own = task.encode(table).columns["labels"][0]
        assert own[own >= 0].tolist() == [0, 1]


def test_a_span_without_a_label_is_no_span_of_the_last_one(task_of):
    """datasets has -1 in place of a missing class."""
    names = ClassLabel(names=["X", "Y"])
    kind = List({"start": Value("int64"), "end": Value("int64"), "label": names})
    rows = [[{"start": 2, "end": 3, "label": 0}], [{"start": 2, "end": 3, "label": -1}]]
    table = Dataset.from_dict({"text": ["a b"] * 2, "spans": rows}).cast_column("spans", kind)
    with pytest.raises(DataError, match=r"row 1 .*expected a list of {start, end, label}"):
        task_of("bert", table, name=NAME, spans="spans").encode(table)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([{"start": 2, "end": 9, "label": "X"}], "from 2 to 9 is not inside the text of 3"),
        ([{"start": 2, "end": 2, "label": "X"}], "from 2 to 2 does not end after its start"),
        ([{"start": 1, "end": 2, "label": "X"}], "from 1 to 2 has no word"),
        ([{"start": 0, "end": 3, "label": "X"}, {"start": 2, "end": 3, "label": "X"}], "overlaps"),
        ([{"start": 0.5, "end": 3, "label": "X"}], "expected a list of {start, end, label}"),
        ([{"start": False, "end": True, "label": "X"}], "expected a list of {start, end, label}"),
        ([{"begin": 0, "end": 3, "label": "X"}], "expected a list of {start, end, label}"),
    ],
)
def test_unsuitable_spans_are_refused_with_their_row(task_of, spans, message):
    good = [{"start": 0, "end": 1, "label": "X"}]
    alike = isinstance(spans[0].get("start"), int) and spans[0]["start"] is not False
    rows = [good, spans] if alike else [spans, spans]
    table = Dataset.from_dict({"text": ["a b"] * 2, "spans": rows})
    with pytest.raises(DataError, match=rf"row \d .*'spans': .*{message}"):
        task_of("bert", table, name=NAME, spans="spans").encode(table)


def test_a_site_keeps_the_labels_of_all(task_of):
    table = as_spans(tagged(4))
    recipe = task_of("bert", table, name=NAME, spans="spans").recipe
    labels = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    agreed = SpanTags(recipe).relabel(table, labels)
    assert SpanTags(recipe).infer_tags(agreed) == labels
    with pytest.raises(DataError, match=r"row 0 .*'(LOC|PER)' is not a known label.*ORG"):
        SpanTags(recipe).relabel(table, ["O", "B-ORG", "I-ORG"])


def test_tags_are_joined_to_spans_with_their_mean_probability(task_of):
    source = SpanTags(task_of("bert", as_spans(tagged(4)), name=NAME, spans="spans").recipe)
    bounds = np.array([[0, 2], [3, 5], [6, 7], [8, 9], [10, 12]])
    tags = ["B-PER", "I-PER", "B-PER", None, "I-LOC"]
    scores = [0.8, 0.6, 0.9, None, 0.5]
    assert source.answer(bounds, tags, scores) == {
        "spans": [
            {"start": 0, "end": 5, "label": "PER", "score": pytest.approx(0.7)},
            {"start": 6, "end": 7, "label": "PER", "score": 0.9},
            {"start": 10, "end": 12, "label": "LOC", "score": 0.5},
        ]
    }


def test_a_run_predicts_spans_of_texts(tiny_models, tmp_path):
    table = as_spans(tagged(12)).add_column("client", [f"client {n % 2}" for n in range(12)])
    recipe = Recipe.model_validate(
        {
            "name": "entities",
            "rounds": 1,
            "task": {"name": NAME, "spans": "spans"},
            "backbone": {"model": str(tiny_models / "bert")},
            "lora": {"r": 2, "target_modules": ["query", "value"]},
            "data": {
                "path": "memory",
                "test_fraction": 0.25,
                "partition": {"scheme": "natural", "by": "client"},
            },
            "training": {"learning_rate": 0.05, "epochs": 2, "batch_size": 2, "device": "cpu"},
        }
    )
    run = federate(recipe, tmp_path / "run", data=table)
    text = table[0]["text"]
    (found,) = run.predict({"client 0": [text]}, device="cpu")["client 0"]
    tags = run.client("client 0").pipeline(device="cpu")(text, ignore_labels=[])
    assert {each["label"] for each in found["spans"]} == {
        each["entity"][2:] for each in tags if each["entity"] != "O" and not_inside(each, text)
    }
    with pytest.raises(DataError, match="must be a text"):
        run.predict({"client 0": [["the", "words"]]}, device="cpu")


def not_inside(found, text):
    """True for the first token of a word."""
    return found["start"] == 0 or not text[found["start"] - 1].isalnum()
