from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, Features, Value

from fedmerge_peft.data.columns import encode_classes
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.cuts import warn_of_cuts
from fedmerge_peft.tasks.labels import infer_labels

NAME = "sequence-classification"
TEXTS = ["Where is my parcel?", "I was charged twice, please refund me.", "It crashes."]


def table_of(
    labels: list[object], texts: list[str | None] | None = None, **columns: list[object]
) -> Dataset:
    return Dataset.from_dict(
        {
            "text": texts or [f"text number {row}" for row in range(len(labels))],
            "label": labels,
            **columns,
        }
    )


# --- labels ---------------------------------------------------------------------------------------
def test_named_labels_are_sorted(task_of):
    table = table_of(["late", "bill", "bug", "bill"])
    task = task_of("bert", table, name=NAME)
    assert task.labels == ["bill", "bug", "late"]
    assert task.collate(task.encode(table), np.arange(4))["labels"].tolist() == [2, 0, 1, 0]


def test_large_string_labels_are_names_too(task_of):
    table = Dataset(
        pa.table(
            {
                "text": pa.array(["a", "b"], pa.large_string()),
                "label": pa.array(["y", "x"], pa.large_string()),
            }
        )
    )
    assert task_of("bert", table, name=NAME).labels == ["x", "y"]


def test_a_class_label_keeps_all_of_its_names(task_of):
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["neg", "pos", "mixed"])}
    )
    table = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    task = task_of("bert", table, name=NAME)
    assert task.labels == ["neg", "pos", "mixed"]
    assert task.collate(task.encode(table), np.arange(2))["labels"].tolist() == [1, 0]


def test_integers_count_from_zero_to_the_largest_or_to_num_labels(task_of):
    assert task_of("bert", table_of([0, 3]), name=NAME).labels == ["0", "1", "2", "3"]
    assert task_of("bert", table_of([0, 1]), name=NAME, num_labels=3).labels == [
        "0",
        "1",
        "LABEL_2",
    ]
    assert task_of("bert", table_of([True, False]), name=NAME).labels == ["False", "True"]


def test_labels_that_start_at_1_or_are_whole_numbers_keep_their_names(task_of, caplog):
    task = task_of("bert", table_of([1.0, 3.0]), name=NAME)
    assert task.labels == ["0", "1", "2", "3"]
    assert task.collate(task.encode(table_of([3.0, 1.0])), np.arange(2))["labels"].tolist() == [
        3,
        1,
    ]
    assert "'label' has integer labels, so there are 4 labels from 0 on, but no row has 0, 2" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            [0, -1],
            {},
            r"row 1 \(from 0, .*\): label -1 in column 'label' is negative",
        ),
        (
            [0, 7, 9],
            {"num_labels": 4},
            (
                r"row 1 \(from 0, .*\): label 7 in column 'label' is too large for 4 "
                r"labels, 0 to 3"
            ),
        ),
        (
            [0, None],
            {},
            r"row 1 \(from 0, of the rows that the run uses\): column 'label' is empty \(null\)",
        ),
        (
            ["a", None],
            {},
            r"row 1 \(from 0, of the rows that the run uses\): column 'label' is empty \(null\)",
        ),
        (
            [0.5, 1.0],
            {},
            (
                r"column 'label' has the type double, such as 0.5 in row 0; "
                r"a label is an integer from 0, or a name"
            ),
        ),
        (["a", "b", "c"], {"num_labels": 2}, r"3 labels, but task.num_labels is 2 \(a, b, c\)"),
        (
            [0, 123456],
            {},
            r"row 1 \(from 0, .*\): label 123456 .* is too large for a label id",
        ),
        (
            np.array([0, 2**63], np.uint64),
            {"num_labels": 2},
            r"row 1 \(from 0, .*\): label 9223372036854775808 .* is too large",
        ),
        ([0], {"label": "intent"}, r"task.label: there is no column 'intent'.*text, label"),
        ([0, 1], {"num_labels": 1001}, r"1,001 labels for 2 rows; at most 1,000 are accepted"),
        ([], {}, r"no rows"),
    ],
)
def test_unsuitable_labels_are_refused(task_of, labels, options, message):
    with pytest.raises(DataError, match=message):
        task_of("bert", table_of(labels), name=NAME, **options)


def test_an_unknown_label_is_refused_with_its_row(task_of):
    task = task_of("bert", table_of(["a", "b"]), name=NAME)
    with pytest.raises(
        DataError,
        match=(
            r"row 1 \(from 0, .*\): column 'label': 'c' is not a known label; "
            r"the labels are a, b"
        ),
    ):
        task.encode(table_of(["a", "c"]))


# --- texts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_batch_equals_the_tokenizers_padding(task_of, tiny_models, kind):
    table = table_of([0, 1, 0], TEXTS)
    task = task_of(kind, table, name=NAME)
    batch = task.collate(task.encode(table), np.array([2, 0, 1]))
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_models / kind, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    wanted = tokenizer([TEXTS[2], TEXTS[0], TEXTS[1]], padding=True, return_tensors="pt")
    assert batch.pop("labels").tolist() == [0, 0, 1]
    assert set(batch) == set(wanted)
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_pairs_have_token_types(task_of, tiny_models):
    table = table_of([0, 1], ["a premise", "b"], other=["a longer hypothesis", "c"])
    task = task_of("bert", table, name=NAME, text_pair="other")
    batch = task.collate(task.encode(table), np.arange(2))
    wanted = hf.AutoTokenizer.from_pretrained(tiny_models / "bert")(
        table["text"][:], table["other"][:], padding=True, return_tensors="pt"
    )
    assert torch.equal(batch["token_type_ids"], wanted["token_type_ids"])
    assert batch["token_type_ids"].sum() > 0


def test_long_texts_are_truncated_and_counted(task_of, caplog):
    table = table_of([0, 1, 0, 1], ["x " * 300, "a", "y " * 200, "z"])
    task = task_of("bert", table, name=NAME)
    with caplog.at_level(logging.WARNING):
        examples = task.encode(table)
        warn_of_cuts(examples, {"": np.arange(4)}, "inputs")
        warn_of_cuts(examples, {"": np.array([1, 3])})
        warn_of_cuts(examples, {"training": np.array([0, 1, 0]), "test": np.array([3])})
    assert [len(ids) for ids in examples.columns["input_ids"]] == [128, 3, 128, 3]
    assert examples.columns["input_ids"][0][-1] == task.processor.sep_token_id
    predicate = "are longer than 128 tokens and were truncated"
    assert caplog.messages == [
        f"2 of 4 inputs {predicate}",
        f"1 of 3 examples {predicate} (1 of 2 training, 0 of 1 test)",
    ]


def test_empty_texts_are_counted(task_of, caplog):
    table = table_of([0, 1, 0], ["a", " ", ""])
    warn_of_cuts(task_of("bert", table, name=NAME).encode(table), {"": np.arange(3)})
    assert caplog.messages == ["2 of 3 examples have an empty text"]


@pytest.mark.parametrize(("pair", "length"), [(None, 1), (None, 2), ("pair", 3)])
def test_a_length_without_room_for_texts_is_refused(pair, length, task_of):
    table = table_of([0, 1]).add_column("pair", ["a", "b"])
    message = rf"task.max_length: a length of {length} leaves no room .*; raise task.max_length$"
    with pytest.raises(DataError, match=message):
        task_of("bert", table, name=NAME, text_pair=pair, max_length=length)


def test_a_model_without_room_for_texts_is_refused(task_of, tiny_models, tmp_path):
    shutil.copytree(tiny_models / "bert", tmp_path / "bert")
    settings = tmp_path / "bert" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 2}))
    with pytest.raises(DataError, match=r"a length of 2 .*; use a model with a higher limit$"):
        task_of("bert", table_of([0, 1]), name=NAME, folder=tmp_path / "bert")


def test_max_length_beyond_the_model_is_refused_with_its_limit(task_of):
    with pytest.raises(DataError, match=r"task.max_length: 129 .* limit of 128"):
        task_of("bert", table_of([0, 1]), name=NAME, max_length=129)
    assert task_of("bert", table_of([0, 1]), name=NAME, max_length=16).max_length == 16


@pytest.mark.parametrize(
    ("kind", "columns", "options", "message"),
    [
        (
            "bert",
            {"text": ["a", None]},
            {},
            r"row 1 \(from 0, of the rows that the run uses\): column 'text' is empty \(null\)",
        ),
        (
            "bert",
            {"text": [1.5, 2]},
            {},
            r"task.text: column 'text' has the type double, such as 1.5 in row 0, and is not text",
        ),
        ("bert", {"text": [["a"], ["b"]]}, {}, r"task.text: the column text has the type list"),
        ("bert", {"body": ["a", "b"]}, {}, r"task.text: there is no column 'text'.*body"),
        (
            "bert",
            {"text": ["a", "b"], "pair": ["a", None]},
            {"text_pair": "pair"},
            r"row 1 \(from 0, of the rows that the run uses\): column 'pair' is empty",
        ),
        (
            "gpt2",
            {"text": ["a", ""]},
            {},
            r"row 1 \(from 0, .*\): the text in column 'text' has no tokens: ''",
        ),
    ],
)
def test_unsuitable_texts_are_refused(task_of, kind, columns, options, message):
    table = Dataset.from_dict({**columns, "label": [0, 1]})
    with pytest.raises(DataError, match=message):
        task_of(kind, table, name=NAME, **options).encode(table)


def test_an_empty_text_is_accepted_if_it_has_tokens(task_of):
    table = table_of([0, 1], ["", "a"])
    assert len(task_of("bert", table, name=NAME).encode(table).columns["input_ids"][0]) == 2


def test_rows_of_a_selection_are_encoded_alone(task_of):
    table = table_of([0, 1, 0], TEXTS).select([2, 1])
    task = task_of("bert", table, name=NAME)
    batch = task.collate(task.encode(table), np.arange(2))
    assert batch["labels"].tolist() == [0, 1]
    assert task.processor.decode(batch["input_ids"][0], skip_special_tokens=True) == TEXTS[2]


def test_a_tokenizer_may_come_from_another_folder(task_of, tiny_models):
    task = task_of(
        "bert",
        table_of([0, 1]),
        name=NAME,
        backbone={"tokenizer": str(tiny_models / "llama"), "revision": "main"},
    )
    assert task.processor.bos_token == "<s>"


def test_a_missing_tokenizer_is_refused(task_of, tmp_path):
    with pytest.raises(
        BackboneError, match=r"Tokenizer of .* cannot be loaded: .*; backbone.tokenizer may name"
    ):
        task_of("bert", table_of([0, 1]), name=NAME, backbone={"tokenizer": str(tmp_path)})


def test_a_faulty_configuration_is_distinguished_from_a_faulty_tokenizer(
    task_of, tiny_models, tmp_path
):
    config = json.loads((tiny_models / "bert" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "32"}))
    message = r"backbone.model: Config of .* 'hidden_size': .*'32'.*; correct config.json"
    with pytest.raises(BackboneError, match=message):
        task_of("bert", table_of([0, 1]), name=NAME, folder=tmp_path)


@pytest.mark.parametrize("length", ["512", 0, -1])
def test_a_limit_of_the_tokenizer_that_is_no_length_is_refused(
    task_of, tiny_models, tmp_path, length
):
    folder = shutil.copytree(tiny_models / "bert", tmp_path / "bert")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": length}))
    with pytest.raises(BackboneError, match=f"model_max_length in .* is {length!r}, expected"):
        task_of("bert", table_of([0, 1]), name=NAME, folder=folder)


# --- losses ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_the_mean_loss_equals_transformers(task_of, tiny_models, kind):
    table = table_of([0, 2, 1], TEXTS)
    task = task_of(kind, table, name=NAME)
    batch = task.collate(task.encode(table), np.arange(3))
    model = getattr(hf, task.auto_model).from_pretrained(tiny_models / kind, num_labels=3).eval()
    model.config.pad_token_id = task.pad_token_id
    with torch.no_grad():
        output = model(**batch)
    losses, counts = task.losses(output.logits, batch["labels"])
    assert losses.shape == counts.shape == (3,)
    assert torch.equal(counts, torch.ones(3))
    torch.testing.assert_close(losses.sum() / counts.sum(), output.loss)
    assert float(counts.sum()) == task.count_terms(batch["labels"])
    predicted, expected = task.predict(output.logits, batch["labels"])["classes"]
    assert predicted == output.logits.argmax(-1).tolist()
    assert expected == [0, 2, 1]


def test_losses_of_half_precision_logits_are_float32(task_of):
    task = task_of("bert", table_of([0, 1]), name=NAME)
    losses, counts = task.losses(torch.randn(2, 2).bfloat16(), torch.tensor([0, 1]))
    assert losses.dtype == counts.dtype == torch.float32


def test_padding_with_eos_changes_no_logits_of_a_decoder(task_of, tiny_models):
    table = table_of([0, 1, 0], TEXTS)
    task = task_of("gpt2", table, name=NAME)
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        tiny_models / "gpt2", num_labels=2, pad_token_id=task.pad_token_id
    ).eval()
    examples = task.encode(table)
    with torch.no_grad():
        together = model(**task.collate(examples, np.arange(3))).logits
        alone = torch.cat(
            [model(**task.collate(examples, np.array([row]))).logits for row in range(3)]
        )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([f"label {number}" for number in range(100_001)], "100,001 different values"),
        (["short", "long" * 251], r"a value of 1,004 characters \('longlong"),
    ],
)
def test_names_of_labels_have_limits(labels, message):
    table = Dataset.from_dict({"text": [""] * len(labels), "label": labels})
    for check in (
        lambda: infer_labels(table, "label", None),
        lambda: encode_classes({"train": table}, "label", "data.partition.by"),
    ):
        with pytest.raises(DataError, match=message):
            check()
