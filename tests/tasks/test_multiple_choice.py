"""Multiple choice: batches, choices of different number, labels, metrics, edge cases."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, List
from sklearn.metrics import accuracy_score

from equality import assert_near
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.report.page import write_report
from fedmerge_peft.training.estimate import estimate
from task_bench import TaskBench, run_of

NAME = "multiple-choice"
LORA = {"target_modules": ["query", "value"]}
CONTEXTS = ["The badge reader", "My parcel is late, and", "It", "Who sleeps at the gate?"]
CHOICES = [["is offline.", "sings"], ["I wait.", "you fly.", "no"], ["b", "c"], ["a", "dog", "a c"]]


def rows_of(labels=(0, 2, 1, 1), choices=CHOICES, **columns):
    contexts = CONTEXTS[: len(choices)]
    own = {"context": contexts, "choices": choices, "label": labels[: len(choices)]}
    return Dataset.from_dict({**own, **columns})


def bench_of(tiny_models, table, **task):
    return TaskBench(tiny_models / "bert", table, {"name": NAME, **task}, LORA)


def labels_of(task_of, table, **task):
    labels = task_of("bert", table, name=NAME, **task).encode(table).columns["labels"]
    return torch.stack(labels).tolist()


def test_batches_are_those_of_the_example_script(task_of):
    """The encoding of run_swag.py, with transformers' collator."""
    choices = [each[:2] for each in CHOICES]
    table = rows_of((0, 1, 1, 0), choices, sent2=["Now", "then", "", "The"])
    task = task_of("bert", table, name=NAME, start="sent2", max_length=12)
    rows, long = [], []
    for number, row in enumerate(table):
        endings = [f"{row['sent2']} {choice}" for choice in row["choices"]]
        tokens = task.processor([row["context"]] * 2, endings, truncation=True, max_length=12)
        rows.append({**tokens, "labels": row["label"]})
        whole = task.processor([row["context"]] * 2, endings)["input_ids"]
        long += [number] * (max(map(len, whole)) > 12)
    wanted = hf.DataCollatorForMultipleChoice(task.processor)(rows)
    examples = task.encode(table)
    found = task.collate(examples, np.arange(4))
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in wanted.items()
    }
    cut = "have a context and a choice that together exceed 12 tokens and were truncated"
    assert examples.cuts[cut] == long
    assert 0 < len(long) < 4


def test_the_outputs_of_an_example_depend_on_no_other(tiny_models):
    bench = bench_of(tiny_models, rows_of())
    bench.backbone.load_row(bench.row())
    logits, labels = bench.logits()
    losses, counts = bench.task.losses(logits, labels)
    assert counts.tolist() == [1] * 4
    batch = bench.task.collate(bench.runtime.examples, bench.rows)
    assert batch["input_ids"].shape[:2] == (4, 3)
    own = bench.task.own_outputs(logits, batch)
    assert [len(each) for each in own] == [2, 3, 2, 3]
    for row in range(4):
        alone, label = bench.logits(np.array([row]))
        assert_near(own[row], alone[0])
        assert_near(losses[row], -alone[0].log_softmax(dim=0)[label[0]])


@pytest.mark.equality
def test_clients_in_one_pass_have_the_gradients_of_each_alone(tiny_models, float64):
    bench = bench_of(tiny_models, rows_of())
    adapters = torch.stack([bench.row(1), bench.row(2), bench.row(3)])
    rows = [np.array([0, 3]), np.array([1]), np.array([2, 0])]
    for together, alone in zip(*bench.gradients(adapters, rows), strict=True):
        assert alone.norm() > 0
        assert (together - alone).norm() <= 1e-10 * alone.norm()


def test_the_accuracy_and_the_answers_follow_from_the_logits(tiny_models):
    bench = bench_of(tiny_models, rows_of())
    row = bench.row()
    bench.backbone.load_row(row)
    logits, labels = bench.logits()
    places = [own[: len(texts)].argmax() for own, texts in zip(logits, CHOICES, strict=True)]
    assert bench.scores(row)["accuracy"] == accuracy_score(labels, places)
    answers = bench.task.answers(logits, bench.runtime.examples, bench.rows)
    assert [answer["choice"] for answer in answers] == places
    for answer, texts in zip(answers, CHOICES, strict=True):
        assert len(answer["scores"]) == len(texts)
        assert sum(answer["scores"]) == pytest.approx(1, abs=1e-6)
        assert answer["score"] == answer["scores"][answer["choice"]]


def test_an_adapter_predicts_the_same_in_plain_peft(tiny_models, tmp_path):
    bench = bench_of(tiny_models, rows_of())
    row = bench.row()
    assert any("classifier" in name for name in bench.backbone.layout.state_dict(row))
    bench.backbone.load_row(row)
    logits, _ = bench.logits()
    batch = bench.task.collate(bench.runtime.examples, bench.rows)
    del batch["labels"]
    with torch.no_grad():
        plain = bench.plain_peft(row, tmp_path).float().eval()(**batch).logits
    real = logits > torch.finfo(logits.dtype).min
    assert_near(logits[real], plain[real])


@pytest.mark.parametrize(
    "labels",
    [[0, 2, 1, 1], [0.0, 2.0, 1.0, 1.0], ["0", "2", "1", "1"], ["A", "no", "c", " B"]],
)
def test_labels_are_numbers_letters_or_texts(task_of, labels):
    assert labels_of(task_of, rows_of(labels)) == [0, 2, 1, 1]


def test_labels_that_never_are_0_are_warned_of(task_of, caplog):
    def table(labels):
        rows = {"context": ["a"] * 20, "choices": [["b", "c", "d"]] * 20}
        return Dataset.from_dict({**rows, "label": labels * 10})

    labels_of(task_of, table([0, 2]))
    assert not caplog.messages
    labels_of(task_of, table([1, 2]))
    assert "no row has 0 in column 'label', so the first choice is never right" in caplog.text


def test_labels_of_a_class_label_are_its_names(task_of):
    kinds = {"letters": ["B", "A"], "numbers": ["1", "2"], "texts": ["b", "a"]}
    expected = {"letters": [1, 0], "numbers": [0, 1], "texts": [1, 0]}
    for kind, names in kinds.items():
        table = rows_of([0, 1], [["a", "b"]] * 2).cast_column("label", ClassLabel(names=names))
        assert labels_of(task_of, table) == expected[kind]


def test_choices_may_have_names_as_in_arc(task_of):
    """ARC names the choices of some questions A, B, C, and those of others 1, 2, 3."""
    names = [["A", "B"], ["1", "2", "3"], ["1", "2"], ["B", "A"]]
    named = [{"text": a, "label": b} for a, b in zip(CHOICES[:4], names, strict=True)]
    named[3]["text"] = named[3]["text"][:2]
    assert labels_of(task_of, rows_of(["A", "3", "1", "A"], named)) == [0, 2, 0, 1]
    with pytest.raises(DataError, match=r"row 1 .*'0' .* is none of 3 choices; .*one of 1, 2, 3"):
        labels_of(task_of, rows_of(["A", "0", "1", "A"], named))
    named[0]["label"] = ["A"]
    with pytest.raises(DataError, match=r"row 0 .*'choices', .*text has 2 .*label has 1"):
        labels_of(task_of, rows_of(["A", "3", "1", "A"], named))


def test_a_name_may_be_the_text_of_another_choice(task_of):
    named = [{"text": ["3", "1", "2"], "label": ["1", "2", "3"]}] * 4
    assert labels_of(task_of, rows_of(["1", "3", "2", "1"], named)) == [0, 2, 1, 0]
    named = [{"text": ["x", "y", "z"], "label": ["1", "1", "3"]}] * 4
    with pytest.raises(
        DataError, match=r"row 1 .*numbers 0, 1.*; give each choice of the row a name of its own$"
    ):
        labels_of(task_of, rows_of(["3", "1", "3", "3"], named))


def test_choices_of_a_class_label_are_its_names(task_of):
    ids = rows_of([0, 1], [[0, 1], [1, 0]])
    table = ids.cast_column("choices", List(ClassLabel(names=["yes", "no"])))
    task = task_of("bert", table, name=NAME)
    texts = task.processor.batch_decode(task.encode(table).columns["input_ids"])
    assert ["yes" in text and "no" in text for text in texts] == [True, True]


def test_texts_before_the_choices_may_be_missing(task_of):
    """An empty field of a CSV file is a missing value, and HellaSwag has many of them."""
    tables = [rows_of(sent2=["Now", empty, "He", "It"]) for empty in ("", None)]
    found = [task_of("bert", each, name=NAME, start="sent2").encode(each) for each in tables]
    ids = [each.columns["input_ids"] for each in found]
    assert all(torch.equal(a, b) for a, b in zip(*ids, strict=True))


def test_choices_that_are_equal_after_their_truncation_are_counted(task_of):
    choices = [["a word " * 9 + end for end in "xy"], ["b", "c"], ["d", "d"], ["e", "f"]]
    table = rows_of((0, 1, 0, 0), choices)
    cuts = task_of("bert", table, name=NAME, max_length=16).encode(table).cuts
    assert cuts["have choices with the same tokens"] == [0, 2]


def test_longformer_gets_no_choice_of_a_single_token(task_of):
    """It counts the separators of each sequence, also of those that fill up a batch."""
    seen = []

    def model(input_ids, attention_mask, **others):
        seen.append(attention_mask.sum(dim=-1).min().item())
        return SimpleNamespace(logits=torch.zeros(input_ids.shape[:2]))

    table = rows_of()
    task = task_of("bert", table, name=NAME)
    batch = task.collate(task.encode(table), np.arange(4))
    del batch["labels"]
    logits = task.forward(model, batch)
    assert seen[0] > 1
    assert (logits == 0).sum(dim=1).tolist() == [2, 3, 2, 3]


def test_choices_may_be_in_columns_of_which_the_last_may_be_empty(task_of):
    filled = [[*own, None][:3] for own in CHOICES]
    columns = {f"ending{n}": [own[n] for own in filled] for n in range(3)}
    table = rows_of(**columns).remove_columns("choices")
    task = task_of("bert", table, name=NAME, choices=[*columns])
    found = task.encode(table).columns
    assert [len(each) for each in found["sequences"]] == [2, 3, 2, 3]
    reference = rows_of()
    wanted = task_of("bert", reference, name=NAME).encode(reference).columns
    for name, rows in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(found[name], rows, strict=True))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 1, 1], r"row 1 .*: 3 in column 'label' is none of 3 choices; write .* 0 to 2"),
        ([0, -1, 1, 1], r"row 1 .*: -1 in column 'label' is none"),
        ([0, None, 1, 1], r"row 1 .*'label' is empty"),
        (["A", "1", "B", "B"], r"row 1 .*: '1' in column 'label' is none of 3 choices"),
        (["A", "D", "B", "B"], r"row 1 .*: 'D' in column 'label' is none of 3 choices"),
        (["0", "", "1", "1"], r"row 1 .*: '' in column 'label' is none .*rows without a label"),
        (["0", "-1", "1", "1"], r"row 1 .*: '-1' in .* or name another split in data.test_split"),
        (["0", "9" * 5000, "1", "1"], r"row 1 .*: '9{20,80}\S* in column 'label' is none"),
        (["0", "1", "1", "x"], r"row 3 .*: 'x' in column 'label' is none of 3 choices"),
        (["1", "3", "2", "2"], r"row 1 .*: '3' in .*; if the labels start at 1, subtract 1"),
        ([0.5, 1, 1, 1], r"task.label: column 'label' has the type double, expected text or"),
    ],
)
def test_labels_that_are_no_choice_are_refused_with_their_row(task_of, labels, message):
    with pytest.raises(DataError, match=message):
        labels_of(task_of, rows_of(labels))


@pytest.mark.parametrize(
    ("choices", "label"), [(["B", "A"], "A"), (["1", "2"], "1"), (["x"] * 2, "x")]
)
def test_labels_that_may_be_several_choices_are_refused(task_of, choices, label):
    with pytest.raises(
        DataError, match=rf"row 0 .*{label}'.* matches more than one of 2 choices \(numbers 0, 1"
    ):
        labels_of(task_of, rows_of([label], [choices]))


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        (
            {"choices": [["a"], ["b", "c"]]},
            {},
            r"row 0 .*1 choice in column 'choices', expected two",
        ),
        ({"choices": [["a", None]] * 2}, {}, r"row 0 .*'choices' has a list with an empty value"),
        ({"choices": ["a", "b"]}, {}, r"task.choices: column 'choices' has the type string"),
        ({}, {"choices": "options"}, r"task.choices: there is no column 'options'"),
        ({"a": ["x", None], "b": ["y", "z"]}, {"choices": ["a", "b"]}, r"row 1 .*'a' is empty"),
        (
            {"a": ["x", "y"], "b": ["y", None]},
            {"choices": ["a", "b"]},
            r"row 1 .*1 choice in the columns a, b",
        ),
        ({"context": ["x", None]}, {}, r"row 1 .*'context' is empty"),
        ({}, {"start": "sent2"}, r"task.start: there is no column 'sent2'"),
    ],
)
def test_unsuitable_rows_are_refused(task_of, columns, task, message):
    table = Dataset.from_dict({**rows_of(choices=CHOICES[:2]).to_dict(), **columns})
    with pytest.raises(DataError, match=message):
        labels_of(task_of, table, **task)


@pytest.mark.parametrize("strategy", ["fedmerge", "fedem"])
def test_a_run_predicts_and_reports(tmp_path, strategy):
    rows = [
        {"client": client, "q": f"Number {row}", "a": client, "b": "other", "c": None, "label": 0}
        for client in ("north", "south")
        for row in range(6)
    ]
    task = {"name": NAME, "context": "q", "choices": ["a", "b", "c"]}
    sections = {"backbone": {"model": "tiny:bert"}, "lora": {"r": 2, **LORA}}
    run = run_of(tmp_path / "run", rows, task, **sections, strategy=strategy)
    write_report([run.path], tmp_path / "report.html")
    assert "accuracy" in (tmp_path / "report.html").read_text()
    if strategy == "fedem":
        return
    inputs = [{"context": "Number 2", "choices": ["north", "other", "south", "no"]}]
    (found,) = run.predict({"north": inputs}, device="cpu")["north"]
    assert len(found["scores"]) == 4
    for unfit in (
        "Who?",
        {"context": "Who?"},
        {"context": "a", "choices": ["b"]},
        {**inputs[0], "x": "y"},
    ):
        with pytest.raises(DataError, match=r"an input must be a dictionary such as {'context'"):
            run.predict({"north": [unfit]}, device="cpu")


def test_each_choice_is_shown_with_its_context(task_of):
    (shown, _, _, _) = task_of("bert", rows_of(), name=NAME).show(rows_of())
    assert [each.role for each in shown.segments] == ["choice 0", "choice 1"]
    assert "".join(shown.segments[1].tokens).count("reader") == 1
    assert shown.label == "0"


def test_a_long_input_is_refused_in_short(task_of):
    with pytest.raises(DataError, match="an input must be") as reported:
        type(task_of("bert", rows_of(), name=NAME)).input_table(
            task_of("bert", rows_of(), name=NAME).recipe, [], ["a" * 10_000]
        )
    assert len(str(reported.value)) < 400


def test_decoders_are_refused_in_one_line(tiny_models):
    reported = r"cannot be loaded as AutoModelForMultipleChoice, .*; choose a model of another arch"
    with pytest.raises(BackboneError, match=reported):
        TaskBench(tiny_models / "gpt2", rows_of(), {"name": NAME}, {"target_modules": ["c_attn"]})


def test_memory_is_estimated_for_four_choices(tiny_models):
    bench = bench_of(tiny_models, rows_of())
    config = hf.AutoConfig.from_pretrained(tiny_models / "bert")
    found = estimate(bench.recipe, config, length=16)
    assert found.adapter == bench.backbone.layout.size
    assert found.training > 0
